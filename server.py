# SPDX-License-Identifier: Apache-2.0
"""Serve DeepLabV3-ResNet101 with PyTriton: the bytes of a photo in, the photo and one class cut out of it back.

    python server.py [--help]

:class:`Segmenter` is the way of a photo through the three stages, :class:`InferenceCallable` what PyTriton calls,
:func:`serve` the model contract and the life of the server.
"""

import sys

if not (3, 11) <= sys.version_info < (3, 13):
    print(f"server.py needs Python 3.11 or 3.12, as its packages do; this is {sys.version.split()[0]}", file=sys.stderr)
    sys.exit(2)

import argparse
import logging
import math
import os
import re
import signal
import socket
import sysconfig
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from pytriton.client.auth import create_auth_headers
from pytriton.exceptions import PyTritonUnrecoverableError
from pytriton.model_config import ModelConfig, Tensor
from pytriton.proxy.types import Request
from pytriton.triton import Triton, TritonConfig
from tritonclient.http import InferenceServerClient

from request import InferenceFailed, PhotoRequest, RequestError, RequestReader

MODEL_NAME = "ResNet101"
WARM_UP_PHOTO = Path(__file__).parent / "images" / "orig.jpg"
# Of the 10 s that `docker stop` leaves, photos in flight get 3 and unloading takes about 2. Triton waits that long for
# clients to close their connections, too; after that it ends at once, and the processes below it need 2 s more.
DRAIN_S = 3
TRITON_EXIT_TIMEOUT_S = 6

LOGGER = logging.getLogger("server")


class StartError(Exception):
    """The server cannot start; the message is one line for the user."""


class Shutdown:
    """Handler of the signals that end the server: photos in flight are finished for a while, and refused after it."""

    def __init__(self):
        self._refuse_from = math.inf

    def __call__(self, *_: object) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        self._refuse_from = time.monotonic() + DRAIN_S
        LOGGER.info("stopping: photos in flight get %d s", DRAIN_S)
        sys.exit(0)  # raises in the main thread, and so leaves Triton's context

    def check(self) -> None:
        """Raise InferenceFailed where there is no time left."""
        if time.monotonic() > self._refuse_from:
            raise InferenceFailed("the server is stopping: send the photo to another, or again later")


class Segmenter:
    """The three stages, one after the other. An object belongs to one thread at a time."""

    def __init__(self, preprocess, network, postprocess):
        self._preprocess = preprocess
        self._network = network
        self._postprocess = postprocess

    def __call__(self, requests: Sequence[PhotoRequest]) -> list[dict[str, np.ndarray]]:
        """Return the outputs that each request asks for, uint8 ``[H, W, 3]``, valid until the next call."""
        photos, images = self._preprocess([request.encoded for request in requests])
        outputs = {}
        if any("original" in request.outputs for request in requests):
            outputs["original"] = to_host(photos)
        if any("segmented" in request.outputs for request in requests):
            probabilities = self._network(images)
            wanted = probabilities[range(len(requests)), [request.class_index for request in requests]]
            segmented = self._postprocess(photos, wanted, [request.threshold for request in requests])
            outputs["segmented"] = to_host(segmented)
        return [
            {name: arrays[index] for name, arrays in outputs.items() if name in request.outputs}
            for index, request in enumerate(requests)
        ]


def to_host(batch) -> list[np.ndarray]:
    """Return the samples of a DALI batch as arrays in host memory."""
    return [np.asarray(sample) for sample in batch.as_cpu()]


