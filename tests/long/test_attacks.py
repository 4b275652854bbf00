# SPDX-License-Identifier: Apache-2.0
"""Attacks on the proxy and the server as they are shipped, all on loopback and bounded in count and time.

A good client uses the proxy all along. After each attack, nothing has changed for it.
"""

import contextlib
import functools
import http.client
import json
import operator
import random
import resource
import shutil
import socket
import statistics
import threading
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import grpc
import psutil
import pytest
from conftest import PHOTO, PROTOCOLS, ROOT, Server, decode, encode, running_toy, wait_for
from front_door import (
    ATTACKER,
    END_STREAM,
    GRPC_HEADERS,
    H2_PREFACE,
    NEEDS_NGINX,
    RST_STREAM,
    SERVICE,
    Proxy,
    access_token,
    connected,
    described,
    frame,
    grpc_rejection,
    grpc_status,
    h2_data,
    h2_exchange,
    h2_request,
    infer_message,
    infer_rejection,
    receive,
    request_head,
    send,
    status,
    statuses,
)
from PIL import Image
from tritonclient.grpc import service_pb2

from tools.launch import free_ports

INFER, READY = "/v2/models/Toy/infer", "/v2/models/Toy/ready"
RAW, MODEL_INFER = "Inference-Header-Content-Length: 0", f"{SERVICE}/ModelInfer"
MEGABYTE = 1_000_000
IN_FLIGHT = 32  # from one address; see deploy/nginx.conf
# Of memory and of /dev/shm. Triton keeps memory for the highest number of responses in flight so far, 12 MB each here,
# and in each of its 8 HTTP threads the stack that deep JSON needed, 0.1 GB.
GROWTH_GB = (2, 0.5)
OPTIONS = ("--behind-proxy", "--instances", 4, "--max-queue", 512)  # a queue as on a GPU


class GoodClient:
    """Sends photos over persistent connections, over both protocols, and checks each response."""

    def __init__(self, proxy: Proxy):
        self._proxy = proxy
        self._expected = 255 - decode(PHOTO)
        self._stopped = threading.Event()
        self.seconds: dict[str, list[float]] = {protocol: [] for protocol in PROTOCOLS}
        self._failures: list[str] = []
        self._threads = [threading.Thread(target=self._ask, args=(protocol,)) for protocol in PROTOCOLS]
        for thread in self._threads:
            thread.start()
        self.usual_s = max(self.next_responses(10))

    def _ask(self, protocol: str) -> None:
        connection = self._proxy.connect(protocol)
        while not self._stopped.wait(0.02):
            began = time.monotonic()
            try:
                response = connection.infer(PHOTO, ("inverted",))["inverted"][0]
            except Exception as error:
                self._failures.append(f"{protocol}: {error}")
                return
            if (response != self._expected).any():
                self._failures.append(f"{protocol}: a wrong response")
            self.seconds[protocol].append(time.monotonic() - began)

    def next_responses(self, count: int) -> list[float]:
        """Return the typical seconds of the next responses, by protocol. Fails if one is an error or wrong."""
        before = {protocol: len(seconds) for protocol, seconds in self.seconds.items()}
        wait_for(
            lambda: self._failures or all(len(self.seconds[name]) >= before[name] + count for name in before),
            timeout_s=60,
        )
        assert self._failures == []
        return [statistics.median(self.seconds[name][-count:]) for name in before]

    def stop(self) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join()


