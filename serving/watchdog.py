# SPDX-License-Identifier: Apache-2.0
"""Notices a Triton that hangs: its processes look alive, but nobody gets an answer."""

import contextlib
import http.client
import threading
import time
from collections.abc import Callable

import tritonclient.grpc
from tritonclient.utils import InferenceServerException

# In a row. Each has a connection of its own: one of Triton's threads may be busy with a large request.
CHECKS = 3


class Watchdog:
    """Asks Triton inside a ``with`` block whether the model is ready, and calls a function if it never says so."""

    def __init__(
        self,
        protocol: str,
        address: str,
        port: int,
        model_name: str,
        timeout_s: float,
        on_silence: Callable[[], None],
    ):
        """Ask over ``http`` or ``grpc``, at an IPv4 address where Triton listens.

        Calls ``on_silence`` once, in another thread, if several checks fail in a row and take ``timeout_s`` seconds.
        """
        self._protocol = protocol
        self._address = "127.0.0.1" if address == "0.0.0.0" else address
        self._port = port
        self._model_name = model_name
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
            failed = 0 if self._is_ready() else failed + 1
            if self._over.wait(began + self._period_s - time.monotonic()):
                return
        self._on_silence()

    def _is_ready(self) -> bool:
        try:
            return self._ask_http() if self._protocol == "http" else self._ask_grpc()
        except (OSError, http.client.HTTPException, InferenceServerException):
            return False

    # Neither follows http_proxy in the environment.

    def _ask_http(self) -> bool:
        connection = http.client.HTTPConnection(self._address, self._port, timeout=self._period_s)
        with contextlib.closing(connection):
            connection.request("GET", f"/v2/models/{self._model_name}/ready")
            return connection.getresponse().status == http.HTTPStatus.OK

    def _ask_grpc(self) -> bool:
        no_proxy = [("grpc.enable_http_proxy", 0)]
        with tritonclient.grpc.InferenceServerClient(f"{self._address}:{self._port}", channel_args=no_proxy) as client:
            return client.is_model_ready(self._model_name, client_timeout=self._period_s)
