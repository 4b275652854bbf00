# SPDX-License-Identifier: Apache-2.0
"""The parts of a server that do not depend on the model: processes, batching, shared memory and signals.

Processes: the server (:mod:`serving.server`) starts Triton, and for each device a worker (:mod:`serving.worker`), which
runs your stages, and frontends (:mod:`serving.frontend`), which run PyTriton's handlers.

The path of a request: in a frontend, PyTriton calls an :class:`~serving.instance.Instance`, which sends the request
through a :class:`~serving.channel.Channel` to the worker. There a :class:`~serving.batcher.Batcher` groups queued
requests, and an :class:`~serving.executor.Executor` calls your stages.
"""

from serving.errors import InferenceFailed, InvalidRequest, UsageError
from serving.options import add_serving_options, make_parser, number
from serving.server import Server
from serving.stages import Checked, Deferred, Stages

__all__ = [
    "Checked",
    "Deferred",
    "InferenceFailed",
    "InvalidRequest",
    "Server",
    "Stages",
    "UsageError",
    "add_serving_options",
    "make_parser",
    "number",
]
