# SPDX-License-Identifier: Apache-2.0
"""Memory of the host: where answers are copied to, and how large photos may be to fit into /dev/shm."""

import bisect
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from serving.channel import ALIGNMENT, Layout, lay_out, layout_of
from serving.errors import InvalidRequest, UsageError
from serving.stages import Deferred

if TYPE_CHECKING:
    import torch

# PyTriton and Triton die of a bus error when /dev/shm is full. Triton's pool starts at 4 MB per instance. A
# request and its answer take 1.3 times their size there, because of gaps. PyTriton's store allocates segments in powers
# of two and keeps them: up to 3 times the size, if requests grow. Both factors are measured.
SHM_BYTES_PER_INSTANCE = 5_000_000
SHM_BYTES_PER_BYTE = 1.3 + 3

# Few instances that accept photos of a megapixel are more useful than many that do not.
USEFUL_PIXELS = 1_000_000


class AnswerMemory:
    """Copies answers from the device to the host, into the same memory again and again."""

    def __init__(self, memory: np.ndarray, device: str):
        """``memory`` is uint8 ``[N]``. It is pinned as needed, so that a GPU can copy into it in the background."""
        self._memory = memory
        self._device = device
        self._pinned = 0

    def store(self, outputs: Mapping[str, object]) -> dict[str, np.ndarray | Deferred]:
        """Copy outputs of any shape and dtype to the host, and return the copies, those of deferred outputs last.

        ``outputs`` are what :meth:`Stages.__call__` returns. On a GPU the copies are complete once torch's current
        stream has come to this point. Deferred outputs get their source as a numpy array, in memory of its own; the
        others are placed into this memory. Raises InvalidRequest if it is too small.
        """
        deferred = {name: output for name, output in outputs.items() if isinstance(output, Deferred)}
        arrays = {name: self._open(output) for name, output in outputs.items() if name not in deferred}
        copies = self._place({name: (array.shape, _dtype_name(array)) for name, array in arrays.items()})
        if not all(isinstance(array, np.ndarray) for array in arrays.values()):
            self._pin(sum(copy.nbytes + ALIGNMENT for copy in copies.values()))
        for name, array in arrays.items():
            _copy(array, copies[name])
        for name, output in deferred.items():
            source = self._open(output.source)
            copies[name] = Deferred(output.compute, _copy(source, _empty_like(source)))
        return copies

    def _open(self, output: object) -> "np.ndarray | torch.Tensor":
        """Return an output without copying it: as an array on the host, or a tensor on the GPU."""
        if self._device == "cpu" or isinstance(output, np.ndarray):
            return np.asarray(output)
        import torch

        return torch.from_dlpack(output)

    def compute_deferred(self, outputs: Mapping[str, np.ndarray | Deferred]) -> dict[str, np.ndarray]:
        """Compute what :meth:`store` returned as deferred, and store it behind the rest. From any thread.

        Raises InvalidRequest if the memory is too small.
        """
        arrays = {
            name: output.compute(output.source) if isinstance(output, Deferred) else output
            for name, output in outputs.items()
        }
        copies = self._place(layout_of(arrays))
        for name, output in outputs.items():
            if isinstance(output, Deferred):  # the others, which come first, are there already
                np.copyto(copies[name], arrays[name])
        return copies

    def _place(self, layout: Layout) -> dict[str, np.ndarray]:
        try:
            return lay_out(self._memory, layout)
        except ValueError:
            raise InvalidRequest(
                f"the answer exceeds this server's limit of {len(self._memory)} bytes: request fewer outputs"
            ) from None

    def _pin(self, size: int) -> None:
        # As much as was ever needed instead of everything: pinned pages take up memory even if nobody writes to them.
        if min(size, len(self._memory)) <= self._pinned:
            return
        import torch

        cudart, pointer = torch.cuda.cudart(), self._memory.ctypes.data
        if self._pinned:
            torch.cuda.check_error(cudart.cudaHostUnregister(pointer))
            self._pinned = 0
        # Rounded up, so that it does not happen again soon.
        size = min(len(self._memory), 1 << (size - 1).bit_length())
        torch.cuda.check_error(cudart.cudaHostRegister(pointer, size, 0))
        self._pinned = size


def _dtype_name(array: "np.ndarray | torch.Tensor") -> str:
    return str(array.dtype).removeprefix("torch.")


def _empty_like(array: "np.ndarray | torch.Tensor") -> np.ndarray:
    """Return memory of the host: for a tensor of a GPU pinned, so that the GPU can copy into it in the background."""
    if isinstance(array, np.ndarray):
        return np.empty_like(array)
    import torch

    return torch.empty_like(array, device="cpu", pin_memory=True).numpy()


def _copy(array: "np.ndarray | torch.Tensor", target: np.ndarray) -> np.ndarray:
    """Copy into an array of the host, from a GPU in the order of torch's current stream, and return it."""
    if isinstance(array, np.ndarray):
        np.copyto(target, array)
    else:
        import torch

        torch.from_numpy(target).copy_(array, non_blocking=True)
    return target


def fit_shared_memory(
    instances: int, max_pixels: int, free: int, message_bytes: Callable[[int], int]
) -> tuple[int, int, str]:
    """Return how many instances, and photos of how many pixels, fit into /dev/shm, and a warning or an empty string.

    ``instances`` and ``max_pixels`` are what the user wants, ``free`` is the number of free bytes, and
    ``message_bytes`` returns the maximum size of a request plus its answer, in bytes, for a number of pixels. Raises
    UsageError if no photo fits.
    """

    def needed(pixels: int) -> int:  # by one instance
        return SHM_BYTES_PER_INSTANCE + math.ceil(SHM_BYTES_PER_BYTE * message_bytes(pixels))

    wanted = instances * needed(max_pixels)
    if wanted <= free:
        return instances, max_pixels, ""
    instances = max(1, min(instances, free // needed(min(max_pixels, USEFUL_PIXELS))))
    fitting = bisect.bisect_right(range(max_pixels + 1), free // instances, key=needed) - 1
    advice = f"use docker run --shm-size {math.ceil(wanted / 2**30)}gb, or make /dev/shm larger"
    if fitting < 1:
        raise UsageError(f"/dev/shm has only {free / 1e6:,.0f} MB free, too little for any photo: {advice}")
    return (
        instances,
        fitting,
        f"SHARED MEMORY: /dev/shm has {free / 1e6:,.0f} MB free instead of {wanted / 1e6:,.0f}. The server refuses "
        f"photos of more than {fitting:,} pixels and runs {instances} instances. To fix this, {advice}.",
    )
