# SPDX-License-Identifier: Apache-2.0
"""Work on what waits together: many threads call, a few workers answer in batches."""

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future


class Batcher:
    """Callable with one item; each worker takes what waits, up to a batch, and never waits for company.

    A worker is called with a list of items, in a thread of its own, and returns a list of results, which it must not
    touch again. Where it raises for a batch, it is called for each item alone, so that only those at fault fail.
    """

    def __init__(self, workers: Sequence[Callable[[list], list]], max_batch_size: int):
        self._waiting: queue.SimpleQueue[tuple[object, Future]] = queue.SimpleQueue()
        self._max_batch_size = max_batch_size
        for index, worker in enumerate(workers):
            threading.Thread(target=self._work, args=(worker,), name=f"batch-worker-{index}", daemon=True).start()

    def __call__(self, item: object) -> object:
        """Return the worker's result for the item, or raise what the worker raised for it."""
        future: Future = Future()
        self._waiting.put((item, future))
        return future.result()

    def _work(self, worker: Callable[[list], list]) -> None:
        while True:
            batch = [self._waiting.get()]
            while len(batch) < self._max_batch_size and not self._waiting.empty():
                try:
                    batch.append(self._waiting.get_nowait())
                except queue.Empty:  # another worker was faster
                    break
            self._answer(worker, batch)

    def _answer(self, worker: Callable[[list], list], batch: list[tuple[object, Future]]) -> None:
        try:
            answers = list(zip(batch, worker([item for item, _ in batch]), strict=True))
        except Exception as error:
            if len(batch) == 1:
                batch[0][1].set_exception(error)
                return
            for entry in batch:
                self._answer(worker, [entry])
        else:
            for (_, future), result in answers:
                future.set_result(result)
