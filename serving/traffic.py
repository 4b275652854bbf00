# SPDX-License-Identifier: Apache-2.0
"""Counts the requests in flight over all processes, so that the server can drain."""

import contextlib
import math
import time
from collections.abc import Iterator, Sequence

from serving.errors import InferenceFailed
from serving.shared import share_numbers

STOPPING = "the server is stopping: send the request to another server, or again later"


class Traffic:
    """The requests in flight. Create it before the processes are forked."""

    def __init__(self, instances: int):
        """Make room for this many instances, which are identified by their numbers."""
        self._in_flight = share_numbers(instances)
        self._last_done = share_numbers(instances)
        self._closes_at = share_numbers(1)
        self._closes_at[0] = math.inf

    @contextlib.contextmanager
    def request(self, instance: int) -> Iterator[None]:
        """Count a request as in flight inside the block. Raises InferenceFailed if the server is about to exit."""
        if time.monotonic() > self._closes_at[0]:
            raise InferenceFailed(STOPPING)
        self._in_flight[instance] = 1
        try:
            yield
        finally:
            self._last_done[instance] = time.monotonic()
            self._in_flight[instance] = 0

    def forget(self, instances: Sequence[int]) -> None:
        """Stop counting the requests of these instances, because their process has ended."""
        self._in_flight[list(instances)] = 0

    def close_at(self, moment: float) -> None:
        """Reject further requests from this moment on, in seconds of ``time.monotonic``."""
        self._closes_at[0] = moment

    @property
    def in_flight(self) -> int:
        """The number of requests in flight."""
        return int(self._in_flight.sum())

    @property
    def last_done(self) -> float:
        """The moment when the last request was done, in seconds of ``time.monotonic``, or 0 if there was none."""
        return float(self._last_done.max())