class InferenceCallable:
    """One instance of the model: PyTriton calls it in a thread of its own, with one request at a time."""

    def __init__(
        self,
        read_request: RequestReader,
        segmenter: Segmenter,
        check_device: Callable[[], None],
        shutdown: Shutdown,
    ):
        self._read_request = read_request
        self._segmenter = segmenter
        self._check_device = check_device
        self._shutdown = shutdown

    def __call__(self, requests: list[Request]) -> list[dict[str, np.ndarray]]:
        """Return for each request the outputs that it asks for, uint8 ``[1, H, W, 3]``.

        Raises InvalidRequest or InferenceFailed, whose sentence goes to the client, and PyTritonUnrecoverableError,
        which ends the server, where the GPU is lost to this process.
        """
        try:
            self._shutdown.check()
            outputs = self._segmenter([self._read_request(request) for request in requests])
        except RequestError as error:
            LOGGER.warning("refused a request: %s", error)
            raise
        except Exception as error:
            LOGGER.exception("a request failed")
            try:
                self._check_device()
            except RuntimeError:
                raise PyTritonUnrecoverableError("the GPU is lost to this process: start the server again") from error
            raise InferenceFailed("the server failed at this photo and logged why: try again later") from None
        return [{name: array[None] for name, array in images.items()} for images in outputs]


def pick_device(choice: str):
    """Return the torch.device for ``--device``. Raises StartError."""
    # torch, torchvision and DALI are imported where they are first needed: they take seconds, and a mistake on the
    # command line is to be answered at once.
    import torch

    gpus = torch.cuda.device_count()
    device = torch.device(choice if choice != "auto" else "cuda" if gpus else "cpu")
    if device.type == "cuda" and (device.index or 0) >= gpus:
        raise StartError(f"--device {choice}: this machine shows {gpus} CUDA devices; nvidia-smi lists them")
    LOGGER.info(
        "device: %s", torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU; {gpus} CUDA devices"
    )
    return device


def build_callables(options: argparse.Namespace, device, shutdown: Shutdown) -> tuple[list[InferenceCallable], str]:
    """Load the weights, build the stages and warm them up.

    Returns an InferenceCallable for each instance, and a warning for the user or an empty string. Raises StartError.
    """
    from model_inference import CLASS_NAMES, SegmentationNetwork, WeightsError, load_weights

    if options.class_name not in CLASS_NAMES:
        raise StartError(f"--class-name {options.class_name} is none of {', '.join(CLASS_NAMES)}")
    try:
        weights = load_weights(options.weights)
    except WeightsError as error:
        raise StartError(f"--weights {options.weights}: {error}") from error
    LOGGER.info("weights: %s", weights.source)

    from pipelines import Postprocess, Preprocess

    instances = options.instances or (4 if device.type == "cuda" else 1)
    LOGGER.info("building and warming up %d instance%s", instances, "s"[: instances - 1])
    network = SegmentationNetwork(weights.state_dict, device)
    read_request = RequestReader(CLASS_NAMES, options.class_name, options.threshold, options.max_pixels)
    photo = np.fromfile(WARM_UP_PHOTO, np.uint8)
    callables = []
    for _ in range(instances):
        segmenter = Segmenter(Preprocess(device, options.input_size), network, Postprocess(device))
        callables.append(InferenceCallable(read_request, segmenter, network.check_device, shutdown))
        callables[-1]([Request({"image": photo[None]}, requested_output_names=["original", "segmented"])])
    return callables, weights.warning


def serve(options: argparse.Namespace, shutdown: Shutdown) -> None:
    """Serve until a signal ends the process. Raises StartError, and RuntimeError where Triton ended by itself."""
    check_ports(options)
    device = pick_device(options.device)
    callables, warning = build_callables(options, device, shutdown)
    # Triton's Python backend loads libpython by the loader's path, and must find the one of this interpreter first.
    libraries = [sysconfig.get_config_var("LIBDIR"), os.environ.get("LD_LIBRARY_PATH")]
    os.environ["LD_LIBRARY_PATH"] = ":".join(filter(None, libraries))
    config = TritonConfig(
        http_address=options.address,
        http_port=options.http_port,
        grpc_address=options.address,
        grpc_port=options.grpc_port,
        metrics_address=options.address,
        metrics_port=options.metrics_port,
        allow_gpu_metrics=device.type == "cuda",
        exit_timeout_secs=TRITON_EXIT_TIMEOUT_S,
        log_verbose=int(options.verbose),
        # Triton logs a page for each refused request, and PyTriton keeps all of that in memory.
        log_file=None if options.verbose else os.devnull,
    )
    with Triton(config=config) as triton:
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
        if warning:
            LOGGER.warning(warning)
        LOGGER.info(
            "ready: model %s at http://%s:%d and grpc://%s:%d, metrics at http://%s:%d/metrics",
            *(MODEL_NAME, options.address, options.http_port, options.address, options.grpc_port),
            *(options.address, options.metrics_port),
        )
        try:
            triton.serve(monitoring_period_s=1)
        except SystemExit:
            unload(triton, options)
            raise
    raise RuntimeError("Triton ended by itself; the lines above say why")


