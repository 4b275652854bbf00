# SPDX-License-Identifier: Apache-2.0
"""Captures the output of native libraries in a worker, to log it in a harmless form.

A library's message may quote a client's bytes, with line breaks and escape sequences. Python's log is not captured.
"""

import contextlib
import logging
import os

MAX_CHARACTERS = 500


class Printed:
    """The captured output of one process. Its parent can read the rest when the process has ended."""

    def __init__(self):
        """Open a pipe, before the process is forked. If the pipe is full, output is lost instead of blocking."""
        self._reader, self._writer = os.pipe()
        for end in (self._reader, self._writer):
            os.set_blocking(end, False)

    def redirect(self) -> None:
        """Capture the output of this process from now on, except Python's log."""
        log = os.fdopen(os.dup(2), "w", buffering=1, errors="backslashreplace")
        for handler in logging.getLogger().handlers:
            if isinstance(handler, logging.StreamHandler):
                handler.setStream(log)
        for standard in (1, 2):
            os.dup2(self._writer, standard)

    def read(self) -> str:
        """Return the output since the last call as one line of printable ASCII, or an empty string."""
        parts = []
        with contextlib.suppress(BlockingIOError):
            while part := os.read(self._reader, 1 << 16):
                parts.append(part)
        line = ascii(b"".join(parts).decode(errors="replace").strip())[1:-1]
        return line if len(line) <= MAX_CHARACTERS else f"{line[:MAX_CHARACTERS]}..."
