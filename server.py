# SPDX-License-Identifier: Apache-2.0
"""Serve DeepLabV3-ResNet101 with PyTriton: the bytes of a photo in, the photo and one class cut out of it back.

    python server.py [--help]

:func:`serve_callables` has the model contract and the life of the server, :class:`InferenceCallable` is what PyTriton
calls. The work itself is done by another process: see worker.py.
"""

import sys

if not (3, 11) <= sys.version_info < (3, 13):
    print(
        f"server.py: needs Python 3.11 or 3.12, as its packages do; this is {sys.version.split()[0]}", file=sys.stderr
    )
    sys.exit(2)

import argparse
import contextlib
import ctypes
import io
import logging
import math
import os
import re
import shutil
import signal
import socket
import sysconfig
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing import connection
from pathlib import Path

import numpy as np
import psutil
from pytriton.model_config import DynamicBatcher, ModelConfig, Tensor
from pytriton.model_config.common import QueuePolicy, TimeoutAction
from pytriton.proxy.types import Request
from pytriton.triton import Triton, TritonConfig

from batching import Channel, open_channels
from request import InferenceFailed, InvalidRequest, RequestError
from worker import (
    ANSWER_BYTES_PER_PIXEL,
    INSTANCES,
    Ready,
    StartError,
    Worker,
    WorkerError,
    max_photo_bytes,
    name_devices,
)

MODEL_NAME = "ResNet101"
# `docker stop` leaves 10 s. Photos in flight get 2 of them; then Triton waits as long for clients to close connections.
DRAIN_S = 2

# Photos that wait, by the type of the device: what is answered within seconds.
MAX_QUEUE = {"cuda": 512, "cpu": 12}
MAX_WAIT_S = 60

# A worker that answers nobody for so long hangs: a GPU may do so without any error.
MAX_WORK_S = 300

# The instances ask the first of them, through a socket, where their memory is. On a busy machine they may do so when it
# has a name but nobody listens yet, or get no answer within the second that PyTriton gives them.
MISSED = re.compile("ConnectionRefusedError|BlockingIOError|waiting for config file")
START_ATTEMPTS = 5

# For the processes that Triton starts. Images stay on the heap, where by default each would be mapped, its pages zeroed
# and unmapped again. 32 MiB is the most that glibc takes as the first of these.
HEAP = {
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(512 << 20),
    "MALLOC_TOP_PAD_": str(64 << 20),
}

LOGGER = logging.getLogger("server")


class TritonError(Exception):
    """Triton did not start; the message is one line."""


class InstancesMissedEachOther(TritonError):
    """A start that may go well the next time."""


class Shutdown:
    """Ends the server on a signal or a fatal error: photos in flight are finished for a while, later ones refused."""

    def __init__(self):
        self.at_time_out: list[Callable[[], None]] = []  # what to call where photos in flight take too long
        self._exit_status = 0
        self._begun = False
        self._undisturbed = False
        self._refuse_from = math.inf
        self._in_flight = 0
        self._last_done = -math.inf
        self._lock = threading.Lock()

    def handle_signals(self) -> None:
        """Have the first SIGINT or SIGTERM leave whatever the main thread does, by way of an exception."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)

    def _on_signal(self, *_: object) -> None:
        first, self._begun = not self._begun, True
        if first and not self._undisturbed:
            sys.exit(self._exit_status)

    @contextlib.contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Have a signal wait until the end of the block."""
        self._undisturbed = True
        try:
            yield
        finally:
            self._undisturbed = False
        if self._begun:
            sys.exit(self._exit_status)

    def finish(self) -> None:
        """Pass over signals and failures from here on: the server ends anyway."""
        self._begun = True

    def fail(self, reason: str) -> None:
        """End the server with an exit status that makes a supervisor start it again. From any thread."""
        if not self._begun:
            LOGGER.critical(reason)
            self._exit_status = 1
            os.kill(os.getpid(), signal.SIGTERM)

    @contextlib.contextmanager
    def request(self) -> Iterator[None]:
        """Surround the work on a request. Raises InferenceFailed where there is no time left for it."""
        if time.monotonic() > self._refuse_from:
            raise InferenceFailed("the server is stopping: send the photo to another one, or again later")
        with self._lock:
            self._in_flight += 1
        try:
            yield
        finally:
            with self._lock:
                self._in_flight -= 1
                self._last_done = time.monotonic()

    def drain(self) -> None:
        """Return when the photos in flight are answered, or when their time is up."""
        began = time.monotonic()
        self._refuse_from = began + DRAIN_S
        LOGGER.info("stopping: photos in flight get %d s", DRAIN_S)
        # A second without any: the last answer is on its way through PyTriton and Triton for some of it.
        while time.monotonic() < began + DRAIN_S + 1:
            if self._in_flight == 0 and time.monotonic() > max(self._last_done, began) + 1:
                return
            time.sleep(0.05)
        if self._in_flight:
            LOGGER.warning("stopping: photos in flight took too long, their clients are told so")
            for give_up in self.at_time_out:
                give_up()


