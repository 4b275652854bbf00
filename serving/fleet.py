# SPDX-License-Identifier: Apache-2.0
"""The serving processes: a worker and its frontends for each device. Starts, watches and ends them."""

import argparse
import contextlib
import errno
import logging
import operator
import shutil
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from multiprocessing import connection
from pathlib import Path
from typing import TYPE_CHECKING

from serving.channel import Channel, open_channels
from serving.device import list_devices
from serving.errors import ServerError, UsageError, start_error
from serving.frontend import Assignment, run_frontend
from serving.instance import Instance
from serving.lifecycle import Lifecycle
from serving.options import MAX_DEFAULT_INSTANCES, count_frontends, device_default
from serving.printed import Printed
from serving.processes import Child, kill_all
from serving.shared import share_numbers
from serving.stages import Stages
from serving.traffic import Traffic
from serving.watchdog import Watchdog
from serving.worker import Ready, run_worker

if TYPE_CHECKING:
    from serving.pytriton_internals import FrontendModel

CONNECT_TIMEOUT_S = 30
GPUS_PER_TRITON = 2  # unless the neural network is slow, more GPUs add little throughput; see docs/production.md

LOGGER = logging.getLogger("server")


class _Frontend(Child):
    """A frontend process, as seen from the server."""

    def __init__(self, instances: Sequence[Instance], temporary: Path):
        self.heartbeat = share_numbers(1)
        self.numbers: dict[int, int] = {}
        super().__init__("frontend", run_frontend, instances, self.heartbeat, temporary)

    def beats(self, timeout_s: float) -> bool:
        """Return whether its heartbeat changes within this time."""
        last, deadline = self.heartbeat[0], time.monotonic() + timeout_s
        while self.heartbeat[0] == last and time.monotonic() < deadline:
            time.sleep(min(0.1, timeout_s))
        return self.heartbeat[0] != last


@dataclass(eq=False)
class _Device:
    """The processes for one device."""

    name: str
    instances: Sequence[Instance]
    printed: Printed
    worker: Child
    frontends: list[_Frontend]
    report: Ready | None = None


