# SPDX-License-Identifier: Apache-2.0
"""The interface that you implement to serve a network."""

import abc
import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from pytriton.proxy.types import Request


@dataclass(frozen=True)
class Deferred:
    """An output that the CPU computes from an array on the device, such as a compressed file.

    The array is copied to the host, and ``compute`` then runs in a thread of a pool, so that neither the device nor the
    other jobs of the batch wait for it. It gets and returns a numpy array.
    """

    compute: Callable[[np.ndarray], np.ndarray]
    source: object


@dataclass(frozen=True)
class Checked:
    """The outputs of a job, and whether they are valid.

    ``valid`` is a tensor of one value in host memory. It may be the target of an asynchronous copy from the device:
    ``.to("cpu", non_blocking=True)``. If it is false, the job fails with ``error``, an exception.
    """

    outputs: Mapping[str, object]
    valid: object
    error: Exception

    def __post_init__(self):
        if not isinstance(self.error, Exception):
            raise TypeError(f"the error of Checked must be an exception, not {self.error!r}")


class Stages(abc.ABC):
    """Turns requests into jobs, and batches of jobs into outputs. Each executor of a worker process has one object.

    One thread calls the object. On a GPU, it has its own CUDA stream, which is torch's current stream in the
    constructor and in all calls. Another thread calls ``read`` and ``weigh`` of the first executor's object, even
    during a batch. Any executor's object may then compute the job.
    """

    # The name of an option, a whole number, with which the limits grow. If /dev/shm is too small, the server lowers it.
    size_option: ClassVar[str | None] = None

    @classmethod
    @abc.abstractmethod
    def limits(cls, options: argparse.Namespace) -> tuple[int, int]:
        """Return the maximum size of a request and of a response, in bytes: all inputs, and all outputs together."""

    @classmethod
    @abc.abstractmethod
    def example(cls, options: argparse.Namespace) -> Request:
        """Return a valid request, without a batch dimension. The server only starts if this request succeeds."""

    @abc.abstractmethod
    def __init__(self, options: argparse.Namespace, device: str):
        """Load the network onto the device, ``cpu`` or ``cuda:N``.

        ``options.max_batch_size`` and the size option have their effective values.
        """

    @abc.abstractmethod
    def read(self, request: Request) -> object:
        """Check a request and return its job, before it joins a batch. Raises InvalidRequest.

        The input arrays have no batch dimension. They are valid until the response is sent.
        """

    @abc.abstractmethod
    def __call__(self, jobs: Sequence) -> Sequence[Mapping[str, object] | Checked]:
        """Return the requested outputs of each job, without a batch dimension.

        Outputs are numpy arrays, strings in numpy arrays, tensors of torch or DALI on the device, or
        :class:`Deferred`. If this raises, it is called again for each job separately.
        """

    def weigh(self, job: object) -> float:  # noqa: ARG002
        """Return the size of a job, up to 1 for the largest possible one. Large jobs do not hold up small ones."""
        return 0
