# SPDX-License-Identifier: Apache-2.0
"""client.py: its requests, its files, its report and its exit status."""

import contextlib
import http.server
import itertools
import json
import signal
import socket
import socketserver
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from conftest import PROTOCOLS, ROOT, SAMPLES, Done, Server, decode, encode, psnr, run_python, sample, wait_for
from front_door import make_certificate
from PIL import Image

import client
from client_files import RECORD
from tools.launch import free_ports

PERSON, CAT = SAMPLES["person"][0], SAMPLES["cat"][0]
SCHEMES = (*PROTOCOLS, "https", "grpcs")


@pytest.fixture(params=PROTOCOLS)
def url(server: Server, request: pytest.FixtureRequest) -> str:
    return server.connect(request.param).url


def image(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def kept(done: Done) -> int:
    """Return the share in the report on one photo, in percent."""
    return int(done.out.split("pixels, ")[1].split("% kept")[0])


def test_without_arguments_it_reports_on_the_sample_photo(server, tmp_path):
    done = run_python(ROOT / "client.py", "--url", server.http_url, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "orig.jpg: 512 x 512 pixels, 4" in done.stdout
    assert "% kept" in done.stdout
    assert "client.py: 1 of 1 photo, 0 failed, " in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_it_writes_images_of_high_quality_in_the_order_of_the_paths(run_client, url, tmp_path):
    small = tmp_path / "small photo.png"
    sample("cat", (90, 60)).save(small)
    done = run_client("--url", url, "--dump-images", "--image-paths", PERSON, small, CAT, "--class-name", "cat")
    assert done.status == 0, done.err
    names = {f"{kind}{index}.jpg" for kind in ("orig", "segm") for index in range(3)}
    assert {path.name for path in tmp_path.iterdir()} == {small.name, RECORD} | names
    for index, path in enumerate([PERSON, small, CAT]):
        original, segmented = image(tmp_path / f"orig{index}.jpg"), image(tmp_path / f"segm{index}.jpg")
        assert psnr(original, decode(path.read_bytes())) > 35
        assert segmented.shape == original.shape
    assert image(tmp_path / "segm0.jpg").mean() < 3  # no cat there
    inside = np.s_[100:200, 100:250]
    assert psnr(image(tmp_path / "segm2.jpg")[inside], image(tmp_path / "orig2.jpg")[inside]) > 35
    sample("person").save(tmp_path / "quality95.jpg", quality=95)
    quality = Image.open(tmp_path / "quality95.jpg").quantization
    assert Image.open(tmp_path / "orig0.jpg").quantization == quality


def test_it_creates_the_output_folder(run_client, server, tmp_path):
    done = run_client("--url", server.http_url, "--dump-images", "--output-dir", "a/b")
    assert done.status == 0, done.err
    assert (tmp_path / "a" / "b" / "segm0.jpg").exists()


def test_it_sends_the_class_and_the_threshold(run_client, server):
    assert kept(run_client("--url", server.http_url, "--threshold", 1)) == 0
    done = run_client("--url", server.http_url, "--class-name", "cat", "--image-paths", CAT)
    assert 75 < kept(done) < 85  # the cat fills 79 % of the photo


def test_the_share_kept_does_not_depend_on_the_files_to_write(run_client, server, tmp_path):
    photo = np.array(sample("person", (200, 200)))
    photo[:100, :50] = 0  # black pixels are no different from others
    Image.fromarray(photo).save(tmp_path / "dark.png")
    asked = [(), ("--dump-images",), ("--mask",), *(("--format", name) for name in ("jpeg", "png", "webp"))]
    numbers = set()
    for options in asked:
        done = run_client(
            "--url", server.http_url, *options, "--image-paths", "dark.png", "--output-dir", "out", "--report", "report"
        )
        assert done.status == 0, done.err
        numbers.add((kept(done), json.loads((tmp_path / "report").read_text())["kept"]))
    mask = server.connect("http").infer((tmp_path / "dark.png").read_bytes(), ("mask",))["mask"]
    assert numbers == {(round(mask.mean() / 2.55), round(mask.mean() / 255, 6))}


@pytest.mark.parametrize("name", ["jpeg", "png", "webp"])
def test_it_writes_the_servers_files_unchanged_with_the_original_upright_and_the_mask(
    run_client, server, tmp_path, name
):
    orientation = Image.Exif()
    orientation[0x0112] = 6  # turned by 90 degrees
    photo = encode(sample("person", (300, 200)), "JPEG", quality=95, exif=orientation)
    (tmp_path / "turned.jpg").write_bytes(photo)
    arguments = ("--format", name, "--mask", "--dump-images", "--image-paths", "turned.jpg", "--output-dir", "out")
    done = run_client("--url", server.http_url, *arguments, "--class-name", "person,cat", "--threshold", 0.4)
    assert done.status == 0, done.err
    ending = "jpg" if name == "jpeg" else name
    original, mask, cut_out = (tmp_path / "out" / file for file in ("orig0.jpg", "mask0.png", f"segm0.{ending}"))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {original.name, mask.name, cut_out.name, RECORD}
    assert psnr(image(original), decode(photo)) > 40
    parameters = {"format": name, "class_name": "person,cat", "threshold": 0.4}
    expected = server.connect("http").infer(photo, ("encoded", "mask"), parameters)
    assert cut_out.read_bytes() == expected["encoded"].tobytes()
    assert np.array_equal(image(mask), expected["mask"][0] > 0)
    assert image(mask).any()
    assert f"turned.jpg: 200 x 300 pixels, {image(mask).mean():.0%} kept, {cut_out.stat().st_size / 1000:.0f} KB" in (
        done.out
    )


def test_it_writes_the_probability_the_labels_and_a_soft_edge(run_client, server, tmp_path):
    options = ("--format", "png", "--edge", 0.8, "--probability", "--labels", "--output-dir", "out")
    done = run_client("--url", server.http_url, *options)
    assert done.status == 0, done.err
    probability, labels, cut_out = (
        Image.open(tmp_path / "out" / f"{name}0.png") for name in ("probability", "labels", "segm")
    )
    expected = server.connect("http").infer(PERSON.read_bytes(), ("probability", "labels"))
    assert np.array_equal(np.asarray(probability), expected["probability"][0])
    assert np.array_equal(np.asarray(labels), expected["labels"][0])
    person = labels.convert("RGB").getpixel((labels.width // 2, labels.height // 2))
    assert person == (192, 128, 128)  # in Pascal VOC's palette
    assert len(np.unique(np.asarray(cut_out)[..., 3])) > 100


def test_each_thread_keeps_a_connection_of_its_own():
    connection = client.Connection("127.0.0.1")
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(lambda: connection.client).result() is not connection.client
    assert connection.client is connection.client


def test_a_url_without_a_scheme_means_http(run_client, server):
    assert run_client("--url", f"127.0.0.1:{server.http_port}").status == 0


def test_a_bad_photo_is_named_and_the_others_are_processed(run_client, url, tmp_path):
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "cut off.jpg").write_bytes(PERSON.read_bytes()[:50_000])
    (tmp_path / "note.txt").write_text("no photo")
    files = [PERSON, "empty.jpg", "cut off.jpg", "note.txt", CAT]
    done = run_client("--url", url, "--dump-images", "--image-paths", *files)
    assert done.status == 1
    assert "empty.jpg: the file is empty" in done.err
    assert "cut off.jpg: the photo is truncated" in done.err
    assert "note.txt: the photo (8 bytes) is damaged or of an unknown type" in done.err
    assert "\nclient.py: 5 of 5 photos, 3 failed, " in done.err
    assert "Traceback" not in done.err
    assert {path.name for path in tmp_path.glob("orig*.jpg")} == {"orig0.jpg", "orig4.jpg"}


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("--class-name", "unicorn", "class_name must be one of __background__, "),
        ("--threshold", "7", "threshold must be a number between 0 and 1, not 7.0"),
    ],
)
def test_a_rejection_is_reported(run_client, url, option, value, expected):
    done = run_client("--url", url, option, value)
    assert done.status == 1
    assert f"orig.jpg: {expected}" in done.err


def test_a_large_photo_is_processed(run_client, server, tmp_path):
    (tmp_path / "large.jpg").write_bytes(encode(sample("person", (4000, 3000)), "JPEG"))
    done = run_client("--url", server.grpc_url, "--image-paths", "large.jpg")
    assert done.status == 0, done.err
    assert "4000 x 3000 pixels" in done.out


@pytest.mark.parametrize("scheme", PROTOCOLS)
def test_without_a_server_it_fails_with_one_line(run_client, scheme):
    url = f"{scheme}://127.0.0.1:{free_ports(1)[0]}"
    done = run_client("--url", url, "--init-timeout-s", 0.5)
    assert done.status == 2
    assert done.err.splitlines()[-1].startswith(f"client.py: {url}: cannot reach the server (")
    assert "Traceback" not in done.err


class StallingServer(socketserver.ThreadingTCPServer):
    """Sends some data one byte at a time, over TLS if it has a certificate, and then nothing."""

    daemon_threads = True

    def __init__(self, data: bytes, certificate: Path | None = None):
        super().__init__(("127.0.0.1", 0), None)
        self.data, self.context = data, None
        if certificate:
            self.context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            self.context.load_cert_chain(certificate)
            self.context.set_alpn_protocols(["h2"])  # as gRPC requires

    def finish_request(self, connection: socket.socket, _: object) -> None:
        with contextlib.suppress(OSError):  # until the client disconnects
            if self.context:
                connection = self.context.wrap_socket(connection, server_side=True)
            for byte in self.data:
                connection.sendall(bytes([byte]))
                time.sleep(0.1)
            while connection.recv(1 << 16):
                pass


def test_a_server_that_stalls_is_not_waited_for_forever(tmp_path, monkeypatch):
    certificate = make_certificate(tmp_path)
    monkeypatch.setattr("connection.REQUEST_TIMEOUT_S", 1.0)
    response = b"HTTP/1.1 200 OK\r\n" + 50 * b"x: y\r\n"
    stalling = {
        StallingServer(b""): SCHEMES,
        StallingServer(response): ["http"],
        StallingServer(b"\x16\x03\x03\x40" + bytes(300)): ["https", "grpcs"],  # a handshake that does not end
        StallingServer(b"", certificate): ["https", "grpcs"],
        StallingServer(response, certificate): ["https"],
    }

    def try_both(server: StallingServer, scheme: str) -> float:
        url = f"{scheme}://localhost:{server.server_address[1]}"
        connection = client.Connection(url, ca_file=certificate)
        began = time.monotonic()
        with pytest.raises(client.ClientError, match=rf"^{url}: cannot reach the server \("):
            connection.wait_for_model(timeout_s=1)
        with pytest.raises(client.InferenceError, match=r"no response within 1 s|Deadline Exceeded"):
            connection.infer(b"photo")
        return time.monotonic() - began

    with contextlib.ExitStack() as stack, ThreadPoolExecutor(10) as pool:  # one after another would take longer
        for server in stalling:
            stack.enter_context(server)
            threading.Thread(target=server.serve_forever, daemon=True).start()
            stack.callback(server.shutdown)
        tries = [pool.submit(try_both, server, scheme) for server, schemes in stalling.items() for scheme in schemes]
        assert max(done.result() for done in tries) < 10


def test_the_library_of_grpc_adds_no_lines_of_its_own(server):
    url = f"grpcs://127.0.0.1:{server.grpc_port}"
    done = run_python(ROOT / "client.py", "--url", url)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"client.py: {url}: this port is for grpc: set --url {server.grpc_url}\n"


class OtherServer(http.server.BaseHTTPRequestHandler):
    """A server of something else."""

    def do_GET(self) -> None:
        self.send_error(404)


class SlowServer(http.server.BaseHTTPRequestHandler):
    """Says that it has the model, and then does not respond."""

    requests = threading.Semaphore(0)

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'{"name":"ResNet101"}')

    def do_POST(self) -> None:
        self.requests.release()
        time.sleep(100)