class FrontDoor:
    """A server behind the proxy, and its good client."""

    def __init__(self, server: Server, proxy: Proxy, client: GoodClient):
        self.server, self.proxy, self.client = server, proxy, client
        self.http_port, self.grpc_port = proxy.http_port, proxy.grpc_port
        self._processes = self._pids()
        self._before = self._used()

    def _pids(self) -> set[int]:
        return {process.pid for process in (*self.server.family(), *self.proxy.workers())}

    def _used(self) -> tuple[int, int]:
        memory = self.server.memory().total() + self.proxy.memory()
        return memory, shutil.disk_usage("/dev/shm").used

    def assert_unharmed(self) -> None:
        """The good client gets its responses as usual, no process was replaced, and memory is within bounds."""
        # Twice the usual time, and some more for a busy machine.
        assert max(self.client.next_responses(10)) < 2 * self.client.usual_s + 0.2
        assert self._pids() == self._processes

        def grown() -> list[float]:
            return [(used - before) / 1e9 for used, before in zip(self._used(), self._before, strict=True)]

        with contextlib.suppress(AssertionError):
            wait_for(lambda: all(map(operator.lt, grown(), GROWTH_GB)), timeout_s=20)
        gigabytes = grown()
        assert all(map(operator.lt, gigabytes, GROWTH_GB)), gigabytes


@pytest.fixture(scope="module")
def shared_front_door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FrontDoor]:
    with running_toy(tmp_path_factory.mktemp("attacks") / "log", *OPTIONS) as server, Proxy([server]) as proxy:
        client = GoodClient(proxy)
        try:
            yield FrontDoor(server, proxy, client)
        finally:
            client.stop()


@pytest.fixture
def front_door(shared_front_door: FrontDoor) -> Iterator[FrontDoor]:
    """The server behind the proxy, which must be unharmed after the test."""
    yield shared_front_door
    shared_front_door.assert_unharmed()


pytestmark = NEEDS_NGINX


@functools.cache
def bomb(megabytes: int) -> bytes:
    """Return a gzip file of about a thousandth of the size that it inflates to."""
    compressor = zlib.compressobj(9, wbits=31)
    return b"".join([compressor.compress(bytes(MEGABYTE)) for _ in range(megabytes)]) + compressor.flush()


# Bodies in chunks, compressed or too large


@pytest.mark.parametrize(
    ("method", "path", "expected"),
    [("POST", INFER, 411), ("PUT", INFER, 404), ("GET", READY, 413), ("POST", "/v2/repository/index", 404)],
)
def test_two_million_chunks(front_door, method, path, expected):
    chunks = b"1\r\nx\r\n" * 2_000_000 + b"0\r\n\r\n"
    assert status(front_door.http_port, method, path, RAW, "Transfer-Encoding: chunked", body=chunks) == expected


def test_chunks_over_http2_are_bytes_like_others(front_door):
    # 100,000 DATA frames of one byte.
    photo = b"".join(frame(0, 0, 1, b"x") for _ in range(100_000)) + frame(0, END_STREAM, 1)
    with connected(front_door.grpc_port) as connection:
        assert h2_exchange(connection, h2_request(1, "POST", MODEL_INFER, *GRPC_HEADERS) + photo) in (200, None)


@pytest.mark.parametrize("header", ["Content-Encoding: gzip", "Content-Encoding: deflate", "Content-Encoding:  GZIP"])
def test_a_megabyte_that_inflates_to_a_gigabyte(front_door, header):
    body = bomb(1000)
    length = f"Content-Length: {len(body)}"
    assert status(front_door.http_port, "POST", INFER, RAW, length, header, body=body) == 415


def test_an_encoding_that_hides_behind_another_header_does_not_reach_the_server(front_door):
    headers = ("Content-Encoding:", "Content-Encoding: gzip", RAW, f"Content-Length: {len(bomb(1000))}")
    assert status(front_door.http_port, "POST", INFER, *headers, body=bomb(1000)) == 500  # it is not a photo


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ([("grpc-encoding", "gzip")], "12"),  # UNIMPLEMENTED, from the proxy
        ([("content-encoding", "gzip")], "12"),
        # INVALID_ARGUMENT, also from the proxy: the message says that it is compressed
        ([("grpc-encoding", "identity"), ("grpc-encoding", "gzip")], "3"),
        ([], "3"),
    ],
)
def test_compressed_messages_over_grpc(front_door, headers, expected):
    body = bomb(55)
    message = b"\1" + len(body).to_bytes(4, "big") + body
    assert len(message) < 65_535  # which may be sent before the other side agrees to more
    before = front_door.proxy.grpc_statuses()
    with connected(front_door.grpc_port) as connection:
        request = h2_request(1, "POST", MODEL_INFER, *GRPC_HEADERS, *headers)
        assert h2_exchange(connection, request + h2_data(1, message)) == 200  # with an error in grpc-status
    wait_for(lambda: len(front_door.proxy.grpc_statuses()) > len(before))
    assert front_door.proxy.grpc_statuses()[len(before) :] == [expected]