def unload(triton: Triton, options: argparse.Namespace) -> None:
    """Have Triton finish the photos in flight and unload the model, while it waits for connections to be closed.

    Left alone it does one after the other: connections that clients keep open without using them take up its exit
    time-out, and it ends without unloading and leaves its stub processes and their shared memory behind.
    """
    address = "127.0.0.1" if options.address == "0.0.0.0" else options.address
    try:
        with InferenceServerClient(f"{address}:{options.http_port}", network_timeout=DRAIN_S) as client:
            client.unload_model(MODEL_NAME, headers=create_auth_headers(triton.get_access_token(), "http"))
    except Exception as error:  # whatever it is, Triton is stopped next
        LOGGER.warning("the model could not be unloaded: %s", error)


def check_ports(options: argparse.Namespace) -> None:
    """Raise StartError where a port cannot be had: Triton would fail late, and PyTriton wait for it for minutes."""
    for flag in ("http_port", "grpc_port", "metrics_port"):
        port = getattr(options, flag)
        try:
            socket.create_server((options.address, port)).close()
        except OSError as error:
            reason = error.strerror.split(" (")[0]
            flag = f"--{flag.replace('_', '-')}"
            raise StartError(
                f"{options.address}:{port} cannot be listened on ({reason}); see {flag} and --address"
            ) from error


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; a mistake on it ends the process with status 2."""
    parser = argparse.ArgumentParser(
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
        help="pretrained (torchvision's, downloaded once), demo (know two photos only), the path of a state dict, or "
        "auto: pretrained, and demo where that cannot be had",
    )
    add("--class-name", default="person", help="the class that is cut out where a request names none")
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
    add("--instances", type=bounded(int, 0, 64), default=0, help="photos worked on at once; 0: 4 on a GPU, 1 without")
    add("--address", default="127.0.0.1", help="address to listen on; 0.0.0.0 for all")
    add("--http-port", type=bounded(int, 1, 65535), default=8000, help="port for HTTP")
    add("--grpc-port", type=bounded(int, 1, 65535), default=8001, help="port for gRPC")
    add("--metrics-port", type=bounded(int, 1, 65535), default=8002, help="port for Prometheus metrics")
    add("--verbose", action="store_true", help="log what PyTriton and Triton do")
    options = parser.parse_args(arguments)
    ports = {options.http_port, options.grpc_port, options.metrics_port}
    if len(ports) < 3:
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
    """An argparse type: auto, cpu, cuda or cuda:N."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is none of auto, cpu, cuda and cuda:N")
    return text


def main() -> None:
    options = parse_options()
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    LOGGER.setLevel(logging.INFO)
    if options.verbose:
        logging.getLogger("pytriton").setLevel(logging.DEBUG)
    else:
        # It logs a traceback for every refused request; InferenceCallable logs a line.
        logging.getLogger("pytriton.proxy.inference").setLevel(logging.ERROR)
    shutdown = Shutdown()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, shutdown)
    try:
        serve(options, shutdown)
    except StartError as error:
        print(f"server.py: {error}", file=sys.stderr)
        sys.exit(2)
    except RuntimeError as error:
        LOGGER.error("%s", error)
        sys.exit(1)


if __name__ == "__main__":
    main()
