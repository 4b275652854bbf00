# SPDX-License-Identifier: Apache-2.0
"""Resolves ``--device``, and hides the differences between a GPU and a CPU.

torch takes seconds to import. It is imported only where a GPU may be involved.
"""

import contextlib
import ctypes
import logging

from serving.errors import ServerError, UsageError
from serving.processes import Child, kill_all

CU_CTX_SCHED_BLOCKING_SYNC = 4  # from CUDA's cuda.h

LOGGER = logging.getLogger("server")


def list_devices(choice: str, timeout_s: float) -> list[str]:
    """Return the devices that ``--device`` names, one for each worker. Raises ServerError."""
    if choice != "all":
        return choice.split(",")
    # In another process, because CUDA does not survive the fork of the workers, and a broken driver may crash or hang.
    counter = Child("GPU counter", lambda pipe: pipe.send(_count_gpus()))
    try:
        if not counter.pipe.poll(timeout_s):
            raise ServerError(f"--device all: the GPU driver did not respond within {timeout_s:g} s")
        gpus = counter.pipe.recv()
    except EOFError:
        gpus = 0
    finally:
        kill_all([counter])
    if not gpus:
        raise UsageError("--device all: torch finds no GPU; run nvidia-smi to see the GPUs and the driver")
    return [f"cuda:{index}" for index in range(gpus)]


def resolve_device(choice: str) -> str:
    """Return ``cpu`` or ``cuda:N`` for one of :func:`list_devices`. Raises UsageError."""
    if choice == "cpu" or (choice == "auto" and not _count_gpus()):
        LOGGER.info("device: CPU")
        return "cpu"
    import torch

    index = torch.device(choice if choice != "auto" else "cuda").index or 0
    if index >= (gpus := _count_gpus()):
        found = f"{gpus} GPU{'s' * (gpus != 1)}"
        raise UsageError(f"--device {choice}: torch finds {found}; run nvidia-smi to see the GPUs and the driver")
    _wait_without_spinning(index)
    LOGGER.info("device: %s", torch.cuda.get_device_name(index))
    return f"cuda:{index}"


def _wait_without_spinning(index: int) -> None:
    # By default, a thread that waits for the GPU occupies a CPU core. This setting applies to all libraries in the
    # process. torch has no function for it.
    driver = ctypes.CDLL("libcuda.so.1")
    driver.cuInit(0)
    driver.cuDevicePrimaryCtxSetFlags_v2(index, CU_CTX_SCHED_BLOCKING_SYNC)


def _count_gpus() -> int:
    import torch

    # With a driver too old for this torch, device_count() includes GPUs that cannot be used.
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def check_device(device: str) -> None:
    """Raise RuntimeError if a CUDA error has made the GPU unusable for this process."""
    if device != "cpu":
        import torch

        torch.cuda.synchronize(device)


class CpuStream(contextlib.nullcontext):
    """The counterpart of a CUDA stream. It does nothing, because a CPU works in order."""

    def wait(self) -> None:
        """Return immediately."""


class CudaStream:
    """A CUDA stream that torch and DALI use inside a ``with`` block. Belongs to one thread at a time."""

    def __init__(self, device: str):
        import torch

        self._stream = torch.cuda.Stream(device)
        self._context = torch.cuda.stream(self._stream)

    def __enter__(self) -> None:
        import torch

        # On exit, torch restores the previous GPU. Without this line, that is GPU 0, which would get a CUDA context.
        torch.cuda.set_device(self._stream.device)
        self._context.__enter__()

    def __exit__(self, *error: object) -> None:
        self._context.__exit__(*error)

    def wait(self) -> None:
        """Wait until the GPU has finished all work in this stream."""
        self._stream.synchronize()


def open_stream(device: str) -> CpuStream | CudaStream:
    """Return a stream on the device."""
    return CpuStream() if device == "cpu" else CudaStream(device)