@pytest.mark.parametrize("algorithm", [grpc.Compression.Gzip, grpc.Compression.Deflate])
def test_compressed_messages_of_grpcs_own_client(front_door, algorithm):
    code = grpc_status(front_door.grpc_port, MODEL_INFER, bytes(300 * MEGABYTE), compression=algorithm)
    assert code is grpc.StatusCode.UNIMPLEMENTED


def test_oversized_bodies_and_messages(front_door):
    body = bytes(60 * MEGABYTE)
    assert status(front_door.http_port, "POST", INFER, RAW, f"Content-Length: {len(body)}", body=body) == 413
    assert status(front_door.http_port, "POST", INFER, RAW, "Content-Length: 10000000000") == 413
    for size in (60 * MEGABYTE, 200 * MEGABYTE):
        assert grpc_status(front_door.grpc_port, MODEL_INFER, bytes(size)) is grpc.StatusCode.RESOURCE_EXHAUSTED
    # A message that announces 4 GB, of which nothing arrives.
    with connected(front_door.grpc_port) as connection:
        request = h2_request(1, "POST", MODEL_INFER, *GRPC_HEADERS)
        h2_exchange(connection, request + h2_data(1, b"\0\xff\xff\xff\xff"))


# Lengths and framing


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        (["Content-Length: -5"], 400),
        (["Content-Length: +5"], 400),
        (["Content-Length: 0x5"], 400),
        (["Content-Length: 5, 5"], 400),
        (["Content-Length: 99999999999999999999999"], 400),
        (["Content-Length: 5", "Content-Length: 6"], 400),
        (["Content-Length: 5", "Content-Length: 5"], 400),
        (["Content-Length: 5", "Transfer-Encoding: chunked"], 400),
        (["Transfer-Encoding: chunked", "Transfer-Encoding: chunked"], 400),
        (["Transfer-Encoding: gzip, chunked"], 411),
        (["Transfer-Encoding: xchunked", "Content-Length: 5"], 411),
        (["Transfer-Encoding:\tchunked", "Content-Length: 5"], 411),
        (["Transfer-Encoding : chunked", "Content-Length: 5"], 400),
        (["Content-Length: 5\r\n Transfer-Encoding: chunked"], 400),
        (["X: " + "x" * 100_000], 400),
        (["X: y"] * 10_000, 400),
        ([], 411),
    ],
)
def test_lengths_that_are_ambiguous_wrong_or_missing(front_door, headers, expected):
    request = request_head("POST", INFER, RAW, *headers) + b"hello"
    assert statuses(front_door.http_port, request) == [expected]


def test_a_request_after_the_body_of_another_is_a_request_like_others(front_door):
    smuggled = b"GET /v2/repository/index HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n"
    head = request_head("POST", INFER, RAW, "Content-Length: 4").replace(b"Connection: close\r\n", b"")
    assert statuses(front_door.http_port, head + b"1234" + smuggled) == [500, 404]  # no photo, not allowed


def test_an_empty_length_of_json_is_rejected(front_door):
    headers = ("Inference-Header-Content-Length: ", f"Content-Length: {len(PHOTO)}")
    assert status(front_door.http_port, "POST", INFER, *headers, body=PHOTO) == 400


@pytest.mark.parametrize("value", ["-1", "0x10", "1e3", "4 4", "18446744073709551616", "99999", "16400"])
def test_lengths_of_json_that_are_wrong_or_too_large(front_door, value):
    headers = (f"Inference-Header-Content-Length: {value}", f"Content-Length: {len(PHOTO)}")
    assert status(front_door.http_port, "POST", INFER, *headers, body=PHOTO) in (400, 413)


