# SPDX-License-Identifier: Apache-2.0
"""Detects processes that hang: they are running, but do not respond."""

import contextlib
import http.client
import threading
import time
from collections.abc import Callable

import tritonclient.grpc
from tritonclient.utils import InferenceServerException

# Checks that fail in a row. After a pause of the whole machine, only the first one fails. Each check of Triton uses a
# new connection, because one of its threads may be busy with a large request.
CHECKS = 3


class Watchdog:
    """Checks something inside a ``with`` block, and calls a function if several checks fail in a row."""

    def __init__(self, is_well: Callable[[float], bool], timeout_s: float, on_silence: Callable[[], None]):
        """``is_well`` takes the maximum duration of a check in seconds.

        Calls ``on_silence`` once, in another thread, if all checks fail for ``timeout_s`` seconds.
        """
        self._is_well = is_well
        self._period_s = timeout_s / CHECKS
        self._on_silence = on_silence
        self._over = threading.Event()

    def __enter__(self) -> "Watchdog":
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()

    def _watch(self) -> None:
        failed = 0
        while failed < CHECKS:
            began = time.monotonic()
            failed = 0 if self._is_well(self._period_s) else failed + 1
            if self._over.wait(began + self._period_s - time.monotonic()):
                return
        self._on_silence()


class TritonProbe:
    """Checks whether a model in Triton is ready. Ignores http_proxy in the environment."""

    def __init__(self, protocol: str, address: str, port: int, model_name: str):
        """``protocol`` is ``http`` or ``grpc``; ``address`` is an IPv4 address on which Triton listens."""
        self._check = self._check_http if protocol == "http" else self._check_grpc
        self._address = "127.0.0.1" if address == "0.0.0.0" else address
        self._port = port
        self._model_name = model_name

    def is_ready(self, timeout_s: float) -> bool:
        """Return whether Triton reports that the model is ready, within this time."""
        try:
            return self._check(timeout_s)
        except (OSError, http.client.HTTPException, InferenceServerException):
            return False

    def _check_http(self, timeout_s: float) -> bool:
        connection = http.client.HTTPConnection(self._address, self._port, timeout=timeout_s)
        with contextlib.closing(connection):
            connection.request("GET", f"/v2/models/{self._model_name}/ready")
            return connection.getresponse().status == http.HTTPStatus.OK

    def _check_grpc(self, timeout_s: float) -> bool:
        no_proxy = [("grpc.enable_http_proxy", 0)]
        with tritonclient.grpc.InferenceServerClient(f"{self._address}:{self._port}", channel_args=no_proxy) as client:
            return client.is_model_ready(self._model_name, client_timeout=timeout_s)
