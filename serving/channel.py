# SPDX-License-Identifier: Apache-2.0
"""Carries requests to another process, and the responses back, through shared memory."""

import hashlib
import pickle
import time
from collections.abc import Mapping
from multiprocessing.synchronize import Semaphore

import numpy as np

from serving.arrays import ArraySpec, Packer, unpack
from serving.processes import FORK
from serving.shared import share_bytes, share_numbers

MESSAGE_BYTES = 1 << 20  # for the pickled part of a request or response: shapes, parameters, errors
SLACK_BYTES = 1 << 16  # for the alignment of arrays, and the headers of files


class Channel:
    """Carries one request at a time to a worker process, and its response back. Create it before the fork.

    Semaphores signal each arrival. With sockets, the caller would release and acquire the GIL once or twice more per
    request, which costs a tenth of the throughput.
    """

    def __init__(self, request_bytes: int, response_bytes: int, queued: Semaphore, last_response: np.ndarray):
        """``queued`` and ``last_response`` are shared by all channels of one worker; see :func:`open_channels`."""
        self.queued = queued
        self._last_response = last_response
        self._request_sent = FORK.Semaphore(0)
        self._response_sent = FORK.Semaphore(0)
        self._request = _Message(request_bytes)
        self._response = _Message(response_bytes)
        self.limit = share_numbers(1)  # of the inputs of a request, in bytes; the worker may lower it
        self.limit[0] = request_bytes
        self._closed = share_numbers(1)
        self._calling = share_numbers(1)

    @property
    def response_memory(self) -> np.ndarray:
        """The memory for the arrays of a response, uint8 ``[response_bytes]``."""
        return self._response.memory

    # For the process that sends requests.

    def call(
        self, arrays: Mapping[str, np.ndarray], message: object, timeout_s: float | None = None
    ) -> dict[str, np.ndarray]:
        """Send a request, wait for its response and return the response's arrays.

        The arrays stay valid until the next call. ``message`` is anything that can be pickled.

        Raises ValueError if the request does not fit into the channel, ConnectionError if the worker exited,
        TimeoutError if the worker has not responded on any channel for ``timeout_s`` seconds, and the exception that it
        responds with. A TimeoutError closes the channel: the next call must not read a late response.
        """
        packer = Packer(self._request.memory)
        for name, array in arrays.items():
            packer.add(name, array)
        self._request.write((packer.specs, message))
        if not self._closed[0]:
            self._calling[0] = True
            self._request_sent.release()
            self.queued.release()
            self._wait_for_response(timeout_s)
            self._calling[0] = False
        if self._closed[0]:
            raise ConnectionError("the worker exited")
        response = self._response.read()
        if isinstance(response, Exception):
            raise response
        return unpack(self._response.memory, response)

    def _wait_for_response(self, timeout_s: float | None) -> None:
        began = time.monotonic()
        remaining = timeout_s
        while not self._response_sent.acquire(timeout=remaining):
            # Other channels may have had responses since. Also, semaphores use the wall clock, which can jump.
            remaining = max(began, self._last_response[0]) + timeout_s - time.monotonic()
            if remaining <= 0:
                self._closed[0] = True
                raise TimeoutError
        self._last_response[0] = time.monotonic()

    # For any process.

    def close(self) -> None:
        """Make current and future calls fail because the worker exited."""
        self._closed[0] = True
        self._response_sent.release()

    def is_processing(self) -> bool:
        """Return whether the worker has taken a request and not yet responded to it."""
        return bool(self._calling[0]) and self._request_sent.get_value() == 0

    def describe_request(self) -> str:
        """Return the size and the SHA-256 of each array of the request in progress."""
        specs, _ = self._request.read()
        return ", ".join(
            f"{name} of {spec.end - spec.begin} bytes with SHA-256 "
            f"{hashlib.sha256(self._request.memory[spec.begin : spec.end]).hexdigest()}"
            for name, spec in specs.items()
        )

    # For the worker.

    def take(self) -> tuple[dict[str, np.ndarray], object] | None:
        """Return the arrays and the message of the next request, or None if none has arrived."""
        if not self._request_sent.acquire(block=False):
            return None
        specs, message = self._request.read()
        return unpack(self._request.memory, specs), message

    def respond(self, response: Mapping[str, ArraySpec] | Exception) -> None:
        """Respond with an exception, or with arrays that a :class:`Packer` placed into the response memory."""
        self._response.write(response)
        self._response_sent.release()


def open_channels(count: int, request_bytes: int, response_bytes: int) -> list[Channel]:
    """Return channels to one worker."""
    queued, last_response = FORK.Semaphore(0), share_numbers(1)
    return [Channel(request_bytes, response_bytes, queued, last_response) for _ in range(count)]


class _Message:
    """Memory for one pickled object and its arrays."""

    def __init__(self, array_bytes: int):
        memory = share_bytes(MESSAGE_BYTES + array_bytes + SLACK_BYTES)
        self._pickled = memory[:MESSAGE_BYTES].data
        self.memory = memory[MESSAGE_BYTES:]

    def write(self, content: object) -> None:
        pickled = pickle.dumps(content)
        self._pickled[: len(pickled)] = pickled  # raises ValueError if it is too large

    def read(self) -> object:
        return pickle.loads(self._pickled)  # which ignores the bytes after the pickle
