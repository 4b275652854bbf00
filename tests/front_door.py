# SPDX-License-Identifier: Apache-2.0
"""The proxy as it is shipped, in front of the servers of a test, and the tools to attack it, all on loopback."""

import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import grpc
import psutil
import pytest
from conftest import MODEL_NAME, ROOT, Server, wait_for
from tritonclient.grpc import service_pb2

from client import Connection
from tools.launch import free_ports

NGINX = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
NEEDS_NGINX = pytest.mark.skipif(
    not NGINX or not Path("/usr/lib/nginx/modules/ngx_http_js_module.so").exists(),
    reason="needs nginx: apt install nginx libnginx-mod-http-js",
)
# Attacks and the client that must not notice them have different addresses.
ATTACKER = "127.0.0.2"
SERVICE = "/inference.GRPCInferenceService"
KEY = "6fa04a" + 29 * "5c"
OPEN = "default anyone;\n"  # in api_keys.conf
# The toy's contract in infer.js.
TOY = {
    "'ResNet101'": "'Toy'",
    "['original', 'segmented', 'mask', 'probability', 'labels', 'encoded']": "['inverted', 'mean']",
    "class_name: 'text', threshold: 'number', format: 'text', quality: 'number', content: 'text', edge:": (
        "hold: 'text', sleep_s: 'number', add:"
    ),
}


def adapt(configuration: str, replacements: Mapping[str, str]) -> str:
    """Return a configuration with replacements for the test. Each of them must match."""
    for there, here in replacements.items():
        assert there in configuration, there
        configuration = configuration.replace(there, here)
    return configuration


def image_files() -> dict[str, Path]:
    """Return the files that proxy.Dockerfile copies to /etc/proxy, by their paths there."""
    copied = re.findall(r"^COPY (.*) /etc/proxy/(.*)$", (ROOT / "deploy/proxy.Dockerfile").read_text(), re.MULTILINE)
    files = {}
    for names, folder in copied:
        for path in (ROOT / "deploy" / name for name in names.split()):
            files |= {folder + file.name: file for file in ([path] if path.is_file() else path.iterdir())}
    return files


class Proxy:
    """nginx with the files that are deployed, where only addresses, keys and the model's contract are replaced."""

    def __init__(
        self,
        servers: Sequence[Server],
        certificate: Path | None = None,
        api_keys: str = OPEN,
        files: Mapping[str, Path] | None = None,
    ):
        """``certificate`` is a PEM file with its key; then the proxy also has TLS ports. ``api_keys`` are lines to add.

        ``files`` are those in /etc/proxy, by default the ones of the image.
        """
        self.http_port, self.grpc_port, self.https_port = free_ports()
        (self.grpcs_port,) = free_ports(1)
        self._servers = servers
        # nginx's workers drop root privileges, and need a folder that they can reach.
        self.folder = Path(tempfile.mkdtemp(prefix="nginx-"))
        self.folder.chmod(0o755)
        replacements = {
            MODEL_NAME: servers[0].model_name,
            "listen 8080;": f"listen 127.0.0.1:{self.http_port};",
            "listen 8081 http2;": f"listen 127.0.0.1:{self.grpc_port} http2;",
        }
        if certificate:
            replacements |= {
                "# listen 8443 ": f"listen 127.0.0.1:{self.https_port} ",
                "# listen 8444 ": f"listen 127.0.0.1:{self.grpcs_port} ",
                "/etc/tls/tls.crt": str(certificate),
                "/etc/tls/tls.key": str(certificate),
            }
        self._texts = {name: path.read_text() for name, path in (files or image_files()).items()}
        for name, text in self._texts.items():
            if name == "nginx.conf":
                text = adapt(text, replacements)
            if name == "infer.js" and servers[0].model_name == "Toy":
                text = adapt(text, TOY)
            if name == "api_keys.conf":
                text += api_keys
            (self.folder / name).parent.mkdir(exist_ok=True)
            (self.folder / name).write_text(text)
        self._write_servers(())
        self.log = self.folder / "log"
        with self.log.open("a") as log:
            command = [NGINX, "-p", self.folder, "-c", self.folder / "nginx.conf"]
            self.process = subprocess.Popen(command, stdout=log, stderr=log)

    def __enter__(self) -> "Proxy":
        def listens() -> bool:
            assert self.process.poll() is None, self.log.read_text()
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.grpc_port)):
                return True
            return False

        try:
            wait_for(listens)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait()
        shutil.rmtree(self.folder)

    def _write_servers(self, down: Sequence[Server]) -> None:
        def lines(port_name: str) -> str:
            return "\n".join(
                f"server 127.0.0.1:{getattr(server, port_name)}{' down' if server in down else ''};"
                for server in self._servers
            )

        text = self._texts["servers.conf"]
        for port, port_name in (("8000", "http_port"), ("8001", "grpc_port")):
            text, count = re.subn(rf"server \S+:{port};", lines(port_name), text)
            assert count == 1
        (self.folder / "servers.conf").write_text(text)

    def grpc_statuses(self) -> list[str]:
        """Return the gRPC statuses of the attacker's calls, from the log: clients get them after a response."""
        lines = [line for line in self.log.read_text().splitlines() if line.startswith(f"{ATTACKER} ")]
        return [status for line in lines if (status := line.split('" ')[-1].split(" ")[1].strip("-"))]

    def workers(self) -> list[psutil.Process]:
        """Return nginx's worker processes."""
        return psutil.Process(self.process.pid).children()

    def drain(self, server: Server) -> None:
        """Take a server out of service, as deploy/servers.conf says, and return when it has no requests any more."""
        before = self.workers()
        self._write_servers([server])
        self.process.send_signal(signal.SIGHUP)
        _, alive = psutil.wait_procs(before, timeout=60)
        assert not alive

    def memory(self) -> int:
        """Return the memory of its processes in bytes."""
        processes = [psutil.Process(self.process.pid), *self.workers()]
        return sum(process.memory_full_info().pss for process in processes)

    def url(self, protocol: str) -> str:
        return f"{protocol}://127.0.0.1:{self.http_port if protocol == 'http' else self.grpc_port}"

    def connect(self, protocol: str) -> Connection:
        """Return a connection over ``http`` or ``grpc``."""
        return Connection(self.url(protocol), self._servers[0].model_name)


