# SPDX-License-Identifier: Apache-2.0
"""Two servers behind haproxy with deploy/haproxy.cfg: one of them is replaced, and no photo is lost."""

import csv
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import PHOTO, ROOT, Server, running_server, wait_for

from client import Connection
from serving.launch import free_ports


def adapt(configuration: str, replacements: dict[str, str]) -> str:
    """Return the configuration with addresses that are free here. Each has to be there once."""
    for there, here in replacements.items():
        assert configuration.count(there) == 1
        configuration = configuration.replace(there, here)
    return configuration


@pytest.fixture
def behind_haproxy(tmp_path: Path) -> Iterator[tuple[Server, Server, dict[str, str], Callable[[str], str]]]:
    """Two servers, the URLs of a proxy in front of them, and a way to give the proxy a command."""
    if not shutil.which("haproxy"):
        pytest.skip("needs haproxy")
    http_port, grpc_port, _ = free_ports()
    options = ("--weights", "demo", "--device", "cpu")
    with Server(tmp_path / "a.log", *options) as a, running_server(tmp_path / "b.log", *options) as b:
        a.wait_until_ready()
        configuration = adapt(
            # Its comments show commands with the same path.
            "\n".join(line for line in (ROOT / "deploy/haproxy.cfg").read_text().splitlines() if line[:1] != "#"),
            {
                "/run/haproxy.sock": f"{tmp_path}/admin",
                "bind :8000": f"bind 127.0.0.1:{http_port}",
                "bind :8001": f"bind 127.0.0.1:{grpc_port}",
                "10.0.0.1:8000": f"127.0.0.1:{a.http_port}",
                "10.0.0.2:8000": f"127.0.0.1:{b.http_port}",
                "10.0.0.1:8001": f"127.0.0.1:{a.grpc_port}",
                "10.0.0.2:8001": f"127.0.0.1:{b.grpc_port}",
            },
        )
        (tmp_path / "haproxy.cfg").write_text(f"{configuration}\n")
        proxy = subprocess.Popen(["haproxy", "-f", tmp_path / "haproxy.cfg"])

        def tell(command: str) -> str:
            with socket.socket(socket.AF_UNIX) as admin:
                admin.connect(f"{tmp_path}/admin")
                admin.sendall(command.encode() + b"\n")
                return admin.makefile().read()

        def is_up() -> bool:
            assert proxy.poll() is None
            return (tmp_path / "admin").exists() and " UP " in tell("show stat").replace(",", " ")

        try:
            wait_for(is_up)
            urls = {"http": f"http://127.0.0.1:{http_port}", "grpc": f"grpc://127.0.0.1:{grpc_port}"}
            yield a, b, urls, tell
        finally:
            proxy.terminate()
            proxy.wait()


def test_no_photo_is_lost_while_one_of_two_servers_is_stopped(behind_haproxy):
    a, b, urls, tell = behind_haproxy
    stopped = threading.Event()

    def ask(protocol: str) -> list[tuple[int, ...]]:
        connection, shapes = Connection(urls[protocol]), []
        while not stopped.is_set() or len(shapes) < 5:
            shapes.append(connection.infer(PHOTO, ("segmented",))["segmented"].shape)  # raises if a photo is lost
        return shapes

    def in_flight() -> int:
        rows = csv.DictReader(tell("show stat").removeprefix("# ").splitlines())
        return sum(int(row["scur"]) for row in rows if row["svname"] == "a")

    with ThreadPoolExecutor(4) as pool:
        clients = [pool.submit(ask, protocol) for protocol in ("http", "grpc") * 2]

        def both_have_answered() -> bool:  # over connections that are kept open, too
            assert not any(client.done() for client in clients)
            return min(a.metric("request_success"), b.metric("request_success")) >= 2

        try:
            wait_for(both_have_answered, timeout_s=60)
            assert tell("set server http/a state drain").strip() == ""
            wait_for(lambda: not in_flight(), timeout_s=60)
            assert a.stop() == 0
        finally:
            stopped.set()
        for client in clients:
            assert set(client.result()) == {(1, 512, 512, 3)}
