# SPDX-License-Identifier: Apache-2.0
"""Measures the cost of the proxy: sends the same photos directly and through it to a server with ready-made images.

    python -m benchmark.door [--device cpu] [--concurrency 4] [--rounds 3] [--seconds 5]

Needs nginx and njs, as deploy/nginx.conf does. Direct and proxied measurements alternate.
"""

import contextlib
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

from benchmark.__main__ import running_servers
from benchmark.cases import JPEG, Case
from benchmark.load import measure, start_processes
from benchmark.photos import ROOT
from serving.options import make_parser, number
from tools.launch import LaunchedServer, free_ports

RAW_OUTPUTS = ("original", "segmented")
CASES = [
    Case(f"{kind} over {protocol}", "ceiling", protocol, outputs, parameters)
    for kind, outputs, parameters in (("raw", RAW_OUTPUTS, {}), ("JPEG", ("encoded",), JPEG))
    for protocol in ("http", "grpc")
]


@contextlib.contextmanager
def running_proxy(server: LaunchedServer) -> Iterator[SimpleNamespace]:
    """Start the proxy in front of a server, open to everybody, and yield its addresses."""
    http_port, grpc_port, _ = free_ports()
    # nginx's processes give up root's rights, and need a folder that they can reach.
    with tempfile.TemporaryDirectory(prefix="nginx-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        for file in ("nginx.conf", "infer.js", "api_keys.conf", "servers.conf"):
            text = (ROOT / "deploy" / file).read_text()
            text = text.replace("listen 8080", f"listen 127.0.0.1:{http_port}")
            text = text.replace("listen 8081", f"listen 127.0.0.1:{grpc_port}")
            text = text.replace("127.0.0.1:8000", f"127.0.0.1:{server.http_port}")
            text = text.replace("127.0.0.1:8001", f"127.0.0.1:{server.grpc_port}")
            (folder / file).write_text(text + ("default anyone;\n" if file == "api_keys.conf" else ""))
        command = ["nginx", "-p", name, "-c", f"{name}/nginx.conf"]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as nginx:
            try:
                urls = {"http_url": f"http://127.0.0.1:{http_port}", "grpc_url": f"grpc://127.0.0.1:{grpc_port}"}
                yield SimpleNamespace(process=server.process, **urls)
            finally:
                nginx.terminate()


def main() -> None:
    """Measure, and print a line for each case."""
    parser = make_parser(__doc__.splitlines()[0])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--concurrency", type=number(int, 1), default=4)
    parser.add_argument("--rounds", type=number(int, 1), default=3)
    parser.add_argument("--seconds", type=number(float, 0.1), default=5)
    options = parser.parse_args()
    with (
        running_servers(["ceiling"], options.device, "") as servers,
        running_proxy(servers["ceiling"]) as proxy,
        start_processes(options.concurrency) as pool,
    ):
        targets = {"direct": servers["ceiling"], "proxy": proxy}
        print("| | direct: photos/s | p50 | proxy: photos/s | p50 |\n| --- | ---: | ---: | ---: | ---: |")
        for case in CASES:
            rates, times = {name: [] for name in targets}, {name: [] for name in targets}
            for round_index in range(options.rounds + 1):
                for name, target in targets.items():
                    measurement = measure(pool, target, case, options.concurrency, options.seconds)
                    if errors := {response.error for response in measurement.responses} - {""}:
                        sys.exit(f"benchmark: {case.name}, {name}: {errors.pop()}")
                    if round_index:  # the first one warms up
                        rates[name].append(len(measurement.responses) / measurement.seconds)
                        times[name] += [response.seconds for response in measurement.responses]
            cells = [
                f"{statistics.mean(rates[name]):.0f} | {statistics.median(times[name]) * 1000:.1f} ms"
                for name in targets
            ]
            print(f"| {case.name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
