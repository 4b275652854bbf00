# SPDX-License-Identifier: Apache-2.0
"""When the server stops, how it drains, and with which status it exits."""

import contextlib
import logging
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from serving.errors import InferenceFailed, ServerError

LOGGER = logging.getLogger("server")

# The last answer still has to pass through PyTriton and Triton once the last request counts as done.
QUIET_S = 1

# What fail() sends to this process. A SIGTERM for all of the server's processes may end a helper before the main thread
# has run its handler. Python runs the handlers of pending signals in the order of their numbers, and this one is high.
FAILURE = signal.SIGRTMIN


class Lifecycle:
    """Stops the server on SIGINT, SIGTERM or a fatal error. The main thread runs inside its ``with`` block.

    A signal leaves the block through SystemExit. A ServerError leaves it with one line on stderr and an exit status.
    """

    def __init__(self, drain_s: float):
        """``drain_s`` is how long requests in flight may take once the server is told to stop, in seconds."""
        self._drain_s = drain_s
        self._on_give_up: list[Callable[[], None]] = []
        self._exit_status = 0
        self._reason = ""
        self._told_to_stop = False
        self._stopping = False
        self._deferred = False
        self._pending = False
        self._refuse_from = math.inf
        self._in_flight = 0
        self._last_done = -math.inf
        self._lock = threading.Lock()

    def __enter__(self) -> "Lifecycle":
        for number in (signal.SIGINT, signal.SIGTERM, FAILURE):
            signal.signal(number, self._on_signal)
        return self

    def __exit__(self, _type: object, error: BaseException | None, _traceback: object) -> None:
        self.finish()
        if isinstance(error, ServerError):
            if self._told_to_stop:  # and so was Triton, which may have ended first
                sys.exit(0)
            print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
            sys.exit(error.exit_status)

    def _on_signal(self, number: int, _frame: object) -> None:
        self._told_to_stop |= number != FAILURE
        # Only the first signal counts, so that an impatient second one does not interrupt the clean-up.
        if self._stopping:
            return
        self._stopping = True
        if number == FAILURE:
            LOGGER.critical(self._reason)
            self._exit_status = 1
        if self._deferred:
            self._pending = True
        else:
            sys.exit(self._exit_status)

    @contextlib.contextmanager
    def signals_deferred(self) -> Iterator[None]:
        """Make a signal wait until the end of the block."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False
        if self._pending:
            sys.exit(self._exit_status)

    def finish(self) -> None:
        """Ignore signals and failures from here on: the server is ending anyway."""
        self._stopping = True

    def fail(self, reason: str) -> None:
        """Stop the server with status 1, which makes a supervisor start it again. From any thread."""
        if not self._stopping:
            self._reason = self._reason or reason
            os.kill(os.getpid(), FAILURE)

    def on_give_up(self, callback: Callable[[], None]) -> None:
        """Register what :meth:`give_up` calls."""
        self._on_give_up.append(callback)

    def give_up(self) -> None:
        """Let the requests in flight fail, because they have taken too long or nobody waits for them any more."""
        for callback in self._on_give_up:
            callback()

    @contextlib.contextmanager
    def request(self) -> Iterator[None]:
        """Count a request as in flight inside the block. Raises InferenceFailed if the server is about to exit."""
        if time.monotonic() > self._refuse_from:
            raise InferenceFailed("the server is stopping: send the photo to another server, or again later")
        with self._lock:
            self._in_flight += 1
        try:
            yield
        finally:
            with self._lock:
                self._in_flight -= 1
                self._last_done = time.monotonic()

    def drain(self) -> None:
        """Return when the requests in flight are answered, or give up on them when their time is over."""
        began = time.monotonic()
        self._refuse_from = began + self._drain_s
        LOGGER.info("stopping: requests in flight have %g s to finish", self._drain_s)
        while time.monotonic() < self._refuse_from + QUIET_S:
            if self._in_flight == 0 and time.monotonic() > max(self._last_done, began) + QUIET_S:
                return
            time.sleep(0.05)
        if self._in_flight:
            LOGGER.warning("stopping: requests in flight took too long and will fail")
            self.give_up()