def test_json_that_is_longer_than_the_body(front_door):
    headers = ("Inference-Header-Content-Length: 9000", "Content-Length: 5")
    assert status(front_door.http_port, "POST", INFER, *headers, body=b"hello") == 400


def test_a_second_length_of_json_does_not_reach_the_server(front_door):
    headers = (RAW, "Inference-Header-Content-Length: 18446744073709551615", "Content-Length: 5")
    assert status(front_door.http_port, "POST", INFER, *headers, body=b"hello") == 500  # no photo


def test_deep_and_long_json(front_door):
    for opening in (b"[", b'{"a":'):
        nested = opening * (999_999 // len(opening))
        assert status(front_door.http_port, "POST", INFER, f"Content-Length: {len(nested)}", body=nested) == 400
        assert infer_rejection(front_door.http_port, nested[:16_000], PHOTO)[0] == 400
    long = json.dumps({"inputs": [{"name": "image", "data": [255] * 10_000_000}]}).encode()
    assert len(long) > 49 * MEGABYTE
    assert status(front_door.http_port, "POST", INFER, f"Content-Length: {len(long)}", body=long) == 400


# Well-formed requests that are expensive for Triton

PARAMETERS = b"".join(b'"\x0e\n\x06%06d\x12\x04\x1a\x02\xff\xff' % number for number in range(MEGABYTE))
LARGE_PHOTO = encode(Image.new("RGB", (4000, 4000)), "PNG")


def image_json(shape: list[int], **members: object) -> bytes:
    """Return a request with an image of a shape."""
    return json.dumps({"inputs": [{"name": "image", "datatype": "UINT8", "shape": shape} | members]}).encode()


def large_json(**members: object) -> bytes:
    """Return a request with the large photo after it."""
    return json.dumps({"inputs": described(LARGE_PHOTO)["inputs"]} | members).encode()


COSTLY = {
    "a shape of 40 GB": (image_json([1, 40_000_000_000], data=[1]), b""),
    "a shape of 4 GB": (image_json([1, 4_000_000_000], data=[1]), b""),
    "a shape that overflows": (image_json([2**33, 2**31 + 1], data=[65] * 700), b""),
    "a shape that overflows, and a photo": (image_json([2**33, 2**31 + 1]), PHOTO),
    "default outputs as JSON": (large_json(), LARGE_PHOTO),
    "an output as JSON": (large_json(outputs=[{"name": "inverted"}]), LARGE_PHOTO),
    "classes": (large_json(outputs=[{"name": "mean", "parameters": {"classification": 25_000_000}}]), LARGE_PHOTO),
    "an empty photo": (json.dumps(described(b"")).encode(), b""),
    "empty inputs": b"\x2a\0" * (5 * MEGABYTE),
    "empty outputs": b"\x32\0" * (5 * MEGABYTE),
    "empty raw contents": b"\x3a\0" * (5 * MEGABYTE),
    "empty parameters": b"\x22\0" * (5 * MEGABYTE),
    "a million parameters that are not UTF-8": b"\x0a\x03Toy" + PARAMETERS,
    "a photo, then empty inputs": infer_message(PHOTO).SerializeToString() + b"\x2a\0" * (5 * MEGABYTE),
    "an empty photo in a message": infer_message(b"").SerializeToString(),
}


@pytest.mark.parametrize("attack", COSTLY)
def test_requests_that_are_expensive_for_triton_cost_nothing(front_door, attack):
    def send_one(_: int) -> object:
        request = COSTLY[attack]
        if isinstance(request, bytes):
            return grpc_rejection(front_door.grpc_port, request)[0]
        return infer_rejection(front_door.http_port, *request)[0]

    before = front_door.server.memory().total()
    with ThreadPoolExecutor(6) as pool:
        assert set(pool.map(send_one, range(18))) <= {400, grpc.StatusCode.INVALID_ARGUMENT}
    assert front_door.server.memory().total() - before < 50 * MEGABYTE  # the good client keeps sending


@pytest.mark.parametrize("through", ["proxy", "server"])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_thousands_of_empty_bodies_leave_nothing_behind(front_door, protocol, through):
    attacked = getattr(front_door, through)

    def send_over_http(count: int) -> None:
        with contextlib.closing(
            http.client.HTTPConnection("127.0.0.1", attacked.http_port, source_address=(ATTACKER, 0))
        ) as connection:
            for _ in range(count):
                connection.request("POST", INFER, headers={"Inference-Header-Content-Length": "0"})
                response = connection.getresponse()
                response.read()
                assert response.status == (400 if through == "proxy" else 500)
                time.sleep(0.001)  # more than 1,000 per second are rejected

    def send_over_grpc(count: int) -> None:
        message = infer_message(b"").SerializeToString()
        expected = grpc.StatusCode.INVALID_ARGUMENT if through == "proxy" else grpc.StatusCode.INTERNAL
        with grpc.insecure_channel(f"127.0.0.1:{attacked.grpc_port}") as channel:
            for _ in range(count):
                with pytest.raises(grpc.RpcError) as error:
                    channel.unary_unary(MODEL_INFER)(message)
                assert error.value.code() is expected
                time.sleep(0.0005)

    send = send_over_http if protocol == "http" else send_over_grpc
    send(500)
    memory, shared = front_door.server.memory().total(), front_door.server.shared_memory()
    send(5000)
    # The good client also keeps sending.
    assert front_door.server.memory().total() - memory < 50 * MEGABYTE
    assert front_door.server.shared_memory() - shared < 10 * MEGABYTE  # PyTriton kept 6.6 KB of each


@pytest.mark.parametrize("seed", range(5))
def test_what_passes_over_grpc_is_what_protobuf_itself_writes_for_a_photo(seed):
    """If a message is changed in any way and the proxy accepts it, no parser can take it for anything else."""
    photo, rng = bytes(300), random.Random(seed)
    request = infer_message(photo)
    request.id = "a-1"
    for name, value in {
        "add": {"int64_param": 1},
        "sleep_s": {"double_param": 0.5},
        "hold": {"string_param": "x"},
    }.items():
        request.parameters[name].MergeFrom(service_pb2.InferParameter(**value))
    for name in ("inverted", "mean"):
        request.outputs.add(name=name)
    good = request.SerializeToString(deterministic=True)
    http_port, grpc_port, _ = free_ports()
    nobody = SimpleNamespace(http_port=http_port, grpc_port=grpc_port, model_name="Toy")
    passed = 0
    with Proxy([nobody]) as proxy, grpc.insecure_channel(f"127.0.0.1:{proxy.grpc_port}") as channel:
        infer = channel.unary_unary(MODEL_INFER)
        for _ in range(1000):  # as many as the proxy accepts at the same time
            message = bytearray(good)
            for _ in range(rng.randint(1, 3)):
                at = rng.randrange(len(good) - len(photo))
                message[at : at + rng.choice([0, 1, 1, 1, 2])] = rng.choice(
                    [bytes([rng.randrange(256)]), bytes([message[at] ^ 1 << rng.randrange(8)]), b"", b"\x2a\0", b"\xff"]
                )
            with pytest.raises(grpc.RpcError) as error:
                infer(bytes(message), timeout=60)
            code = error.value.code()
            assert code in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.UNAVAILABLE)
            if code is grpc.StatusCode.UNAVAILABLE and "no server" in error.value.details():
                passed += 1
                seen = service_pb2.ModelInferRequest.FromString(bytes(message))
                assert seen.model_name == "Toy"
                assert not seen.model_version
                assert set(seen.parameters) <= {"add", "sleep_s", "hold", "timeout"}
                assert {output.name for output in seen.outputs} <= {"inverted", "mean"}
                assert seen.inputs == infer_message(photo).inputs
                assert seen.ByteSize() == len(message)  # nothing is hidden or said twice
    assert passed


