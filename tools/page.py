# SPDX-License-Identifier: Apache-2.0
"""Serves the page for browsers on this machine: server.py, and nginx in front of it, both on loopback.

    python -m tools.page [--port PORT] [option of server.py ...]

The page needs no key, because only this machine can reach it. Ctrl-C stops both.
"""

import argparse
import contextlib
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from connection import MODEL_NAME
from serving.options import number
from tools.launch import DIE_WITH_PARENT, LaunchedServer, exit_on_signals, free_ports, running

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


@contextlib.contextmanager
def running_nginx(configuration: Path, **options: object) -> Iterator[subprocess.Popen]:
    """Run nginx with this configuration inside a ``with`` block. ``options`` are those of Popen."""
    command = [*DIE_WITH_PARENT, NGINX, "-e", "stderr", "-p", configuration.parent, "-c", configuration]
    with running(command, process_group=0, **options) as nginx:
        try:
            yield nginx
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(nginx.pid, signal.SIGTERM)  # its workers survive if it was killed


def serve(port: int, options: Sequence[str]) -> None:
    """Run server.py and nginx until a signal arrives. Raises RuntimeError if one of them ends."""
    with (
        tempfile.TemporaryDirectory(prefix="page-") as folder,
        LaunchedServer([ROOT / "server.py", *options], prefix=DIE_WITH_PARENT) as server,
    ):
        configuration = configure(Path(folder), port, *free_ports(1), server)
        server.wait_until_ready(MODEL_NAME, timeout_s=math.inf)  # the first start may be a long download
        with running_nginx(configuration) as nginx:
            print(f"\nOpen http://127.0.0.1:{port} in a browser. Press Ctrl-C to stop.\n", flush=True)
            status = server.wait_for(nginx)
            raise RuntimeError(f"{'the server' if nginx.poll() is None else 'nginx'} ended with status {status}")


def main(arguments: Sequence[str]) -> None:
    """Check the requirements, and serve. The exit status is 2 if a requirement is missing."""
    parser = argparse.ArgumentParser(prog="tools.page", usage=argparse.SUPPRESS, add_help=False, allow_abbrev=False)
    parser.add_argument("--port", type=number(int, 1, 65535), default=8080)
    known, options = parser.parse_known_args(arguments)
    if own := [option for option in options if option.startswith(("--address", "--http-", "--grpc-", "--metrics-"))]:
        parser.exit(2, f"tools.page: omit {own[0].partition('=')[0]}: the page needs its own addresses and ports\n")
    if not NGINX or not MODULE.exists():
        parser.exit(2, "tools.page: nginx or its njs module is missing: run apt install nginx libnginx-mod-http-js\n")
    try:
        socket.create_server(("127.0.0.1", known.port)).close()
    except OSError as error:
        parser.exit(2, f"tools.page: cannot listen on port {known.port} ({error}): try make page PORT=8090\n")
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell makes background ("&") processes ignore it
    exit_on_signals()
    try:
        serve(known.port, options)
    except ValueError as error:
        parser.exit(2, f"tools.page: {error}\n")
    except RuntimeError as error:
        parser.exit(1, f"tools.page: {error}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
