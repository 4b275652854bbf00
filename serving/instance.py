# SPDX-License-Identifier: Apache-2.0
"""What PyTriton calls: hands a request to a worker process and waits for the answer."""

import logging
from collections.abc import Sequence

import numpy as np
from pytriton.proxy.types import Request

from serving.channel import Channel
from serving.errors import InferenceFailed, InvalidRequest, RequestError
from serving.lifecycle import Lifecycle

LOGGER = logging.getLogger("server")


class Instance:
    """One instance of the model. PyTriton calls it in its own thread."""

    def __init__(self, channel: Channel, max_request_bytes: int, timeout_s: float, lifecycle: Lifecycle):
        """``channel`` belongs to this instance alone. A worker that is silent for ``timeout_s`` ends the server."""
        self._channel = channel
        self._max_request_bytes = max_request_bytes
        self._timeout_s = timeout_s
        self._lifecycle = lifecycle

    def __call__(self, requests: Sequence[Request]) -> list[dict[str, np.ndarray]]:
        """Return the outputs that each request asks for, with a batch dimension of 1, valid until the next call.

        Raises InvalidRequest or InferenceFailed.
        """
        try:
            with self._lifecycle.request():
                answers = []
                for request in requests:
                    answer = self._infer(request)
                    if len(requests) > 1:  # the next request reuses the memory of this answer
                        answer = {name: array.copy() for name, array in answer.items()}
                    answers.append(answer)
        except RequestError as error:
            LOGGER.warning("a request failed: %s", error)
            raise
        return [{name: array[None] for name, array in answer.items()} for answer in answers]

    def _infer(self, request: Request) -> dict[str, np.ndarray]:
        if any(len(array) != 1 for array in request.data.values()):
            raise InvalidRequest("the batch dimension must be 1: send one request for each item")
        arrays = {name: array[0] for name, array in request.data.items()}
        if strings := [name for name, array in arrays.items() if array.dtype.hasobject]:
            raise InvalidRequest(f"the input {strings[0]} must have a type of fixed size, such as UINT8")
        size = sum(array.nbytes for array in arrays.values())
        if size > self._max_request_bytes:
            raise InvalidRequest(
                f"the request has {size} bytes, but this server accepts at most {self._max_request_bytes}: "
                "save the photo as a JPEG, or scale it down"
            )
        try:
            message = request.parameters or {}, request.requested_output_names
            return self._channel.call(arrays, message, self._timeout_s)
        except ValueError:
            raise InvalidRequest("the parameters of the request are too long") from None
        except ConnectionError:
            raise InferenceFailed("the server is stopping because its worker is gone: try again later") from None
        except TimeoutError:
            self._lifecycle.fail(f"stopping: a worker has answered no request for {self._timeout_s:g} s")
            raise InferenceFailed("the server took too long and is stopping: try again later") from None