class InferenceCallable:
    """One instance of the model: PyTriton calls it in a thread of its own, with one request at a time."""

    def __init__(self, channel: Channel, max_bytes: int, shutdown: Shutdown):
        """``channel``: to the worker, for this instance alone; ``max_bytes``: of a photo, what is room for."""
        self._channel = channel
        self._max_bytes = max_bytes
        self._shutdown = shutdown

    def __call__(self, requests: list[Request]) -> list[dict[str, np.ndarray]]:
        """Return for each request the outputs that it asks for, uint8 ``[1, H, W, 3]``, valid until the next call.

        Raises InvalidRequest or InferenceFailed, whose sentence goes to the client.
        """
        try:
            with self._shutdown.request():
                answers = [self._segment(request) for request in requests]
        except RequestError as error:
            LOGGER.warning("refused a request: %s", error)
            raise
        return [{name: array[None] for name, array in images.items()} for images in answers]

    def _segment(self, request: Request) -> dict[str, np.ndarray]:
        encoded = request.data["image"][0]
        if encoded.size > self._max_bytes:
            raise InvalidRequest(
                f"the photo has {encoded.size} bytes, more than the {self._max_bytes} that this server takes: "
                "save it as a JPEG, or make it smaller"
            )
        try:
            message = request.parameters or {}, request.requested_output_names
            return self._channel.call(encoded, message, timeout_s=MAX_WORK_S)
        except ValueError:
            raise InvalidRequest("the request's parameters are too long") from None
        except ConnectionError:
            raise InferenceFailed("the server ends, and its worker process is gone: try again later") from None
        except TimeoutError:
            self._shutdown.fail(f"a worker has not answered for {MAX_WORK_S} s: it hangs, and the server ends")
            raise InferenceFailed("the server took too long for this photo, and ends: try again later") from None


@contextlib.contextmanager
def segmentation(options: argparse.Namespace, shutdown: Shutdown) -> Iterator[tuple[list[Callable], Ready]]:
    """Start a worker for each device; yield a callable for each instance, and what the workers say of themselves.

    Raises StartError and WorkerError.
    """
    max_instances = options.instances or max(INSTANCES.values())
    workers: list[Worker] = []
    try:
        devices = name_devices(options.device)
        shm_bytes = shutil.disk_usage("/dev/shm").free // len(devices)
        for device in devices:
            try:
                channels = open_channels(
                    max_instances,
                    request_bytes=max_photo_bytes(options.max_pixels),
                    response_bytes=ANSWER_BYTES_PER_PIXEL * options.max_pixels,
                )
            except (OSError, OverflowError) as error:
                raise StartError(f"--max-pixels {options.max_pixels}: no memory for such photos ({error})") from error
            workers.append(Worker(options, device, channels, shm_bytes))
            # PyTriton waits for its callables, which wait for the worker.
            shutdown.at_time_out.append(workers[-1].kill)
        said = [worker.wait_until_ready() for worker in workers]
        for worker in workers:
            threading.Thread(target=fail_without, args=(worker, shutdown), daemon=True).start()
        callables = [
            InferenceCallable(channel, ready.max_bytes, shutdown)
            for worker, ready in zip(workers, said, strict=True)
            for channel in worker.channels[: ready.instances]
        ]
        yield callables, said[0]
    finally:
        shutdown.finish()
        for worker in workers:
            worker.kill()
        if not all(worker.join(timeout_s=10) for worker in workers):
            LOGGER.critical("a worker cannot be killed: its GPU's driver hangs")
            os._exit(1)  # Python would wait for it


