# SPDX-License-Identifier: Apache-2.0
"""Worker processes: each builds the stages on one device and answers requests.

PyTriton copies every request and answer under the interpreter lock of its process. With the stages in a process of
their own, the two do not slow each other down.
"""

import argparse
import ctypes
import errno
import logging
import math
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from logging.handlers import BufferingHandler
from multiprocessing import Pipe, connection

import numpy as np
from pytriton.model_config.common import QueuePolicy, TimeoutAction
from pytriton.proxy.types import Request

from serving.batcher import Batcher
from serving.channel import FORK, SLACK_BYTES, Channel, open_channels
from serving.device import check_device, kill_all, list_devices, open_stream, resolve_device
from serving.errors import InferenceFailed, RequestError, ServerError, UsageError
from serving.instance import Instance
from serving.lifecycle import Lifecycle
from serving.memory import AnswerMemory, fit_shared_memory
from serving.options import MOST_DEFAULT_INSTANCES, device_default
from serving.printed import Printed
from serving.stages import Deferred, Stages

MAX_WAIT_S = 60  # for an instance; after that, a request is refused unprocessed

PR_SET_PDEATHSIG = 1  # from Linux's sys/prctl.h

Answer = dict[str, np.ndarray] | Callable[[], dict[str, np.ndarray]]

LOGGER = logging.getLogger("server")


@dataclass(frozen=True)
class _Ready:
    """What a worker reports when it has started."""

    device_type: str
    instances: int
    max_pixels: int
    warnings: Sequence[str]


class Workers:
    """A worker process for each device, and the instances through which PyTriton reaches them."""

    def __init__(
        self,
        stages: type[Stages],
        options: argparse.Namespace,
        request_bytes: Callable[[int], int],
        answer_bytes: Callable[[int], int],
        lifecycle: Lifecycle,
    ):
        """Nothing starts before the ``with`` block.

        Each worker creates an object of ``stages``. ``request_bytes`` and ``answer_bytes`` return the maximum size of a
        request and of an answer, in bytes, for a photo with a number of pixels.
        """
        self._stages = stages
        self._options = options
        self._request_bytes = request_bytes
        self._answer_bytes = answer_bytes
        self._lifecycle = lifecycle
        self._workers: list[_Worker] = []
        self._watchers: list[threading.Thread] = []
        self.instances: list[Instance] = []
        self.queue_policy: QueuePolicy | None = None

    def __enter__(self) -> "Workers":
        """Start the workers and wait until all are ready. Raises ServerError."""
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._lifecycle.finish()
        kill_all([worker.process for worker in self._workers], "a worker")
        for watcher in self._watchers:  # which log what the workers were doing
            watcher.join()

    def _start(self) -> None:
        options = self._options
        devices = list_devices(options.device, options.start_timeout_s)
        shm_bytes = shutil.disk_usage("/dev/shm").free // len(devices)
        for device in devices:
            try:
                channels = open_channels(
                    options.instances or MOST_DEFAULT_INSTANCES,
                    request_bytes=self._request_bytes(options.max_pixels),
                    answer_bytes=self._answer_bytes(options.max_pixels),
                )
            except (OSError, OverflowError) as error:
                if getattr(error, "errno", None) == errno.ENOSPC:  # semaphores lie there
                    raise UsageError(
                        "/dev/shm is full: remove what killed servers left, see docs/production.md"
                    ) from error
                raise UsageError(f"--max-pixels {options.max_pixels}: not enough memory ({error})") from error
            # Between the fork and the append, a signal would leave an orphaned process.
            with self._lifecycle.signals_deferred():
                printed = Printed()
                limits = shm_bytes, self._request_bytes, self._answer_bytes
                build = partial(_build, self._stages, options, device, channels, printed, *limits)
                self._workers.append(_Worker(device, channels, printed, build))
            # When PyTriton stops, it waits for its instances, and they wait for the worker.
            self._lifecycle.on_give_up(self._workers[-1].process.kill)
        reports = self._wait_until_ready(options.start_timeout_s)
        for worker, report in zip(self._workers, reports, strict=True):
            self._watchers.append(threading.Thread(target=self._fail_without, args=(worker,), daemon=True))
            self._watchers[-1].start()
            max_request_bytes = self._request_bytes(report.max_pixels)
            self.instances += [
                Instance(channel, max_request_bytes, options.worker_timeout_s, self._lifecycle)
                for channel in worker.channels[: report.instances]
            ]
        # Once more, next to the line that says that the server is ready, where they are hard to miss.
        for warning in dict.fromkeys(warning for report in reports for warning in report.warnings):
            LOGGER.warning(warning)
        self.queue_policy = QueuePolicy(
            max_queue_size=device_default(options, "max_queue", reports[0].device_type),
            # A timeout that a request sets itself counts if it is shorter.
            default_timeout_microseconds=MAX_WAIT_S * 1_000_000,
            allow_timeout_override=True,
            timeout_action=TimeoutAction.REJECT,
        )

    def _wait_until_ready(self, timeout_s: float) -> list[_Ready]:
        """Return what the workers report when they have started. Raises the first ServerError of any of them."""
        deadline = time.monotonic() + timeout_s
        reports: dict[_Worker, _Ready] = {}
        while waiting := [worker for worker in self._workers if worker not in reports]:
            arrived = connection.wait([worker.status for worker in waiting], max(0, deadline - time.monotonic()))
            if not arrived:
                raise ServerError(
                    f"the worker for --device {waiting[0].device} did not start within {timeout_s:g} s: its GPU driver "
                    "may be hung, or downloading the weights takes longer than --start-timeout-s allows"
                )
            reports |= {worker: worker.read_report() for worker in waiting if worker.status in arrived}
        return [reports[worker] for worker in self._workers]

    def _fail_without(self, worker: "_Worker") -> None:
        worker.wait_until_ended()
        self._lifecycle.fail("stopping: a worker exited")
        worker.break_off()


