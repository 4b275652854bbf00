# SPDX-License-Identifier: Apache-2.0
"""The proxy lets clients through and refuses what harms the server. tests/long/test_attacks.py has the rest."""

import gzip
import http.client
import ssl
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

import grpc
import numpy as np
import pytest
import tritonclient.grpc
from conftest import PHOTO, PROTOCOLS, Server, decode, encode, running_together, start_toy
from front_door import (
    KEY,
    NEEDS_NGINX,
    SERVICE,
    Proxy,
    access_token,
    grpc_status,
    make_certificate,
    refusal,
    status,
)
from PIL import Image

INFER, RAW = "/v2/models/Toy/infer", "Inference-Header-Content-Length: 0"
SENTENCES = {
    400: "the request is malformed: check Content-Length and Inference-Header-Content-Length",
    404: "the proxy does not let this method and path through",
    411: "send the body with a Content-Length, not in chunks",
    413: "the request is too large: save the photo as a JPEG, or scale it down",
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


@NEEDS_NGINX
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_clients_get_their_answers(proxy, protocol):
    connection = proxy.connect(protocol)
    connection.wait_for_model(timeout_s=1)
    np.testing.assert_array_equal(connection.infer(PHOTO)["inverted"][0], 255 - decode(PHOTO))
    assert connection.client.is_server_live()
    assert connection.client.is_server_ready()
    assert "Toy" in str(connection.client.get_model_metadata("Toy"))
    assert "dynamic_batching" in str(connection.client.get_model_config("Toy"))


@NEEDS_NGINX
def test_the_standard_health_check_of_grpc_is_answered(proxy):
    with grpc.insecure_channel(f"127.0.0.1:{proxy.grpc_port}") as channel:
        assert channel.unary_unary("/grpc.health.v1.Health/Check")(b"") == b"\x08\x01"  # SERVING


@NEEDS_NGINX
def test_chunks_and_compressed_bodies_are_refused(proxy):
    chunks = b"1\r\nx\r\n" * 100_000 + b"0\r\n\r\n"
    assert status(proxy.http_port, "POST", INFER, RAW, "Transfer-Encoding: chunked", body=chunks) == 411
    bomb = gzip.compress(bytes(10_000_000))
    length = f"Content-Length: {len(bomb)}"
    for encoding in ("gzip", "deflate", "br"):
        headers = RAW, length, f"Content-Encoding: {encoding}"
        assert refusal(proxy.http_port, "POST", INFER, *headers, body=bomb) == (415, SENTENCES[415])
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
        ((RAW, "Content-Length: -9"), 400),
        ((RAW,), 411),
    ],
)
def test_sizes_that_are_wrong_or_too_large_are_refused_before_the_body(proxy, headers, expected):
    assert refusal(proxy.http_port, "POST", INFER, *headers) == (expected, SENTENCES[expected])


@NEEDS_NGINX
def test_a_refusal_over_grpc_says_what_is_wrong_in_a_sentence(proxy):
    with grpc.insecure_channel(f"127.0.0.1:{proxy.grpc_port}") as channel, pytest.raises(grpc.RpcError) as error:
        channel.unary_unary(f"{SERVICE}/LogSettings")(b"", timeout=60)
    assert error.value.details() == SENTENCES[404]


@NEEDS_NGINX
def test_a_large_message_over_grpc_is_refused(proxy):
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
                refused = refusal(proxy.http_port, "POST", spelling, *headers, "Content-Length: 0")
                assert refused == (404, SENTENCES[404])
                assert status(proxy.http_port, "GET", spelling, *headers) == 404
    for path in ("/v2/models/Toy", "/v2/models/Toy/config", "/v2/models/Toy/ready", "/v2/health/live"):
        assert status(proxy.http_port, "GET", path) == 200
        assert status(proxy.http_port, "GET", f"{path}%0a") == 404
    for metadata in ((), (("triton-grpc-protocol-triton-access-token", token),)):
        for method in ("RepositoryIndex", "SystemSharedMemoryStatus", "ModelStatistics", "LogSettings", "TraceSetting"):
            code = grpc_status(proxy.grpc_port, f"{SERVICE}/{method}", metadata=metadata)
            assert code is grpc.StatusCode.UNIMPLEMENTED


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_certificate(tmp_path_factory.mktemp("tls"))


@NEEDS_NGINX
def test_tls_and_the_api_key(server, certificate):
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
            for refused in (client.get_model_metadata, partial(client.infer, inputs=[image])):
                with pytest.raises(Exception, match="send a valid API key"):
                    refused("Toy")
            result = client.infer("Toy", [image], headers={"authorization": f"Bearer {KEY}"})
            assert (result.as_numpy("inverted")[0] == 255 - decode(PHOTO)).all()
