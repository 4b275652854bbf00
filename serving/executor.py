# SPDX-License-Identifier: Apache-2.0
"""Calls your stages in a worker process, and turns their exceptions into errors for clients."""

import argparse
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pytriton.proxy.types import Request

from serving.channel import SLACK_BYTES, Channel
from serving.device import check_device, open_stream
from serving.errors import InferenceFailed, InvalidRequest, RequestError
from serving.memory import ResponseMemory, StoredResponse
from serving.stages import Checked, Stages

LOGGER = logging.getLogger("server")


@dataclass(eq=False)
class Job:
    """A request that has been read and has no response yet."""

    channel: Channel
    content: object  # what Stages.read returned
    weight: float


class Executor:
    """Your stages, on their own CUDA stream. One thread calls :meth:`compute`; others may call the other methods."""

    def __init__(
        self,
        stages: type[Stages],
        options: argparse.Namespace,
        device: str,
        memories: Mapping[Channel, ResponseMemory],
    ):
        """Create the stages on the device, and compute the example. Raises the exceptions of the stages.

        ``memories`` has the memory for the responses of each channel. Executors may share it.
        """
        self.device = device
        self._memories = memories
        self._stream = open_stream(device)
        with self._stream:
            self.stages = stages(options, device)
        # Warm up: the first run of each stage chooses kernels and allocates memory.
        channel, example = next(iter(memories)), stages.example(options)
        for size in {1, options.max_batch_size}:
            for response in self.compute([self.read(channel, example) for _ in range(size)]):
                if isinstance(response, Exception):
                    raise response
                response.complete()

    def read(self, channel: Channel, request: Request) -> Job:
        """Return the job of a request. Raises the exceptions of :meth:`Stages.read`."""
        content = self.stages.read(request)
        return Job(channel, content, float(self.stages.weigh(content)))

    def compute(self, jobs: Sequence[Job]) -> list[StoredResponse | Exception]:
        """Return the response of each job, in the memory of its channel, or its error. Raises what the stages raise."""
        with self._stream:
            results = self.stages([job.content for job in jobs])
            if len(results) != len(jobs):
                name = type(self.stages).__name__
                raise ValueError(f"{name} returned {len(results)} results for a batch of {len(jobs)}")
            outputs = [result.outputs if isinstance(result, Checked) else result for result in results]
            responses = [self._store(job, output) for job, output in zip(jobs, outputs, strict=True)]
            # Up to here, work for the GPU is only queued, except for the encoding of JPEGs, which blocks.
            self._stream.wait()
        return [
            result.error if isinstance(result, Checked) and not bool(result.valid) else response
            for response, result in zip(responses, results, strict=True)
        ]

    def _store(self, job: Job, outputs: Mapping[str, object]) -> StoredResponse | InvalidRequest:
        # If this raised, the batcher would compute all other jobs of the batch again.
        try:
            return self._memories[job.channel].store(outputs)
        except InvalidRequest as error:
            return error

    def explain(self, error: Exception) -> RequestError:
        """Return the error for the client. Ends the process if the GPU is lost."""
        # After some CUDA errors, all further calls in this process fail, or worse, valid requests are rejected.
        try:
            check_device(self.device)
        except RuntimeError as lost:
            LOGGER.critical("a worker lost its GPU and is exiting: %s", str(lost).splitlines()[0])
            os._exit(1)
        if isinstance(error, RequestError):
            return error
        LOGGER.error("a request failed", exc_info=error)
        return InferenceFailed("the server could not process this request and logged the reason: try again later")


def open_memories(channels: Sequence[Channel], response_bytes: int, device: str) -> dict[Channel, ResponseMemory]:
    """Return the memory of each channel for responses of up to ``response_bytes``."""
    size = response_bytes + SLACK_BYTES
    return {channel: ResponseMemory(channel.response_memory[:size], device) for channel in channels}
