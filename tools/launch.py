# SPDX-License-Identifier: Apache-2.0
"""Starts a server in a process, on free ports: for tests, benchmarks and demonstrations.

    python -m tools.launch server.py [option ...] -- client.py [option ...]

This runs the server until the client exits, adds ``--url`` to the client's options, and exits with the client's status.
"""

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence

STOP_TIMEOUT_S = 60
DIE_WITH_PARENT = ["setpriv", "--pdeathsig", "TERM"]  # a prefix: stop the command if this process is killed
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # ignores http_proxy in the environment

_reservations: list[socket.socket] = []


def free_ports(count: int = 3) -> list[int]:
    """Return free ports on loopback, and reserve them from other callers until this process ends."""
    ports: list[int] = []
    while len(ports) < count:
        # Below the system's range for outgoing connections, so that they stay free.
        port = random.randrange(20_000, 32_000)
        # A server listens only once it has started. Until then, the name of an abstract socket reserves the port.
        reservation = socket.socket(socket.AF_UNIX)
        try:
            reservation.bind(f"\0free-port-{port}")
            socket.create_server(("127.0.0.1", port)).close()
        except OSError:
            reservation.close()
        else:
            _reservations.append(reservation)
            ports.append(port)
    return ports


class LaunchedServer:
    """A server process on free ports of loopback. As a context manager, it stops at the end of the block."""

    def __init__(
        self,
        command: Sequence[object],
        environment: Mapping[str, str] | None = None,
        prefix: Sequence[str] = (),
        **options: object,
    ):
        """Start ``command``, a Python script and its options.

        ``environment`` extends that of this process, ``prefix`` comes before the whole command, and ``options`` are
        those of Popen.
        """
        self.http_port, self.grpc_port, self.metrics_port = free_ports()
        self.http_url, self.grpc_url = f"http://127.0.0.1:{self.http_port}", f"grpc://127.0.0.1:{self.grpc_port}"
        ports = {"http": self.http_port, "grpc": self.grpc_port, "metrics": self.metrics_port}
        flags = [word for name, port in ports.items() for word in (f"--{name}-port", port)]
        self.process = subprocess.Popen(
            [*prefix, sys.executable, *map(str, [*command, *flags])],
            env=os.environ | dict(environment or {}),
            **options,
        )

    def __enter__(self) -> "LaunchedServer":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def wait_until_ready(self, model_name: str, timeout_s: float = 120) -> None:
        """Return when the model is ready. Raises RuntimeError if the server ends first, or TimeoutError."""
        deadline = time.monotonic() + timeout_s
        while self.process.poll() is None:
            with contextlib.suppress(OSError), DIRECT.open(f"{self.http_url}/v2/models/{model_name}/ready", timeout=5):
                return
            if time.monotonic() > deadline:
                raise TimeoutError(f"the server was not ready within {timeout_s:g} s")
            time.sleep(0.05)
        raise RuntimeError(f"the server ended with status {self.process.returncode}; its log says why")

    def stop(self, signal_number: int = signal.SIGTERM) -> int:
        """Send a signal if the server is still running, wait for its end and return the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal_number)
        return self.process.wait(timeout=STOP_TIMEOUT_S)

    def wait_for(self, process: subprocess.Popen) -> int:
        """Wait for the end of a process, and return its exit status, or that of the server if it ends first.

        After signal N, this is 128 + N, as in a shell.
        """
        while process.poll() is None and self.process.poll() is None:
            time.sleep(0.1)
        status = (self.process.returncode or 1) if process.returncode is None else process.returncode
        return status if status >= 0 else 128 - status


@contextlib.contextmanager
def running(command: Sequence[object], **options: object) -> Iterator[subprocess.Popen]:
    """Run a command, and terminate it at the end of the block. ``options`` are those of Popen."""
    process = subprocess.Popen(command, **options)
    try:
        yield process
    finally:
        process.terminate()
        process.wait()


def exit_on_signals() -> None:
    """Make the first SIGINT, SIGTERM or SIGHUP raise SystemExit, so that ``with`` blocks clean up.

    Further ones are ignored, so that they do not interrupt the clean-up: ``timeout`` sends two. After signal N, the
    exit status is 128 + N, as in a shell.
    """
    signals = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]

    def leave(received: int, _: object) -> None:
        for each in signals:
            signal.signal(each, signal.SIG_IGN)
        sys.exit(128 + received)

    for each in signals:
        if signal.getsignal(each) != signal.SIG_IGN:  # as with nohup
            signal.signal(each, leave)


def main(arguments: Sequence[str]) -> int:
    """Run the server and the client that the arguments describe; return the exit status."""
    if "--" not in arguments:
        print("usage: python -m tools.launch SERVER.py [OPTION ...] -- CLIENT.py [OPTION ...]", file=sys.stderr)
        return 2
    exit_on_signals()
    separator = arguments.index("--")
    with (
        LaunchedServer(arguments[:separator]) as server,
        running([sys.executable, *arguments[separator + 1 :], "--url", server.http_url]) as client,
    ):
        return server.wait_for(client)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
