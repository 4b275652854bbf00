# SPDX-License-Identifier: Apache-2.0
"""What native libraries print in a worker, kept out of the log until it is known to be harmless there.

A library's message may quote a client's bytes, with line breaks and escape sequences. Python's log is written past it.
"""

import contextlib
import logging
import os

MAX_CHARACTERS = 500


class Printed:
    """Collects what one process prints. The process that started it can read the rest when it has ended."""

    def __init__(self):
        """Open a pipe, before the process is forked. If it is full, what is printed is lost, and nobody waits."""
        self._reader, self._writer = os.pipe()
        for end in (self._reader, self._writer):
            os.set_blocking(end, False)

    def redirect(self) -> None:
        """Collect what this process prints from now on, except what Python logs."""
        log = os.fdopen(os.dup(2), "w", buffering=1, errors="backslashreplace")
        for handler in logging.getLogger().handlers:
            if isinstance(handler, logging.StreamHandler):
                handler.setStream(log)
        for standard in (1, 2):
            os.dup2(self._writer, standard)

    def read(self) -> str:
        """Return what was printed since the last call, as one line of printable ASCII, or an empty string."""
        parts = []
        with contextlib.suppress(BlockingIOError):
            while part := os.read(self._reader, 1 << 16):
                parts.append(part)
        line = ascii(b"".join(parts).decode(errors="replace").strip())[1:-1]
        return line if len(line) <= MAX_CHARACTERS else f"{line[:MAX_CHARACTERS]}..."
