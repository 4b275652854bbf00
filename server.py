# SPDX-License-Identifier: Apache-2.0
"""Serve DeepLabV3-ResNet101 with PyTriton: the bytes of a photo in, the photo and one class cut out of it back.

    python server.py [--help]

:func:`serve` has the model contract and the life of the server, :func:`build_callables` puts the parts together, and
:class:`InferenceCallable` is what PyTriton calls.
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
import signal
import socket
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import psutil
from pytriton.client.auth import create_auth_headers
from pytriton.model_config import ModelConfig, Tensor
from pytriton.proxy.types import Request
from pytriton.triton import Triton, TritonConfig
from tritonclient.http import InferenceServerClient

from request import InferenceFailed, PhotoRequest, RequestError, RequestReader

# torch, torchvision and DALI are imported where they are first needed: they take seconds, and a mistake on the command
# line is to be answered at once.

MODEL_NAME = "ResNet101"
WARM_UP_PHOTO = Path(__file__).parent / "images" / "orig.jpg"
# `docker stop` leaves 10 s. Photos in flight get 2 of them; then Triton waits as long for clients to close connections.
DRAIN_S = 2

# What needs no tuning, by the type of the device. Two workers on a GPU: while one batch is in the network, the next is
# decoded and the one before copied to the host.
INSTANCES = {"cuda": 16, "cpu": 1}
MAX_BATCH_SIZE = {"cuda": 8, "cpu": 1}
WORKERS = {"cuda": 2, "cpu": 1}

LOGGER = logging.getLogger("server")


class StartError(Exception):
    """The server cannot start, and the user can do something about it; the message is one line."""


class TritonError(Exception):
    """Triton did not start or ended by itself; the message is one line."""


class Shutdown:
    """Ends the server on a signal or a fatal error: photos in flight are finished for a while, later ones refused."""

    def __init__(self):
        self._exit_status = 0
        self._refuse_from = math.inf
        self._in_flight = 0
        self._last_done = -math.inf
        self._lock = threading.Lock()

    def handle_signals(self) -> None:
        """Have SIGINT and SIGTERM leave whatever the main thread does, by way of an exception."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: sys.exit(self._exit_status))

    def ignore_signals(self) -> None:
        """Let nothing disturb the shut-down that one has begun."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)

    def fail(self) -> None:
        """End the server with an exit status that makes a supervisor start it again. From any thread."""
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


class InferenceCallable:
    """One instance of the model: PyTriton calls it in a thread of its own, with one request at a time."""

    def __init__(
        self,
        read_request: RequestReader,
        segment: Callable[[PhotoRequest], dict[str, np.ndarray]],
        check_device: Callable[[], None],
        shutdown: Shutdown,
    ):
        self._read_request = read_request
        self._segment = segment
        self._check_device = check_device
        self._shutdown = shutdown

    def __call__(self, requests: list[Request]) -> list[dict[str, np.ndarray]]:
        """Return for each request the outputs that it asks for, uint8 ``[1, H, W, 3]``.

        Raises InvalidRequest or InferenceFailed, whose sentence goes to the client.
        """
        try:
            with self._shutdown.request():
                outputs = [self._segment(self._read_request(request)) for request in requests]
        except RequestError as error:
            LOGGER.warning("refused a request: %s", error)
            self._end_if_device_is_lost()
            raise
        except Exception:
            LOGGER.exception("a request failed")
            self._end_if_device_is_lost()
            raise InferenceFailed("the server failed at this photo and logged why: try again later") from None
        return [{name: array[None] for name, array in images.items()} for images in outputs]

    def _end_if_device_is_lost(self) -> None:
        # After some CUDA errors every later call of the process fails, or worse: a decoder takes good photos for bad.
        try:
            self._check_device()
        except RuntimeError as error:
            LOGGER.critical("the GPU is lost to this process, which ends: %s", str(error).splitlines()[0])
            self._shutdown.fail()


def pick_device(choice: str):
    """Return the torch.device for ``--device``. Raises StartError."""
    import torch

    # A driver too old for this torch counts devices, but has none available.
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    device = torch.device(choice if choice != "auto" else "cuda" if gpus else "cpu")
    if device.type == "cuda" and (device.index or 0) >= gpus:
        raise StartError(
            f"--device {choice}: torch finds {gpus} CUDA devices here; see nvidia-smi and the driver's version"
        )
    LOGGER.info("device: %s", torch.cuda.get_device_name(device) if gpus and device.type == "cuda" else "CPU")
    return device


def build_callables(options: argparse.Namespace, device, shutdown: Shutdown) -> tuple[list[InferenceCallable], str]:
    """Load the weights, build the stages and warm them up.

    Returns an InferenceCallable for each instance, and a warning for the user or an empty string. Raises StartError.
    """
    from model_inference import CLASS_NAMES, SegmentationNetwork, WeightsError, load_weights, pick_precision

    if options.class_name not in CLASS_NAMES:
        raise StartError(f"--class-name {options.class_name} is none of {', '.join(CLASS_NAMES)}")
    try:
        weights = load_weights(options.weights)
    except WeightsError as error:
        raise StartError(f"--weights {options.weights}: {error}") from error
    LOGGER.info("weights: %s", weights.source)

    from batching import Batcher
    from segmentation import Segmenter

    instances = options.instances or INSTANCES[device.type]
    max_batch_size = options.max_batch_size or MAX_BATCH_SIZE[device.type]
    precision = pick_precision(options.precision, device)
    LOGGER.info("warm-up: instances %d, photos a batch %d, precision %s", instances, max_batch_size, precision)
    network = SegmentationNetwork(weights.state_dict, device, precision)
    segmenters = [Segmenter(network, options.input_size, max_batch_size) for _ in range(WORKERS[device.type])]
    encoded = np.fromfile(WARM_UP_PHOTO, np.uint8)
    photo = PhotoRequest(encoded, class_index=0, threshold=0.5, outputs=frozenset({"original", "segmented"}))
    for segmenter in segmenters:
        for size in {1, max_batch_size}:
            segmenter([photo] * size)
    segment = Batcher(segmenters, max_batch_size)
    read_request = RequestReader(CLASS_NAMES, options.class_name, options.threshold, options.max_pixels)
    callables = [InferenceCallable(read_request, segment, network.check_device, shutdown) for _ in range(instances)]
    return callables, weights.warning


def serve(options: argparse.Namespace, shutdown: Shutdown, build: Callable = build_callables) -> None:
    """Serve until a signal ends the process. Raises StartError and TritonError.

    ``build``: makes the callables; ``benchmark.py`` has others, to compare with.
    """
    check_address(options)
    prepare_environment()
    device = pick_device(options.device)
    callables, warning = build(options, device, shutdown)
    config = TritonConfig(
        http_address=options.address,
        http_port=options.http_port,
        grpc_address=options.address,
        grpc_port=options.grpc_port,
        metrics_address=options.address,
        metrics_port=options.metrics_port,
        allow_gpu_metrics=device.type == "cuda",
        exit_timeout_secs=DRAIN_S,
        log_verbose=int(options.verbose),
        # Triton logs a page for each refused request, and PyTriton keeps all of that in memory.
        log_file=None if options.verbose else os.devnull,
    )
    helpers: list[psutil.Process] = []
    triton = Triton(config=config)
    try:
        triton.bind(
            model_name=MODEL_NAME,
            infer_func=callables,
            inputs=[Tensor(name="image", dtype=np.uint8, shape=(-1,))],
            outputs=[
                Tensor(name="original", dtype=np.uint8, shape=(-1, -1, 3)),
                Tensor(name="segmented", dtype=np.uint8, shape=(-1, -1, 3)),
            ],
            # Photos differ in size, and a Triton batch is one dense array: each request travels alone.
            config=ModelConfig(max_batch_size=1),
        )
        try:
            triton.run()
        except Exception as error:
            # An exception in one of Triton's stub processes comes with a traceback around the line that counts.
            lines = str(error).split("\nAt:\n")[0].strip().splitlines() or [type(error).__name__]
            raise TritonError(f"Triton did not start ({lines[-1]}); --verbose shows its log") from error
        helpers = helper_processes()
        if warning:
            LOGGER.warning(warning)
        LOGGER.info(
            f"ready: model {MODEL_NAME} at http://{options.address}:{options.http_port} and "
            f"grpc://{options.address}:{options.grpc_port}, metrics at "
            f"http://{options.address}:{options.metrics_port}/metrics"
        )
        triton.serve(monitoring_period_s=1)
        raise TritonError("Triton ended by itself; --verbose shows its log")
    except SystemExit:
        shutdown.ignore_signals()
        refuse_new_requests(triton, options)
        shutdown.drain()
        raise
    finally:
        # PyTriton prints what comes from Triton's processes: from here on, how their resource trackers clear up.
        with contextlib.redirect_stdout(sys.stdout if options.verbose else io.StringIO()):
            clean_up(triton, helpers)


def refuse_new_requests(triton: Triton, options: argparse.Namespace) -> None:
    """Have Triton unload the model: it refuses what comes now, and answers what it has taken."""
    address = "127.0.0.1" if options.address == "0.0.0.0" else options.address
    try:
        with InferenceServerClient(f"{address}:{options.http_port}", network_timeout=1, connection_timeout=1) as client:
            client.unload_model(MODEL_NAME, headers=create_auth_headers(triton.get_access_token(), "http"))
    except Exception as error:  # not started yet, ended already, or stopping because it saw the terminal's Ctrl-C, too
        LOGGER.debug("the model was not unloaded: %s", error)


def helper_processes() -> list[psutil.Process]:
    """Return the processes that tritonserver started."""
    return [process for process in psutil.Process().children(recursive=True) if process.ppid() != os.getpid()]


def clean_up(triton: Triton, helpers: Sequence[psutil.Process]) -> None:
    """Stop Triton, and what it leaves behind where it was killed or ran out of time."""
    helpers = {*helpers, *helper_processes()}
    # Triton takes 2 s to end each stub process, one after the other, and they have nothing left to do.
    for helper in helpers:
        with contextlib.suppress(psutil.NoSuchProcess):
            if helper.name().startswith("triton_python"):
                helper.kill()
    triton.stop()
    for helper in psutil.wait_procs(helpers, timeout=1)[1]:
        with contextlib.suppress(psutil.NoSuchProcess):
            helper.kill()
    for segment in Path("/dev/shm").glob(f"pytrtion{os.getpid()}-*"):  # PyTriton's spelling
        segment.unlink(missing_ok=True)


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
    found = [folder for folder in folders if folder and Path(folder, library).exists()]
    if not found:
        try:
            ctypes.CDLL(library)
        except OSError:
            raise StartError(
                f"Triton needs {library}, which this Python lacks: take one built with --enable-shared"
            ) from None
    os.environ["LD_LIBRARY_PATH"] = ":".join(filter(None, [*found, os.environ.get("LD_LIBRARY_PATH")]))
    # Images stay on the heap: by default each would be mapped, its pages zeroed, and unmapped again. 32 MiB is the most
    # that glibc takes as the first of these.
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(32 << 20))
    os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", str(512 << 20))
    os.environ.setdefault("MALLOC_TOP_PAD_", str(64 << 20))
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
        "--device", type=device_name, default="auto", help="auto, cpu, cuda or cuda:N; auto takes a GPU if there is one"
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
    add("--instances", type=bounded(int, 0, 64), default=0, help="requests in work at once; 0: 16 on a GPU, 1 without")
    add(
        "--max-batch-size",
        type=bounded(int, 0, 64),
        default=0,
        help="of these, the most that go through the network together; 0: 8 on a GPU, 1 without",
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


def device_name(text: str) -> str:
    """Check a device, as an argparse type: auto, cpu, cuda or cuda:N."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is none of auto, cpu, cuda and cuda:N")
    return text


def run(options: argparse.Namespace, build: Callable = build_callables) -> None:
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
    except TritonError as error:
        print(f"server.py: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    run(parse_options())
