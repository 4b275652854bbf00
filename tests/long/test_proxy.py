# SPDX-License-Identifier: Apache-2.0
"""Two servers behind the proxy: one of them is stopped, and no photo is lost."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import PHOTO, PROTOCOLS, Server, running_together, start_toy, wait_for
from front_door import NEEDS_NGINX, Proxy

pytestmark = NEEDS_NGINX


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[tuple[Server, Server]]:
    options = ("--instances", 4, "--max-queue", 512)
    with running_together({name: start_toy(tmp_path / name, *options) for name in "ab"}) as servers:
        yield tuple(servers.values())


class Clients:
    """Clients that send photos over persistent connections until they are told to stop."""

    def __init__(self, proxy: Proxy, pool: ThreadPoolExecutor):
        self._proxy = proxy
        self._stopped = threading.Event()
        self.clients = [pool.submit(self._ask, protocol) for protocol in PROTOCOLS * 2]

    def _ask(self, protocol: str) -> list[tuple[int, ...]]:
        connection, shapes = self._proxy.connect(protocol), []
        while not self._stopped.is_set():
            shapes.append(connection.infer(PHOTO)["inverted"].shape)  # raises if a photo is lost
        return shapes

    def wait_for_responses_of(self, *servers: Server) -> None:
        """Return when each of the servers has processed some more photos."""
        before = [server.metric("request_success") for server in servers]

        def all_have_responded() -> bool:
            assert not any(client.done() for client in self.clients)
            return all(
                server.metric("request_success") >= count + 10 for server, count in zip(servers, before, strict=True)
            )

        wait_for(all_have_responded, timeout_s=60)

    def stop(self) -> None:
        """Check that all photos succeeded."""
        self._stopped.set()
        for client in self.clients:
            assert set(client.result()) == {(1, 512, 512, 3)}


def test_no_photo_is_lost_while_one_of_two_servers_is_stopped(servers):
    a, b = servers
    with Proxy(servers) as proxy, ThreadPoolExecutor(4) as pool:
        clients = Clients(proxy, pool)
        try:
            clients.wait_for_responses_of(a, b)
            proxy.drain(a)
            processed = a.metric("request_success")
            clients.wait_for_responses_of(b)
            assert a.metric("request_success") == processed
            assert a.stop() == 0
            clients.wait_for_responses_of(b)
        finally:
            clients.stop()


def test_a_server_that_cannot_be_reached_costs_no_photo(servers):
    a, b = servers
    assert a.stop() == 0
    with Proxy(servers) as proxy, ThreadPoolExecutor(4) as pool:
        clients = Clients(proxy, pool)
        try:
            clients.wait_for_responses_of(b)
        finally:
            clients.stop()


def test_requests_are_spread_and_not_connections(servers):
    with Proxy(servers) as proxy, ThreadPoolExecutor(8) as pool:
        connection = proxy.connect("grpc")
        connection.infer(PHOTO)
        before = [server.metric("request_success") for server in servers]
        began = time.monotonic()
        # One connection, as grpcio keeps it for a client. Requests that take their time, so that they overlap.
        image = connection.image_input(PHOTO)
        calls = [pool.submit(connection.client.infer, "Toy", [image], parameters={"sleep_s": 0.5}) for _ in range(8)]
        for call in calls:
            call.result()
        counts = [server.metric("request_success") - count for server, count in zip(servers, before, strict=True)]
        assert counts == [4, 4]
        assert time.monotonic() - began < 8 * 0.5


def test_without_a_server_clients_are_told(servers):
    for server in servers:
        server.process.kill()
        server.process.wait()
        wait_for(lambda server=server: not any(p.name() == "tritonserver" for p in server.family()))
    with Proxy(servers) as proxy:
        for protocol in PROTOCOLS:
            with pytest.raises(Exception, match="no server can be reached: send the photo again later"):
                proxy.connect(protocol).infer(PHOTO)
