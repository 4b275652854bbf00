# SPDX-License-Identifier: Apache-2.0
"""The server process: puts the parts together, in the order in which they start."""

import argparse
import contextlib
import dataclasses
import os
from collections.abc import Callable, Sequence

from pytriton.model_config import DynamicBatcher, ModelConfig, Tensor
from pytriton.model_config.common import QueuePolicy, TimeoutAction

from serving.fleet import Fleet
from serving.instance import Instance
from serving.lifecycle import Lifecycle
from serving.options import configure_logging
from serving.stages import Stages
from serving.triton import Triton

MAX_WAIT_S = 60  # in Triton's queue; after that, a request is rejected


class Server:
    """Serves one model. Used like PyTriton's Triton: bind a model inside a ``with`` block, then serve it.

    A signal leaves the block through SystemExit, with status 0. What ends the server otherwise is reported in one line
    on stderr, with status 2 if the user has to change something, and with status 1 otherwise.
    """

    def __init__(self, stages: type[Stages], options: argparse.Namespace):
        """``options`` come from a parser with :func:`~serving.options.add_serving_options`, and reach the stages."""
        _open_standard_streams()
        configure_logging(options.verbose)
        self._lifecycle = Lifecycle(options.drain_s)
        self._options = options
        self._fleet = Fleet(stages, options, self._lifecycle)
        self._triton: Triton | None = None
        self._processes = contextlib.ExitStack()

    def __enter__(self) -> "Server":
        """Start a worker process per device, each of which creates an object of the stages, and the frontends."""
        with contextlib.ExitStack() as processes:
            processes.enter_context(self._lifecycle)
            self._triton = Triton(self._options, self._lifecycle)  # checks ports and environment first
            processes.enter_context(self._fleet)
            self._processes = processes.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._processes.__exit__(*error)

    @property
    def instances(self) -> Sequence[Instance]:
        """What PyTriton calls. Each has one request at a time, and its own share of the memory."""
        return self._fleet.instances

    def bind(
        self,
        *,
        model_name: str,
        infer_func: Sequence[Callable],
        inputs: Sequence[Tensor],
        outputs: Sequence[Tensor],
        config: ModelConfig,
    ) -> None:
        """Set what is served. Takes the arguments of PyTriton's ``bind``, and adds the limits of the queue."""
        policy = QueuePolicy(
            max_queue_size=self._fleet.max_queue,
            # A timeout that a request sets itself counts if it is shorter.
            default_timeout_microseconds=MAX_WAIT_S * 1_000_000,
            allow_timeout_override=True,
            timeout_action=TimeoutAction.REJECT,
        )
        batcher = dataclasses.replace(config.batcher or DynamicBatcher(), default_queue_policy=policy)
        self._triton.bind(
            model_name=model_name,
            infer_func=infer_func,
            inputs=inputs,
            outputs=outputs,
            config=dataclasses.replace(config, batcher=batcher),
        )

    def serve(self) -> None:
        """Start Triton and serve until a signal arrives. Leaves through SystemExit or ServerError."""
        self._triton.serve(self._fleet)


def _open_standard_streams() -> None:
    """Open those that are closed. Otherwise, a pipe gets their number, and what a library prints goes into it."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
