# SPDX-License-Identifier: Apache-2.0
"""The proxy lets clients through and rejects what harms the server. tests/long/test_attacks.py has the rest."""

import gzip
import http.client
import http.server
import json
import re
import ssl
import textwrap
import threading
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import grpc
import numpy as np
import pytest
import tritonclient.grpc
from conftest import PHOTO, PROTOCOLS, ROOT, Server, decode, encode, running_together, start_toy, wait_for
from front_door import (
    GRPC_HEADERS,
    H2_PREFACE,
    KEY,
    NEEDS_NGINX,
    SERVICE,
    Proxy,
    access_token,
    adapt,
    connected,
    described,
    grpc_rejection,
    grpc_status,
    h2_data,
    h2_request,
    infer_message,
    infer_rejection,
    make_certificate,
    rejection,
    send,
    status,
)
from PIL import Image
from tritonclient.grpc import service_pb2

from client import Connection

INFER, RAW = "/v2/models/Toy/infer", "Inference-Header-Content-Length: 0"
SENTENCES = {
    400: "the request is malformed: check Content-Length and Inference-Header-Content-Length",
    404: "the proxy does not let this method and path through",
    411: "send the body with a Content-Length, not in chunks",
    413: "the request is too large: scale the photo down, save it as a JPEG, or shorten the JSON",
    415: "send the request without compression",
}


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mapping[str, Server]]:
    folder = tmp_path_factory.mktemp("front-door")
    servers = {
        "behind": start_toy(folder / "behind", "--address", "0.0.0.0", "--behind-proxy"),
        "exposed": start_toy(folder / "exposed", "--address", "0.0.0.0"),
    }
    with running_together(servers):
        yield servers


@pytest.fixture(scope="module")
def server(servers) -> Server:
    return servers["behind"]


@pytest.fixture(scope="module")
def proxy(server) -> Iterator[Proxy]:
    with Proxy([server]) as proxy:
        yield proxy


def test_a_server_that_others_can_reach_warns_unless_a_proxy_is_in_front(servers):
    assert "docs/security.md" in servers["exposed"].log.read_text()
    assert "docs/security.md" not in servers["behind"].log.read_text()


def test_other_users_of_the_machine_cannot_read_the_photos_in_shared_memory(server):
    server.connect("http").infer(PHOTO)
    segments = server.segments()
    assert any("pytrtion" in segment.name for segment in segments)
    assert {segment.stat().st_mode & 0o777 for segment in segments} == {0o600}


def test_deep_json_and_many_chunks_do_not_end_a_server_without_a_proxy(servers):
    port = servers["exposed"].http_port
    assert status(port, "POST", INFER, "Content-Length: 1000000", body=b"[" * 1_000_000) == 500
    chunks = b"1\r\n[\r\n" * 300_000 + b"0\r\n\r\n"
    assert status(port, "POST", INFER, "Transfer-Encoding: chunked", body=chunks) == 500
    assert (servers["exposed"].connect("http").infer(PHOTO)["inverted"][0] == 255 - decode(PHOTO)).all()


PAGE = {
    "/": "text/html; charset=utf-8",
    "/index.html": "text/html; charset=utf-8",
    "/style.css": "text/css; charset=utf-8",
    "/app.js": "text/javascript; charset=utf-8",
    "/triton.js": "text/javascript; charset=utf-8",
    "/icon.svg": "image/svg+xml; charset=utf-8",
}


@NEEDS_NGINX
def test_browsers_get_the_page_without_a_key_and_may_use_nothing_else(server):
    with Proxy([server], api_keys="") as proxy:
        for path, content_type in PAGE.items():
            for method in ("GET", "HEAD"):
                connection = http.client.HTTPConnection("127.0.0.1", proxy.http_port)
                connection.request(method, path, headers={"Range": "bytes=0-1,3-4"})
                response = connection.getresponse()
                body = response.read()
                connection.close()
                assert (response.status, response.headers["Content-Type"]) == (200, content_type)
                file = ROOT / "deploy" / "page" / (path[1:] or "index.html")
                assert body == (file.read_bytes() if method == "GET" else b"")
                policy = response.headers["Content-Security-Policy"]
                assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'; ")
                assert "unsafe" not in policy
                assert "frame-ancestors 'none'" in policy
                assert response.headers["X-Content-Type-Options"] == "nosniff"
                assert response.headers["Referrer-Policy"] == "no-referrer"
                assert response.headers["Cache-Control"] == "no-cache"
                assert response.headers["Cross-Origin-Resource-Policy"] == "same-origin"
            for method in ("POST", "PUT", "DELETE", "OPTIONS", "PROPFIND"):
                assert rejection(proxy.http_port, method, path, "Content-Length: 2", body=b"{}") == (
                    404,
                    SENTENCES[404],
                )
            assert status(proxy.http_port, "GET", path, "Content-Length: 2000", body=bytes(2000)) == 413
        assert status(proxy.http_port, "POST", INFER, RAW, "Content-Length: 2", body=b"{}") == 403


