# SPDX-License-Identifier: Apache-2.0
"""Every exception that crosses a module boundary. Each message is one line, written for whoever reads it."""


class ServerError(Exception):
    """The server cannot start or go on. Starting it again may help."""

    exit_status = 1


class UsageError(ServerError):
    """The server cannot start until the user changes something, such as an option."""

    exit_status = 2


class RequestError(Exception):
    """A request gets no answer. The message is one sentence for its client."""

    # PyTriton sends the client the exception as Python prints it. Without a traceback and a module, that is one line,
    # "InvalidRequest: sentence", and does not reveal paths on this machine.
    __module__ = "builtins"
    __traceback__ = property(lambda _self: None, lambda _self, _traceback: None)  # contextlib assigns to it

    def __reduce__(self):  # pickle looks a class up in its module, which is not the real one here
        known = next(kind for kind in type(self).__mro__ if kind.__name__ in globals())  # yours may be a subclass
        return _restore, (known.__name__, str(self))


class InvalidRequest(RequestError):
    """The client has to change the request."""

    __module__ = "builtins"


class InferenceFailed(RequestError):
    """The server failed at a request that may be fine."""

    __module__ = "builtins"


def _restore(class_name: str, message: str) -> RequestError:
    return globals()[class_name](message)
