# SPDX-License-Identifier: Apache-2.0
"""How the server stops: requests in flight finish or get an error, and there are no leftovers."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import pytest
from conftest import (
    PHOTO,
    PROTOCOLS,
    ROOT,
    TOY_SERVER,
    Server,
    decode,
    infer_until_rejected,
    running_together,
    skip_if_in_tmp,
    start_toy,
    wait_for,
    with_tmpfs,
)

from client import InferenceError
from serving.traffic import STOPPING

# As a shell does SIGINT for a command before &, and some supervisors SIGCHLD.
IGNORING_SIGNALS = ("sh", "-c", 'trap "" INT CHLD; exec "$@"', "sh")
UNDER_LOAD = ("SIGTERM", "SIGINT", "Ctrl-C in a terminal")


class Stopped:
    """A server that was told to stop, and its requests in flight."""

    def __init__(self, server: Server):
        self.server = server
        self.clients: list[Future] = []
        self.seconds: Future | None = None

    def wait(self) -> float:
        """Return how long it took to exit."""
        began = time.monotonic()
        self.server.process.wait(timeout=60)
        return time.monotonic() - began

    def assert_it_ended_cleanly(self, within_s: float, complaints: str = "Traceback| ERROR |Warning: |block") -> str:
        """Return the log."""
        assert self.seconds.result() < within_s
        assert self.server.process.returncode == 0
        assert self.server.left_behind() == []
        log = self.server.log.read_text()
        assert not re.search(complaints, log)
        return log


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Stopped]]:
    """Servers by the way they stop. They run in parallel, because each takes some seconds to start and to stop."""
    folder = tmp_path_factory.mktemp("stopped")
    busy = ("--max-queue", 100)
    servers = {
        "SIGTERM": start_toy(folder / "sigterm", *busy),
        "SIGINT": start_toy(folder / "sigint", *busy, prefix=IGNORING_SIGNALS),
        "Ctrl-C in a terminal": start_toy(folder / "ctrl-c", *busy),
        "long drain": start_toy(folder / "long", "--drain-s", 6, "--instances", 2, "--triton-timeout-s", 3),
        "short drain": start_toy(folder / "short", "--drain-s", 1),
        "killed Triton": start_toy(folder / "triton", "--drain-s", 6),
        "Ctrl-C in a terminal, long drain": start_toy(
            folder / "frontends", *busy, "--drain-s", 20, "--frontends", 3, "--instances", 6
        ),
    }
    with running_together(servers), ThreadPoolExecutor(100) as pool:
        stopped = {how: Stopped(server) for how, server in servers.items()}
        for how in UNDER_LOAD:
            # More requests than can finish: the others get an error, and the clients' connections stay open.
            stopped[how].clients = [
                pool.submit(infer_until_rejected, servers[how].connect(protocol), sleep_s=0.1)
                for protocol in PROTOCOLS * 10
            ]
        for how, seconds in (("long drain", 1.5), ("short drain", 100), ("killed Triton", 100)):
            stopped[how].clients = [
                pool.submit(servers[how].connect(protocol).infer, PHOTO, (), {"sleep_s": seconds})
                for protocol in PROTOCOLS
            ]
        # A request for each instance, two in each of the frontends, and 14 that wait for them.
        held = stopped["Ctrl-C in a terminal, long drain"]
        go_on = folder / "go on"

        def send_held_requests(count: int) -> None:
            for number in range(len(held.clients), len(held.clients) + count):
                connection = held.server.connect(PROTOCOLS[number % 2])
                held.clients.append(pool.submit(connection.infer, PHOTO, (), {"hold": str(go_on), "add": number}))

        send_held_requests(20)
        wait_for(lambda: held.server.metric("pending_request_count") == 14)
        for how, server in servers.items():
            wait_for(
                lambda server=server: "sleeping for" in server.log.read_text() or "holding" in server.log.read_text()
            )
            if how in UNDER_LOAD:
                wait_for(lambda server=server: server.metric("request_success") >= 4)
            server.segments()
        for how, server in servers.items():
            if "Ctrl-C" in how:
                os.killpg(server.process.pid, signal.SIGINT)
            elif how == "long drain":  # as `timeout` stops a command
                os.killpg(server.process.pid, signal.SIGTERM)
            else:
                # A terminal that is closed sends SIGHUP.
                number = {"SIGINT": signal.SIGINT, "short drain": signal.SIGHUP}.get(how, signal.SIGTERM)
                server.process.send_signal(number)
            stopped[how].seconds = pool.submit(stopped[how].wait)
        for how in ("SIGTERM", "short drain"):  # an impatient user sends more signals
            wait_for(lambda how=how: "stopping: " in servers[how].log.read_text())
            servers[how].process.send_signal(signal.SIGINT)
            servers[how].process.send_signal(signal.SIGTERM)
        servers["killed Triton"].processes("tritonserver")[0].kill()
        wait_for(lambda: "stopping: " in held.server.log.read_text())
        send_held_requests(2)
        wait_for(lambda: held.server.metric("pending_request_count") == 16)
        go_on.touch()
        yield stopped
        for server in servers.values():
            server.process.kill()


@pytest.mark.parametrize("how", UNDER_LOAD)
def test_a_signal_under_load_ends_the_server_cleanly(stopped, how):
    stopped[how].assert_it_ended_cleanly(within_s=10)
    results = [client.result() for client in stopped[how].clients]
    assert sum(succeeded for succeeded, _ in results) > 0
    for _, said in results:
        assert re.search("is stopping|refused|closed|UNAVAILABLE|not ready|unknown|queue is full|reset", said), said


def test_requests_in_flight_are_finished_within_the_drain_time(stopped):
    # Together they take longer than the default of --drain-s.
    log = stopped["long drain"].assert_it_ended_cleanly(within_s=12)
    for client in stopped["long drain"].clients:
        assert (client.result()["inverted"][0] == 255 - decode(PHOTO)).all()
    assert "in flight have 6 s to finish" in log
    assert "took too long" not in log


def test_after_ctrl_c_in_a_terminal_the_server_finishes_requests_and_takes_new_ones(stopped):
    log = stopped["Ctrl-C in a terminal, long drain"].assert_it_ended_cleanly(within_s=12)
    for number, client in enumerate(stopped["Ctrl-C in a terminal, long drain"].clients):
        assert (client.result()["inverted"][0] == 255 - decode(PHOTO) - np.uint8(number)).all()
    assert "took too long" not in log


def test_a_request_that_takes_longer_than_the_drain_time_does_not_hold_up_the_exit(stopped):
    log = stopped["short drain"].assert_it_ended_cleanly(within_s=10)
    # One request had begun, and the other one was waiting.
    told = [str(client.exception()) for client in stopped["short drain"].clients]
    assert all(type(client.exception()) is InferenceError for client in stopped["short drain"].clients)
    assert STOPPING in told
    assert "stopping: requests in flight that took too long and will fail: 1\n" in log


def test_the_end_of_triton_does_not_hold_up_a_server_that_is_stopping(stopped):
    # Triton's helpers warn that it was killed.
    stopped["killed Triton"].assert_it_ended_cleanly(within_s=12, complaints="Traceback| ERROR ")
    assert all(type(client.exception()) is InferenceError for client in stopped["killed Triton"].clients)


def test_a_clean_stop_leaves_nothing_in_temporary_folders_and_triton_does_not_abort():
    with_tmpfs("/mnt", "1m")  # skips the test if it cannot mount
    skip_if_in_tmp()
    wait = "from client import *; Connection(sys.argv[-1], 'Toy').wait_for_model(30)"
    script = """
        for folder in /tmp /dev/shm; do mount -t tmpfs tmpfs $folder; done; cd /tmp
        PYTRITON_HOME= HOME=/proc PYTHONPATH=$0 "$@" >&2
        echo "status $?"; ls -A /tmp /dev/shm"""
    launch = [sys.executable, "-m", "tools.launch", TOY_SERVER, "--verbose", "--", "-c", wait]
    command = ["unshare", "-rm", "sh", "-c", script, ROOT, *launch]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.split() == ["status", "0", "/dev/shm:", "/tmp:"], done.stderr
    assert "All models are stopped, unloading models" in done.stderr
    assert "terminate called" not in done.stderr
