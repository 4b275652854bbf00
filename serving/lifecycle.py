# SPDX-License-Identifier: Apache-2.0
"""Shutdown: signals, draining and the exit status."""

import contextlib
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from serving.errors import ServerError
from serving.shared import share_bytes
from serving.traffic import Traffic

LOGGER = logging.getLogger("server")

# Time for the last response to pass through PyTriton and Triton, once the last request counts as done.
QUIET_S = 1

# The signal that fail() sends. A SIGTERM for all of the server's processes may end a helper before the main thread has
# run its handler. Python runs the handlers of pending signals in the order of their numbers, and this one is high.
FAILURE = signal.SIGRTMIN


class Lifecycle:
    """Stops the server on SIGINT, SIGTERM, SIGHUP or a fatal error. The main thread runs inside its ``with`` block.

    A signal leaves the block through SystemExit. A ServerError leaves it with one line on stderr and an exit status.
    """

    def __init__(self, drain_s: float):
        """``drain_s`` is the number of seconds to let requests in flight finish when the server stops."""
        self._drain_s = drain_s
        self._server = os.getpid()
        self._reason = share_bytes(1000)
        self._exit_status = 0
        self._told_to_stop = False
        self._stopping = False
        self._deferred = False
        self._pending = False

    def __enter__(self) -> "Lifecycle":
        signals = signal.SIGINT, signal.SIGTERM, signal.SIGHUP, FAILURE
        for signal_number in signals:
            if signal_number != signal.SIGHUP or signal.getsignal(signal_number) != signal.SIG_IGN:  # by nohup
                signal.signal(signal_number, self._on_signal)
        signal.signal(signal.SIGALRM, self._leave)
        # If the parent ignores it, and so this process as well, nobody could tell how a child ended.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {*signals, signal.SIGALRM})  # which the parent may have blocked
        return self

    def __exit__(self, _type: object, error: BaseException | None, _traceback: object) -> None:
        self.ignore_signals()
        if isinstance(error, ServerError):
            if self._told_to_stop:  # as was Triton, which may have ended first
                sys.exit(0)
            sys.stderr.write(f"{Path(sys.argv[0]).name}: {error}\n")  # print() may write the end of the line later
            sys.exit(error.exit_status)

    def _on_signal(self, signal_number: int, _frame: object) -> None:
        self._told_to_stop |= signal_number != FAILURE
        # Only the first signal counts, so that a second Ctrl-C does not interrupt the clean-up.
        if self._stopping:
            return
        self._stopping = True
        if signal_number == FAILURE:
            LOGGER.critical(self._reason.tobytes().rstrip(b"\0").decode(errors="replace"))
            self._exit_status = 1
        if self._deferred:
            self._pending = True
        else:
            self._leave()

    def _leave(self, *_: object) -> None:
        # Python ignores SystemExit in a destructor or a callback. Raise it again until the server has begun to stop.
        signal.alarm(1)
        sys.exit(self._exit_status)

    @contextlib.contextmanager
    def signals_deferred(self) -> Iterator[None]:
        """Defer signals until the end of the block."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False
        if self._pending:
            self._leave()

    def ignore_signals(self) -> None:
        """Ignore further signals and failures, because the server is stopping anyway."""
        self._stopping = True
        signal.alarm(0)

    def fail(self, reason: str) -> None:
        """Stop the server with status 1, so that a supervisor restarts it. Any thread and process may call this."""
        if not self._stopping:
            if not self._reason[0]:
                encoded = reason.encode()[: len(self._reason)]
                self._reason[: len(encoded)] = list(encoded)
            os.kill(self._server, FAILURE)

    def drain(self, traffic: Traffic, abandon: Callable[[], None]) -> None:
        """Wait until no request is in flight. Calls ``abandon`` if this takes too long."""
        signal.alarm(0)
        began = time.monotonic()
        deadline = began + self._drain_s
        traffic.close_at(deadline)
        LOGGER.info("stopping: requests in flight have %g s to finish", self._drain_s)
        while time.monotonic() < deadline + QUIET_S:
            if traffic.in_flight == 0 and time.monotonic() > max(traffic.last_done, began) + QUIET_S:
                return
            time.sleep(0.05)
        if count := traffic.in_flight:
            LOGGER.warning("stopping: requests in flight that took too long and will fail: %d", count)
            abandon()