# Administration

ADMINISTRATION = [
    ("POST", "/v2/repository/index"),
    ("POST", "/v2/repository/models/Toy/load"),
    ("POST", "/v2/repository/models/Toy/unload"),
    ("GET", "/v2/systemsharedmemory/status"),
    ("POST", "/v2/systemsharedmemory/region/x/register"),
    ("POST", "/v2/systemsharedmemory/unregister"),
    ("GET", "/v2/cudasharedmemory/status"),
    ("POST", "/v2/cudasharedmemory/region/x/register"),
    ("GET", "/v2/models/stats"),
    ("GET", "/v2/models/Toy/stats"),
    ("GET", "/v2/models/Toy/versions/1/stats"),
    ("GET", "/v2/trace/setting"),
    ("POST", "/v2/models/Toy/trace/setting"),
    ("GET", "/v2/logging"),
    ("POST", "/v2/logging"),
    ("POST", "/v2/models/Toy/generate"),
    ("GET", "/metrics"),
    ("GET", "/v2"),
]
METHODS = [
    "RepositoryIndex",
    "RepositoryModelLoad",
    "RepositoryModelUnload",
    "SystemSharedMemoryStatus",
    "SystemSharedMemoryRegister",
    "SystemSharedMemoryUnregister",
    "CudaSharedMemoryStatus",
    "CudaSharedMemoryRegister",
    "CudaSharedMemoryUnregister",
    "ModelStatistics",
    "ModelStreamInfer",
    "TraceSetting",
    "LogSettings",
]