class _Worker:
    """A worker process, as seen from the process that started it."""

    def __init__(
        self,
        device: str,
        channels: Sequence[Channel],
        printed: Printed,
        build: Callable[[], tuple[Batcher, _Ready]],
    ):
        """Fork the process, which calls ``build``. This must happen while the server has only one thread."""
        self.channels = channels
        self.device = device
        self._printed = printed
        self.status, worker_end = Pipe()
        self.process = FORK.Process(target=_run, args=(os.getpid(), printed, build, worker_end))
        self.process.start()
        worker_end.close()

    def read_report(self) -> _Ready:
        """Return what it reports. Raises ServerError."""
        try:
            report = self.status.recv()
        except EOFError:
            self.process.join()
            code = self.process.exitcode
            how = f"exit status {code}" if code >= 0 else signal.Signals(-code).name
            raise ServerError(f"a worker exited during startup ({how})") from None
        if isinstance(report, Exception):
            raise report
        return report

    def wait_until_ended(self) -> None:
        """Return when the process has ended, and log which requests it was processing. From any thread."""
        connection.wait([self.process.sentinel])
        for channel in self.channels:
            if channel.is_processing():
                LOGGER.error("a worker ended while it processed %s", channel.describe_request())
        if printed := self._printed.read():
            LOGGER.error('before a worker ended, a library printed "%s"', printed)

    def break_off(self) -> None:
        """Make current and future calls fail."""
        for channel in self.channels:
            channel.break_off()


class Runner:
    """The stages, on their own CUDA stream."""

    def __init__(self, stages: type[Stages], options: argparse.Namespace, device: str):
        self.device = device
        self._stream = open_stream(device)
        with self._stream:
            self.stages = stages(options, device)

    def __call__(self, batch: Sequence[tuple[AnswerMemory, object]]) -> list[Answer]:
        """Return the outputs of each job, in the memory that comes with it, or a function that returns them."""
        with self._stream:
            outputs = self.stages([job for _, job in batch])
            answers = [memory.store(output) for (memory, _), output in zip(batch, outputs, strict=True)]
            # So far, the GPU's work is only queued, except for the encoding of JPEGs, which blocks.
            self._stream.wait()
            self.stages.verify()
        return [
            partial(memory.compute_deferred, answer)
            if any(isinstance(output, Deferred) for output in answer.values())
            else answer
            for (memory, _), answer in zip(batch, answers, strict=True)
        ]


