# SPDX-License-Identifier: Apache-2.0
"""The callable that is bound to PyTriton: sends a request to a worker process, and waits for the response."""

import logging
from collections.abc import Mapping, Sequence

import numpy as np
from pytriton.model_config.triton_model_config import TensorSpec
from pytriton.proxy.types import Request

from serving.channel import Channel
from serving.errors import InferenceFailed, InvalidRequest, RequestError
from serving.lifecycle import Lifecycle
from serving.traffic import STOPPING, Traffic

STRING_KINDS = "OS"  # of numpy's dtypes

LOGGER = logging.getLogger("server")


class Instance:
    """One instance of the model. A frontend calls each instance in a separate thread, with one request at a time."""

    def __init__(self, number: int, channel: Channel, timeout_s: float, traffic: Traffic, lifecycle: Lifecycle):
        """``channel`` is for this instance only. The server stops if a worker is silent for ``timeout_s`` seconds."""
        self.number = number
        self.channel = channel
        self.outputs: Sequence[TensorSpec] = ()  # of the model, once it is bound
        self._timeout_s = timeout_s
        self._traffic = traffic
        self._lifecycle = lifecycle

    def __call__(self, requests: Sequence[Request]) -> list[dict[str, np.ndarray]]:
        """Return each request's outputs, with a batch dimension of 1. The next call overwrites them.

        Raises InvalidRequest or InferenceFailed.
        """
        try:
            with self._traffic.request(self.number):
                responses = []
                for request in requests:
                    response = self._infer(request)
                    if len(requests) > 1:  # the next request reuses the memory of this response
                        response = {name: array.copy() for name, array in response.items()}
                    responses.append(response)
        except RequestError as error:
            LOGGER.warning("a request failed: %s", error)
            raise
        return [{name: array[None] for name, array in response.items()} for response in responses]

    def _infer(self, request: Request) -> dict[str, np.ndarray]:
        if any(len(array) != 1 for array in request.data.values()):
            raise InvalidRequest("the batch dimension must be 1: send one request for each item")
        arrays = {name: array[0] for name, array in request.data.items()}
        size = sum(array.nbytes for array in arrays.values())
        if size > (limit := int(self.channel.limit[0])):
            raise InvalidRequest(f"the request has {size} bytes, but the limit is {limit}")
        try:
            message = request.parameters or {}, request.requested_output_names
            response = self.channel.call(arrays, message, self._timeout_s)
        except ValueError:
            raise InvalidRequest("the inputs or parameters of the request are too large") from None
        except ConnectionError:
            raise InferenceFailed(STOPPING) from None
        except TimeoutError:
            LOGGER.error("a worker hung while it processed %s", self.channel.describe_request())
            self._lifecycle.fail(f"stopping: a worker has responded to no request for {self._timeout_s:g} s")
            raise InferenceFailed("the server took too long and is stopping: try again later") from None
        check_outputs(self.outputs, request.requested_output_names or (), response)
        return response


def check_outputs(outputs: Sequence[TensorSpec], requested: Sequence[str], response: Mapping[str, np.ndarray]) -> None:
    """Raise InferenceFailed if a response, without a batch dimension, does not match the declared outputs.

    PyTriton's stub process would otherwise drop an output, or hang forever because it cannot convert one.
    """
    declared = {output.name: output for output in outputs}
    for name, array in response.items():
        if name not in declared:
            raise InferenceFailed(f"the output {name} is not declared")
        dtype, shape = np.dtype(declared[name].dtype), declared[name].shape
        same_type = array.dtype == dtype or (array.dtype.kind in STRING_KINDS and dtype.kind in STRING_KINDS)
        same_rank = array.ndim == len(shape)
        if not same_type or not same_rank or any(n not in (-1, m) for n, m in zip(shape, array.shape, strict=True)):
            found = _describe(array.dtype, array.shape)
            raise InferenceFailed(f"the output {name} is declared as {_describe(dtype, shape)}, but is {found}")
        if array.size == 0:
            raise InferenceFailed(f"the output {name} is empty, which PyTriton cannot return")
    # Triton lists all outputs for a request that names none. The stages may then choose some.
    missing = [name for name in requested if name not in response]
    if missing and (not response or len(requested) < len(outputs)):
        raise InferenceFailed(f"the output {missing[0]} is missing")


def _describe(dtype: np.dtype, shape: Sequence[int]) -> str:
    return f"{'strings' if dtype.kind in STRING_KINDS else dtype} {list(shape)}"
