# SPDX-License-Identifier: Apache-2.0
"""The process that has the network: builds the stages on a device, and answers what comes through its channels."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import logging
import math
import os
import signal
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import Pipe, connection
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from batching import FORK, Batcher, Channel
from request import InferenceFailed, PhotoRequest, RequestError, RequestReader

if TYPE_CHECKING:
    import torch

    from model_inference import SegmentationNetwork, Weights

# torch, torchvision and DALI are imported where they are needed, which is in this process alone: they take seconds, and
# a mistake on the command line is to be answered at once.

# What needs no tuning, by the type of the device. Instances: more of them compete for server.py's interpreter lock.
# Batches: with more photos than the GPU has hardware decoders (4 to 7, where it has any) DALI decodes some in another
# way, which rounds differently: their pixels would depend on their company. Two threads on a GPU: while one batch is in
# the network, the next is decoded and the one before copied to the host.
INSTANCES = {"cuda": 12, "cpu": 1}
MAX_BATCH_SIZE = {"cuda": 4, "cpu": 1}
THREADS = {"cuda": 2, "cpu": 1}

# Of both pictures together, RGB.
ANSWER_BYTES_PER_PIXEL = 2 * 3
# Of an encoded photo: the best JPEG of nothing but noise has as much, and a camera writes something into the header.
MAX_BYTES_PER_PIXEL = 2
MAX_HEADER_BYTES = 1 << 20

# What PyTriton and Triton need of /dev/shm, and die of a bus error without. Triton's pool has 4 MB for an instance from
# the start, and takes the encoded photo and both pictures, with gaps: 1.3 times their bytes, measured. PyTriton's store
# takes them in segments of powers of two that it keeps: after photos that grow, three times their bytes.
SHM_BYTES_PER_INSTANCE = 5_000_000 + 4 * MAX_HEADER_BYTES
SHM_BYTES_PER_PIXEL = math.ceil((1.3 + 3) * (ANSWER_BYTES_PER_PIXEL + MAX_BYTES_PER_PIXEL))

PR_SET_PDEATHSIG = 1  # of Linux's sys/prctl.h

LOGGER = logging.getLogger("server")
WARM_UP_PHOTO = Path(__file__).parent / "images" / "orig.jpg"


class StartError(Exception):
    """The server cannot start, and the user can do something about it; the message is one line."""


class WorkerError(Exception):
    """The worker failed at its start, which may go well the next time; the message is one line."""


@dataclass(frozen=True)
class Ready:
    """What the worker found out of its device, its share of /dev/shm and its weights.

    ``instances``: how many channels it serves; ``max_bytes``: of a photo; ``warnings``: for the user, a line each.
    """

    device_type: str
    instances: int
    max_bytes: int = 0
    warnings: Sequence[str] = ()


class Worker:
    """The process, as seen from the one that started it."""

    def __init__(self, options: argparse.Namespace, device: str, channels: Sequence[Channel], shm_bytes: int):
        """Fork the process, which is to happen before this one has threads.

        ``options``: of the server's command line; ``device``: one of :func:`name_devices`; ``shm_bytes``: what of
        /dev/shm is for its photos.
        """
        self.channels = channels
        self._status, worker_end = Pipe()
        self._process = FORK.Process(target=_work, args=(options, device, channels, shm_bytes, worker_end))
        self._process.start()
        worker_end.close()

    def wait_until_ready(self) -> Ready:
        """Return what it found out. Raises StartError and WorkerError."""
        try:
            status = self._status.recv()
        except EOFError:
            self._process.join()
            code = self._process.exitcode
            how = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
            raise WorkerError(f"the worker process ended at its start ({how})") from None
        if isinstance(status, Exception):
            raise status
        return status

    def wait_until_ended(self) -> None:
        """Return when the process has ended, and those that call it were told. From any thread."""
        connection.wait([self._process.sentinel])
        for channel in self.channels:
            channel.break_off()

    def kill(self) -> None:
        """Have the process end, whatever it does."""
        self._process.kill()

    def join(self, timeout_s: float) -> bool:
        """Wait until the process has ended, and return whether it has."""
        self._process.join(timeout_s)
        return not self._process.is_alive()


def _work(
    options: argparse.Namespace,
    device: str,
    channels: Sequence[Channel],
    shm_bytes: int,
    status: connection.Connection,
) -> None:
    """Be the process. It ends by ``os._exit``: Python's own way out would wait for the batcher's threads."""
    # The server says when it is over: Ctrl-C in a terminal reaches this process, too, which has photos to finish.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # where the server is killed, this process is, too
    try:
        try:
            batcher, ready = _build(options, pick_device(device), channels, shm_bytes)
        except RuntimeError as error:  # torch's and DALI's, of a GPU whose memory others have above all
            LOGGER.debug("the worker failed at its start", exc_info=error)
            line = str(error).strip().splitlines()[0]
            raise WorkerError(f"the worker failed at its start: {line}; --verbose shows where") from error
        status.send(ready)
        batcher.run()
    except (StartError, WorkerError) as error:
        status.send(error)
    except BaseException:
        LOGGER.exception("the worker failed")
    os._exit(1)


def _build(
    options: argparse.Namespace, device: torch.device, channels: Sequence[Channel], shm_bytes: int
) -> tuple[Batcher, Ready]:
    """Load the weights, build the stages and warm them up. Raises StartError."""
    weights = _load_weights(options)
    instances, max_pixels, shm_warning = fit_shared_memory(
        options.instances or INSTANCES[device.type], options.max_pixels, shm_bytes
    )

    from model_inference import CLASS_NAMES
    from segmentation import HostMemory, Segmenter

    max_batch_size = options.max_batch_size or MAX_BATCH_SIZE[device.type]
    LOGGER.info("warm-up: instances %d, photos a batch %d", instances, max_batch_size)
    network = _build_network(options, device, weights.state_dict)
    segmenters = [Segmenter(network, options.input_size, max_batch_size) for _ in range(THREADS[device.type])]
    # The first run of each stage chooses kernels and asks for memory.
    encoded, room = np.fromfile(WARM_UP_PHOTO, np.uint8), HostMemory(np.empty(8 << 20, np.uint8))
    photo = PhotoRequest(encoded, 0, 0.5, ("original", "segmented"), room)
    for segmenter in segmenters:
        for size in {1, max_batch_size}:
            segmenter([photo] * size)

    memories = {channel: HostMemory(channel.response, pin=device.type == "cuda") for channel in channels[:instances]}
    read_request = RequestReader(CLASS_NAMES, options.class_name, options.threshold, max_pixels)

    def read(channel: Channel, encoded: np.ndarray, message: tuple) -> PhotoRequest:
        return read_request(encoded, *message, memories[channel])

    def explain(error: Exception) -> RequestError:
        _end_if_device_is_lost(network)
        if isinstance(error, RequestError):
            return error
        LOGGER.error("a request failed", exc_info=error)
        return InferenceFailed("the server failed at this photo and logged why: try again later")

    batcher = Batcher(list(memories), read, segmenters, explain, max_batch_size)
    warnings = tuple(filter(None, (shm_warning, weights.warning)))
    return batcher, Ready(device.type, instances, max_photo_bytes(max_pixels), warnings)


def _load_weights(options: argparse.Namespace) -> Weights:
    from model_inference import CLASS_NAMES, WeightsError, load_weights

    if options.class_name not in CLASS_NAMES:
        raise StartError(f"--class-name {options.class_name} is none of {', '.join(CLASS_NAMES)}")
    try:
        weights = load_weights(options.weights)
    except WeightsError as error:
        raise StartError(f"--weights {options.weights}: {error}") from error
    LOGGER.info("weights: %s", weights.source)
    return weights


def _build_network(
    options: argparse.Namespace, device: torch.device, state_dict: dict[str, torch.Tensor]
) -> SegmentationNetwork:
    from model_inference import SegmentationNetwork, pick_precision

    precision = pick_precision(options.precision, device)
    network = SegmentationNetwork(state_dict, device, precision)
    if precision == "fp16" and network.overflows(options.input_size):
        if options.precision != "auto":
            raise StartError("--precision fp16: these weights are too large for it; take bf16, fp32 or auto")
        LOGGER.warning("the weights are too large for fp16: fp32 instead, which is slower; try --precision bf16")
        precision = "fp32"
        network = SegmentationNetwork(state_dict, device, precision)
    LOGGER.info("precision: %s", precision)
    return network


def max_photo_bytes(max_pixels: int) -> int:
    """Return the most bytes that an encoded photo may have."""
    return max_pixels * MAX_BYTES_PER_PIXEL + MAX_HEADER_BYTES


def fit_shared_memory(instances: int, max_pixels: int, free: int) -> tuple[int, int, str]:
    """Return how many instances, and photos of how many pixels, /dev/shm has room for, and a warning or nothing.

    ``instances``, ``max_pixels``: what is wanted; ``free``: the room in bytes. Raises StartError.
    """
    needed = instances * (SHM_BYTES_PER_INSTANCE + max_pixels * SHM_BYTES_PER_PIXEL)
    if needed <= free:
        return instances, max_pixels, ""
    # Few instances that take photos of a million pixels are of more use than many that do not.
    enough = SHM_BYTES_PER_INSTANCE + min(max_pixels, 1_000_000) * SHM_BYTES_PER_PIXEL
    instances = max(1, min(instances, free // enough))
    max_pixels = min(max_pixels, (free // instances - SHM_BYTES_PER_INSTANCE) // SHM_BYTES_PER_PIXEL)
    cure = f"docker run --shm-size {math.ceil(needed / 1e9)}gb, or a larger /dev/shm"
    if max_pixels <= 0:
        raise StartError(f"/dev/shm has no room for any photo: {cure}")
    warning = (
        f"SHARED MEMORY: /dev/shm has {free / 1e6:,.0f} MB free, not {needed / 1e6:,.0f}: photos of more than "
        f"{max_pixels:,} pixels are refused, instances {instances}; cure: {cure}"
    )
    return instances, max_pixels, warning


def _end_if_device_is_lost(network: SegmentationNetwork) -> None:
    # After some CUDA errors every later call of the process fails, or worse: a decoder takes good photos for bad.
    try:
        network.check_device()
    except RuntimeError as error:
        LOGGER.critical("the GPU is lost to this process, which ends: %s", str(error).splitlines()[0])
        os._exit(1)


def name_devices(choice: str) -> list[str]:
    """Return the devices that ``--device`` means, one for each worker. Raises StartError."""
    if choice != "all":
        return choice.split(",")
    gpus = 0
    # In another process, which may die of its driver: CUDA would not survive the fork of the workers.
    with contextlib.suppress(BrokenProcessPool), ProcessPoolExecutor(1, mp_context=FORK) as pool:
        gpus = pool.submit(_count_gpus).result()
    if not gpus:
        raise StartError("--device all: torch finds no CUDA device here; see nvidia-smi and the driver's version")
    return [f"cuda:{index}" for index in range(gpus)]


def pick_device(choice: str) -> torch.device:
    """Return the torch.device for one device of ``--device``. Raises StartError."""
    import torch

    gpus = _count_gpus()
    device = torch.device(choice if choice != "auto" else "cuda" if gpus else "cpu")
    if device.type == "cuda" and (device.index or 0) >= gpus:
        raise StartError(
            f"--device {choice}: torch finds {gpus} CUDA devices here; see nvidia-smi and the driver's version"
        )
    LOGGER.info("device: %s", torch.cuda.get_device_name(device) if gpus and device.type == "cuda" else "CPU")
    return device


def _count_gpus() -> int:
    import torch

    # A driver too old for this torch counts devices, but has none available.
    return torch.cuda.device_count() if torch.cuda.is_available() else 0
