# SPDX-License-Identifier: Apache-2.0
"""Have the requests of one process worked on by another, together where several wait.

The threads of the first process each :meth:`call <Channel.call>` through a channel of their own; in the second, forked
from it, a :class:`Batcher` collects what waits in all of them and answers. Two processes, because each has an
interpreter lock of its own: what the second computes does not hold up what the first copies.
"""

import math
import mmap
import pickle
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from multiprocessing import get_context
from multiprocessing.synchronize import Semaphore
from types import SimpleNamespace

import numpy as np

FORK = get_context("fork")
MESSAGE_BYTES = 1 << 20


class Channel:
    """Carries one request at a time to another process and its answer back, in memory that both have.

    Semaphores tell when something is there. With sockets the caller would give its interpreter lock away, and wait for
    it again, once or twice more for each request: that cost a tenth of the server's throughput.
    """

    def __init__(self, request_bytes: int, response_bytes: int, waiting: Semaphore, pulse: SimpleNamespace):
        """For this and other channels of a batcher, ``waiting`` counts the requests that wait.

        ``pulse.answered``: when the last of any was answered, in seconds of ``time.monotonic``.
        """
        self.waiting = waiting
        self._pulse = pulse
        self._asked = FORK.Semaphore(0)
        self._answered = FORK.Semaphore(0)
        self._request = _Memory(request_bytes)
        self._response = _Memory(response_bytes)
        self._broken = False

    @property
    def response(self) -> np.ndarray:
        """The memory for the arrays of an answer, uint8 ``[response_bytes]``."""
        return self._response.array

    def call(self, array: np.ndarray, message: object, timeout_s: float | None = None) -> dict[str, np.ndarray]:
        """Send a request, wait, and return the answer's arrays, which the next call overwrites.

        ``array``: uint8 ``[N]``; ``message``: anything that can be pickled. Raises ValueError where either has no
        room, ConnectionError where the other process is gone, TimeoutError where it has not answered anybody for
        ``timeout_s``, after which the channel is of no use any more, and whatever that process answers with.
        """
        self._request.write((array.size, message))
        # Not numpy's way to copy, which gives the interpreter lock away, too.
        memoryview(self._request.array)[: array.size] = array.data
        if not self._broken:
            self._asked.release()
            self.waiting.release()
            began = time.monotonic()
            while not self._answered.acquire(timeout=timeout_s):
                # Semaphores go by the time of day, which leaps when somebody sets it.
                if time.monotonic() - max(began, self._pulse.answered) >= timeout_s:
                    self._broken = True  # an answer that comes late is not the next call's
                    raise TimeoutError
            self._pulse.answered = time.monotonic()
        if self._broken:
            raise ConnectionError("the process that answers is gone")
        answer = self._response.read()
        if isinstance(answer, Exception):
            raise answer
        return lay_out(self.response, answer)

    def break_off(self) -> None:
        """Tell whoever calls, or will, that the other process is gone."""
        self._broken = True
        self._answered.release()

    def take(self) -> tuple[np.ndarray, object] | None:
        """Return the array and the message of the request that waits in this channel, or None."""
        if not self._asked.acquire(block=False):
            return None
        size, message = self._request.read()
        return self._request.array[:size], message

    def answer(self, answer: Mapping[str, np.ndarray] | Exception) -> None:
        """Answer with an exception, or with arrays that :func:`lay_out` made of the channel's response memory."""
        if not isinstance(answer, Exception):
            answer = {name: array.shape for name, array in answer.items()}
        self._response.write(answer)
        self._answered.release()


def open_channels(count: int, request_bytes: int, response_bytes: int) -> list[Channel]:
    """Return channels for one batcher, to be made before its process is forked."""
    waiting, pulse = FORK.Semaphore(0), SimpleNamespace(answered=-math.inf)
    return [Channel(request_bytes, response_bytes, waiting, pulse) for _ in range(count)]


class _Memory:
    """Room for a message and an array in memory that forked processes share."""

    def __init__(self, array_bytes: int):
        # Anonymous memory takes nothing of /dev/shm, and of its size only the pages that were ever written to exist.
        memory = mmap.mmap(-1, MESSAGE_BYTES + array_bytes)
        self._message = memoryview(memory)[:MESSAGE_BYTES]
        self.array = np.frombuffer(memory, np.uint8, offset=MESSAGE_BYTES)

    def write(self, message: object) -> None:
        pickled = pickle.dumps(message)
        self._message[: len(pickled)] = pickled

    def read(self) -> object:
        return pickle.loads(self._message)  # a pickle says itself where it ends


def lay_out(memory: np.ndarray, shapes: Mapping[str, Sequence[int]]) -> dict[str, np.ndarray]:
    """Return uint8 arrays of these shapes in ``memory``, uint8 ``[N]``, one behind the other."""
    arrays, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + math.prod(shape)
        arrays[name] = memory[begin:end].reshape(shape)
    return arrays


class Batcher:
    """Workers that take what waits in the channels, up to a batch each, and never wait for company."""

    def __init__(
        self,
        channels: Sequence[Channel],
        read: Callable[[Channel, np.ndarray, object], object],
        workers: Sequence[Callable[[list], list]],
        explain: Callable[[Exception], Exception],
        max_batch_size: int,
    ):
        """``read``: returns the item that a channel's array and message stand for, or raises.

        ``workers``: each is called with a list of items, in a thread of its own, and returns the list of answers. Where
        one raises for a batch, it is called for each item alone, so that only those at fault fail. ``explain``: returns
        the exception to answer with for one that was raised.
        """
        self._channels = list(channels)
        self._waiting = channels[0].waiting
        self._read = read
        self._workers = workers
        self._explain = explain
        self._max_batch_size = max_batch_size
        self._collecting = threading.Lock()

    def run(self) -> None:
        """Work for ever; an error that is not a request's own is raised."""
        pool = ThreadPoolExecutor(len(self._workers), "batch-worker")
        done, _ = wait([pool.submit(self._work, worker) for worker in self._workers], return_when=FIRST_COMPLETED)
        done.pop().result()

    def _work(self, worker: Callable[[list], list]) -> None:
        while True:
            batch = []
            for channel, array, message in self._collect():
                try:
                    batch.append((channel, self._read(channel, array, message)))
                except Exception as error:
                    channel.answer(self._explain(error))
            self._answer(worker, batch)

    def _collect(self) -> list[tuple[Channel, np.ndarray, object]]:
        """Wait for a request, and return what waits then."""
        self._waiting.acquire()
        count = 1
        while count < self._max_batch_size and self._waiting.acquire(block=False):
            count += 1
        requests = []
        with self._collecting:
            for channel in list(self._channels):
                if len(requests) < count and (request := channel.take()) is not None:
                    requests.append((channel, *request))
                    # Whoever was served goes to the end of the queue.
                    self._channels.remove(channel)
                    self._channels.append(channel)
        return requests

    def _answer(self, worker: Callable[[list], list], batch: list[tuple[Channel, object]]) -> None:
        try:
            answers = worker([item for _, item in batch]) if batch else []
        except Exception as error:
            if len(batch) == 1:
                batch[0][0].answer(self._explain(error))
                return
            for entry in batch:
                self._answer(worker, [entry])
        else:
            for (channel, _), answer in zip(batch, answers, strict=True):
                channel.answer(answer)
