# SPDX-License-Identifier: Apache-2.0
"""Host memory: copies responses from the device, and limits requests to what fits into /dev/shm."""

import argparse
import bisect
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from serving.arrays import ArraySpec, Packer
from serving.errors import InvalidRequest, UsageError
from serving.stages import Deferred, Stages

if TYPE_CHECKING:
    import torch

# If /dev/shm is full, PyTriton and Triton crash with SIGBUS. Triton's pool starts at 4 MB per instance, and a request
# and its response take 1.3 times their size in it, because of gaps. PyTriton's store allocates segments in powers of
# two and keeps them: up to 3 times the size if requests grow. Both factors are measured.
SHM_BYTES_PER_INSTANCE = 5_000_000
SHM_BYTES_PER_BYTE = 1.3 + 3

# A few instances that accept large requests are more useful than many that reject them: the number of instances is
# reduced until requests of this share of the configured size fit.
USEFUL_SHARE = 1 / 25


class ResponseMemory:
    """Copies responses from the device to the host, always into the same memory."""

    def __init__(self, memory: np.ndarray, device: str):
        """``memory`` is uint8 ``[N]``. It is pinned on demand, so that a GPU can copy into it asynchronously."""
        self._memory = memory
        self._device = device
        self._pinned = 0

    def store(self, outputs: Mapping[str, object]) -> "StoredResponse":
        """Copy the outputs of a job, of any shape and dtype, to the host.

        On a GPU, the copies are complete when torch's current stream reaches this point. Raises InvalidRequest if the
        memory is too small.
        """
        response = StoredResponse(self._memory)
        copies = []
        for name, output in outputs.items():
            if isinstance(output, Deferred):
                continue
            array = self._open(output)
            if isinstance(array, np.ndarray):
                response.add(name, array)
            else:
                dtype = str(array.dtype).removeprefix("torch.")
                copies.append((array, response.reserve(name, tuple(array.shape), dtype)))
        if copies:
            self._pin(response.end)
        for tensor, target in copies:
            _copy_from_gpu(tensor, target)
        # The deferred outputs come last, because their sizes are not known yet.
        for name, output in outputs.items():
            if isinstance(output, Deferred):
                response.deferred[name] = Deferred(output.compute, self._copy_source(output.source))
        return response

    def _open(self, output: object) -> "np.ndarray | torch.Tensor":
        """Return an output without copying it: as an array on the host, or a tensor on the GPU."""
        if self._device == "cpu" or isinstance(output, np.ndarray):
            return np.asarray(output)
        import torch

        return torch.from_dlpack(output)

    def _copy_source(self, source: object) -> np.ndarray:
        array = self._open(source)
        if isinstance(array, np.ndarray):
            return array.copy()
        import torch

        pinned = torch.empty_like(array, device="cpu", pin_memory=True).numpy()
        _copy_from_gpu(array, pinned)
        return pinned

    def _pin(self, size: int) -> None:
        # Pin only the largest size so far: pinned pages take up memory even if they are unused.
        if min(size, len(self._memory)) <= self._pinned:
            return
        import torch

        cudart, pointer = torch.cuda.cudart(), self._memory.ctypes.data
        if self._pinned:
            torch.cuda.check_error(cudart.cudaHostUnregister(pointer))
            self._pinned = 0
        # Round up, so that this happens rarely.
        size = min(len(self._memory), 1 << (size - 1).bit_length())
        torch.cuda.check_error(cudart.cudaHostRegister(pointer, size, 0))
        self._pinned = size


def _copy_from_gpu(tensor: "torch.Tensor", target: np.ndarray) -> None:
    """Copy into an array of the host, in the order of torch's current stream."""
    import torch

    torch.from_numpy(target).copy_(tensor, non_blocking=True)


class StoredResponse(Packer):
    """A response in the memory of a channel. Deferred outputs may still be missing.

    Raises InvalidRequest if the memory is too small.
    """

    def __init__(self, memory: np.ndarray):
        """``memory`` is uint8 ``[N]``."""
        super().__init__(memory)
        self.deferred: dict[str, Deferred] = {}
        self._limit = len(memory)

    def allocate(self, name: str, shape: tuple[int, ...], dtype: str, size: int) -> np.ndarray:
        """Return this number of bytes for an array."""
        try:
            return super().allocate(name, shape, dtype, size)
        except ValueError:
            message = f"the response exceeds the limit of {self._limit} bytes: request fewer outputs"
            raise InvalidRequest(message) from None

    def complete(self) -> Mapping[str, ArraySpec]:
        """Compute the deferred outputs, and return the specs of all arrays. May be called once, by any thread."""
        while self.deferred:
            name, output = self.deferred.popitem()
            self.add(name, output.compute(output.source))
        return self.specs


def fit_shared_memory(
    stages: type[Stages], options: argparse.Namespace, instances: int, free: int
) -> tuple[int, argparse.Namespace, str]:
    """Return the number of instances that fit into /dev/shm, their options, and a warning or an empty string.

    ``instances`` is the configured number, and ``free`` is the number of free bytes. Only the size option of the stages
    may change. Raises UsageError if not even one instance fits.
    """
    name = stages.size_option
    wanted_size = getattr(options, name) if name else 1

    def resize(size: int) -> argparse.Namespace:
        return argparse.Namespace(**vars(options) | ({name: size} if name else {}))

    def needed(size: int) -> int:  # by one instance
        return SHM_BYTES_PER_INSTANCE + math.ceil(SHM_BYTES_PER_BYTE * sum(stages.limits(resize(size))))

    wanted = instances * needed(wanted_size)
    if wanted <= free:
        return instances, options, ""
    useful_size = math.ceil(wanted_size * USEFUL_SHARE) if name else wanted_size
    instances = max(1, min(instances, free // needed(useful_size)))
    if name:
        size = bisect.bisect_right(range(wanted_size + 1), free // instances, key=needed) - 1
    else:
        size = int(needed(wanted_size) <= free)
    advice = f"use docker run --shm-size {math.ceil(wanted / 2**30)}gb, or make /dev/shm larger"
    if size < 1:
        raise UsageError(f"/dev/shm has only {free / 1e6:,.0f} MB free, not enough for any request: {advice}")
    limited = f", with --{name.replace('_', '-')} {size}" if name else ""
    return (
        instances,
        resize(size),
        f"SHARED MEMORY: /dev/shm has {free / 1e6:,.0f} MB free instead of {wanted / 1e6:,.0f}. The server runs "
        f"{instances} instances{limited}. To fix this, {advice}.",
    )