@NEEDS_NGINX
def test_no_path_leads_out_of_the_page(proxy):
    names = [path.name for path in proxy.folder.iterdir() if path.is_file()]
    assert {"nginx.conf", "api_keys.conf", "infer.js"} <= {*names}
    targets = [*names, *(f"page/{path[1:]}" for path in PAGE), "etc/passwd", "page", ".git/config"]
    ways = (
        "",
        "page/../",
        "../",
        "../../../../",
        "%2e%2e/",
        "..%2f",
        "style.css/../",
        "style.css/",
        "/",
        "x/../../",
        "./%2e./",
    )
    for target in targets:
        for way in ways:
            path = f"/{way}{target}"
            assert status(proxy.http_port, "GET", path) in (400, 404), path
    for path in (
        "//",
        "/style.css%00",
        "/style.css%0a",
        "/style.css/",
        "/STYLE.CSS",
        "/style.css;x",
        "/%00",
        "/%2f",
        "/index.html~",
    ):
        assert status(proxy.http_port, "GET", path) in (400, 404), path


@NEEDS_NGINX
def test_a_page_that_nginx_may_not_read_asks_nobody_for_a_key(server):
    with Proxy([server]) as proxy:
        (proxy.folder / "page" / "app.js").chmod(0)
        assert rejection(proxy.http_port, "GET", "/app.js") == (404, SENTENCES[404])


@NEEDS_NGINX
def test_a_malformed_request_for_the_page_is_rejected_like_any_other(proxy):
    chunks = "Transfer-Encoding: chunked"
    assert rejection(proxy.http_port, "GET", "/app.js", chunks, body=b"hello") == (400, SENTENCES[400])
    assert rejection(proxy.http_port, "GET", f"/?{9000 * 'a'}") == (400, SENTENCES[400])


@NEEDS_NGINX
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_clients_get_their_responses(proxy, protocol):
    connection = proxy.connect(protocol)
    connection.wait_for_model(timeout_s=1)
    np.testing.assert_array_equal(connection.infer(PHOTO)["inverted"][0], 255 - decode(PHOTO))
    assert connection.client.is_server_live()
    assert connection.client.is_server_ready()
    assert "Toy" in str(connection.client.get_model_metadata("Toy"))
    assert "dynamic_batching" in str(connection.client.get_model_config("Toy"))


@NEEDS_NGINX
def test_the_standard_health_check_of_grpc_gets_a_response(proxy):
    with grpc.insecure_channel(f"127.0.0.1:{proxy.grpc_port}") as channel:
        assert channel.unary_unary("/grpc.health.v1.Health/Check")(b"") == b"\x08\x01"  # SERVING


@NEEDS_NGINX
def test_chunks_and_compressed_bodies_are_rejected(proxy):
    chunks = b"1\r\nx\r\n" * 100_000 + b"0\r\n\r\n"
    assert status(proxy.http_port, "POST", INFER, RAW, "Transfer-Encoding: chunked", body=chunks) == 411
    bomb = gzip.compress(bytes(10_000_000))
    length = f"Content-Length: {len(bomb)}"
    for encoding in ("gzip", "deflate", "br"):
        headers = RAW, length, f"Content-Encoding: {encoding}"
        assert rejection(proxy.http_port, "POST", INFER, *headers, body=bomb) == (415, SENTENCES[415])
    for algorithm in (grpc.Compression.Gzip, grpc.Compression.Deflate):
        code = grpc_status(proxy.grpc_port, f"{SERVICE}/ModelInfer", bytes(10_000_000), compression=algorithm)
        assert code is grpc.StatusCode.UNIMPLEMENTED