class Fleet:
    """The workers and frontends of all devices, inside a ``with`` block."""

    def __init__(self, stages: type[Stages], options: argparse.Namespace, lifecycle: Lifecycle):
        """The ``with`` block starts the processes."""
        self._stages = stages
        self._options = options
        self._lifecycle = lifecycle
        self._devices: list[_Device] = []
        self._watcher: threading.Thread | None = None
        self._kills = False  # whether it kills the workers, which is not the fault of their requests
        self._watchdogs = contextlib.ExitStack()  # of the frontends
        self.traffic: Traffic | None = None  # once the devices are known
        self.instances: list[Instance] = []

    def __enter__(self) -> "Fleet":
        """Start the processes and wait until the workers are ready. Raises ServerError."""
        # Libraries such as DALI remove their temporary files when a process exits, but workers are killed.
        with self._lifecycle.signals_deferred():
            self._temporary = tempfile.TemporaryDirectory(prefix="workers_", ignore_cleanup_errors=True)
        tempfile.tempdir = self._temporary.name  # forked processes inherit it
        try:
            self._fork()
            self._wait_for_workers()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._lifecycle.ignore_signals()
        self._watchdogs.close()
        self._kills = True
        kill_all([child for device in self._devices for child in (*device.frontends, device.worker)])
        if self._watcher:
            self._watcher.join()
        tempfile.tempdir = None
        self._temporary.cleanup()

    def _fork(self) -> None:
        options = self._options
        names = list_devices(options.device, options.start_timeout_s)
        gpus = len(set(names) - {"cpu"})
        if gpus > GPUS_PER_TRITON:
            LOGGER.warning(
                "%d GPUs share one Triton, which may not keep up: several servers behind the proxy can be faster, see "
                "docs/production.md",
                gpus,
            )
        shm_bytes = shutil.disk_usage("/dev/shm").free // len(names)
        count = options.instances or MAX_DEFAULT_INSTANCES
        self.traffic = Traffic(count * len(names))
        for index, name in enumerate(names):
            channels = self._open_channels(count)
            instances = [
                Instance(index * count + number, channel, options.worker_timeout_s, self.traffic, self._lifecycle)
                for number, channel in enumerate(channels)
            ]
            printed = Printed()
            # A signal between a fork and its entry in these lists would orphan the process.
            with self._lifecycle.signals_deferred():
                process = Child("worker", run_worker, self._stages, options, name, channels, printed, shm_bytes)
                device = _Device(name, instances, printed, process, [])
                self._devices.append(device)
                # The type of the device is unknown until the worker reports it. Start as many frontends as for a GPU.
                for _ in range(count_frontends(options, "cuda", len(names))):
                    device.frontends.append(_Frontend(instances, Path(self._temporary.name)))

    def _open_channels(self, count: int) -> list[Channel]:
        try:
            request_bytes, response_bytes = map(operator.index, self._stages.limits(self._options))
            if min(request_bytes, response_bytes) < 0:
                raise ValueError("they must not be negative")
        except ServerError:
            raise
        except Exception as error:
            raise start_error(f"the limits of {self._stages.__name__} failed", error) from error
        try:
            return open_channels(count, request_bytes, response_bytes)
        except (OSError, OverflowError) as error:
            code = getattr(error, "errno", None)
            if code == errno.ENOSPC:  # semaphores are files there
                raise UsageError(
                    "/dev/shm is full: delete the leftovers of killed servers; see docs/production.md"
                ) from error
            if code in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT):
                raise UsageError(f"/dev/shm must be a writable tmpfs, but: {error.strerror}") from error
            size = self._stages.size_option
            limit = f"--{size.replace('_', '-')} {getattr(self._options, size)}: " if size else ""
            raise UsageError(f"{limit}not enough memory ({error})") from error

    def _wait_for_workers(self) -> None:
        """Wait for the workers' reports, and assign the instances to the frontends. Raises a worker's ServerError."""
        deadline = time.monotonic() + self._options.start_timeout_s
        while waiting := [device for device in self._devices if not device.report]:
            pipes = [device.worker.pipe for device in waiting]
            arrived = connection.wait(pipes, max(0, deadline - time.monotonic()))
            if not arrived:
                seconds = f"{self._options.start_timeout_s:g} s"
                raise ServerError(
                    f"the worker for --device {waiting[0].name} did not start within {seconds}: "
                    "its GPU driver may be hung, or downloading the weights may need a longer --start-timeout-s"
                )
            for device in waiting:
                if device.worker.pipe in arrived:
                    device.report = device.worker.receive()
        for device in self._devices:
            count = count_frontends(self._options, device.report.device_type, len(self._devices))
            count = min(count, device.report.instances)
            kill_all(device.frontends[count:])
            device.frontends = device.frontends[:count]
        # Triton prefers instances with low numbers, so spread these over all devices and frontends.
        for position in range(max(device.report.instances for device in self._devices)):
            for device in self._devices:
                if position < device.report.instances:
                    frontend = device.frontends[position % len(device.frontends)]
                    frontend.numbers[position] = len(self.instances)
                    self.instances.append(device.instances[position])
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()
        # Repeat the warnings next to the line that says that the server is ready, where they are hard to miss.
        for warning in dict.fromkeys(warning for device in self._devices for warning in device.report.warnings):
            LOGGER.warning(warning)

    @property
    def max_queue(self) -> int:
        """The maximum number of queued requests."""
        return device_default(self._options, "max_queue", self._devices[0].report.device_type)

    def check_example(self, model: "FrontendModel") -> None:
        """Send the example of the stages to each worker, as Triton will. Raises ServerError if it fails."""
        try:
            example = self._stages.example(self._options)
            request = replace(example, data={name: array[None] for name, array in example.data.items()})
            for device in self._devices:
                device.instances[0].outputs = model.triton_config.outputs
                device.instances[0]([request])
        except Exception as error:
            raise start_error(f"the example of {self._stages.__name__} failed", error) from error

    def connect(self, model: "FrontendModel", folders: Sequence[Path]) -> None:
        """Make the frontends serve the model in Triton, and remove ``folders`` if the server is killed.

        Raises ServerError.
        """
        frontends = [frontend for device in self._devices for frontend in device.frontends]
        for frontend in frontends:
            frontend.send(Assignment(model.triton_config, frontend.numbers, folders))
        for frontend in frontends:
            if not frontend.pipe.poll(CONNECT_TIMEOUT_S):
                raise ServerError(f"a frontend did not start within {CONNECT_TIMEOUT_S} s")
            frontend.receive()
            watchdog = Watchdog(frontend.beats, self._options.triton_timeout_s, self._on_frontend_hang)
            self._watchdogs.enter_context(watchdog)
        LOGGER.debug("frontends: %d", len(frontends))

    def abandon(self) -> None:
        """Make the requests in flight fail, because they have taken too long."""
        self._kills = True
        for device in self._devices:
            device.worker.process.kill()

    def _watch(self) -> None:
        """Stop the server if a process ends. Returns when all have ended."""
        workers = {device.worker.process.sentinel: device for device in self._devices}
        frontends = {child.process.sentinel: (child, device) for device in self._devices for child in device.frontends}
        while workers or frontends:
            for sentinel in connection.wait([*workers, *frontends]):
                if sentinel in workers:
                    self._lose_worker(workers.pop(sentinel))
                else:
                    self._lose_frontend(*frontends.pop(sentinel))

    def _on_frontend_hang(self) -> None:
        self._lifecycle.fail(f"stopping: a frontend hung for {self._options.triton_timeout_s:g} s")

    def _lose_worker(self, device: _Device) -> None:
        if not self._kills:
            for instance in device.instances:
                if instance.channel.is_processing():
                    LOGGER.error("a worker exited while it processed %s", instance.channel.describe_request())
            if printed := device.printed.read():
                LOGGER.error('before a worker exited, a library printed "%s"', printed)
        self._lifecycle.fail("stopping: a worker exited")
        for instance in device.instances:
            instance.channel.close()

    def _lose_frontend(self, frontend: _Frontend, device: _Device) -> None:
        self.traffic.forget([device.instances[position].number for position in frontend.numbers])
        self._lifecycle.fail("stopping: a frontend exited")
