# SPDX-License-Identifier: Apache-2.0
"""Frontend processes: each runs PyTriton's handlers for some of the instances.

PyTriton runs the handlers of all instances as threads of one process, where they wait for each other: copying requests
and responses takes the GIL. Several processes lift that limit.
"""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection

import numpy as np
from pytriton.model_config.triton_model_config import TritonModelConfig

from serving.instance import Instance

HEARTBEAT_S = 0.5

LOGGER = logging.getLogger("server")


@dataclass(frozen=True)
class Assignment:
    """What a frontend has to serve."""

    config: TritonModelConfig
    max_request_bytes: int
    numbers: dict[int, int]  # of the instances: the position in the frontend's list, and the number in Triton


def main(pipe: Connection, instances: Sequence[Instance], heartbeat: np.ndarray) -> None:
    """Receive an Assignment, serve it, and confirm with True. Returns if a handler has ended.

    ``heartbeat`` is float64 ``[1]``, which changes as long as this process is not stuck.
    """
    assignment: Assignment = pipe.recv()
    from serving.pytriton_internals import start_handlers

    assigned = {number: instances[position] for position, number in assignment.numbers.items()}
    for instance in assigned.values():
        instance.max_request_bytes = assignment.max_request_bytes
    threads = start_handlers(assignment.config, assigned)
    pipe.send(True)
    while all(thread.is_alive() for thread in threads):
        heartbeat[0] += 1
        time.sleep(HEARTBEAT_S)
    LOGGER.error("a handler of PyTriton ended")
