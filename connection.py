# SPDX-License-Identifier: Apache-2.0
"""The client's connection to a model on a server: HTTP or gRPC, with or without TLS, an API key and retries."""

import contextlib
import ipaddress
import logging
import math
import os
import random
import re
import socket
import ssl
import threading
import time
import urllib.request
from collections.abc import Mapping, Sequence
from http.client import HTTPException
from pathlib import Path
from types import ModuleType
from urllib.parse import urlsplit

import gevent
import numpy as np
import tritonclient.grpc
import tritonclient.http
from tritonclient.utils import InferenceServerException

MODEL_NAME = "ResNet101"
DEFAULT_PORTS = {"http": 8000, "grpc": 8001, "https": 443, "grpcs": 443}
REQUEST_TIMEOUT_S = 300.0  # a server without a GPU may have a long queue
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 4.0  # between two attempts
PORT_CHECK_AFTER_S = 1.0
ANNOUNCE_S = 60.0  # how often retries are logged

BUSY = {"429", "502", "503", "StatusCode.UNAVAILABLE"}
# The server and its proxy say "again later" if a retry may help. Triton listens before and after it serves the model.
TRANSIENT = ("again later", "timeout expired", "Request for unknown model")
NO_RESPONSE = {"StatusCode.UNAVAILABLE", "StatusCode.DEADLINE_EXCEEDED"}
DENIED = {"401", "403", "StatusCode.UNAUTHENTICATED", "StatusCode.PERMISSION_DENIED"}

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
        self._certificates = _check_certificates("--ca-file", ca_file) if ca_file else _system_certificates()
        if self._tls and self._certificates and not ca_file:
            _check_certificates("SSL_CERT_FILE", self._certificates)
        self._retry_s = retry_s
        self._failing_since: float | None = None  # all requests since then have failed
        self._announced = -math.inf
        self._is_grpc = self._scheme.startswith("grpc")
        self._triton: ModuleType = tritonclient.grpc if self._is_grpc else tritonclient.http
        self._local = threading.local()

    def wait_for_model(self, timeout_s: float) -> None:
        """Return when the model is ready. Raises ClientError if it is not within ``timeout_s`` seconds.

        An error that waiting does not fix, such as a wrong certificate, key or port, is raised immediately.
        """
        began = time.monotonic()
        announced = port_checked = False
        # The port may expect TLS, so it gets no key before it has responded in the protocol of the URL.
        send_key = not self._headers
        while True:
            try:
                self._request_metadata(send_key, min(5.0, max(0.1, began + timeout_s - time.monotonic())))
                if send_key:
                    return
                send_key = True
                continue
            except Exception as error:  # each library has its own exceptions
                if isinstance(error, ValueError) and not isinstance(error, OSError):
                    raise self._wrong_port() from None  # no JSON: the metrics port responds to any path with nothing
                failure = self._inference_error(error)
                if failure.denied:
                    if send_key:
                        raise ClientError(f"{self.url}: {failure}") from None
                    send_key = True
                    continue
                responded = isinstance(error, InferenceServerException) and error.status() not in NO_RESPONSE
                state = f"the model {self.model_name} is not ready" if responded else "cannot reach the server"
                state = f"{state} ({explain(error)}{'' if responded else self._proxy_hint()})"
            waited = time.monotonic() - began
            # Without a URL for TLS, check the port only after a while: the server may still be starting.
            if not port_checked and (self._tls or waited > min(timeout_s, PORT_CHECK_AFTER_S)):
                port_checked = self._check_port(responded)
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

    def _wrong_port(self) -> ClientError:
        protocol = "gRPC" if self._is_grpc else "HTTP"
        return ClientError(
            f"{self.url}: this port is not for {protocol} requests: by default, port 8000 is for HTTP and 8001 for gRPC"
        )

    def _check_port(self, responded: bool) -> bool:
        """Raise ClientError if the URL does not fit the port, in TLS or protocol. Return whether the port is open.

        ``responded`` says whether the server has responded in the protocol of the URL.
        """
        context = ssl.create_default_context(cafile=self._certificates if self._tls else None)
        if not (self._tls and self._certificates):
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        try:
            with socket.create_connection((self._host, self._port), timeout=2) as plain:
                try:
                    context.wrap_socket(plain, server_hostname=self._host).close()
                except ssl.SSLCertVerificationError as error:
                    advice = "set --ca-file to the certificate of its CA"
                    if "mismatch" in error.verify_message:
                        advice = "use the host name of the certificate in --url"
                    elif "expired" in error.verify_message:
                        advice = "renew it"
                    reason = error.verify_message.rstrip(".")
                    raise ClientError(
                        f"{self.url}: the server's certificate is not trusted ({reason}): {advice}"
                    ) from None
                except OSError:
                    # Triton only closes the connection, and so does a proxy with TLS that stops. A response tells.
                    protocol = self._plain_protocol()
                    if protocol and self._tls:
                        plain_url = f"{self._scheme[:-1]}://{self._address}"
                        raise ClientError(f"{self.url}: the server does not use TLS: set --url {plain_url}") from None
                    if protocol not in ("", self._scheme) and not responded:
                        raise self._wrong_port() from None
                    return True
        except OSError:
            return False
        if not self._tls:
            tls_url = f"{self._scheme}s://{self._address}"
            raise ClientError(f"{self.url}: the server uses TLS: set --url {tls_url}, with the name in its certificate")
        return True

    def _plain_protocol(self) -> str:
        """Return the protocol of the port without TLS, ``http`` or ``grpc``, or an empty string if it is neither."""
        start = b""
        with contextlib.suppress(OSError), socket.create_connection((self._host, self._port), timeout=2) as plain:
            plain.sendall(b"GET /v2/health/live HTTP/1.0\r\n\r\n")
            start = plain.recv(12)
        if re.match(rb"HTTP/1\.. (?!400)", start):  # with 400, servers reject HTTP on a port for TLS
            return "http"
        return "grpc" if re.match(rb"\x00\x00.\x04\x00{5}", start, re.DOTALL) else ""  # HTTP/2 begins with its settings

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
        if outputs:
            options["outputs"] = [self._triton.InferRequestedOutput(name) for name in outputs]
        began = time.monotonic()
        try:
            with contextlib.nullcontext() if self._is_grpc else gevent.Timeout(REQUEST_TIMEOUT_S, TimeoutError):
                result = self.client.infer(
                    self.model_name,
                    [self.image_input(encoded)],
                    parameters=dict(parameters or {}),
                    timeout=timeout_us,
                    headers=self._headers,
                    **options,
                )
            response = result.get_response()
            received = response["outputs"] if isinstance(response, dict) else response.outputs
            names = [output["name"] if isinstance(output, dict) else output.name for output in received]
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
            return InferenceError(sentence + self._proxy_hint(error), transient, denied)
        if isinstance(error, TimeoutError):
            return InferenceError(f"no response within {REQUEST_TIMEOUT_S:g} s")
        if isinstance(error, (OSError, HTTPException)):
            # A proxy that stops ends a handshake.
            broken = not isinstance(error, ssl.SSLError) or isinstance(error, (ssl.SSLEOFError, ssl.SSLZeroReturnError))
            return InferenceError(f"cannot reach the server ({sentence})", transient=broken)
        return InferenceError(f"the response is incomplete ({sentence})", transient=True)

    def _proxy_hint(self, error: Exception | None = None) -> str:
        """Return a hint about the proxy that gRPC takes from the environment, if it may be the cause of the error."""
        if not self._is_grpc or self._is_loopback() or (error and "failed to connect" not in str(error)):
            return ""
        used = next((name for name in ("grpc_proxy", "https_proxy", "http_proxy") if os.environ.get(name)), None)
        if not used or urllib.request.proxy_bypass(self._host):
            return ""
        return f", through the proxy in {used}; set no_proxy={self._host} to connect directly"

    def _is_loopback(self) -> bool:
        try:
            return ipaddress.ip_address(self._host).is_loopback
        except ValueError:
            return self._host == "localhost" or self._host.endswith(".localhost")

    def image_input(self, encoded: bytes) -> tritonclient.http.InferInput | tritonclient.grpc.InferInput:
        """Return the model's input, UINT8 ``[1, N]``, for Triton's own client."""
        photo = np.frombuffer(encoded, np.uint8)[None]
        image = self._triton.InferInput("image", photo.shape, "UINT8")
        image.set_data_from_numpy(photo)
        return image

    @property
    def client(self) -> tritonclient.http.InferenceServerClient | tritonclient.grpc.InferenceServerClient:
        """Triton's own client, one for each thread, because the one for HTTP is not thread-safe.

        Never with ``verbose``, which prints the API key and the bytes of each photo.
        """
        if not hasattr(self._local, "client"):
            self._local.client = self._new_grpc_client() if self._is_grpc else self._new_http_client()
        return self._local.client

    def _new_http_client(self) -> tritonclient.http.InferenceServerClient:
        return tritonclient.http.InferenceServerClient(
            self._address,
            network_timeout=REQUEST_TIMEOUT_S,
            ssl=self._tls,
            ssl_options={"ca_certs": self._certificates} if self._tls and self._certificates else None,
        )

    def _new_grpc_client(self) -> tritonclient.grpc.InferenceServerClient:
        options = [
            ("grpc.max_send_message_length", -1),
            ("grpc.max_receive_message_length", -1),
            # By default, gRPC waits up to two minutes before it reconnects to a server that was restarted.
            ("grpc.initial_reconnect_backoff_ms", 200),
            ("grpc.max_reconnect_backoff_ms", 2000),
            ("grpc.enable_http_proxy", int(not self._is_loopback())),  # no proxy can reach this machine's loopback
        ]
        return tritonclient.grpc.InferenceServerClient(
            self._address, ssl=self._tls, root_certificates=self._certificates, channel_args=options
        )


def _system_certificates() -> str | None:
    """Return the file with the system's CAs. By default, the HTTP and gRPC libraries use their own."""
    files = ssl.get_default_verify_paths().cafile, "/etc/ssl/certs/ca-certificates.crt"
    return next((file for file in files if file and Path(file).exists()), None)


def _check_certificates(option: str, ca_file: str | Path) -> str:
    """Return the path of a file with certificates. Raises ClientError."""
    try:
        ssl.create_default_context(cafile=ca_file)
    except ssl.SSLError:
        raise ClientError(f"{option}: {ca_file} contains no certificate in PEM format") from None
    except OSError as error:
        raise ClientError(f"{option}: cannot read {ca_file} ({error.strerror})") from None
    return str(ca_file)


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