@NEEDS_NGINX
@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ((RAW, "Content-Length: 52000000"), 413),
        (("Content-Length: 1000001",), 400),  # all of it JSON
        (("Inference-Header-Content-Length: 20000", "Content-Length: 30000"), 413),
        (("Inference-Header-Content-Length: 18446744073709551616", "Content-Length: 9"), 413),
        (("Inference-Header-Content-Length: -1", "Content-Length: 9"), 400),
        (("Inference-Header-Content-Length: 0x9", "Content-Length: 9"), 400),
        (("Inference-Header-Content-Length: 010", "Content-Length: 99"), 400),  # 8 or 10
        ((RAW, "Content-Length: -9"), 400),
        ((RAW,), 411),
    ],
)
def test_sizes_that_are_wrong_or_too_large_are_rejected_before_the_body(proxy, headers, expected):
    assert rejection(proxy.http_port, "POST", INFER, *headers) == (expected, SENTENCES[expected])


@NEEDS_NGINX
def test_a_rejection_over_grpc_says_what_is_wrong_in_a_sentence(proxy):
    with grpc.insecure_channel(f"127.0.0.1:{proxy.grpc_port}") as channel, pytest.raises(grpc.RpcError) as error:
        channel.unary_unary(f"{SERVICE}/LogSettings")(b"", timeout=60)
    assert error.value.details() == SENTENCES[404]


@NEEDS_NGINX
def test_a_large_message_over_grpc_is_rejected(proxy):
    code = grpc_status(proxy.grpc_port, f"{SERVICE}/ModelInfer", bytes(52_000_000))
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED


@NEEDS_NGINX
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_photo_of_the_largest_size_passes(proxy, protocol):
    photo = encode(Image.new("RGB", (4100, 4100)), "BMP")
    assert 50_000_000 < len(photo) < 51_048_576
    assert (proxy.connect(protocol).infer(photo, ("mean",))["mean"] == 0).all()


@NEEDS_NGINX
def test_administration_is_out_of_reach_even_with_the_token(proxy, server):
    token = access_token(server)
    with tritonclient.grpc.InferenceServerClient(f"127.0.0.1:{server.grpc_port}") as client:  # the token is right
        client.get_model_repository_index(headers={"triton-grpc-protocol-triton-access-token": token})
    for headers in ((), (f"triton-access-token: {token}",)):
        for path in ("/v2/repository/index", "/v2/systemsharedmemory/status", "/v2/models/Toy/stats", "/v2/logging"):
            for spelling in (path, path.replace("/v2/", "//v2//"), f"/v2/health/../..{path}", path.replace("o", "%6f")):
                rejected = rejection(proxy.http_port, "POST", spelling, *headers, "Content-Length: 0")
                assert rejected == (404, SENTENCES[404])
                assert status(proxy.http_port, "GET", spelling, *headers) == 404
    for path in ("/v2/models/Toy", "/v2/models/Toy/config", "/v2/models/Toy/ready", "/v2/health/live"):
        assert status(proxy.http_port, "GET", path) == 200
        assert status(proxy.http_port, "GET", f"{path}%0a") == 404
    for metadata in ((), (("triton-grpc-protocol-triton-access-token", token),)):
        for method in ("RepositoryIndex", "SystemSharedMemoryStatus", "ModelStatistics", "LogSettings", "TraceSetting"):
            code = grpc_status(proxy.grpc_port, f"{SERVICE}/{method}", metadata=metadata)
            assert code is grpc.StatusCode.UNIMPLEMENTED


def changed(request: dict, place: str, value: object) -> dict:
    """Return a request with another value at a place such as ``inputs.0.name``."""
    *path, last = [int(step) if step.isdigit() else step for step in place.split(".")]
    target = request
    for step in path:
        target = target[step]
    target[last] = value
    return request


SIZE = len(PHOTO)
IMAGE, BINARY = "the input must be image, UINT8, \\[1, N\\]", "request binary data"


