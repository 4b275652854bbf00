# SPDX-License-Identifier: Apache-2.0
"""The client's connection to a model on a server: HTTP or gRPC, with or without TLS, an API key and retries."""

import contextlib
import importlib
import logging
import math
import random
import re
import ssl
import threading
import time
from collections.abc import Mapping, Sequence
from http.client import HTTPException
from pathlib import Path
from types import ModuleType
from urllib.parse import urlsplit

import gevent.socket
import gevent.ssl
import numpy as np
from tritonclient.utils import InferenceServerException

MODEL_NAME = "ResNet101"
DEFAULT_PORTS = {"http": 8000, "grpc": 8001, "https": 443, "grpcs": 443}
REQUEST_TIMEOUT_S = 300.0  # a server without a GPU may have a long queue
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 4.0  # between two attempts
PORT_CHECK_AFTER_S, PORT_CHECK_TIMEOUT_S = 1.0, 2.0
ANNOUNCE_S = 60.0  # how often retries are logged

BUSY = {"429", "502", "503", "StatusCode.UNAVAILABLE"}
# The server and its proxy say "again later" if a retry may help. Triton listens before and after it serves the model.
TRANSIENT = ("again later", "timeout expired", "Request for unknown model")
NO_RESPONSE = {"StatusCode.UNAVAILABLE", "StatusCode.DEADLINE_EXCEEDED"}
DENIED = {"401", "403", "StatusCode.UNAUTHENTICATED", "StatusCode.PERMISSION_DENIED"}

# The settings with which HTTP/2 begins, or the headers of HTTP/1.
RESPONSE = re.compile(rb"\x00\x00.\x04\x00{5}|HTTP/1\.. (?P<status>\d+).*\r\n\r\n", re.DOTALL)

LOGGER = logging.getLogger("client")


class ClientError(Exception):
    """The client cannot send photos. The message is one line for the user."""


class InferenceError(Exception):
    """A request failed. The message is usually the server's.

    ``transient`` says whether the same request may succeed later, and ``denied`` whether the server rejects the key.
    """

    def __init__(self, message: str, transient: bool = False, denied: bool = False):
        super().__init__(message)
        self.transient, self.denied = transient, denied


