# SPDX-License-Identifier: Apache-2.0
"""The exceptions that modules share. Each message is one line for the operator or the client."""

import logging

# Of a message for a client, whatever it quotes. gRPC drops a response if its error takes more than 8 KB, and encodes a
# character in up to 12 bytes.
MAX_CHARACTERS = 600

LOGGER = logging.getLogger("server")


class ServerError(Exception):
    """The server cannot start or continue. A restart may help."""

    exit_status = 1


class UsageError(ServerError):
    """The server cannot start until the user changes something, such as an option."""

    exit_status = 2


def printable(text: str) -> str:
    """Return a text with escape sequences for unprintable characters, such as line breaks."""
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)


def start_error(failure: str, error: BaseException) -> ServerError:
    """Return a one-line exception for a failed start, and log the traceback of ``error`` at debug level."""
    LOGGER.debug(failure, exc_info=error)
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return ServerError(f"{failure}: {reason}; --verbose shows where")


class RequestError(Exception):
    """A request failed. The message is one sentence for its client."""

    # PyTriton sends the client the exception as Python prints it. Without a traceback and a module, this is one line,
    # "InvalidRequest: sentence", which does not reveal paths on this machine.
    __module__ = "builtins"
    __traceback__ = property(lambda _self: None, lambda _self, _traceback: None)  # contextlib assigns to it

    def __str__(self) -> str:
        return printable(super().__str__()[:MAX_CHARACTERS])[:MAX_CHARACTERS]

    def __reduce__(self):  # pickle looks up a class in its module, which is not the real one
        known = next(kind for kind in type(self).__mro__ if kind.__name__ in globals())  # or its base
        return _restore, (known.__name__, str(self)[:MAX_CHARACTERS])


class InvalidRequest(RequestError):
    """The client has to change the request."""

    __module__ = "builtins"


class InferenceFailed(RequestError):
    """The server failed. The request may be valid."""

    __module__ = "builtins"


def _restore(class_name: str, message: str) -> RequestError:
    return globals()[class_name](message)
