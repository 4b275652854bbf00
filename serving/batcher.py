# SPDX-License-Identifier: Apache-2.0
"""Groups the requests that are waiting and has them answered together."""

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait

import numpy as np

from serving.channel import Channel


class Batcher:
    """Threads that take what is waiting in the channels, up to one batch each. They never wait for a batch to fill."""

    def __init__(
        self,
        channels: Sequence[Channel],
        read: Callable[[Channel, Mapping[str, np.ndarray], object], object],
        runners: Sequence[Callable[[list], list]],
        explain: Callable[[Exception], Exception],
        max_batch_size: int,
    ):
        """Nothing runs before :meth:`run`.

        ``read`` turns the arrays and the message of a request into a job, or raises. Each of the ``runners`` is called
        in a thread of its own with a list of jobs, and returns the list of answers. If it raises, it is called again
        for each job alone, so that only the job at fault fails. ``explain`` turns an exception into the one to answer
        with.
        """
        self._channels = list(channels)
        self._waiting = channels[0].waiting
        self._read = read
        self._runners = runners
        self._explain = explain
        self._max_batch_size = max_batch_size
        self._collecting = threading.Lock()

    def run(self) -> None:
        """Work forever. Raises the first error that is not the fault of one request."""
        pool = ThreadPoolExecutor(len(self._runners), "runner")
        done, _ = wait([pool.submit(self._work, runner) for runner in self._runners], return_when=FIRST_COMPLETED)
        done.pop().result()

    def _work(self, runner: Callable[[list], list]) -> None:
        while True:
            batch = []
            for channel, arrays, message in self._collect():
                try:
                    batch.append((channel, self._read(channel, arrays, message)))
                except Exception as error:
                    channel.answer(self._explain(error))
            self._answer(runner, batch)

    def _collect(self) -> list[tuple[Channel, Mapping[str, np.ndarray], object]]:
        """Wait for a request, and return all that are waiting then, up to one batch."""
        self._waiting.acquire()
        count = 1
        while count < self._max_batch_size and self._waiting.acquire(block=False):
            count += 1
        requests = []
        with self._collecting:
            for channel in list(self._channels):
                if len(requests) < count and (request := channel.take()) is not None:
                    requests.append((channel, *request))
                    # A channel that was served goes to the end of the queue.
                    self._channels.remove(channel)
                    self._channels.append(channel)
        return requests

    def _answer(self, runner: Callable[[list], list], batch: list[tuple[Channel, object]]) -> None:
        try:
            answers = runner([job for _, job in batch]) if batch else []
        except Exception as error:
            if len(batch) == 1:
                batch[0][0].answer(self._explain(error))
                return
            for entry in batch:
                self._answer(runner, [entry])
        else:
            for (channel, _), answer in zip(batch, answers, strict=True):
                channel.answer(answer)
