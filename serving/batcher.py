# SPDX-License-Identifier: Apache-2.0
"""Groups the requests that are waiting and has them answered together."""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from serving.channel import Channel

LOGGER = logging.getLogger("server")


class Batcher:
    """Takes what is waiting in the channels, up to one batch, and never waits for a batch to fill."""

    def __init__(
        self,
        channels: Sequence[Channel],
        read: Callable[[Channel, Mapping[str, np.ndarray], object], object],
        runner: Callable[[list], list],
        explain: Callable[[Exception], Exception],
        max_batch_size: int,
    ):
        """Nothing runs before :meth:`run`.

        ``read`` turns the arrays and the message of a request into a job, or raises. ``runner`` is called with a list
        of jobs, and returns the list of answers. If it raises, it is called again for each job alone, so that only the
        job at fault fails. Instead of an answer, it may return a function, which a thread pool calls to compute the
        answer. ``explain`` turns an exception into the one that is sent to the client.
        """
        self._channels = list(channels)
        self._waiting = channels[0].waiting
        self._read = read
        self._runner = runner
        self._explain = explain
        self._max_batch_size = max_batch_size
        # At a lower priority than the batches, which keep the device busy. On Linux, niceness applies per thread.
        self._pool = ThreadPoolExecutor(os.cpu_count(), "deferred", initializer=os.nice, initargs=(5,))

    def run(self) -> None:
        """Work forever. Raises the first error that is not the fault of one request."""
        while True:
            batch = []
            for channel, arrays, message in self._collect():
                try:
                    batch.append((channel, self._read(channel, arrays, message)))
                except Exception as error:
                    channel.answer(self._explain(error))
            self._answer(batch)

    def _collect(self) -> list[tuple[Channel, Mapping[str, np.ndarray], object]]:
        """Wait for a request, and return all that are waiting then, up to one batch."""
        self._waiting.acquire()
        count = 1
        while count < self._max_batch_size and self._waiting.acquire(block=False):
            count += 1
        requests = []
        for channel in list(self._channels):
            if len(requests) < count and (request := channel.take()) is not None:
                requests.append((channel, *request))
                # A channel that was served goes to the end of the queue.
                self._channels.remove(channel)
                self._channels.append(channel)
        return requests

    def _answer(self, batch: list[tuple[Channel, object]]) -> None:
        try:
            answers = self._runner([job for _, job in batch]) if batch else []
        except Exception as error:
            if len(batch) == 1:
                batch[0][0].answer(self._explain(error))
                return
            for entry in batch:
                self._answer([entry])
        else:
            for (channel, _), answer in zip(batch, answers, strict=True):
                if callable(answer):
                    self._pool.submit(self._answer_later, channel, answer)
                else:
                    channel.answer(answer)

    def _answer_later(self, channel: Channel, compute: Callable[[], Mapping[str, np.ndarray]]) -> None:
        try:
            try:
                answer = compute()
            except Exception as error:
                answer = self._explain(error)
            channel.answer(answer)
        except BaseException:
            # Nobody else notices an error in a pool, and the request would wait forever.
            LOGGER.exception("a worker failed")
            os._exit(1)
