# SPDX-License-Identifier: Apache-2.0
"""Worker processes: each builds the stages on one device and responds to requests."""

import argparse
import contextlib
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from logging.handlers import BufferingHandler
from multiprocessing.connection import Connection

from serving.batcher import Batcher
from serving.channel import Channel
from serving.device import resolve_device
from serving.errors import ServerError, start_error
from serving.executor import Executor, open_memories
from serving.memory import fit_shared_memory
from serving.options import device_default
from serving.printed import Printed
from serving.stages import Stages

LOGGER = logging.getLogger("server")


@dataclass(frozen=True)
class Ready:
    """The report of a worker that has started."""

    device_type: str
    instances: int
    warnings: Sequence[str]


def run_worker(
    pipe: Connection,
    stages: type[Stages],
    options: argparse.Namespace,
    device: str,
    channels: Sequence[Channel],
    printed: Printed,
    shm_bytes: int,
) -> None:
    """Build the stages on the device that ``--device`` names, report Ready, and work forever.

    ``shm_bytes`` is the part of ``/dev/shm`` that this worker's requests may use. Raises ServerError during the start.
    """
    warnings = BufferingHandler(capacity=1000)
    warnings.setLevel(logging.WARNING)
    LOGGER.addHandler(warnings)
    try:
        device = resolve_device(device)
        device_type = device.split(":")[0]
        wanted = device_default(options, "instances", device_type)
        instances, options, warning = fit_shared_memory(stages, options, wanted, shm_bytes)
        if warning:
            LOGGER.warning(warning)
        options.max_batch_size = device_default(options, "max_batch_size", device_type)
        LOGGER.info("instances: %d, maximum batch size: %d", instances, options.max_batch_size)
        channels = channels[:instances]
        request_bytes, response_bytes = stages.limits(options)
        for channel in channels:
            channel.limit[0] = request_bytes
        memories = open_memories(channels, response_bytes, device)
        count = device_default(options, "executors", device_type)
        executors = [Executor(stages, options, device, memories)]
        with _without_warnings():  # the others would repeat them
            executors += [Executor(stages, options, device, memories) for _ in range(count - 1)]
    except ServerError:
        raise
    except (Exception, SystemExit) as error:  # typically of torch or DALI, if the GPU's memory is full
        raise start_error("a worker failed to start", error) from error
    LOGGER.removeHandler(warnings)
    # On a CPU, a batch takes as long as its jobs one after another, so large jobs gain nothing from sharing one.
    max_batch_weight = 1 if device_type == "cpu" else math.inf
    batcher = Batcher(channels, executors, printed, options.max_batch_size, max_batch_weight)
    messages = tuple(record.getMessage() for record in warnings.buffer)
    pipe.send(Ready(device_type, instances, messages))
    printed.redirect()  # from here on, output may contain a client's text
    batcher.run()


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
