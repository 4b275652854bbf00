# SPDX-License-Identifier: Apache-2.0
"""Overload, little memory, and clients that misbehave."""

import contextlib
import http.client
import json
import re
import shutil
import socket
import struct
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from conftest import (
    PHOTO,
    PROTOCOLS,
    ROOT,
    Server,
    decode,
    encode,
    get,
    http_request,
    running_together,
    start_toy,
    wait_for,
    with_tmpfs,
)
from PIL import Image

from client import Connection, InferenceError


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mapping[str, Server]]:
    """Servers by their purpose. They start in parallel, which is faster."""
    folder = tmp_path_factory.mktemp("limits")
    servers = {
        # Processes one request at a time, with a queue of eight.
        "slow": start_toy(folder / "slow", "--instances", 1, "--max-queue", 8, "--triton-timeout-s", 3),
        "strange clients": start_toy(folder / "clients", "--max-queue", 100, "--triton-timeout-s", 3),
        "little shared memory": start_toy(folder / "shm", "--instances", 16, prefix=with_tmpfs("/dev/shm", "64m")),
        "little disk": start_toy(folder / "disk", prefix=with_tmpfs("$PYTRITON_HOME", "64m")),
    }
    with running_together(servers) as running:
        yield running


@pytest.fixture
def slow(servers: Mapping[str, Server]) -> Server:
    return servers["slow"]


def test_requests_beyond_the_queue_limit_are_rejected_immediately(slow):
    connections = {protocol: slow.connect(protocol) for protocol in PROTOCOLS}

    def ask(protocol: str) -> str:
        try:
            return str(connections[protocol].infer(PHOTO, parameters={"sleep_s": 0.05})["inverted"].shape)
        except InferenceError as error:
            return str(error)

    with ThreadPoolExecutor(200) as pool:
        responses = list(pool.map(ask, PROTOCOLS * 100))
    rejected = responses.count("the server is busy and its queue is full: send the photo again later")
    succeeded = responses.count("(1, 512, 512, 3)")
    assert rejected + succeeded == 200
    assert succeeded >= 9
    assert rejected > 50
    assert ask("http") == "(1, 512, 512, 3)"


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_request_that_waited_too_long_is_not_processed(slow, protocol, tmp_path):
    begun, go_on = slow.metric("exec_count"), tmp_path / "go on"
    expired = metric_of_expired_requests(slow)
    connection = slow.connect("http")
    with ThreadPoolExecutor(4) as pool:
        patient = [pool.submit(connection.infer, PHOTO, (), {"hold": str(go_on)}) for _ in range(3)]
        wait_for(lambda: slow.metric("pending_request_count") >= 2)
        impatient = pool.submit(slow.connect(protocol).infer, PHOTO, timeout_us=1000)
        wait_for(lambda: slow.metric("pending_request_count") >= 3 or impatient.done())
        go_on.touch()
        with pytest.raises(InferenceError, match="timeout expired"):
            impatient.result()
        assert all(response.result()["inverted"].shape == (1, 512, 512, 3) for response in patient)
    assert slow.metric("exec_count") == begun + 3
    wait_for(lambda: metric_of_expired_requests(slow) == expired + 1)


def metric_of_expired_requests(server: Server) -> int:
    """Return the value of the metric that docs/production.md names."""
    name, label = re.search(r"`(\w+)\{(reason=\"REJECTED\")\}`", (ROOT / "docs" / "production.md").read_text()).groups()
    return int(re.search(rf"^{name}\{{.*{label}.*\}} (\d+)", get(server.metrics_port, "/metrics"), re.MULTILINE)[1])


def connect(server: Server, share: float) -> socket.socket:
    """Return a connection over which the first part of a request was sent, and nothing is read."""
    request = http_request(PHOTO, server.model_name)
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(("127.0.0.1", server.http_port))
    connection.sendall(request[: int(share * len(request))])
    return connection