def spellings(path: str) -> set[str]:
    """Return ways to write a path that a server may take for the same."""
    letter = f"%{ord(path[-1]):02x}" if path != "/" else ""
    return {
        path,
        path + "/",
        path.replace("/", "//"),
        path[:-1] + letter,
        path[:-1] + letter.replace("%", "%25"),
        path.replace("/", "/%2e/"),
        f"{INFER}/../../../..{path}",
        f"{INFER}/%2e%2e/%2e%2e/%2e%2e/%2e%2e{path}",
        f"{INFER}%2f..%2f..%2f..%2f..{path}",
        f"{READY};{path}",
        f"http://127.0.0.1{path}",
        f"{path}?{READY}",
        f"{path}#{READY}",
        path.upper(),
    }


@pytest.mark.parametrize("with_token", [False, True])
def test_administration_over_http(front_door, with_token):
    token = [f"triton-access-token: {access_token(front_door.server)}"] if with_token else []
    for method, path in ADMINISTRATION:
        for spelling in spellings(path):
            for verb in {method, "POST", "GET"}:
                response = status(front_door.http_port, verb, spelling, *token, "Content-Length: 2", body=b"{}")
                assert response in (400, 404), (verb, spelling)


def test_the_root_is_the_page_however_it_is_spelled(front_door):
    page = (ROOT / "deploy" / "page" / "index.html").read_bytes()
    for spelling in spellings("/"):
        assert status(front_door.http_port, "POST", spelling, "Content-Length: 2", body=b"{}") in (400, 404)
        with connected(front_door.http_port) as connection:
            send(connection, request_head("GET", spelling))
            response = receive(connection)
        assert response.split(b" ", 2)[1] in (b"400", b"404") or response.endswith(b"\r\n\r\n" + page), spelling


@pytest.mark.parametrize("with_token", [False, True])
def test_administration_over_grpc(front_door, with_token):
    token = access_token(front_door.server)
    metadata = (("triton-grpc-protocol-triton-access-token", token), ("triton-access-token", token))
    for method in METHODS:
        for spelling in (method, f"/{method}", f"../inference.GRPCInferenceService/{method}", f"%52{method[1:]}"):
            path = f"{SERVICE}/{spelling}"
            code = grpc_status(front_door.grpc_port, path, metadata=metadata if with_token else ())
            assert code is grpc.StatusCode.UNIMPLEMENTED, path


