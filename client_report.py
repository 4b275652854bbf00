# SPDX-License-Identifier: Apache-2.0
"""The client's report on each photo."""

import contextlib
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, TextIO

from tqdm import tqdm

from connection import ClientError

MAX_LINE_BYTES = 1 << 20  # of a report


class Result(NamedTuple):
    """The result of one photo: a line of ``--report``. Only a photo that failed has an ``error``."""

    file: str
    width: int | None = None
    height: int | None = None
    kept: float | None = None  # the share of its pixels in the cut-out
    encoded_bytes: int | None = None  # of the cut-out as an image file
    milliseconds: float | None = None  # from reading the photo to the response, including retries
    files: Sequence[str] = ()
    error: str | None = None

    def __str__(self) -> str:
        if self.error:
            return printable(f"{self.file}: {self.error}")
        facts = [f"{self.width} x {self.height} pixels", f"{self.kept:.0%} kept"]
        if self.encoded_bytes:
            facts.append(f"{self.encoded_bytes / 1000:.0f} KB")
        facts.append(f"{self.milliseconds:.0f} ms")
        return printable(f"{self.file}: {', '.join([*facts, *self.files])}")


class Report:
    """Reports the result of each photo: on stdout, or on stderr if it failed, and in the file of --report."""

    def __init__(self, path: Path | None, obstacle: str = ""):
        """Open the file, if there is one. ``obstacle`` says why it must not be replaced. Raises ClientError."""
        self.incomplete = False
        self._lines, self._json = sys.stdout, None
        if path == Path("-"):
            self._lines, self._json = None, sys.stdout
        elif path:
            try:
                if path.is_file():
                    with path.open("rb") as existing:
                        if is_report(existing.readline(MAX_LINE_BYTES)):
                            obstacle = ""
                if obstacle and (path.is_file() or path.is_dir()):  # and not a pipe
                    raise ClientError(f"--report: {obstacle}: set another file, or --overwrite")
                self._json = path.open("a")
            except OSError as error:
                raise ClientError(f"--report: cannot write {path} ({error.strerror})") from None

    def begin(self) -> None:
        """Empty the file, which until then has the report of an earlier run."""
        if self._json and self._json is not sys.stdout:
            with contextlib.suppress(OSError):  # a pipe
                self._json.truncate(0)

    @property
    def is_read(self) -> bool:
        """Whether the results of photos that succeed can still be written anywhere."""
        return bool(self._lines or self._json)

    def add(self, result: Result) -> None:
        """Report on a photo. A write error is reported once. It makes the report incomplete, but no photo fails."""
        if self._json:
            self._json = self._print(json.dumps(result._asdict()), self._json)
        if result.error:
            say(str(result))
        elif self._lines:
            self._lines = self._print(str(result), self._lines)

    def _print(self, line: str, stream: TextIO) -> TextIO | None:
        """Print a line. Return the stream, or None if it cannot be written to."""
        try:
            with tqdm.external_write_mode(stream):
                print(line, file=stream, flush=True)
        except OSError as error:
            if stream is sys.stdout:  # Python flushes it again at exit
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            if not (stream is sys.stdout and isinstance(error, BrokenPipeError)):  # as with "| head"
                self.incomplete = True
                say(f"client.py: cannot write to {stream.name.strip('<>')} ({error.strerror}); continuing without it")
            return None
        return stream


def is_report(line: bytes) -> bool:
    """Return whether this is the first line of a report, or of an empty file."""
    try:
        return not line or tuple(json.loads(line)) == Result._fields
    except (ValueError, TypeError, RecursionError):
        return False


def plural(count: int, noun: str) -> str:
    """Return a number and a noun: ``1 photo``, ``2 photos``."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def say(line: str) -> None:
    """Print a line to stderr, above the progress bar. Parts of it may come from the server."""
    if sys.stderr:  # and not closed
        with contextlib.suppress(OSError), tqdm.external_write_mode(sys.stderr):
            print(printable(line), file=sys.stderr, flush=True)


class Speaker(logging.Handler):
    """Prints log messages with :func:`say`."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print a message."""
        say(record.getMessage())


def printable(text: str) -> str:
    """Return the text as one line for a terminal: names of files and errors of servers may contain any character."""
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)