@NEEDS_NGINX
@pytest.mark.parametrize(
    ("place", "value", "sentence"),
    [
        # Triton would allocate the whole shape.
        ("inputs.0.shape", [1, 40_000_000_000], IMAGE),
        ("inputs.0.shape", [1, 2**64 + SIZE], IMAGE),
        ("inputs.0.shape", [2**32, 2**32], IMAGE),
        ("inputs.0.shape", [1, -SIZE], IMAGE),
        ("inputs.0.shape", [1, str(SIZE)], IMAGE),
        ("inputs.0.shape", [1, None], IMAGE),
        ("inputs.0.shape", [True, SIZE], IMAGE),
        ("inputs.0.shape", [1, SIZE, 1], IMAGE),
        ("inputs.0.shape", [SIZE], IMAGE),
        ("inputs.0.shape", {"0": 1, "1": SIZE, "length": 2}, IMAGE),
        ("inputs.0.name", "mean", IMAGE),
        ("inputs.0.datatype", "FP64", IMAGE),
        ("inputs.0.parameters.binary_data_size", SIZE - 1, IMAGE),
        ("inputs.0.parameters.binary_data_size", 2**64, IMAGE),
        (
            "inputs.0.parameters.shared_memory_region",
            "x",
            "parameters of the input may have binary_data_size",
        ),
        ("inputs.0.parameters", [], "parameters of the input must be an object"),
        ("inputs.0.data", [1], "the input may have name, datatype, shape, parameters, and nothing"),
        ("inputs.0", None, "the input must be an object"),
        ("inputs", [], "inputs must have one element"),
        ("inputs", 2 * described(PHOTO)["inputs"], "inputs must have one element"),
        ("inputs", {"0": {}}, "inputs must have one element"),
        # Responses would become JSON, which takes many times their size.
        ("parameters", {}, BINARY),
        ("parameters.binary_data_output", False, BINARY),
        ("parameters.binary_data_output", 1, "must be true or false"),
        ("outputs", [{"name": "inverted", "parameters": {}}], BINARY),
        ("outputs", [{"name": "inverted", "parameters": {"binary_data": False}}], BINARY),
        ("outputs", [{"name": "mean", "parameters": {"binary_data": True, "classification": 9}}], "and nothing else"),
        (
            "outputs",
            [{"name": "mean", "parameters": {"binary_data": True, "shared_memory_region": "x"}}],
            "and nothing",
        ),
        ("outputs", [{"name": "mean", "data": [1]}], "and nothing else"),
        ("outputs", [{"name": "mean"}, {"name": "mean"}], "the output mean is named twice"),
        ("outputs", [{"name": "secret"}], "unknown output, not one of inverted, mean"),
        ("outputs", [{"name": ["mean"]}], "unknown output"),
        ("outputs", {}, "outputs must be a list"),
        # Names, types and sizes of parameters
        (
            "parameters.secret",
            1,
            "parameters may have binary_data_output, hold, sleep_s, add, timeout",
        ),
        ("parameters.priority", 1, "and nothing else"),
        ("parameters.__proto__", {"secret": 1}, "and nothing else"),
        ("parameters.constructor", 1, "and nothing else"),
        ("parameters", [["add", 1]], "parameters must be an object"),
        ("parameters.add", "1", "add must be a number"),
        ("parameters.add", None, "add must be a number"),
        ("parameters.hold", 1, "hold must be text"),
        ("parameters.hold", "x" * 257, "hold must be text"),
        ("parameters.hold", "x\0", "hold must be text"),
        ("parameters.hold", "\N{SNOWMAN}", "hold must be text"),
        ("parameters.hold", "\ud800", "hold must be text"),
        ("parameters.timeout", -1, "timeout must be a whole number"),
        ("parameters.timeout", 0.5, "timeout must be a whole number"),
        ("parameters.timeout", 2**63, "timeout must be a whole number"),
        ("parameters.timeout", "1", "timeout must be a whole number"),
        ("id", "x" * 129, "id must have"),
        ("id", "secret\n", "id must have"),
        ("id", 7, "id must have"),
        ("secret", 1, "the request may have id, inputs, outputs, parameters, and nothing else"),
    ],
)
def test_json_with_anything_but_a_photo_request_is_rejected(proxy, place, value, sentence):
    request = changed(described(PHOTO), place, value)
    status, said = infer_rejection(proxy.http_port, json.dumps(request).encode(), PHOTO)
    assert status == 400
    assert re.search(sentence, said)
    assert "secret" not in said