def fail_without(worker: Worker, shutdown: Shutdown) -> None:
    """End the server when a worker has ended by itself."""
    worker.wait_until_ended()
    shutdown.fail("a worker has ended, and with it the server does")


def serve(options: argparse.Namespace, shutdown: Shutdown, build: Callable = segmentation) -> None:
    """Serve until a signal ends the process. Raises StartError, WorkerError and TritonError.

    ``build``: makes the callables; ``benchmark.py`` has others, to compare with.
    """
    check_address(options)
    prepare_environment()
    with build(options, shutdown) as (callables, ready):
        serve_callables(callables, ready, options, shutdown)


def serve_callables(
    callables: Sequence[Callable], ready: Ready, options: argparse.Namespace, shutdown: Shutdown
) -> None:
    """Have Triton serve the model, an instance for each callable, until a signal ends the process."""
    for attempt in range(START_ATTEMPTS):
        try:
            with running_triton(callables, ready, options, shutdown) as triton:
                for warning in ready.warnings:
                    LOGGER.warning(warning)
                LOGGER.info(
                    f"ready: model {MODEL_NAME} at http://{options.address}:{options.http_port} and "
                    f"grpc://{options.address}:{options.grpc_port}, metrics at "
                    f"http://{options.address}:{options.metrics_port}/metrics"
                )
                triton.serve(monitoring_period_s=1)
                # Sends a signal, which leaves from here.
                shutdown.fail("Triton has ended, and with it the server does; --verbose shows its log")
        except InstancesMissedEachOther as error:
            if attempt == START_ATTEMPTS - 1:
                raise
            LOGGER.warning("%s; trying again", error)


@contextlib.contextmanager
def running_triton(
    callables: Sequence[Callable], ready: Ready, options: argparse.Namespace, shutdown: Shutdown
) -> Iterator[Triton]:
    """Start Triton with the model bound to it; afterwards finish the photos in flight and leave nothing behind."""
    config = TritonConfig(
        http_address=options.address,
        http_port=options.http_port,
        grpc_address=options.address,
        grpc_port=options.grpc_port,
        metrics_address=options.address,
        metrics_port=options.metrics_port,
        allow_gpu_metrics=ready.device_type == "cuda",
        exit_timeout_secs=DRAIN_S,
        log_verbose=int(options.verbose),
        # Triton logs a page for each refused request, and PyTriton keeps all of that in memory.
        log_file=None if options.verbose else os.devnull,
    )
    helpers: list[psutil.Process] = []
    try:
        triton = Triton(config=config)
    except OSError as error:
        raise StartError(f"PyTriton cannot make its workspace: {error}; PYTRITON_HOME names another place") from error
    try:
        triton.bind(
            model_name=MODEL_NAME,
            infer_func=callables,
            inputs=[Tensor(name="image", dtype=np.uint8, shape=(-1,))],
            outputs=[
                Tensor(name="original", dtype=np.uint8, shape=(-1, -1, 3)),
                Tensor(name="segmented", dtype=np.uint8, shape=(-1, -1, 3)),
            ],
            config=ModelConfig(
                # Photos differ in size, and a Triton batch is one dense array: each request travels alone.
                max_batch_size=1,
                batcher=DynamicBatcher(
                    default_queue_policy=QueuePolicy(
                        max_queue_size=options.max_queue or MAX_QUEUE[ready.device_type],
                        # A request's own timeout counts where it is shorter.
                        default_timeout_microseconds=MAX_WAIT_S * 1_000_000,
                        allow_timeout_override=True,
                        timeout_action=TimeoutAction.REJECT,
                    )
                ),
            ),
        )
        try:
            triton.run()
        except Exception as error:
            # An exception in one of Triton's stub processes comes with a traceback around the line that counts.
            lines = str(error).split("\nAt:\n")[0].strip().splitlines() or [type(error).__name__]
            kind = InstancesMissedEachOther if MISSED.search(lines[-1]) else TritonError
            raise kind(f"Triton did not start ({lines[-1]}); --verbose shows its log") from error
        helpers = helper_processes()
        threading.Thread(target=fail_without_helpers, args=(helpers, triton, shutdown), daemon=True).start()
        yield triton
    except SystemExit:
        shutdown.drain()
        raise
    finally:
        # PyTriton prints what comes from Triton's processes: from here on, how their resource trackers clear up.
        with shutdown.undisturbed(), contextlib.redirect_stdout(sys.stdout if options.verbose else io.StringIO()):
            clean_up(triton, helpers)


