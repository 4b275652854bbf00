# SPDX-License-Identifier: Apache-2.0
"""Benchmark the server, a plain one and PyTriton itself in one run. docs/performance.md explains the report.

    python -m benchmark [--rows plain server] [--output benchmark.json] [--plot benchmark.png]

The servers run at the same time and are measured in rotation, so that other load on the machine affects all of them
equally.
"""

import argparse
import contextlib
import functools
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

from benchmark.cases import CASES, STAGES_ROW, Case
from benchmark.photos import ROOT
from tools.launch import DIE_WITH_PARENT, LaunchedServer, exit_on_signals, free_ports

# By the type of the device. On a CPU, the requests in flight at the end of a measurement take seconds to finish.
DEFAULTS = {
    "cuda": {"concurrency": (1, 16, 32), "rounds": 2, "seconds": 1.5, "batch_sizes": (1, 2, 4, 8, 16)},
    "cpu": {"concurrency": (1, 8), "rounds": 1, "seconds": 3, "batch_sizes": (1, 2, 4)},
}
NAMES = [*(case.name for case in CASES), STAGES_ROW]
DEFAULT_ROWS = [name for name in NAMES if not name.startswith("proxy")]
WARM_UP_S = 0.5

progress = functools.partial(print, file=sys.stderr, flush=True)


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line. An error ends the process with one line and status 2."""
    from serving.options import device_names, make_parser, number

    parser = make_parser("Benchmark the server, a plain one and PyTriton itself in one run.")
    parser.prog = "benchmark"
    add = functools.partial(parser.add_argument, default=argparse.SUPPRESS)
    add(
        "--device",
        type=device_names,
        default="auto",
        help="as for server.py; the stages are measured on the first of several devices",
    )
    rows = "default: all but those of the proxy, which need nginx"
    add("--rows", nargs="+", metavar="NAME", choices=NAMES, help=f"rows to measure: {', '.join(NAMES)} ({rows})")
    add(
        "--concurrency",
        type=number(int, 1),
        nargs="+",
        metavar="N",
        help="photos in flight (default: 1 16 32, or 1 8 on a CPU)",
    )
    add("--rounds", type=number(int, 1), help="measurements per row (default: 2, or 1 on a CPU)")
    add("--seconds", type=number(float, 0.1), help="seconds of each (default: 1.5, or 3 on a CPU)")
    add("--server", default="server.py --weights demo", help="command of the server, with its options")
    add("--output", type=output_file, default="benchmark.json", help="file for the figures")
    add("--plot", type=picture_file, help="draw the figures into this file; needs matplotlib")
    return parser.parse_args(arguments)


def output_file(text: str) -> Path:
    """Return the path of a file that can be written, as an argparse type: the measurement takes minutes."""
    path = Path(text)
    try:
        # Do not create it yet: an interrupted measurement would leave an empty file.
        with path.open("a") if path.exists() else tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot write {text} ({error.strerror})") from None
    return path


def picture_file(text: str) -> Path:
    """Return the path of a file that matplotlib can write, as an argparse type."""
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError:
        raise argparse.ArgumentTypeError("needs matplotlib: install requirements-dev.txt") from None
    extensions = [f".{extension}" for extension in FigureCanvasBase.get_supported_filetypes()]
    if Path(text).suffix not in extensions:
        raise argparse.ArgumentTypeError(f"must end with one of {', '.join(extensions)}, not {text}")
    return output_file(text)


def measure_all(options: argparse.Namespace) -> dict:
    """Measure the servers, and then the stages. Return the report."""
    from benchmark.report import describe
    from serving.device import list_devices, resolve_device
    from serving.errors import UsageError

    try:
        devices = list_devices(options.device, timeout_s=60)
        device = resolve_device(devices[0])
    except UsageError as error:
        sys.exit(f"benchmark: {error}")
    options = argparse.Namespace(**{"rows": DEFAULT_ROWS} | DEFAULTS[device.split(":")[0]] | vars(options))
    report = {"machine": describe(device), "rows": [], "stages": []}
    if cases := [case for case in CASES if case.name in options.rows]:
        report["rows"] = measure_servers(cases, device if len(devices) == 1 else ",".join(devices), options)
    if STAGES_ROW in options.rows:
        from benchmark.stages import measure_stages

        report["stages"] = measure_stages(device, options.batch_sizes, progress)
    return report


def measure_servers(cases: Sequence[Case], device: str, options: argparse.Namespace) -> list[dict]:
    """Measure the servers in rotation. Return a row for each case and number of photos in flight."""
    from benchmark.load import measure, running_processes
    from benchmark.report import make_row

    max_in_flight = max(options.concurrency)
    tasks = [(case, in_flight) for in_flight in options.concurrency for case in cases]
    measurements: list[list] = [[] for _ in tasks]
    names = dict.fromkeys(case.server for case in cases)
    with running_servers(names, device, options.server) as servers, running_processes(max_in_flight) as pool:
        for case in cases:
            progress(f"warming up: {case.name}")
            responses = measure(pool, servers[case.server], case, max_in_flight, WARM_UP_S).responses
            if errors := {response.error for response in responses} - {""}:
                progress(f"{case.name}: {errors.pop()}")
        for round_index in range(options.rounds):
            for (case, in_flight), rounds in zip(tasks, measurements, strict=True):
                progress(f"round {round_index + 1} of {options.rounds}: {case.name}, {in_flight} in flight")
                rounds.append(measure(pool, servers[case.server], case, in_flight, options.seconds))
    return [make_row(case, in_flight, rounds) for (case, in_flight), rounds in zip(tasks, measurements, strict=True)]


@contextlib.contextmanager
def running_servers(names: Iterable[str], device: str, server_command: str) -> Iterator[dict]:
    """Start the servers in parallel. Yield them by name when all are ready: LaunchedServers, and a similar proxy."""
    from server import MODEL_NAME
    from serving.triton import MALLOC_ENVIRONMENT

    commands = {"plain": ["-m", "benchmark.plain"], "ceiling": ["-m", "benchmark.ceiling"]}
    commands["server"] = shlex.split(server_command)
    servers = {}
    with contextlib.ExitStack() as stack:
        # The proxy forwards requests to the ceiling.
        for name in dict.fromkeys("ceiling" if name == "proxy" else name for name in names):
            command = [*commands[name], "--device", device]
            # In its own process group: Ctrl-C in a terminal would end PyTriton's processes in any order.
            options = {"prefix": DIE_WITH_PARENT, "process_group": 0, "cwd": ROOT, "stdout": sys.stderr}
            servers[name] = stack.enter_context(LaunchedServer(command, **options))
        # A server takes seconds to stop, so signal all of them before waiting for any.
        stack.callback(lambda: [server.process.terminate() for server in servers.values()])
        for name, server in servers.items():
            progress(f"starting: {name}")
            try:
                server.wait_until_ready(MODEL_NAME)
            except (RuntimeError, TimeoutError) as error:
                sys.exit(f"benchmark: {name}: {error}")
        if "proxy" in names:
            servers["proxy"] = stack.enter_context(running_proxy(servers["ceiling"]))
        os.environ.update(MALLOC_ENVIRONMENT)  # as for Triton's processes, to reduce the CPU time of the load
        yield servers


@contextlib.contextmanager
def running_proxy(server: LaunchedServer) -> Iterator[SimpleNamespace]:
    """Start the proxy in front of a server, without keys. Yield the server with the addresses of the proxy."""
    from tools.page import NGINX, configure, running_nginx

    if not NGINX:
        sys.exit("benchmark: the rows of the proxy need nginx: apt install nginx libnginx-mod-http-js")
    http_port, grpc_port = free_ports(2)
    with (
        tempfile.TemporaryDirectory(prefix="nginx-") as folder,
        running_nginx(configure(Path(folder), http_port, grpc_port, server), stdout=subprocess.DEVNULL),
    ):
        urls = {"http_url": f"http://127.0.0.1:{http_port}", "grpc_url": f"grpc://127.0.0.1:{grpc_port}"}
        yield SimpleNamespace(process=server.process, **urls)


def main() -> None:
    """Measure, print the tables, write the figures and draw the plot."""
    options = parse_options()
    from benchmark.report import plot, tables

    exit_on_signals()
    report = measure_all(options)
    print(tables(report), flush=True)  # first, in case the disk is full
    try:
        options.output.write_text(json.dumps(report, indent=2) + "\n")
    except OSError as error:
        sys.exit(f"benchmark: cannot write {options.output} ({error.strerror})")
    if "plot" in options:
        plot(report, options.plot)


if __name__ == "__main__":
    main()