def test_rest_over_http2_and_grpc_over_http1(front_door):
    before = front_door.proxy.grpc_statuses()
    with connected(front_door.grpc_port) as connection:
        assert h2_exchange(connection, h2_request(1, "GET", "/v2/repository/index", flags=END_STREAM)) == 200
    wait_for(lambda: len(front_door.proxy.grpc_statuses()) > len(before))
    assert front_door.proxy.grpc_statuses()[len(before) :] == ["12"]
    assert status(front_door.http_port, "POST", f"{SERVICE}/RepositoryIndex", "Content-Length: 0") == 404
    upgrade = ("Upgrade: h2c", "HTTP2-Settings: AAMAAABkAAQAAP__", "Connection: Upgrade, HTTP2-Settings")
    assert status(front_door.http_port, "GET", "/v2/repository/index", *upgrade) == 404


# Slow clients, idle clients, many clients


def assert_closed(sockets: list[socket.socket], within_s: float) -> None:
    """Read data until the other side has closed all connections."""
    deadline = time.monotonic() + within_s
    for connection in sockets:
        connection.settimeout(max(0.1, deadline - time.monotonic()))
        with contextlib.suppress(ConnectionError):
            while connection.recv(1 << 20):
                pass


def many(stack: contextlib.ExitStack, count: int, port: int, data: bytes, **options: int) -> list[socket.socket]:
    """Open connections and send the same over each."""
    sockets = [stack.enter_context(connected(port, **options)) for _ in range(count)]
    for connection in sockets:
        send(connection, data)
    return sockets


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_slow_headers(front_door, protocol):
    beginning = b"POST / HTTP/1.1\r\nHost: test\r\n" if protocol == "http" else H2_PREFACE[:-1]
    with contextlib.ExitStack() as stack:
        port = front_door.http_port if protocol == "http" else front_door.grpc_port
        sockets = many(stack, 200, port, beginning)
        began = time.monotonic()
        while time.monotonic() < began + 8:  # a byte now and then does not help
            for connection in sockets if protocol == "http" else ():
                send(connection, b"X")
            assert max(front_door.client.next_responses(3)) < 5
        assert_closed(sockets, within_s=15)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_slow_bodies(front_door, protocol):
    with contextlib.ExitStack() as stack:
        if protocol == "http":
            head = request_head("POST", INFER, RAW, f"Content-Length: {40 * MEGABYTE}")
            many(stack, 200, front_door.http_port, head + bytes(100_000))
        else:
            request = h2_request(1, "POST", MODEL_INFER, *GRPC_HEADERS)
            part = frame(0, 0, 1, b"\0" + (40 * MEGABYTE).to_bytes(4, "big") + bytes(1000))
            many(stack, 200, front_door.grpc_port, H2_PREFACE + request + part)
        assert max(front_door.client.next_responses(3)) < 5
        # The proxy closes these connections, which makes room for others.
        assert status(front_door.http_port, "GET", READY) == 429
        wait_for(lambda: status(front_door.http_port, "GET", READY) == 200, timeout_s=30)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_slow_readers(front_door, protocol):
    photo = encode(Image.new("RGB", (2000, 2000)), "PNG")  # a response of 12 MB
    with contextlib.ExitStack() as stack:
        if protocol == "http":
            request = request_head("POST", INFER, RAW, f"Content-Length: {len(photo)}") + photo
            many(stack, 200, front_door.http_port, request, receive_buffer=4096)
        else:
            content = infer_message(photo).SerializeToString()
            message = b"\0" + len(content).to_bytes(4, "big") + content
            request = h2_request(1, "POST", MODEL_INFER, *GRPC_HEADERS) + h2_data(1, message)
            many(stack, 200, front_door.grpc_port, H2_PREFACE + request, receive_buffer=4096)
        assert max(front_door.client.next_responses(3)) < 20  # after the large photos in the queue
        wait_for(lambda: not front_door.server.metric("pending_request_count"), timeout_s=60)
        front_door.assert_unharmed()