@contextlib.contextmanager
def connected(port: int, receive_buffer: int = 0) -> Iterator[socket.socket]:
    """Connect from the attacker's address."""
    with socket.socket() as connection:
        if receive_buffer:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        connection.bind((ATTACKER, 0))
        connection.settimeout(60)
        connection.connect(("127.0.0.1", port))
        yield connection


def send(connection: socket.socket, data: bytes) -> None:
    """Send as much as the other side accepts."""
    with contextlib.suppress(OSError):  # it may have already responded and closed the connection
        connection.sendall(data)


def receive(connection: socket.socket) -> bytes:
    """Return the data that arrives until the other side closes the connection, or until the timeout."""
    received = b""
    with contextlib.suppress(OSError):
        while part := connection.recv(1 << 16):
            received += part
    return received


def request_head(method: str, path: str, *headers: str) -> bytes:
    """Return a request up to its body. The connection is closed after it."""
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: test", "Connection: close", *headers, "", ""]).encode()


def statuses(port: int, data: bytes) -> list[int]:
    """Send bytes over a new connection, and return the HTTP statuses of all responses until it is closed."""
    with connected(port) as connection:
        send(connection, data)
        received = receive(connection)
    return [int(number) for number in re.findall(rb"HTTP/1\.1 (\d{3}) ", received)]


def status(port: int, method: str, path: str, *headers: str, body: bytes = b"") -> int:
    """Send a request unchanged, and return the status of the first response."""
    with connected(port) as connection:
        send(connection, request_head(method, path, *headers) + body)
        return int(connection.makefile("rb").readline().split()[1])


def rejection(port: int, method: str, path: str, *headers: str, body: bytes = b"") -> tuple[int, str]:
    """Send a request unchanged, and return the status and the sentence with which it is rejected."""
    with connected(port) as connection:
        send(connection, request_head(method, path, *headers) + body)
        # Until the response is complete: nginx waits for a body that does not come before it closes the connection.
        response = http.client.HTTPResponse(connection)
        response.begin()
        assert response.headers["Content-Type"] == "application/json"
        return response.status, json.loads(response.read())["error"]


def grpc_status(port: int, method: str, message: bytes = b"", **options: object) -> grpc.StatusCode:
    """Call a method over gRPC, and return its status."""
    sizes = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
    with grpc.insecure_channel(f"127.0.0.1:{port}", sizes) as channel:
        try:
            channel.unary_unary(method)(message, timeout=60, **options)
        except grpc.RpcError as error:
            return error.code()
    return grpc.StatusCode.OK