def _run(
    parent: int, printed: Printed, build: Callable[[], tuple[Batcher, _Ready]], status: connection.Connection
) -> None:
    """Entry point of the worker process."""
    # Ctrl-C in a terminal reaches this process, too. It has requests to finish; the server ends it.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # the server was killed before prctl
        os._exit(1)
    try:
        try:
            batcher, report = build()
        except RuntimeError as error:  # torch's and DALI's, typically about a GPU whose memory is full
            LOGGER.debug("a worker failed to start", exc_info=error)
            reason = str(error).strip().splitlines()[0]
            raise ServerError(f"a worker failed to start: {reason}; --verbose shows where") from error
        status.send(report)
        printed.redirect()  # from here on, what is printed may come from a client
        batcher.run()
    except ServerError as error:
        status.send(error)
    except BaseException:
        LOGGER.exception("a worker failed")
    os._exit(1)  # Python's own exit would wait for the batcher's threads


def _build(
    stages: type[Stages],
    options: argparse.Namespace,
    device: str,
    channels: Sequence[Channel],
    printed: Printed,
    shm_bytes: int,
    request_bytes: Callable[[int], int],
    answer_bytes: Callable[[int], int],
) -> tuple[Batcher, _Ready]:
    """Build the stages on the device that ``--device`` names. Raises ServerError."""
    device = resolve_device(device)
    device_type = device.split(":")[0]
    warnings = BufferingHandler(capacity=1000)
    warnings.setLevel(logging.WARNING)
    LOGGER.addHandler(warnings)

    instances, max_pixels, warning = fit_shared_memory(
        device_default(options, "instances", device_type),
        options.max_pixels,
        shm_bytes,
        message_bytes=lambda pixels: request_bytes(pixels) + answer_bytes(pixels),
    )
    if warning:
        LOGGER.warning(warning)
    max_batch_size = device_default(options, "max_batch_size", device_type)
    options = argparse.Namespace(**vars(options) | {"max_pixels": max_pixels, "max_batch_size": max_batch_size})
    LOGGER.info("instances: %d, photos per batch: %d at most", instances, max_batch_size)
    runner = Runner(stages, options, device)
    most = answer_bytes(max_pixels) + SLACK_BYTES
    memories = {channel: AnswerMemory(channel.answer_memory[:most], device) for channel in channels[:instances]}

    def read(channel: Channel, arrays: Mapping[str, np.ndarray], message: tuple) -> tuple[AnswerMemory, object]:
        parameters, outputs = message
        request = Request(data=arrays, parameters=parameters, requested_output_names=outputs)
        return memories[channel], runner.stages.read(request)

    def weigh(job: tuple[AnswerMemory, object]) -> float:
        return runner.stages.weigh(job[1])

    def explain(error: Exception) -> RequestError:
        _end_without(device)
        if isinstance(error, RequestError):
            return error
        LOGGER.error("a request failed", exc_info=error)
        return InferenceFailed("the server could not process this request and logged the reason: try again later")

    LOGGER.removeHandler(warnings)
    messages = tuple(record.getMessage() for record in warnings.buffer)

    # On a CPU, a batch takes as long as its jobs one after another, so that large ones need not share one.
    max_batch_weight = 1 if device_type == "cpu" else math.inf
    batcher = Batcher(list(memories), read, runner, explain, printed, max_batch_size, weigh, max_batch_weight)
    return batcher, _Ready(device_type, instances, max_pixels, messages)


def _end_without(device: str) -> None:
    # After some CUDA errors every later call in this process fails, or worse, a decoder rejects good photos.
    try:
        check_device(device)
    except RuntimeError as error:
        LOGGER.critical("a worker lost its GPU and exits: %s", str(error).splitlines()[0])
        os._exit(1)