class Connection:
    """A connection to a model on one server. Thread-safe."""

    def __init__(
        self,
        url: str,
        model_name: str = MODEL_NAME,
        api_key: str = "",
        ca_file: Path | None = None,
        retry_s: float = 0,
    ):
        """``url`` is SCHEME://host:port or host; the port may be omitted. Raises ClientError.

        ``api_key`` is for the proxy in front of a server; see docs/security.md. ``ca_file`` has the certificates to
        trust instead of the system's. ``retry_s`` is the number of seconds to retry a request if the server is busy or
        cannot be reached.
        """
        try:
            parts = urlsplit(url if "://" in url else f"http://{url}")
            port = parts.port
            (parts.hostname or "").encode("idna")  # as the socket module does when it looks up the address
        except UnicodeError:
            raise ClientError(f"--url {url}: {parts.hostname} is not a valid host name") from None
        except ValueError as error:
            raise ClientError(f"--url {url}: {error}") from None
        if parts.scheme not in DEFAULT_PORTS or not parts.hostname or "@" in parts.netloc or parts.path.strip("/"):
            schemes = ", ".join(f"{scheme}://host:port" for scheme in DEFAULT_PORTS)
            raise ClientError(f"--url must be {schemes} or host, not {url}")
        if not re.fullmatch(r"[!-~]*", api_key):
            raise ClientError("--api-key must consist of printable ASCII characters without spaces")
        self._scheme, self._host = parts.scheme, parts.hostname
        self._port = DEFAULT_PORTS[parts.scheme] if port is None else port
        host = f"[{self._host}]" if ":" in self._host else self._host
        self._address = f"{host}:{self._port}"
        self.url = f"{self._scheme}://{self._address}"
        self.model_name = model_name
        self._headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self._tls = self._scheme in ("https", "grpcs")
        self._certificates = str(ca_file) if ca_file else _system_certificates()
        if ca_file or self._tls:
            _check_certificates("--ca-file" if ca_file else "SSL_CERT_FILE", self._certificates)
        self._retry_s = retry_s
        self._failing_since: float | None = None  # all requests since then have failed
        self._announced = -math.inf
        self._is_grpc = self._scheme.startswith("grpc")
        # Imported only now, because gRPC reads GRPC_VERBOSITY during its import.
        self._triton: ModuleType = importlib.import_module(f"tritonclient.{'grpc' if self._is_grpc else 'http'}")
        self._local = threading.local()

    def wait_for_model(self, timeout_s: float) -> None:
        """Return when the model is ready. Raises ClientError if it is not within ``timeout_s`` seconds.

        An error that waiting does not fix, such as a wrong certificate, key or port, is raised within seconds.
        """
        began = time.monotonic()
        announced = port_checked = False
        # The port may expect TLS, so it gets no key before it has responded in the protocol of the URL.
        send_key = not self._headers
        while True:
            try:
                self._request_metadata(send_key, min(5.0, max(0.1, began + timeout_s - time.monotonic())))
                return
            except Exception as error:  # each library has its own exceptions
                failure = self._inference_error(error)
                if failure.denied and send_key:
                    raise ClientError(f"{self.url}: {failure}") from None
                if failure.denied:
                    send_key = True
                    continue
                responded = isinstance(error, InferenceServerException) and error.status() not in NO_RESPONSE
                state = f"the model {self.model_name} is not ready" if responded else "cannot reach the server"
                state = f"{state} ({explain(error)})"
            waited = time.monotonic() - began
            # Without a URL for TLS, check the port only after a while: the server may still be starting.
            if not port_checked and (self._tls or waited > min(timeout_s, PORT_CHECK_AFTER_S)):
                port_checked = self._check_port()
            if waited > timeout_s:
                raise ClientError(
                    f"{self.url}: {state}, even after {timeout_s:g} s. If the server is still starting, raise "
                    "--init-timeout-s; otherwise, start it with `python server.py`, or set --url"
                )
            if not announced:
                LOGGER.info("waiting up to %g s for %s to serve %s", timeout_s, self.url, self.model_name)
                announced = True
            time.sleep(0.2)

    def _request_metadata(self, send_key: bool, timeout_s: float) -> None:
        """Return if the model is ready. Raises the exceptions of Triton's clients.

        A check for readiness would not do: Triton's port for metrics responds to it with success.
        """
        headers = self._headers if send_key else {}
        if self._is_grpc:
            self.client.get_model_metadata(self.model_name, headers=headers, client_timeout=timeout_s)
            return
        # The client's own timeouts start again with each byte that arrives.
        with gevent.Timeout(timeout_s, TimeoutError("timed out")), self._new_http_client() as client:
            client.get_model_metadata(self.model_name, headers=headers)

    def _check_port(self) -> bool:
        """Raise ClientError if the port expects another scheme than that of the URL. Return whether it is open."""
        certificates = self._certificates if self._tls else None
        context = _tls_context(certificates)
        if not certificates:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        try:
            try:
                protocol, tls = self._probe_port(context), True
            except ssl.SSLCertVerificationError as error:
                advice = "set --ca-file to the certificate of its CA"
                if "mismatch" in error.verify_message:
                    advice = "use the host name of the certificate in --url"
                elif "expired" in error.verify_message:
                    advice = "renew it"
                elif "not yet valid" in error.verify_message:
                    advice = "check the clocks of both machines"
                reason = error.verify_message.rstrip(".")
                raise ClientError(f"{self.url}: the server's certificate is not trusted ({reason}): {advice}") from None
            except (ssl.SSLError, ConnectionError):
                protocol, tls = self._probe_port(None), False
        except OSError:
            return False
        if protocol == "other":
            ports = "by default, port 8000 is for HTTP and 8001 for gRPC"
            raise ClientError(f"{self.url}: this port is not for inference requests: {ports}")
        # Triton ends a TLS handshake, but so does a stopping proxy that uses TLS. Only a response tells them apart.
        scheme = (protocol or self._scheme.rstrip("s")) + "s" * tls if protocol or tls else self._scheme
        if scheme != self._scheme:
            name = ", but with the host name in its certificate" * (tls and not self._tls)
            raise ClientError(f"{self.url}: this port is for {scheme}: set --url {scheme}://{self._address}{name}")
        return True

    def _probe_port(self, context: ssl.SSLContext | None) -> str:
        """Return the protocol of the port, ``http``, ``grpc`` or ``other``, or an empty string if it is unclear.

        With a ``context``, ask over TLS. Raises OSError.
        """
        response = b""
        with (
            gevent.Timeout(PORT_CHECK_TIMEOUT_S, TimeoutError("timed out")),
            gevent.socket.create_connection((self._host, self._port)) as plain,
            context.wrap_socket(plain, server_hostname=self._host) if context else plain as connection,
            contextlib.suppress(OSError),
        ):
            connection.sendall(b"GET /v2 HTTP/1.0\r\n\r\n")
            while not RESPONSE.match(response) and len(response) < 1 << 14 and (part := connection.recv(1 << 12)):
                response += part
        found = RESPONSE.match(response)
        if not found:
            return ""
        if not found["status"] or b"application/grpc" in response:  # the proxy's port for gRPC also speaks HTTP/1
            return "grpc"
        if found["status"] in (b"200", b"404") and b"application/json" in response:  # of Triton, of the proxy
            return "http"
        return "other" if found["status"] == b"200" else ""

    def infer(
        self,
        encoded: bytes,
        outputs: Sequence[str] = (),
        parameters: Mapping[str, object] | None = None,
        timeout_us: int | None = None,
    ) -> dict[str, np.ndarray]:
        """Return the requested outputs by name, or the default ones, with a batch dimension of 1.

        ``encoded`` has the bytes of a photo. The server rejects it after ``timeout_us`` microseconds in the queue.
        Raises InferenceError, after ``retry_s`` seconds if it is transient.
        """
        pause, first_failure = FIRST_PAUSE_S, None
        while True:
            try:
                arrays = self._infer_once(encoded, outputs, parameters, timeout_us)
            except InferenceError as error:
                if not error.transient:
                    self._failing_since = None
                    raise
                now = time.monotonic()
                first_failure = first_failure or now
                # If the server does not respond to any request, a thousand photos must not wait one after another.
                self._failing_since = failing_since = self._failing_since or now
                jittered = pause * random.uniform(0.5, 1)  # so that clients do not all retry at the same time
                if now + jittered > min(first_failure, failing_since) + self._retry_s:
                    raise
                # A busy server would fill the log.
                level = logging.INFO if now > self._announced + ANNOUNCE_S else logging.DEBUG
                if level == logging.INFO:
                    self._announced = now
                LOGGER.log(level, "%s: %s; retrying for up to %g s", self.url, error, self._retry_s)
                time.sleep(jittered)
                pause = min(2 * pause, LONGEST_PAUSE_S)
            else:
                self._failing_since = None
                return arrays

    def _infer_once(
        self,
        encoded: bytes,
        outputs: Sequence[str],
        parameters: Mapping[str, object] | None,
        timeout_us: int | None,
    ) -> dict[str, np.ndarray]:
        options = {"client_timeout": REQUEST_TIMEOUT_S} if self._is_grpc else {}
        began = time.monotonic()
        try:
            with contextlib.nullcontext() if self._is_grpc else gevent.Timeout(REQUEST_TIMEOUT_S, TimeoutError):
                result = self.client.infer(
                    self.model_name,
                    [self.image_input(encoded)],
                    outputs=[self._triton.InferRequestedOutput(name) for name in outputs] or None,
                    parameters=dict(parameters or {}),
                    timeout=timeout_us,
                    headers=self._headers,
                    **options,
                )
            response = result.get_response()
            received = response.outputs if self._is_grpc else response["outputs"]
            names = [output.name if self._is_grpc else output["name"] for output in received]
            arrays = {name: result.as_numpy(name) for name in names}
            if missing := [name for name in outputs if arrays.get(name) is None or not arrays[name].size]:
                raise ValueError(f"without {missing[0]}")
        except Exception as error:
            if not isinstance(error, InferenceServerException):
                self._local.__dict__.clear()  # a broken HTTP connection cannot be reused
            raise self._inference_error(error) from error
        LOGGER.debug("%d bytes: %s in %.0f ms", len(encoded), ", ".join(names), (time.monotonic() - began) * 1000)
        return arrays

    def _inference_error(self, error: Exception) -> InferenceError:
        """Return the InferenceError for an exception of Triton's clients."""
        sentence = explain(error)
        if isinstance(error, InferenceServerException):
            denied = error.status() in DENIED
            if denied:
                sentence = f"{sentence}. Set --api-key, or API_KEY in the environment"
            transient = error.status() in BUSY or any(words in sentence for words in TRANSIENT)
            return InferenceError(sentence, transient, denied)
        if isinstance(error, TimeoutError) and not error.errno:  # with one, the kernel gave up on the connection
            return InferenceError(f"no response within {REQUEST_TIMEOUT_S:g} s")
        if isinstance(error, (OSError, HTTPException)):
            # A proxy that stops ends a handshake.
            broken = not isinstance(error, ssl.SSLError) or isinstance(error, (ssl.SSLEOFError, ssl.SSLZeroReturnError))
            return InferenceError(f"cannot reach the server ({sentence})", transient=broken)
        return InferenceError(f"the response is incomplete ({sentence})", transient=True)

    def image_input(self, encoded: bytes) -> object:
        """Return the model's input, UINT8 ``[1, N]``, for Triton's own client."""
        photo = np.frombuffer(encoded, np.uint8)[None]
        image = self._triton.InferInput("image", photo.shape, "UINT8")
        image.set_data_from_numpy(photo)
        return image

    @property
    def client(self) -> object:
        """Triton's own client, one for each thread, because the one for HTTP is not thread-safe.

        Never with ``verbose``, which prints the API key and the bytes of each photo.
        """
        if not hasattr(self._local, "client"):
            self._local.client = self._new_grpc_client() if self._is_grpc else self._new_http_client()
        return self._local.client

    def _new_http_client(self) -> object:
        return self._triton.InferenceServerClient(
            self._address,
            connection_timeout=REQUEST_TIMEOUT_S,
            network_timeout=REQUEST_TIMEOUT_S,
            ssl=self._tls,
            ssl_options={"ca_certs": self._certificates} if self._certificates else None,
            ssl_context_factory=_tls_context,
        )

    def _new_grpc_client(self) -> object:
        options = [
            ("grpc.max_send_message_length", -1),
            ("grpc.max_receive_message_length", -1),
            # By default, gRPC waits up to two minutes before it reconnects to a server that was restarted.
            ("grpc.initial_reconnect_backoff_ms", 200),
            ("grpc.max_reconnect_backoff_ms", 2000),
            ("grpc.enable_http_proxy", 0),  # Triton's client for HTTP ignores http_proxy as well
        ]
        return self._triton.InferenceServerClient(
            self._address, ssl=self._tls, root_certificates=self._certificates, channel_args=options
        )