def hang_up(connection: socket.socket) -> None:
    """Close the connection with a reset."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def test_clients_that_disconnect_or_do_not_read_do_not_disturb_others(servers):
    server = servers["strange clients"]
    (tritonserver,) = server.processes("tritonserver")
    http, grpc = (server.connect(protocol) for protocol in PROTOCOLS)
    http.infer(PHOTO)
    before = tritonserver.num_fds()
    half, silent, closed = ([connect(server, share) for _ in range(5)] for share in (0.5, 1, 1))
    for connection in closed:
        hang_up(connection)
    image = grpc.image_input(PHOTO)
    for _ in range(5):
        with pytest.raises(Exception, match="Deadline Exceeded"):
            grpc.client.infer(server.model_name, [image], client_timeout=0.001)
    for connection in (http, grpc):
        assert (connection.infer(PHOTO)["inverted"][0] == 255 - decode(PHOTO)).all()
    for connection in half[1:] + silent[1:]:
        hang_up(connection)
    wait_for(lambda: tritonserver.num_fds() <= before + 5)
    # The server stops although one of each is still connected.
    assert server.stop() == 0
    assert server.left_behind() == []
    assert "Traceback" not in server.log.read_text()


def test_with_little_shared_memory_the_server_takes_smaller_photos_and_lives(servers):
    server = servers["little shared memory"]
    log = server.log.read_text()
    instances, most = re.search(r"runs (\d+) instances, with --max-pixels (\d+)\.", log).groups()
    assert "SHARED MEMORY: /dev/shm has 67 MB free instead of " in log
    assert re.search(r"docker run --shm-size \d+gb", log)
    side = int(int(most) ** 0.5)
    assert side >= 1000
    assert int(instances) == 2
    connections = [server.connect(protocol) for protocol in PROTOCOLS * 3]
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (side, side, 3), np.uint8))
    with pytest.raises(InferenceError, match=r"the request has \d+ bytes, but the limit is \d+") as error:
        connections[0].infer(encode(noise, "BMP"))
    with pytest.raises(InferenceError, match=r"pixels, but this server's limit is \d+"):
        connections[1].infer(encode(Image.new("RGB", (side + 1, side + 1)), "PNG"))
    damaged = bytes(int(re.search(r"limit is (\d+)", str(error.value))[1]))

    def expect_rejection(connection: Connection) -> None:
        with pytest.raises(InferenceError, match="is damaged"):
            connection.infer(damaged)

    # Several photos at once, of growing sizes up to the limit. In between, damaged files of the largest size fail. If
    # these kept their memory, 64 MB would be full after 10 of them.
    with ThreadPoolExecutor(6) as pool:
        for width in (side // 4, side // 2, 3 * side // 4, side, side, side):
            encoded = encode(noise.crop((0, 0, width, side)), "JPEG", quality=100)
            for response in pool.map(lambda connection, encoded=encoded: connection.infer(encoded), connections):
                assert response["inverted"].shape == (1, side, width, 3)
            list(pool.map(expect_rejection, connections * 5))
    assert server.process.poll() is None


def infer_with_text(server: Server, photo: bytes, text: bytes) -> str:
    """Send a photo over HTTP with a parameter of arbitrary bytes, and return the server's error."""
    size = {"binary_data_size": len(photo)}
    request = {
        "parameters": {"note": "TEXT"},
        "inputs": [{"name": "image", "shape": [1, len(photo)], "datatype": "UINT8", "parameters": size}],
    }
    header = json.dumps(request).encode().replace(b"TEXT", text)
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", server.http_port)) as connection:
        lengths = {"Inference-Header-Content-Length": str(len(header))}
        connection.request("POST", f"/v2/models/{server.model_name}/infer", header + photo, lengths)
        return connection.getresponse().read().decode()


def test_requests_that_cannot_be_passed_on_are_rejected_and_leave_nothing_behind(servers):
    server = servers["little shared memory"]
    connection = server.connect("grpc")
    for _ in range(20):  # together, they have 100 MB, and /dev/shm has 64 MB
        said = infer_with_text(server, bytes(5_000_000), b"\xff")
        assert "InvalidRequest: a parameter is not valid UTF-8" in said
        assert "Traceback" not in said
    used = shutil.disk_usage(f"/proc/{server.process.pid}/root/dev/shm").used  # as the server sees it
    for _ in range(200):
        with pytest.raises(InferenceError, match="the input image is empty"):
            connection.infer(b"")
    assert shutil.disk_usage(f"/proc/{server.process.pid}/root/dev/shm").used == used
    assert (connection.infer(PHOTO)["inverted"][0] == 255 - decode(PHOTO)).all()


def test_a_disk_that_fills_up_does_not_disturb_a_running_server(servers):
    server = servers["little disk"]
    filler = Path(f"/proc/{server.process.pid}/root{server.home}/filler")  # as the server sees it
    with pytest.raises(OSError, match="No space left"):
        filler.write_bytes(bytes(1 << 27))
    for protocol in PROTOCOLS:
        assert (server.connect(protocol).infer(PHOTO)["inverted"][0] == 255 - decode(PHOTO)).all()
