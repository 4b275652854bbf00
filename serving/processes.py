# SPDX-License-Identifier: Apache-2.0
"""The server's child processes: forked from it, connected by a pipe, and killed with it by default."""

import contextlib
import ctypes
import logging
import os
import signal
from collections.abc import Callable, Sequence
from multiprocessing import Pipe, get_context

from serving.errors import ServerError

FORK = get_context("fork")
KILL_TIMEOUT_S = 10

PR_SET_PDEATHSIG, PR_SET_NAME = 1, 15  # from Linux's sys/prctl.h

LOGGER = logging.getLogger("server")


class Child:
    """A child process, as seen from the server."""

    def __init__(self, kind: str, main: Callable[..., None], *arguments: object):
        """Fork, and call ``main(pipe, *arguments)`` in the child. The server must have only one thread at this time.

        ``kind`` is its name in log lines, errors and ``ps``, such as "worker". The child exits when ``main`` returns.
        """
        self.kind = kind
        self.pipe, child_end = Pipe()
        self.process = FORK.Process(target=_run, args=(os.getpid(), kind, main, child_end, *arguments))
        self.process.start()
        child_end.close()

    def send(self, message: object) -> None:
        """Send an object to the child. If the child has exited, :meth:`receive` says so."""
        with contextlib.suppress(ConnectionError):
            self.pipe.send(message)

    def receive(self) -> object:
        """Return the next object that the child sends. Raises the child's ServerError, or one if it has exited."""
        try:
            message = self.pipe.recv()
        except (EOFError, ConnectionError):
            self.process.join()
            code = self.process.exitcode
            how = f"exit status {code}" if code >= 0 else signal.Signals(-code).name
            raise ServerError(f"a {self.kind} exited during startup ({how})") from None
        if isinstance(message, ServerError):
            raise message
        return message


def _run(parent: int, kind: str, main: Callable[..., None], pipe: object, *arguments: object) -> None:
    """Entry point of a child."""
    # A terminal also signals this process. Ignore Ctrl-C and the closing of the terminal: the server drains requests
    # first. Ignore Ctrl-Z: Triton and the frontends continue, and would take a suspended worker for one that hangs.
    for signal_number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGTSTP):
        signal.signal(signal_number, signal.SIG_IGN)
    prctl(PR_SET_NAME, kind.encode())
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # the server was killed before prctl
        os._exit(1)
    try:
        main(pipe, *arguments)
    except ServerError as error:
        pipe.send(error)
        os._exit(1)
    except BaseException:
        LOGGER.exception("a %s failed", kind)
        os._exit(1)
    os._exit(0)  # Python's own exit would wait for threads


def prctl(*arguments: object) -> None:
    """Call prctl(2) for this process."""
    ctypes.CDLL(None).prctl(*arguments)


def survive_server() -> None:
    """Let this child outlive the server, even if the whole process group is killed.

    It has to notice the server's end with :func:`os.getppid`, and exit.
    """
    os.setsid()
    prctl(PR_SET_PDEATHSIG, 0)


def kill_all(children: Sequence[Child]) -> None:
    """Kill child processes and wait until they have ended. Exits if one does not."""
    for child in children:
        child.process.kill()
    for child in children:
        child.process.join(KILL_TIMEOUT_S)
        if child.process.is_alive():
            LOGGER.critical("cannot kill a %s: the driver of its GPU is probably hung", child.kind)
            os._exit(1)  # Python's own exit would wait for it