def infer_rejection(port: int, json_part: bytes, photo: bytes = b"") -> tuple[int, str]:
    """Send JSON and a photo after it to the toy, and return the status and the sentence of the rejection."""
    lengths = f"Inference-Header-Content-Length: {len(json_part)}", f"Content-Length: {len(json_part) + len(photo)}"
    return rejection(port, "POST", "/v2/models/Toy/infer", *lengths, body=json_part + photo)


def grpc_rejection(port: int, message: bytes) -> tuple[grpc.StatusCode, str]:
    """Send a message to the toy over gRPC, and return the status and the sentence with which it is rejected."""
    sizes = [("grpc.max_send_message_length", -1)]
    with grpc.insecure_channel(f"127.0.0.1:{port}", sizes) as channel, pytest.raises(grpc.RpcError) as error:
        channel.unary_unary(f"{SERVICE}/ModelInfer")(message, timeout=60)
    return error.value.code(), error.value.details()


def described(photo: bytes) -> dict:
    """Return the JSON that Triton's HTTP client sends to the toy with a photo."""
    size = len(photo)
    image = {"name": "image", "datatype": "UINT8", "shape": [1, size], "parameters": {"binary_data_size": size}}
    return {"inputs": [image], "parameters": {"binary_data_output": True}}


def infer_message(photo: bytes) -> service_pb2.ModelInferRequest:
    """Return the message that Triton's gRPC client sends to the toy with a photo."""
    request = service_pb2.ModelInferRequest(model_name="Toy", raw_input_contents=[photo])
    request.inputs.add(name="image", datatype="UINT8", shape=[1, len(photo)])
    return request


DATA, HEADERS, RST_STREAM, SETTINGS, GOAWAY = 0, 1, 3, 4, 7
END_STREAM, END_HEADERS = 1, 4


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """Return a frame of HTTP/2."""
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


def h2_request(stream: int, method: str, path: str, *headers: tuple[str, str], flags: int = 0) -> bytes:
    """Return the HEADERS frame of a request, with each header spelled out."""
    pseudo = [(":method", method), (":scheme", "http"), (":path", path), (":authority", "test")]
    fields = [
        b"\0" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()
        for name, value in [*pseudo, *headers]
    ]
    return frame(HEADERS, END_HEADERS | flags, stream, b"".join(fields))


H2_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(SETTINGS, 0, 0)
GRPC_HEADERS = (("content-type", "application/grpc"), ("te", "trailers"))


def h2_data(stream: int, body: bytes) -> bytes:
    """Return a body as frames, of which the last one ends the stream."""
    parts = [body[start : start + 16384] for start in range(0, len(body), 16384)] or [b""]
    frames = [frame(DATA, 0, stream, part) for part in parts[:-1]]
    return b"".join([*frames, frame(DATA, END_STREAM, stream, parts[-1])])


def h2_status(received: bytes) -> int | None:
    """Return the HTTP status of the first response among the frames that a server has sent, or None."""
    while len(received) >= 9:
        length, kind = int.from_bytes(received[:3], "big"), received[3]
        payload, received = received[9 : 9 + length], received[9 + length :]
        if kind == HEADERS:
            payload = payload.lstrip(b"\x20")  # an update of the table size
            known = {0x88: 200, 0x8C: 400, 0x8D: 404, 0x8E: 500}
            return known.get(payload[0]) or int(payload[2:5])
    return None


def h2_exchange(connection: socket.socket, data: bytes) -> int | None:
    """Send frames after a preface, and return the status of the first response."""
    send(connection, H2_PREFACE + data)
    connection.settimeout(5)
    return h2_status(receive(connection))


def access_token(server: Server) -> str:
    """Return the token for Triton's administration. Its command line shows it to every user of the machine."""
    (tritonserver,) = server.processes("tritonserver")
    argument = next(word for word in tritonserver.cmdline() if ":triton-access-token=" in word)
    return argument.split("=")[1]


def make_certificate(folder: Path) -> Path:
    """Return a PEM file with a certificate for localhost and its key."""
    if not shutil.which("openssl"):
        pytest.skip("needs openssl")
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
    names = ["-addext", "subjectAltName=DNS:localhost"]
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    subprocess.run(
        [*command.split(), *names, "-keyout", key, "-out", certificate], check=True, capture_output=True, cwd=folder
    )
    certificate.write_text(certificate.read_text() + key.read_text())
    return certificate