def fail_without_helpers(helpers: Sequence[psutil.Process], triton: Triton, shutdown: Shutdown) -> None:
    """End the server when one of Triton's helpers has ended: the one that Triton starts instead finds no memory."""
    with contextlib.suppress(ProcessLookupError):  # it has ended already
        connection.wait([os.pidfd_open(helper.pid) for helper in helpers])
    if triton.is_alive():
        shutdown.fail("one of Triton's helper processes has ended, and with it the server does")


def tritonservers() -> list[psutil.Process]:
    """Return the process that PyTriton started, if it is there."""
    return [child for child in psutil.Process().children() if named(child, "tritonserver")]


def helper_processes() -> list[psutil.Process]:
    """Return the processes that tritonserver started."""
    helpers = []
    for process in tritonservers():
        with contextlib.suppress(psutil.NoSuchProcess):
            helpers += process.children(recursive=True)
    return helpers


def named(process: psutil.Process, name: str) -> bool:
    """Return whether the process is there and its name begins like this."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.name().startswith(name)
    return False


def clean_up(triton: Triton, helpers: Sequence[psutil.Process]) -> None:
    """Stop Triton, and what it leaves behind where it was killed or ran out of time."""
    helpers = {*helpers, *helper_processes()}
    # Its own time-out does not cover all that it waits for.
    killer = threading.Timer(2 * DRAIN_S, kill, args=[tritonservers()])
    killer.start()
    try:
        triton.stop()
    finally:
        killer.cancel()
        # First the stub processes: of the others some clear up when those are gone.
        kill([helper for helper in helpers if named(helper, "triton_python")])
        kill(psutil.wait_procs(helpers, timeout=1)[1])
        for segment in Path("/dev/shm").glob(f"pytrtion{os.getpid()}-*"):  # PyTriton's spelling
            segment.unlink(missing_ok=True)


def kill(processes: Iterable[psutil.Process]) -> None:
    """Kill those of the processes that are still there."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def check_address(options: argparse.Namespace) -> None:
    """Resolve the address, which Triton does not. Raises StartError where a port on it cannot be had.

    Triton itself would fail late, and PyTriton wait for it for minutes.
    """
    for flag in ("--http-port", "--grpc-port", "--metrics-port"):
        port = getattr(options, flag[2:].replace("-", "_"))
        try:
            options.address = socket.gethostbyname(options.address)
            socket.create_server((options.address, port)).close()
        except OSError as error:
            reason = error.strerror.split(" (")[0]
            raise StartError(
                f"{options.address}:{port} cannot be listened on: {reason}; see {flag}, --address"
            ) from error


def prepare_environment() -> None:
    """Set what Triton and its stub processes inherit, and how the threads of this process take turns.

    Raises StartError where this Python lacks its shared library.
    """
    # Triton's Python backend loads libpython by the loader's path, and has to find the one of this interpreter.
    library = f"libpython3.{sys.version_info.minor}.so.1.0"
    folders = [sysconfig.get_config_var("LIBDIR"), f"{sys.base_prefix}/lib"]
    found = [folder for folder in folders if folder and os.access(f"{folder}/{library}", os.R_OK)]
    if not found:
        try:
            ctypes.CDLL(library)
        except OSError:
            raise StartError(
                f"Triton needs {library}, which this Python lacks: take one built with --enable-shared"
            ) from None
    os.environ["LD_LIBRARY_PATH"] = ":".join(filter(None, [*found, os.environ.get("LD_LIBRARY_PATH")]))
    for name, value in HEAP.items():
        os.environ.setdefault(name, value)
    # An instance waits for the interpreter's lock a few times a request, by default up to 5 ms each time.
    sys.setswitchinterval(0.0005)


