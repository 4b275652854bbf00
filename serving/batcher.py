# SPDX-License-Identifier: Apache-2.0
"""Groups requests into batches and has them answered together."""

import contextlib
import logging
import math
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from serving.channel import Channel
from serving.errors import InferenceFailed
from serving.printed import Printed

LARGE_WEIGHT = 1 / 6  # of the largest possible job; for photos of at most 25 megapixels, this is 4 megapixels

LOGGER = logging.getLogger("server")


@contextlib.contextmanager
def exit_on_error() -> Iterator[None]:
    """End the process on an error in a thread. Nobody else would notice it, and requests would wait forever."""
    try:
        yield
    except BaseException:
        LOGGER.exception("a worker failed")
        os._exit(1)


@dataclass(eq=False)
class _Entry:
    """A request that has been read and not been answered."""

    channel: Channel
    job: object
    weight: float


class Batcher:
    """Takes the requests from the channels, in batches, and never waits for a batch to fill.

    One thread reads requests, and rejects some, while another one computes a batch. Large jobs do not hold up small
    ones: not all channels can have one, and a small job that arrives while a batch is computed is part of the next one.
    """

    def __init__(
        self,
        channels: Sequence[Channel],
        read: Callable[[Channel, Mapping[str, np.ndarray], object], object],
        runner: Callable[[list], list],
        explain: Callable[[Exception], Exception],
        printed: Printed,
        max_batch_size: int,
        weigh: Callable[[object], float] = lambda _job: 0,
        max_batch_weight: float = math.inf,
    ):
        """Nothing runs before :meth:`run`.

        ``read`` turns the arrays and the message of a request into a job, or raises. ``runner`` is called with a list
        of jobs, and returns the list of answers. If it raises, it is called again for each job alone, so that only the
        job at fault fails. Instead of an answer, it may return a function, which a thread pool calls to compute the
        answer. ``explain`` turns an exception into the one that is sent to the client. What a job makes libraries print
        is logged with a description of its request. ``weigh`` returns the weight of a job, 1 for the largest possible
        one; large jobs of more than ``max_batch_weight`` together do not share a batch.
        """
        self._channels = deque(channels)
        self._waiting = channels[0].waiting
        self._read = read
        self._runner = runner
        self._explain = explain
        self._printed = printed
        self._max_batch_size = max_batch_size
        self._weigh = weigh
        self._max_batch_weight = max_batch_weight
        self._entries: list[_Entry] = []  # that wait for a batch, the oldest first
        self._arrived = threading.Condition()  # guards the entries
        # A fifth of the channels remains for small jobs, even while clients wait for large files to be encoded.
        self._large = threading.Semaphore(max(1, len(channels) * 4 // 5))
        # At a lower priority than the batches, which keep the device busy. On Linux, niceness applies per thread.
        self._pool = ThreadPoolExecutor(os.cpu_count(), "deferred", initializer=os.nice, initargs=(5,))

    def run(self) -> None:
        """Work forever. Raises the first error that is not the fault of one request."""
        threading.Thread(target=self._read_requests, daemon=True).start()
        while True:
            with self._arrived:
                self._arrived.wait_for(lambda: self._entries)
                batch = self._next_batch()
            self._compute(batch)

    def _read_requests(self) -> None:
        with exit_on_error():
            while True:
                self._waiting.acquire()
                while (request := self._channels[0].take()) is None:
                    self._channels.rotate(-1)
                self._read_request(self._channels[0], *request)
                self._channels.rotate(-1)  # the others come first now

    def _read_request(self, channel: Channel, arrays: Mapping[str, np.ndarray], message: object) -> None:
        try:
            job = self._read(channel, arrays, message)
            entry = _Entry(channel, job, self._weigh(job))
            if entry.weight > LARGE_WEIGHT and not self._large.acquire(blocking=False):
                raise InferenceFailed("the server is busy with large requests: send this one again later")
        except Exception as error:
            channel.answer(self._explain(error))
        else:
            with self._arrived:
                self._entries.append(entry)
                self._arrived.notify()

    def _next_batch(self) -> list[_Entry]:
        batch, weight = [], 0.0
        for entry in list(self._entries):
            fits = entry.weight <= LARGE_WEIGHT or weight + entry.weight <= self._max_batch_weight
            if len(batch) < self._max_batch_size and (fits or not batch):
                batch.append(entry)
                weight += entry.weight
                self._entries.remove(entry)
        return batch

    def _compute(self, batch: Sequence[_Entry]) -> None:
        try:
            answers = self._runner([entry.job for entry in batch])
        except Exception as error:
            if len(batch) > 1:
                self._printed.read()  # the job at fault prints it again
                for entry in batch:
                    self._compute([entry])
                return
            answers = [self._explain(error)]
        if printed := self._printed.read():
            requests = "; ".join(entry.channel.describe_request() for entry in batch)
            LOGGER.warning('a library printed "%s" while it processed %s', printed, requests)
        for entry, answer in zip(batch, answers, strict=True):
            if callable(answer):
                self._pool.submit(self._compute_later, entry, answer)
            else:
                self._answer(entry, answer)

    def _compute_later(self, entry: _Entry, compute: Callable[[], Mapping[str, np.ndarray]]) -> None:
        with exit_on_error():
            try:
                answer = compute()
            except Exception as error:
                answer = self._explain(error)
            self._answer(entry, answer)

    def _answer(self, entry: _Entry, answer: Mapping[str, np.ndarray] | Exception) -> None:
        if entry.weight > LARGE_WEIGHT:
            self._large.release()
        entry.channel.answer(answer)