@pytest.fixture
def url_of(request: pytest.FixtureRequest) -> str:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), request.param) as other:
        other.daemon_threads = True
        threading.Thread(target=other.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{other.server_port}"
        other.shutdown()


class RudeServer(SlowServer):
    """Rejects a photo, and tries to clear the terminal."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        body = json.dumps({"error": "\x1b[2J\x1b]0;owned\a denied"}).encode()
        self.send_response(401)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


class ForgetfulServer(SlowServer):
    """Responds without the requested outputs."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        output = {"name": "original", "datatype": "UINT8", "shape": [1, 1, 1, 3], "data": [1, 2, 3]}
        body = json.dumps({"model_name": "ResNet101", "model_version": "1", "outputs": [output]}).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.mark.parametrize("url_of", [RudeServer], indirect=True)
def test_the_text_of_a_server_does_not_control_the_terminal(run_client, url_of):
    done = run_client("--url", url_of, "--image-paths", SAMPLES["cat"][0], "\x1b[2Jmissing.jpg")
    assert done.status == 2
    assert r"\x1b[2J\x1b]0;owned\x07 denied" in done.err
    assert r"\x1b[2Jmissing.jpg" in done.err
    assert "\x1b" not in done.out + done.err


@pytest.mark.parametrize("url_of", [ForgetfulServer], indirect=True)
def test_a_response_without_a_mask_is_incomplete(run_client, url_of):
    done = run_client("--url", url_of, "--retry-s", 0)
    assert (done.status, done.out) == (1, "")
    assert "the response is incomplete (without mask)\n" in done.err


@pytest.mark.parametrize("url_of", [OtherServer], indirect=True)
def test_a_server_of_something_else_is_recognized(run_client, url_of):
    done = run_client("--url", url_of, "--init-timeout-s", 0.5)
    assert done.status == 2
    assert done.err.splitlines()[-1] == (
        f"client.py: {url_of}: the model ResNet101 is not ready (the response is not from Triton (HTTP status 404)), "
        "even after 0.5 s. If the server is still starting, raise --init-timeout-s; otherwise, start it with "
        "`python server.py`, or set --url"
    )


@pytest.mark.parametrize("scheme", PROTOCOLS)
def test_a_model_that_the_server_does_not_have_is_named(server, scheme):
    url = server.connect(scheme).url
    with pytest.raises(client.ClientError) as error:
        client.Connection(url, "ResNet50").wait_for_model(timeout_s=0.5)
    reason = "Request for unknown model: 'ResNet50' is not found"
    assert str(error.value).startswith(f"{url}: the model ResNet50 is not ready ({reason}), even after 0.5 s. ")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_port_for_other_requests_is_recognized(server, scheme):
    url = f"{scheme}://127.0.0.1:{server.metrics_port}"
    with pytest.raises(client.ClientError) as error:
        client.Connection(url).wait_for_model(timeout_s=60)
    assert str(error.value) == (
        f"{url}: this port is not for inference requests: by default, port 8000 is for HTTP and 8001 for gRPC"
    )


@pytest.mark.parametrize(
    ("scheme", "expected"), [pair for pair in itertools.product(SCHEMES, PROTOCOLS) if pair[0] != pair[1]]
)
def test_a_url_that_does_not_fit_the_port_is_corrected_at_once(server, scheme, expected):
    address = f"127.0.0.1:{server.http_port if expected == 'http' else server.grpc_port}"
    began = time.monotonic()
    with pytest.raises(client.ClientError) as error:
        client.Connection(f"{scheme}://{address}", api_key="a-key").wait_for_model(timeout_s=60)
    assert time.monotonic() - began < 5
    assert str(error.value) == f"{scheme}://{address}: this port is for {expected}: set --url {expected}://{address}"


@contextlib.contextmanager
def closing_port(response: bytes) -> Iterator[tuple[int, list[bytes]]]:
    """Yield a port that responds to anything with these bytes and closes the connection, and what it has received."""
    received: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def close_each() -> None:
            with contextlib.suppress(OSError):  # until the test ends
                while True:
                    connection, _ = listening.accept()
                    with connection, contextlib.suppress(ConnectionError):
                        received.append(connection.recv(1 << 16))
                        connection.sendall(response)

        threading.Thread(target=close_each, daemon=True).start()
        yield listening.getsockname()[1], received
        listening.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("scheme", ["http", "grpc"])
@pytest.mark.parametrize(
    "response", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\nThe plain HTTP request was sent to HTTPS port"]
)
def test_a_port_that_may_expect_tls_gets_no_key(scheme, response):
    with closing_port(response) as (port, received):
        connection = client.Connection(f"{scheme}://127.0.0.1:{port}", api_key="a-secret-key")
        with pytest.raises(client.ClientError):
            connection.wait_for_model(timeout_s=2)
    assert received
    assert not any(b"a-secret-key" in request for request in received)


def test_a_port_that_ends_each_handshake_may_be_that_of_a_proxy_with_tls_that_restarts():
    with closing_port(b"") as (port, _):
        connection = client.Connection(f"https://127.0.0.1:{port}")
        with pytest.raises(client.ClientError, match=r": cannot reach the server \(.*\), even after 1 s\. "):
            connection.wait_for_model(timeout_s=1)
        with pytest.raises(client.InferenceError, match="EOF") as error:
            connection.infer(b"photo")
        assert error.value.transient


def test_it_waits_until_the_server_listens_and_the_model_is_ready(caplog):
    caplog.set_level("INFO", logger="client")
    asked = itertools.count(1)

    class LateServer(http.server.BaseHTTPRequestHandler):
        """Says that the model is ready from the third request on."""

        def do_GET(self) -> None:
            self.send_response(200 if next(asked) >= 3 else 400)
            self.end_headers()
            self.wfile.write(b"{}")

    with http.server.HTTPServer(("127.0.0.1", 0), LateServer, bind_and_activate=False) as late:
        late.server_bind()  # until it listens, connections are refused
        url = f"http://127.0.0.1:{late.server_port}"

        def listen() -> None:
            wait_for(lambda: caplog.messages)  # after the first rejection
            late.server_activate()
            for _ in range(3):
                late.handle_request()

        threading.Thread(target=listen, daemon=True).start()
        client.Connection(url).wait_for_model(timeout_s=30)
    assert caplog.messages == [f"waiting up to 30 s for {url} to serve ResNet101"]
    assert next(asked) == 4


@pytest.mark.parametrize("url_of", [SlowServer], indirect=True)
def test_ctrl_c_does_not_wait_for_the_requests_in_flight(url_of, tmp_path):
    options = ["--url", url_of, "--concurrency", "2", "--image-paths", *[PERSON] * 9]
    command = [sys.executable, ROOT / "client.py", *options]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        for _ in range(2):
            assert SlowServer.requests.acquire(timeout=30)
        assert not SlowServer.requests.acquire(timeout=0.5)  # no more than --concurrency
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=5) == 130
        said = process.stderr.read()
    assert said.splitlines()[-1] == "client.py: interrupted"
    assert "Traceback" not in said