GOOD_JSON = json.dumps(described(PHOTO)).encode()


@NEEDS_NGINX
@pytest.mark.parametrize(
    ("text", "photo"),
    [
        # Row 1 of the attacks: 83 bytes that ended the server.
        (b'{"inputs":[{"name":"image","datatype":"UINT8","shape":[1,40000000000],"data":[1]}]}', b""),
        (b'{"inputs":[{"name":"image","datatype":"UINT8","shape":[1,40000000000],"data":[1]}]}', PHOTO),
        (GOOD_JSON, b""),
        (GOOD_JSON, PHOTO[1:]),
        (GOOD_JSON, PHOTO + b"x"),
        (b"[" * 16_000, PHOTO),
        (b'{"inputs":' * 1_600, PHOTO),
        (GOOD_JSON + b"x", PHOTO),
        (GOOD_JSON + b"\0", PHOTO),
        (GOOD_JSON[:-1], PHOTO),
        (GOOD_JSON.replace(b"true", b"True"), PHOTO),
        (GOOD_JSON.replace(b"true", b'true, "add": NaN'), PHOTO),
        (GOOD_JSON.replace(b"true", b'true, "add": 1e999'), PHOTO),
        (GOOD_JSON.replace(b"true", b'true, "add": 0x1'), PHOTO),
        (GOOD_JSON.replace(b"true", b'true, "hold": "\xff"'), PHOTO),
        (GOOD_JSON.replace(b"image", b"image\0"), PHOTO),
        (GOOD_JSON.replace(b"image", b"\xc0\xa9mage"), PHOTO),
        (b"\xef\xbb\xbf" + GOOD_JSON, PHOTO),
        (b"null", PHOTO),
        (b"[]", PHOTO),
        (b"1", PHOTO),
        (b" ", PHOTO),
    ],
)
def test_json_that_is_malformed_or_does_not_fit_the_photo_is_rejected(proxy, text, photo):
    status, said = infer_rejection(proxy.http_port, text, photo)
    assert status == 400
    assert said.isascii()