def test_thousands_of_idle_connections(front_door):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    count = 3000
    if hard != resource.RLIM_INFINITY and hard < 2 * count:
        pytest.skip("needs the right to open more files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2 * count), hard))
    with contextlib.ExitStack() as stack:
        for port in (front_door.http_port, front_door.grpc_port):
            many(stack, count // 2, port, b"")
        front_door.assert_unharmed()


@pytest.mark.parametrize(
    "request_of",
    [
        lambda stream: h2_request(stream, "POST", MODEL_INFER, *GRPC_HEADERS),
        lambda stream: h2_request(stream, "GET", "/", flags=END_STREAM),
    ],
    ids=["infer", "unknown"],
)
def test_rapid_reset(front_door, request_of):
    cancel = (8).to_bytes(4, "big")
    attempts = b"".join(request_of(stream) + frame(RST_STREAM, 0, stream, cancel) for stream in range(1, 10_001, 2))
    for _ in range(10):
        with connected(front_door.grpc_port) as connection:
            connection.settimeout(10)
            send(connection, H2_PREFACE + attempts)
            receive(connection)
    assert max(front_door.client.next_responses(3)) < 5


def test_too_many_requests_in_flight_from_one_address(front_door):
    head = request_head("POST", INFER, RAW, f"Content-Length: {MEGABYTE}", "Expect: 100-continue")
    with contextlib.ExitStack() as stack:
        waiting = many(stack, IN_FLIGHT, front_door.http_port, head)
        for connection in waiting:
            assert connection.recv(100).startswith(b"HTTP/1.1 100 ")  # counted, and waiting for the body
        assert status(front_door.http_port, "GET", READY) == 429
        assert max(front_door.client.next_responses(3)) < 5  # from another address
        for connection in waiting:
            connection.close()
    wait_for(lambda: status(front_door.http_port, "GET", READY) == 200, timeout_s=60)


def test_too_many_requests_per_second_from_one_address(front_door):
    head = request_head("GET", READY).replace(b"Connection: close\r\n", b"")
    with contextlib.ExitStack() as stack:
        sockets = many(stack, 8, front_door.http_port, 900 * head + request_head("GET", READY))
        responses = b"".join(receive(connection) for connection in sockets)
    assert responses.count(b"HTTP/1.1 200") >= 1000
    assert responses.count(b"HTTP/1.1 429") >= 1
    wait_for(lambda: status(front_door.http_port, "GET", READY) == 200, timeout_s=60)


# The server without the proxy


def test_fifty_megabytes_of_chunks_do_not_end_a_server_without_the_proxy(tmp_path):
    # They cost 10 GB of memory until the server is restarted. Nothing but a proxy helps against that.
    if psutil.virtual_memory().available < 14_000 * MEGABYTE:
        pytest.skip("needs 14 GB of free memory")
    with running_toy(tmp_path / "log") as server:
        chunks = b"1\r\nx\r\n" * (50 * MEGABYTE // 6) + b"0\r\n\r\n"
        with connected(server.http_port) as connection:
            connection.settimeout(150)
            send(connection, request_head("POST", INFER, "Transfer-Encoding: chunked") + chunks)
            assert receive(connection).startswith(b"HTTP/1.1 500 ")  # neither JSON nor a photo
        assert (server.connect("http").infer(PHOTO)["inverted"][0] == 255 - decode(PHOTO)).all()


def test_an_attack_that_ends_triton_ends_the_server_with_status_1_and_leaves_nothing_behind(tmp_path):
    with running_toy(tmp_path / "log") as server:
        nested = b"[" * (40 * MEGABYTE)  # more than the stack that the server provides
        send_to = request_head("POST", INFER, f"Content-Length: {len(nested)}") + nested
        assert statuses(server.http_port, send_to) == []
        assert server.process.wait(timeout=30) == 1
        assert server.left_behind() == []
