# SPDX-License-Identifier: Apache-2.0
"""Helpers for the command line, and the options of every server."""

import argparse
import logging
import os
import re
import socket
from collections.abc import Callable

from serving.errors import printable

# Defaults by the type of the device. A GPU computes two batches at the same time: it preprocesses one while the network
# computes the other. The remaining third of its instances copy requests and responses. A CPU has one instance more than
# the client's default --concurrency: the batcher reserves one for small requests. A full queue is some seconds of work.
DEVICE_DEFAULTS = {
    "cuda": {"instances": 20, "max_batch_size": 7, "executors": 2, "max_queue": 512},
    "cpu": {"instances": 5, "max_batch_size": 4, "executors": 1, "max_queue": 12},
}
DEFAULT_ADDRESS = "127.0.0.1"
DEFAULT_PORTS = {"http": 8000, "grpc": 8001, "metrics": 8002}
MAX_DEFAULT_INSTANCES = max(defaults["instances"] for defaults in DEVICE_DEFAULTS.values())


def device_default(options: argparse.Namespace, name: str, device_type: str) -> int:
    """Return an option, or the default for the type of the device (``cuda`` or ``cpu``) if it is 0."""
    return getattr(options, name) or DEVICE_DEFAULTS[device_type][name]


def count_frontends(options: argparse.Namespace, device_type: str, workers: int) -> int:
    """Return the number of frontend processes for each worker.

    A GPU keeps three of them busy. They share the cores with Triton, the worker and often the clients.
    """
    if options.frontends:
        return options.frontends
    cores = len(os.sched_getaffinity(0)) // workers
    return 1 if device_type == "cpu" else max(1, min(3, cores // 5))


def make_parser(description: str) -> argparse.ArgumentParser:
    """Return a parser that prints the default of each option, and reports an error in one line with status 2."""
    return argparse.ArgumentParser(
        description=description,
        usage=argparse.SUPPRESS,  # argparse would print it above every error message
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )


def number(kind: type, lowest: float, highest: float | None = None) -> Callable[[str], float]:
    """Return an argparse type for numbers of this kind, ``int`` or ``float``, within inclusive bounds."""
    what = "a whole number" if kind is int else "a number"
    valid = f"{what} >= {lowest}" if highest is None else f"{what} between {lowest} and {highest}"

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not lowest <= value <= (value if highest is None else highest):
            raise argparse.ArgumentTypeError(f"must be {valid}, not {text or 'empty'}")
        return value

    return parse


def device_names(text: str) -> str:
    """Return the value of ``--device`` if it is valid. An argparse type."""
    if not re.fullmatch(r"auto|all|(cpu|cuda(:\d+)?)(,(cpu|cuda(:\d+)?))*", text):
        raise argparse.ArgumentTypeError(
            f"must be auto, all, cpu, cuda, cuda:N, or several devices separated by commas, not {text or 'empty'}"
        )
    return text


def ip_address(text: str) -> str:
    """Return the IPv4 address of a host, because Triton does not resolve names. An argparse type."""
    if not text:  # for which gethostbyname returns 0.0.0.0
        raise argparse.ArgumentTypeError("must not be empty; 0.0.0.0 listens on all addresses")
    try:
        return socket.gethostbyname(text)
    except (OSError, UnicodeError):
        raise argparse.ArgumentTypeError(f"must be an IPv4 address or a known host name, not {text}") from None


def add_serving_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that do not depend on the model."""
    add = parser.add_argument_group("serving").add_argument
    add(
        "--device",
        type=device_names,
        default="auto",
        help="cpu, cuda, cuda:N, several of them separated by commas, all (GPUs), or auto: a GPU if there is one",
    )
    for name, highest, text in (
        ("--instances", 64, "concurrent requests per device"),
        ("--max-batch-size", 64, "maximum number of requests per batch"),
        ("--executors", 8, "batches that a device computes at the same time"),
        ("--max-queue", None, "maximum number of queued requests; further ones are rejected immediately"),
    ):
        key = name[2:].replace("-", "_")
        on_gpu, on_cpu = (DEVICE_DEFAULTS[device_type][key] for device_type in ("cuda", "cpu"))
        add(name, type=number(int, 0, highest), default=0, help=f"{text}; 0 means {on_gpu} on a GPU, {on_cpu} on a CPU")
    add(
        "--frontends",
        type=number(int, 0, 16),
        default=0,
        help="processes per device that exchange requests with Triton; 0 means up to 3 on a GPU, 1 on a CPU",
    )
    add(
        "--address",
        type=ip_address,
        help=f"IPv4 address or host name to listen on, 0.0.0.0 for all (default: {DEFAULT_ADDRESS})",
        default=argparse.SUPPRESS,
    )
    add("--behind-proxy", action="store_true", help="do not warn that --address exposes Triton; see docs/security.md")
    for (name, port), title in zip(DEFAULT_PORTS.items(), ("HTTP", "gRPC", "Prometheus metrics"), strict=True):
        text = f"port for {title} (default: {port})"
        add(f"--{name}-port", type=number(int, 1, 65535), help=text, default=argparse.SUPPRESS)
    add(
        "--access-token",
        help="token for Triton's administrative endpoints (default: TRITON_ACCESS_TOKEN in the environment, or random)",
        default=argparse.SUPPRESS,
    )
    hangs = "does not respond for this many seconds"
    for name, lowest, default, text in (
        ("--drain-s", 0, 2, "seconds to let requests in flight finish when the server stops"),
        ("--start-timeout-s", 1, 600, "seconds to let the workers start, including the download of the weights"),
        ("--worker-timeout-s", 1, 300, f"exit with status 1 if requests wait and their worker {hangs}"),
        ("--triton-timeout-s", 1, 30, f"exit with status 1 if Triton or a frontend {hangs}"),
    ):
        add(name, type=number(float, lowest, 86_400), default=default, help=text)
    add("--verbose", action="store_true", help="log the details of PyTriton and Triton")


class LineFormatter(logging.Formatter):
    """Keeps a message on one line, and indents tracebacks, so that a client's text cannot look like another entry."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        """Return the line, with escape sequences for unprintable characters."""
        return printable(super().formatMessage(record))

    def formatException(self, error: tuple) -> str:  # noqa: N802
        """Return the traceback."""
        return "\n".join(f"    {printable(line)}" for line in super().formatException(error).splitlines())


def configure_logging(verbose: bool) -> None:
    """Log to stderr: the server, and PyTriton if ``verbose``."""
    handler = logging.StreamHandler()
    handler.setFormatter(LineFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("server").setLevel(logging.DEBUG if verbose else logging.INFO)
    if verbose:
        logging.getLogger("pytriton").setLevel(logging.DEBUG)
    else:
        # PyTriton logs a traceback for each rejected request. serving/instance.py logs one line.
        logging.getLogger("pytriton.proxy.inference").setLevel(logging.ERROR)
        logging.getLogger("pytriton.server").setLevel(logging.ERROR)