@NEEDS_NGINX
def test_triton_gets_json_that_the_proxy_wrote():
    """Parsers disagree about which of two members with the same name counts, so Triton gets only one."""
    received = []

    class Recorder(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            received.append((self.headers, self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

    text = GOOD_JSON.replace(b'"shape": [', b'"shape": [1, 40000000000], "shape": [1.0e0, 0.').replace(
        b"0.1, %d]" % SIZE, b"%d.0]" % SIZE
    )
    text = text.replace(b"true", b'false, "\\u0061dd": 0.1, "binary_data_output": true')
    with http.server.HTTPServer(("127.0.0.1", 0), Recorder) as recorder:
        thread = threading.Thread(target=recorder.handle_request)
        thread.start()
        behind = SimpleNamespace(http_port=recorder.server_port, grpc_port=recorder.server_port, model_name="Toy")
        with Proxy([behind]) as proxy:
            lengths = f"Inference-Header-Content-Length: {len(text)}", f"Content-Length: {len(text) + SIZE}"
            assert status(proxy.http_port, "POST", INFER, *lengths, "X: y", body=text + PHOTO) == 200
        thread.join()
    ((headers, body),) = received
    clean = described(PHOTO)
    clean["parameters"]["add"] = 0.1
    written, photo = body[: len(text)], body[len(text) :]
    assert json.loads(written) == clean
    assert written.count(b"shape") == written.count(b"binary_data_output") == 1
    assert photo == PHOTO
    assert set(headers) == {"Host", "Content-Length", "Inference-Header-Content-Length"}


@NEEDS_NGINX
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_everything_that_tritons_client_says_about_a_photo_passes(proxy, protocol):
    connection = proxy.connect(protocol)
    outputs = [connection._triton.InferRequestedOutput(name) for name in ("mean", "inverted")]
    for parameters in ({}, {"add": 1}, {"add": 1, "sleep_s": 1e-05}, {"add": 1.0}):
        for options in ({}, {"outputs": outputs}, {"request_id": "a-1.b:2_c", "timeout": 10_000_000}):
            image = connection.image_input(PHOTO)
            result = connection.client.infer("Toy", [image], parameters=parameters, **options)
            assert (result.as_numpy("inverted")[0] == 255 - decode(PHOTO) - np.uint8(parameters.get("add", 0))).all()
            assert result.as_numpy("mean").shape == (1, 3)


@NEEDS_NGINX
def test_a_body_that_is_empty_is_rejected(proxy):
    sentence = "the photo is missing: send its bytes after the JSON, or as raw_input_contents"
    assert rejection(proxy.http_port, "POST", INFER, RAW, "Content-Length: 0") == (400, sentence)
    assert infer_rejection(proxy.http_port, json.dumps(described(b"")).encode()) == (400, sentence)
    assert grpc_rejection(proxy.grpc_port, b"")[0] is grpc.StatusCode.INVALID_ARGUMENT
    message = infer_message(b"").SerializeToString()
    assert grpc_rejection(proxy.grpc_port, message) == (grpc.StatusCode.INVALID_ARGUMENT, sentence)


def message_with(**fields: object) -> bytes:
    """Return a message for the toy with other values of fields, or more elements if they are repeated."""
    request = infer_message(PHOTO)
    request.MergeFrom(service_pb2.ModelInferRequest(**fields))
    return request.SerializeToString()


Request, Parameter = service_pb2.ModelInferRequest, service_pb2.InferParameter
TWICE, IN_FRONT = "the message has a field twice", "too long before the photo"
ENTRY = b'"\x09\n\x03add\x12\x02\x10\x01'
MESSAGE = infer_message(PHOTO).SerializeToString()


@NEEDS_NGINX
@pytest.mark.parametrize(
    ("message", "sentence"),
    [
        # Fields that cost tritonserver many times their size on the wire
        (b"\x2a\0" * 5_000_000, TWICE),
        (b"\x32\0" * 5_000_000, "unknown output"),
        (b"\x3a\0" * 5_000_000, "the photo is missing"),
        (MESSAGE + b"\x3a\0" * 5_000_000, "raw_input_contents must be one photo"),
        (b"\x22\0" * 5_000_000, IN_FRONT),
        (b"\x0a\0" * 5_000_000, TWICE),
        (b"\x08\0" * 5_000_000, "unknown field"),
        (b"\x0b\x0c" * 5_000_000, "unknown field"),
        (message_with(parameters={str(n): Parameter(bool_param=True) for n in range(1_000_000)}), "unknown parameter"),
        (message_with(parameters={"add": Parameter(int64_param=1)}).replace(ENTRY, 2 * ENTRY), "add is named twice"),
        # The input
        (message_with(inputs=infer_message(PHOTO).inputs), TWICE),
        (Request(model_name="Toy", raw_input_contents=[PHOTO]).SerializeToString(), IMAGE),
        (MESSAGE.replace(b"UINT8", b"BYTES"), IMAGE),
        (MESSAGE.replace(b"image", b"imag\0"), IMAGE),
        (MESSAGE[:-1], "send one message|raw_input_contents"),
        (MESSAGE + b"x", "raw_input_contents must be one photo"),
        (message_with(raw_input_contents=[PHOTO]), "raw_input_contents must be one photo"),
        # The outputs
        (message_with(outputs=[{"name": "secret"}]), "unknown output, not one of inverted, mean"),
        (message_with(outputs=[{"name": "mean"}, {"name": "mean"}]), "the output mean is named twice"),
        (
            message_with(outputs=[{"name": "mean", "parameters": {"classification": Parameter(int64_param=9)}}]),
            "unknown output|nothing else",
        ),
        # Parameters
        (message_with(parameters={"secret": Parameter(int64_param=1)}), "unknown parameter, not one of hold"),
        (message_with(parameters={"__proto__": Parameter(int64_param=1)}), "unknown parameter"),
        (message_with(parameters={"add": Parameter(string_param="1")}), "add must be a number"),
        (message_with(parameters={"add": Parameter(bool_param=True)}), "add must be a number"),
        (message_with(parameters={"add": Parameter()}), "malformed"),
        (message_with(parameters={"hold": Parameter(int64_param=1)}), "hold must be text"),
        (message_with(parameters={"hold": Parameter(double_param=1)}), "hold must be text"),
        (message_with(parameters={"hold": Parameter(string_param="x" * 257)}), "hold must be text"),
        (
            message_with(parameters={"hold": Parameter(string_param="secret")}).replace(b"secret", b"\xff" * 6),
            "hold must",
        ),
        (message_with(parameters={"hold": Parameter(string_param="\N{SNOWMAN}")}), "hold must be text"),
        (message_with(parameters={"timeout": Parameter(int64_param=-1)}), "timeout must be a whole number"),
        (message_with(parameters={"timeout": Parameter(int64_param=2**62)}), "timeout must be a whole number"),
        # The rest
        (message_with(model_name="secret"), "the model must be Toy"),
        (message_with(model_version="1"), "unknown field"),
        (message_with(id="x" * 129), "id must have"),
        (message_with(id="secret\n"), "id must have"),
        (MESSAGE + MESSAGE, "raw_input_contents must be one photo"),
        (bytes(10_000_000), "unknown field"),
        (b"\xff" * 10_000_000, "unknown field|malformed"),
        (b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff", "malformed"),
    ],
)
def test_a_message_with_anything_but_a_photo_request_is_rejected(proxy, message, sentence):
    code, said = grpc_rejection(proxy.grpc_port, message)
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert re.search(sentence, said), said
    assert said.isascii()
    assert "secret" not in said


@pytest.fixture(scope="module")
def both(servers) -> Iterator[Proxy]:
    """A proxy in front of two servers."""
    with Proxy([*servers.values()], api_keys=f"{KEY} alice;\n") as proxy:
        yield proxy


ANOTHER_TYPE = (("content-type", "text/plain"), ("te", "trailers"))
INVALID, UNIMPLEMENTED = "3", "12"


@NEEDS_NGINX
@pytest.mark.parametrize(
    ("method", "headers", "expected"),
    [
        ("POST", (*GRPC_HEADERS, ("grpc-timeout", "5")), INVALID),
        ("POST", (*GRPC_HEADERS, ("grpc-timeout", "")), INVALID),
        ("POST", (*GRPC_HEADERS, ("grpc-timeout", "-1S")), INVALID),
        ("POST", (*GRPC_HEADERS, ("grpc-timeout", "123456789S")), INVALID),
        ("POST", (*GRPC_HEADERS, ("grpc-timeout", "1S"), ("grpc-timeout", "x")), INVALID),
        ("POST", (*GRPC_HEADERS, ("grpc-previous-rpc-attempts", "x")), INVALID),
        ("POST", (*GRPC_HEADERS, ("grpc-retry-pushback-ms", "x")), INVALID),
        ("POST", (*GRPC_HEADERS, ("grpc-internal-encoding-request", "x")), INVALID),
        ("POST", (*GRPC_HEADERS, ("grpc-status", "x")), INVALID),
        ("POST", (*GRPC_HEADERS, ("x-bin", "!!!!")), INVALID),
        ("POST", (*GRPC_HEADERS, ("lb-cost-bin", "AA")), INVALID),
        ("POST", ANOTHER_TYPE, INVALID),
        ("POST", (*GRPC_HEADERS, ("content-type", "application/grpcx")), INVALID),
        ("HEAD", GRPC_HEADERS, UNIMPLEMENTED),
        ("OPTIONS", GRPC_HEADERS, UNIMPLEMENTED),
        # These reach the server, which responds.
        ("POST", (*GRPC_HEADERS, ("grpc-timeout", "0S")), "4"),
        ("POST", (*GRPC_HEADERS, ("grpc-timeout", "99999999H"), ("grpc-accept-encoding", "gzip,,x")), "0"),
        ("POST", (*GRPC_HEADERS, ("connection", "close"), ("x", "\x7f"), ("lb-token", "x")), "0"),
        ("POST", GRPC_HEADERS[:1], "2"),
    ],
)
def test_no_headers_of_a_call_make_the_proxy_mark_servers_as_failed(both, method, headers, expected):
    """If a server resets two calls, nginx gives it no others for 10 s. This needs no key."""
    before, path = len(both.grpc_statuses()), f"{SERVICE}/ServerLive"
    streams = range(1, 12, 2)
    calls = [h2_request(stream, method, path, *headers) + h2_data(stream, bytes(5)) for stream in streams]
    with connected(both.grpc_port) as connection:
        send(connection, H2_PREFACE + b"".join(calls))
        wait_for(lambda: len(both.grpc_statuses()) == before + len(streams))
    assert set(both.grpc_statuses()[before:]) == {expected}
    good = Connection(both.url("grpc"), "Toy", api_key=KEY)
    assert all(good.infer(PHOTO, ("mean",))["mean"].shape == (1, 3) for _ in range(4))


@NEEDS_NGINX
def test_no_health_check_over_http_makes_the_proxy_mark_servers_as_failed(both):
    for path in ("/v2/health/live", "/v2/models/Toy/ready"):
        for headers in ((), ("Content-Length: 1000",), ("Content-Length: 0", "Upgrade: h2c", "TE: x")):
            body = bytes(1000) if "1000" in str(headers) else b""
            assert {status(both.http_port, "GET", path, *headers, body=body) for _ in range(6)} == {200}
    chunks = b"3\r\nabc\r\n0\r\n\r\n"
    assert status(both.http_port, "GET", "/v2/health/live", "Transfer-Encoding: chunked", body=chunks) == 200
    good = Connection(both.url("http"), "Toy", api_key=KEY)
    assert all(good.infer(PHOTO, ("mean",))["mean"].shape == (1, 3) for _ in range(4))


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_certificate(tmp_path_factory.mktemp("tls"))


@NEEDS_NGINX
def test_tls_and_the_api_key(server, certificate, monkeypatch):
    monkeypatch.chdir(ROOT)
    context = ssl.create_default_context(cafile=str(certificate))

    def ask(method: str, path: str, body: bytes | None = None, **headers: str) -> int:
        connection = http.client.HTTPSConnection("localhost", locked.https_port, context=context, timeout=10)
        connection.request(method, path, body, headers)
        return connection.getresponse().status

    with Proxy([server], certificate, api_keys=f"{KEY} alice;\n") as locked:
        assert ask("GET", "/v2/models/Toy/ready") == 200  # health needs no key
        infer = partial(ask, "POST", INFER, PHOTO, **{"Inference-Header-Content-Length": "0"})
        for request in (partial(ask, "GET", "/v2/models/Toy"), infer):
            assert request() == 403
            assert request(Authorization=f"Bearer {KEY.upper()}") == 403
            assert request(Authorization=f"Bearer {KEY}") == 200

        with tritonclient.grpc.InferenceServerClient(
            f"localhost:{locked.grpcs_port}", ssl=True, root_certificates=str(certificate)
        ) as client:
            image = locked.connect("grpc").image_input(PHOTO)
            assert client.is_model_ready("Toy")
            for rejected in (client.get_model_metadata, partial(client.infer, inputs=[image])):
                with pytest.raises(Exception, match="send a valid API key"):
                    rejected("Toy")
            result = client.infer("Toy", [image], headers={"authorization": f"Bearer {KEY}"})
            assert (result.as_numpy("inverted")[0] == 255 - decode(PHOTO)).all()

        # The example in the documentation, and the changes that it names for HTTP.
        monkeypatch.setenv("API_KEY", KEY)
        page = (ROOT / "docs" / "security.md").read_text()
        example = textwrap.dedent(page.split("With TLS and a key in Python:\n")[1].split("\n`ca.pem`")[0])
        for_http = {
            "tritonclient.grpc": "tritonclient.http",
            "8444": "8443",
            'root_certificates="ca.pem"': 'ssl_options={"ca_certs": "ca.pem"}',
        }
        assert all(there in page for there in for_http.values())
        for code in (example, adapt(example, for_http)):
            ports = {"8444": locked.grpcs_port, "8443": locked.https_port}
            for there, here in ports.items():
                code = code.replace(f"example.com:{there}", f"localhost:{here}")
            names: dict = {}
            exec(adapt(code, {"ResNet101": "Toy", "ca.pem": str(certificate)}), names)
            assert (names["result"].as_numpy("inverted")[0] == 255 - decode(PHOTO)).all()