class OneLineParser(argparse.ArgumentParser):
    """Answers a mistake with a line, where argparse prints its usage, too."""

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: {message}; see --help\n")


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; a mistake on it ends the process with status 2."""
    parser = OneLineParser(
        description="Serve DeepLabV3-ResNet101 with PyTriton and DALI.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--device",
        type=device_names,
        default="auto",
        help="cpu, cuda, cuda:N, several of them with commas between, all (GPUs), or auto: a GPU if there is one",
    )
    add(
        "--weights",
        default="auto",
        help="pretrained (torchvision's, downloaded once), demo (knows only the two sample photos), the path of a "
        "state dict, or auto: pretrained, and demo where that cannot be had",
    )
    add("--class-name", default="person", help="the class to cut out where a request names none")
    add(
        "--threshold",
        type=bounded(float, 0, 1),
        default=0.6,
        help="the probability to exceed where a request names none",
    )
    add(
        "--input-size",
        type=bounded(int, 32, 2048),
        default=224,
        help="width and height of the network's input in pixels",
    )
    add("--max-pixels", type=bounded(int, 1), default=25_000_000, help="photos with more pixels are refused")
    add(
        "--precision",
        choices=("auto", "fp32", "bf16", "fp16"),
        default="auto",
        help="of the network; auto: the fastest",
    )
    add(
        "--instances",
        type=bounded(int, 0, 64),
        default=0,
        help="requests in work at once on each device; 0: 12 on a GPU, 1 without",
    )
    add(
        "--max-batch-size",
        type=bounded(int, 0, 64),
        default=0,
        help="of these, the most that go through the network together; 0: 4 on a GPU, 1 without",
    )
    add(
        "--max-queue",
        type=bounded(int, 0),
        default=0,
        help="requests that may wait for an instance, the next are refused at once; 0: 512 on a GPU, 12 without",
    )
    add("--address", default="127.0.0.1", help="IPv4 address or name to listen on; 0.0.0.0 for all addresses")
    add("--http-port", type=bounded(int, 1, 65535), default=8000, help="port for HTTP")
    add("--grpc-port", type=bounded(int, 1, 65535), default=8001, help="port for gRPC")
    add("--metrics-port", type=bounded(int, 1, 65535), default=8002, help="port for Prometheus metrics")
    add("--verbose", action="store_true", help="log what PyTriton and Triton do")
    options = parser.parse_args(arguments)
    if len({options.http_port, options.grpc_port, options.metrics_port}) < 3:
        parser.error("--http-port, --grpc-port and --metrics-port have to differ")
    return options


def bounded(kind: type, lowest: float, highest: float | None = None) -> Callable[[str], float]:
    """Return an argparse type: a number of the kind within the bounds."""
    bounds = f"from {lowest} to {highest}" if highest is not None else f"of at least {lowest}"

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not lowest <= value <= (value if highest is None else highest):
            raise argparse.ArgumentTypeError(f"{text!r} is no {kind.__name__} {bounds}")
        return value

    return parse


def device_names(text: str) -> str:
    """Check ``--device``, as an argparse type."""
    if not re.fullmatch(r"auto|all|(cpu|cuda(:\d+)?)(,(cpu|cuda(:\d+)?))*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is none of auto, all, cpu, cuda and cuda:N, or several with commas")
    return text


def run(options: argparse.Namespace, build: Callable = segmentation) -> None:
    """Run the server until it ends; see README.md for the exit status."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    LOGGER.setLevel(logging.INFO)
    if options.verbose:
        LOGGER.setLevel(logging.DEBUG)
        logging.getLogger("pytriton").setLevel(logging.DEBUG)
    else:
        # It logs a traceback for every refused request, where InferenceCallable logs a line.
        logging.getLogger("pytriton.proxy.inference").setLevel(logging.ERROR)
        logging.getLogger("pytriton.server").setLevel(logging.ERROR)
    shutdown = Shutdown()
    shutdown.handle_signals()
    try:
        serve(options, shutdown, build)
    except StartError as error:
        print(f"server.py: {error}", file=sys.stderr)
        sys.exit(2)
    except (TritonError, WorkerError) as error:
        print(f"server.py: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    run(parse_options())