def _tls_context(cafile: str | None) -> ssl.SSLContext:
    """Return a context whose connections obey gevent.Timeout. Those of ssl.create_default_context would block."""
    context = gevent.ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if cafile:
        context.load_verify_locations(cafile)
    return context


def _system_certificates() -> str | None:
    """Return the file with the system's CAs. By default, the HTTP and gRPC libraries use their own."""
    files = ssl.get_default_verify_paths().cafile, "/etc/ssl/certs/ca-certificates.crt"
    return next((file for file in files if file and Path(file).exists()), None)


def _check_certificates(option: str, file: str | None) -> None:
    """Raise ClientError if the file contains no certificates or cannot be read."""
    try:
        _tls_context(file)
    except ssl.SSLError:
        raise ClientError(f"{option}: {file} contains no certificate in PEM format") from None
    except OSError as error:
        raise ClientError(f"{option}: cannot read {file} ({error.strerror})") from None


def explain(error: Exception) -> str:
    """Return the relevant line of an error, which PyTriton and Triton wrap in tracebacks."""
    said = error.message() if isinstance(error, InferenceServerException) else error
    text = str(said).split("\nAt:\n")[0].strip() or type(error).__name__
    if "Exceeds maximum queue size" in text:
        return "the server is busy and its queue is full: send the photo again later"
    if "while decoding the response" in text:  # such as a load balancer's page
        return f"the response is not from Triton (HTTP status {error.status()})"
    found = re.search(r"(InvalidRequest|InferenceFailed): (.*)", text)
    return found[2] if found else text.splitlines()[-1].strip()
