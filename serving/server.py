# SPDX-License-Identifier: Apache-2.0
"""The server process: puts the parts together, in the order in which they start."""

import argparse
import contextlib
import dataclasses
import os
from collections.abc import Callable, Sequence

from pytriton.model_config import DynamicBatcher, ModelConfig, Tensor
from pytriton.model_config.common import QueuePolicy, TimeoutAction

from serving.errors import UsageError
from serving.fleet import Fleet
from serving.instance import Instance
from serving.lifecycle import Lifecycle
from serving.options import configure_logging
from serving.stages import Stages
from serving.triton import Triton

MAX_WAIT_S = 60  # in Triton's queue, before a request is rejected


class Server:
    """Serves one model. Used like PyTriton's Triton: bind a model inside a ``with`` block, then serve it.

    A signal raises SystemExit in the block, with status 0. Any other reason to stop prints one line to stderr, and sets
    status 2 if the user has to change something, or 1.
    """

    def __init__(self, stages: type[Stages], options: argparse.Namespace):
        """``options`` come from a parser with :func:`~serving.options.add_serving_options`. The stages get them."""
        _open_standard_streams()
        configure_logging(options.verbose)
        self._lifecycle = Lifecycle(options.drain_s)
        self._options = options
        self._fleet = Fleet(stages, options, self._lifecycle)
        self._triton: Triton | None = None
        self._model: dict[str, object] = {}
        self._processes = contextlib.ExitStack()

    def __enter__(self) -> "Server":
        """Start the frontends, and for each device a worker process, which creates the stages. Raises SystemExit."""
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
        """The callables for PyTriton. Each processes one request at a time, in its own memory."""
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
        """Set the model. Takes the arguments of PyTriton's ``bind``, and adds the limits of the queue.

        Raises UsageError if the model does not group requests, or is decoupled.
        """
        if not config.batching or config.decoupled:
            raise UsageError("ModelConfig must have batching=True and decoupled=False")
        policy = QueuePolicy(
            max_queue_size=self._fleet.max_queue,
            # A request can only set a shorter timeout.
            default_timeout_microseconds=MAX_WAIT_S * 1_000_000,
            allow_timeout_override=True,
            timeout_action=TimeoutAction.REJECT,
        )
        batcher = dataclasses.replace(config.batcher or DynamicBatcher(), default_queue_policy=policy)
        self._model = {
            "model_name": model_name,
            "infer_func": infer_func,
            "inputs": inputs,
            "outputs": outputs,
            "config": dataclasses.replace(config, batcher=batcher),
        }

    def serve(self) -> None:
        """Start Triton and serve until a signal arrives. Raises SystemExit or ServerError; never returns."""
        self._triton.serve(self._fleet, **self._model)


def _open_standard_streams() -> None:
    """Open those that are closed. Otherwise, a pipe could get the number of one, and the output of libraries."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
