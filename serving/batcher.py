# SPDX-License-Identifier: Apache-2.0
"""Groups queued requests into batches, and responds to them."""

import contextlib
import logging
import math
import os
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from pytriton.proxy.types import Request

from serving.channel import Channel
from serving.errors import InferenceFailed
from serving.executor import Executor, Job
from serving.memory import StoredResponse
from serving.printed import Printed

LARGE_WEIGHT = 1 / 6  # heavier jobs are large; the largest possible job weighs 1

LOGGER = logging.getLogger("server")


@contextlib.contextmanager
def exit_on_error() -> Iterator[None]:
    """End the process on an error in a thread. Otherwise, it would go unnoticed, and requests would wait forever."""
    try:
        yield
    except BaseException:
        LOGGER.exception("a worker failed")
        os._exit(1)


class Batcher:
    """Computes the requests from the channels in batches, without waiting for a batch to fill.

    One thread reads and checks requests. Each executor has a thread, which computes one batch at a time. Large jobs do
    not hold up small ones: some channels are reserved for small jobs, and a small job may join any batch.
    """

    def __init__(
        self,
        channels: Sequence[Channel],
        executors: Sequence[Executor],
        printed: Printed,
        max_batch_size: int,
        max_batch_weight: float = math.inf,
    ):
        """Call :meth:`run` to start.

        ``printed`` is logged with a description of the requests in progress. A large job joins a batch only if the
        weight of the batch stays within ``max_batch_weight``.
        """
        self._channels = deque(channels)
        self._queued = channels[0].queued
        self._executors = executors
        self._printed = printed
        self._max_batch_size = max_batch_size
        self._max_batch_weight = max_batch_weight
        self._queue: list[Job] = []  # the oldest first
        self._in_progress: list[Job] = []
        self._arrived = threading.Condition()  # guards both lists
        # A fifth of the channels remains for small jobs, even while clients wait for large files to be encoded.
        self._large = threading.Semaphore(max(1, len(channels) * 4 // 5))
        # Its priority is lower than that of the batches, which keep the device busy. On Linux, niceness is per thread.
        self._pool = ThreadPoolExecutor(os.cpu_count(), "deferred", initializer=os.nice, initargs=(5,))

    def run(self) -> None:
        """Process requests forever. An error that is not the fault of one request ends the process."""
        threading.Thread(target=self._read_requests, daemon=True).start()
        for executor in self._executors[1:]:
            threading.Thread(target=self._compute_batches, args=(executor,), daemon=True).start()
        self._compute_batches(self._executors[0])

    def _compute_batches(self, executor: Executor) -> None:
        with exit_on_error():
            while True:
                with self._arrived:
                    self._arrived.wait_for(lambda: self._queue)
                    batch = self._next_batch()
                self._compute(executor, batch)

    def _read_requests(self) -> None:
        with exit_on_error():
            while True:
                self._queued.acquire()
                while (request := self._channels[0].take()) is None:
                    self._channels.rotate(-1)
                self._read_request(self._channels[0], *request)
                self._channels.rotate(-1)  # round robin

    def _read_request(self, channel: Channel, arrays: Mapping[str, np.ndarray], message: tuple) -> None:
        try:
            parameters, outputs = message
            job = self._executors[0].read(channel, Request(arrays, parameters, requested_output_names=outputs))
            if job.weight > LARGE_WEIGHT and not self._large.acquire(blocking=False):
                raise InferenceFailed("the server is busy with large requests: send this request again later")
        except Exception as error:
            channel.respond(self._executors[0].explain(error))
        else:
            with self._arrived:
                self._queue.append(job)
                self._arrived.notify()

    def _next_batch(self) -> list[Job]:
        batch, weight = [], 0.0
        for job in list(self._queue):
            fits = job.weight <= LARGE_WEIGHT or weight + job.weight <= self._max_batch_weight
            if len(batch) < self._max_batch_size and (fits or not batch):
                batch.append(job)
                weight += job.weight
                self._queue.remove(job)
        self._in_progress += batch
        return batch

    def _compute(self, executor: Executor, batch: Sequence[Job]) -> None:
        """Respond to each job. If the batch fails, compute its jobs one by one, so that only the faulty one fails."""
        try:
            responses = executor.compute(batch)
        except Exception as error:
            if len(batch) > 1:
                self._printed.read()  # discarded: the faulty job will print it again
                for job in batch:
                    self._compute(executor, [job])
                return
            responses = [error]
        if printed := self._printed.read():
            with self._arrived:  # so that the channels keep these requests meanwhile
                requests = "; ".join(job.channel.describe_request() for job in self._in_progress)
            LOGGER.warning('a library printed "%s" while it processed %s', printed, requests)
        for job, response in zip(batch, responses, strict=True):
            if isinstance(response, StoredResponse) and response.deferred:
                self._pool.submit(self._respond, job, response)
            else:
                self._respond(job, response)

    def _respond(self, job: Job, response: StoredResponse | Exception) -> None:
        with exit_on_error():
            if isinstance(response, StoredResponse):
                try:
                    response = response.complete()
                except Exception as error:
                    response = error
            if isinstance(response, Exception):
                response = self._executors[0].explain(response)
            if job.weight > LARGE_WEIGHT:
                self._large.release()
            with self._arrived:
                self._in_progress.remove(job)
            job.channel.respond(response)
