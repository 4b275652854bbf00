# SPDX-License-Identifier: Apache-2.0
"""Frontend processes: each runs PyTriton's handlers for some of the instances.

PyTriton runs the handlers of all instances as threads of one process, where they compete for the GIL to copy requests
and responses. Several processes remove this limit.
"""

import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
from pytriton.model_config.triton_model_config import TritonModelConfig

from serving.instance import Instance
from serving.leftovers import remove_after_server
from serving.processes import survive_server

HEARTBEAT_S = 0.5

LOGGER = logging.getLogger("server")


@dataclass(frozen=True)
class Assignment:
    """The model and the instances for a frontend to serve."""

    config: TritonModelConfig
    numbers: dict[int, int]  # each instance's number in Triton, by its position in the frontend's list
    folders: Sequence[Path]  # to remove if the server is killed


def run_frontend(pipe: Connection, instances: Sequence[Instance], heartbeat: np.ndarray, temporary: Path) -> None:
    """Receive an Assignment, serve it, and confirm with True. Returns if a handler has ended.

    ``heartbeat``, float64 ``[1]``, changes until this process hangs. If the server is killed, this process ends Triton,
    which would wait forever for the requests in flight, and removes the folder ``temporary``.
    """
    server = os.getppid()
    survive_server()
    try:
        while not pipe.poll(HEARTBEAT_S):
            if os.getppid() != server:
                raise EOFError
        assignment: Assignment = pipe.recv()
    except EOFError:
        remove_after_server(server, [temporary])
        return
    from serving.pytriton_internals import start_handlers

    assigned = {number: instances[position] for position, number in assignment.numbers.items()}
    threads = start_handlers(assignment.config, assigned)
    pipe.send(True)
    while os.getppid() == server and all(thread.is_alive() for thread in threads):
        heartbeat[0] += 1
        time.sleep(HEARTBEAT_S)
    if os.getppid() == server:
        LOGGER.error("a handler of PyTriton ended")
    else:
        remove_after_server(server, [temporary, *assignment.folders])
