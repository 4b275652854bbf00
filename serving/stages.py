# SPDX-License-Identifier: Apache-2.0
"""What you write to serve a network: the stages, and a function that loads them."""

import abc
import argparse
from collections.abc import Callable, Mapping, Sequence

from pytriton.proxy.types import Request


class Stages(abc.ABC):
    """Turns requests into jobs, and batches of jobs into outputs. An object belongs to one thread.

    A thread on a GPU has a CUDA stream of its own, which is torch's current stream in the constructor and in all calls.
    """

    @abc.abstractmethod
    def read(self, request: Request) -> object:
        """Check a request and return its job, before it joins a batch. Raises InvalidRequest.

        The input arrays have no batch dimension. They are valid until the request is answered.
        """

    @abc.abstractmethod
    def __call__(self, jobs: Sequence) -> Sequence[Mapping[str, object]]:
        """Return the outputs that each job asks for, without a batch dimension.

        Outputs are numpy arrays, or tensors of torch or DALI. If this raises, it is called again for each job alone.
        """

    def verify(self) -> None:  # noqa: B027 - not every network needs it
        """Raise an exception if the outputs of the last call are wrong. By now, the GPU has finished them."""


# Runs once in each worker process. Gets the options, with the automatic ones filled in, and the device: ``cpu`` or
# ``cuda:N``. Returns what makes the stages of one thread.
Load = Callable[[argparse.Namespace, str], Callable[[], Stages]]
