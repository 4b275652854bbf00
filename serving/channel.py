# SPDX-License-Identifier: Apache-2.0
"""Carries requests from one process to another, and the answers back, through memory that both share."""

import hashlib
import math
import mmap
import pickle
import time
from collections.abc import Mapping, Sequence
from multiprocessing import get_context
from multiprocessing.synchronize import Semaphore

import numpy as np

FORK = get_context("fork")
MESSAGE_BYTES = 1 << 20  # for the pickled part of a request or answer: shapes, parameters, errors
SLACK_BYTES = 1 << 16  # for the alignment of arrays, and the headers of files
ALIGNMENT = 64  # of each array: a cache line, and more than any dtype needs

Layout = Mapping[str, tuple[Sequence[int], str]]  # the shape and dtype of each array


class Channel:
    """Carries one request at a time to another process, and its answer back.

    Semaphores signal that something has arrived. Sockets would make the caller release the interpreter lock and wait
    for it again once or twice more per request, which cost a tenth of the throughput.
    """

    def __init__(self, request_bytes: int, answer_bytes: int, waiting: Semaphore, pulse: "Pulse"):
        """``waiting`` and ``pulse`` are shared by all channels of one worker; see :func:`open_channels`."""
        self.waiting = waiting
        self._pulse = pulse
        self._request_sent = FORK.Semaphore(0)
        self._answer_sent = FORK.Semaphore(0)
        self._request = _SharedMemory(request_bytes + SLACK_BYTES)
        self._answer = _SharedMemory(answer_bytes + SLACK_BYTES)
        self._broken = False
        self._calling = False

    @property
    def answer_memory(self) -> np.ndarray:
        """The memory for the arrays of an answer, uint8 ``[answer_bytes]``."""
        return self._answer.array

    def call(
        self, arrays: Mapping[str, np.ndarray], message: object, timeout_s: float | None = None
    ) -> dict[str, np.ndarray]:
        """Send a request, wait for its answer and return the answer's arrays.

        The arrays stay valid until the next call. ``message`` is anything that can be pickled.

        Raises ValueError if the request does not fit into the channel, ConnectionError if the other process is gone,
        TimeoutError if it has answered no request for ``timeout_s`` seconds, and whatever exception it answers with.
        After a TimeoutError the channel is broken: a late answer must not become the answer to the next call.
        """
        layout = layout_of(arrays)
        self._request.write((layout, message))
        for name, copy in lay_out(self._request.array, layout).items():
            # np.copyto would release the interpreter lock, and getting it back takes longer than the copy.
            _as_bytes(copy)[:] = _as_bytes(arrays[name])
        if not self._broken:
            self._calling = True
            self._request_sent.release()
            self.waiting.release()
            self._wait_for_answer(timeout_s)
            self._calling = False
        if self._broken:
            raise ConnectionError("the process that answers is gone")
        answer = self._answer.read()
        if isinstance(answer, Exception):
            raise answer
        return lay_out(self.answer_memory, answer)

    def _wait_for_answer(self, timeout_s: float | None) -> None:
        began = time.monotonic()
        remaining = timeout_s
        while not self._answer_sent.acquire(timeout=remaining):
            # Other channels may have been answered since. Semaphores also follow the time of day, which can jump.
            remaining = max(began, self._pulse.last) + timeout_s - time.monotonic()
            if remaining <= 0:
                self._broken = True
                raise TimeoutError
        self._pulse.last = time.monotonic()

    def break_off(self) -> None:
        """Make current and future calls fail because the other process is gone."""
        self._broken = True
        self._answer_sent.release()

    def is_processing(self) -> bool:
        """Return whether the other process has taken a request and not answered it."""
        return self._calling and self._request_sent.get_value() == 0

    def describe_request(self) -> str:
        """Return the size and the SHA-256 of each array of the request that is being processed. For either process."""
        layout, _ = self._request.read()
        return ", ".join(
            f"{name} of {array.nbytes} bytes with SHA-256 {hashlib.sha256(array).hexdigest()}"
            for name, array in lay_out(self._request.array, layout).items()
        )

    def take(self) -> tuple[dict[str, np.ndarray], object] | None:
        """Return the arrays and the message of the request that is waiting, or None. For the other process."""
        if not self._request_sent.acquire(block=False):
            return None
        layout, message = self._request.read()
        return lay_out(self._request.array, layout), message

    def answer(self, answer: Mapping[str, np.ndarray] | Exception) -> None:
        """Answer with an exception, or with arrays that :func:`lay_out` placed into the answer memory."""
        self._answer.write(answer if isinstance(answer, Exception) else layout_of(answer))
        self._answer_sent.release()


class Pulse:
    """When a worker last answered anybody, in seconds of ``time.monotonic``."""

    def __init__(self):
        self.last = -math.inf


def layout_of(arrays: Mapping[str, np.ndarray]) -> Layout:
    """Return what :func:`lay_out` needs to make room for such arrays."""
    return {name: (array.shape, array.dtype.str) for name, array in arrays.items()}


def lay_out(memory: np.ndarray, layout: Layout) -> dict[str, np.ndarray]:
    """Return arrays of this layout, one after another in ``memory``, uint8 ``[N]``.

    Raises ValueError if the memory is too small.
    """
    arrays, end = {}, 0
    for name, (shape, dtype) in layout.items():
        begin = -(-end // ALIGNMENT) * ALIGNMENT
        end = begin + math.prod(shape) * np.dtype(dtype).itemsize
        if end > len(memory):
            raise ValueError(f"{name} does not fit: {end} bytes are needed, {len(memory)} are there")
        arrays[name] = memory[begin:end].view(dtype).reshape(shape)
    return arrays


def _as_bytes(array: np.ndarray) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def open_channels(count: int, request_bytes: int, answer_bytes: int) -> list[Channel]:
    """Return channels to one worker, to be opened before its process is forked."""
    waiting, pulse = FORK.Semaphore(0), Pulse()
    return [Channel(request_bytes, answer_bytes, waiting, pulse) for _ in range(count)]


class _SharedMemory:
    """Memory for a message and arrays that forked processes share."""

    def __init__(self, array_bytes: int):
        # Anonymous memory needs no room in /dev/shm, and only pages that were written to take up any.
        memory = mmap.mmap(-1, MESSAGE_BYTES + array_bytes)
        self._message = memoryview(memory)[:MESSAGE_BYTES]
        self.array = np.frombuffer(memory, np.uint8, offset=MESSAGE_BYTES)

    def write(self, message: object) -> None:
        pickled = pickle.dumps(message)
        self._message[: len(pickled)] = pickled

    def read(self) -> object:
        return pickle.loads(self._message)  # a pickle knows where it ends
