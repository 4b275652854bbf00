# SPDX-License-Identifier: Apache-2.0
"""Serves the page for browsers on this machine: server.py, and nginx in front of it, both on loopback.

    python -m tools.page [--port PORT] [option of server.py ...]

The page needs no key, because only this machine can reach it. Ctrl-C stops both.
"""

import argparse
import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from serving.options import number
from tools.launch import LaunchedServer, free_ports, running

ROOT = Path(__file__).resolve().parent.parent
NGINX = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
MODULE = Path("/usr/lib/nginx/modules/ngx_http_js_module.so")


def configure(folder: Path, port: int, grpc_port: int, server: LaunchedServer) -> Path:
    """Put the proxy's files into a folder, with other ports and without keys. Return the path of nginx.conf."""
    # Other users can read this folder, so do not copy all of deploy/: it has the keys, and perhaps other private files.
    deploy = folder / "deploy"
    shutil.copytree(ROOT / "deploy" / "page", deploy / "page")
    shutil.copy(ROOT / "deploy" / "infer.js", deploy)
    for name, replacements in {
        "nginx.conf": {
            "listen 8080;": f"listen 127.0.0.1:{port};",
            "listen 8081 http2;": f"listen 127.0.0.1:{grpc_port} http2;",
        },
        "servers.conf": {"127.0.0.1:8000": f"127.0.0.1:{server.http_port}", "127.0.0.1:8001": server.grpc_url[7:]},
    }.items():
        text = (ROOT / "deploy" / name).read_text()
        for there, here in replacements.items():
            if text.count(there) != 1:
                raise ValueError(f"deploy/{name} must contain {there!r} exactly once; deploy it as in docs/security.md")
            text = text.replace(there, here)
        (deploy / name).write_text(text)
    (deploy / "api_keys.conf").write_text("default anyone;\n")
    # nginx's workers drop root privileges, and must be able to read the page.
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return deploy / "nginx.conf"


def running_nginx(configuration: Path, **options: object) -> AbstractContextManager[subprocess.Popen]:
    """Run nginx with this configuration inside a ``with`` block. ``options`` are those of Popen."""
    return running([NGINX, "-e", "stderr", "-p", configuration.parent, "-c", configuration], **options)


@contextlib.contextmanager
def forwarded_log() -> Iterator[tuple[int, threading.Event]]:
    """Yield a file for the server's log, which appears on stderr, and an event for the line that says it is ready."""
    # With a terminal, the server shows the progress of a download.
    reader, writer = os.openpty() if sys.stderr.isatty() else os.pipe()
    ready = threading.Event()

    def forward() -> None:
        log = b""
        with contextlib.suppress(OSError):  # at the end of a terminal
            while part := os.read(reader, 1 << 16):
                os.write(sys.stderr.fileno(), part)
                log = (log + part)[-(1 << 16) :]
                if re.search(rb" ready: model .*\n", log):
                    ready.set()

    thread = threading.Thread(target=forward, daemon=True)
    thread.start()
    try:
        yield writer, ready
    finally:
        os.close(writer)
        thread.join(timeout=5)


def serve(port: int, options: Sequence[str]) -> int:
    """Run server.py and nginx until one of them ends or a signal arrives. Return the exit status."""
    with (
        tempfile.TemporaryDirectory(prefix="page-") as folder,
        forwarded_log() as (log, ready),
        LaunchedServer([ROOT / "server.py", *options], stderr=log) as server,
    ):
        configuration = configure(Path(folder), port, *free_ports(1), server)
        while not ready.wait(0.1):
            if server.process.poll() is not None:  # its log says why
                return server.process.returncode
        with running_nginx(configuration) as nginx:
            print(f"\nOpen http://127.0.0.1:{port} in a browser. Press Ctrl-C to stop.\n", flush=True)
            return server.wait_for(nginx)


def main(arguments: Sequence[str]) -> int:
    """Check the requirements, and serve. Return the exit status, which is 2 if a requirement is missing."""
    parser = argparse.ArgumentParser(prog="tools.page", usage=argparse.SUPPRESS, add_help=False, allow_abbrev=False)
    parser.add_argument("--port", type=number(int, 1, 65535), default=8080)
    known, options = parser.parse_known_args(arguments)
    if not NGINX or not MODULE.exists():
        parser.exit(2, "tools.page: nginx or its njs module is missing: run apt install nginx libnginx-mod-http-js\n")
    try:
        socket.create_server(("127.0.0.1", known.port)).close()
    except OSError as error:
        parser.exit(2, f"tools.page: cannot listen on port {known.port} ({error}): try make page PORT=8090\n")
    for signal_number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(signal_number, lambda received, _: sys.exit(128 + received))  # exits the blocks that stop both
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell makes background ("&") processes ignore it
    try:
        return serve(known.port, options)
    except ValueError as error:
        parser.exit(2, f"tools.page: {error}\n")
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
