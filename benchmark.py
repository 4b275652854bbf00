# SPDX-License-Identifier: Apache-2.0
"""Measure the server against the plain way and against what PyTriton itself can carry, in one run.

    python benchmark.py [--output benchmark.json] [--plot benchmark.png]

Three servers run side by side and are asked in turn, round after round, so that a machine that others use slows all of
them alike:

plain    one instance, fp32, eager, one photo at a time: the three stages as one would write them down first
ceiling  the same contract and instances as the server, but ready-made images in place of any work
server   `python server.py` as it is

The load comes from processes of their own, one for each photo in flight, over gRPC, with photos of four sizes.
"""

import argparse
import contextlib
import io
import json
import os
import platform
import random
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import cache, partial
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import psutil
import tritonclient.grpc
from PIL import Image

from request import PhotoRequest
from worker import INSTANCES, THREADS, Ready, pick_device

ROOT = Path(__file__).parent
SIZES = ((1281, 851), (640, 426), (1024, 683), (500, 375))
SERVERS = ("plain", "ceiling", "server")
BOTH = ("original", "segmented")
DEFAULTS = {
    "cuda": {"concurrency": (1, 16, 32), "batch_sizes": (1, 2, 4, 8, 16)},
    "cpu": {"concurrency": (1, 4, 8), "batch_sizes": (1, 2, 4)},
}


@cache
def photos() -> list[bytes]:
    """Return the sample photo in the four sizes, as JPEGs of quality 90 with 4:2:0 colours, as cameras write them."""
    sample = Image.open(ROOT / "images" / "orig.jpg")
    encoded = []
    for size in SIZES:
        stream = io.BytesIO()
        sample.resize(size).save(stream, "JPEG", quality=90, subsampling="4:2:0")
        encoded.append(stream.getvalue())
    return encoded


@contextlib.contextmanager
def plain(options: argparse.Namespace, _shutdown: object) -> Iterator[tuple[list[Callable], Ready]]:
    """Yield one callable that does it all in the simplest way."""
    import torch

    from model_inference import CLASS_NAMES, build_module, load_weights
    from pipelines import Postprocess, Preprocess

    device = pick_device(options.device)
    preprocess, postprocess = Preprocess(device, 224), Postprocess(device)
    network = build_module(load_weights("demo").state_dict).to(device)

    @torch.inference_mode()
    def segment(requests):
        originals, images = preprocess([requests[0].data["image"][0]])
        probabilities = network(images)["out"].softmax(dim=1)
        segmented = postprocess(originals, probabilities[:, CLASS_NAMES.index("person")], [0.6])
        outputs = {"original": originals, "segmented": segmented}
        return [{name: np.asarray(batch.as_cpu()[0])[None] for name, batch in outputs.items()}]

    segment([argparse.Namespace(data={"image": np.frombuffer(photos()[0], np.uint8)[None]})])
    yield [segment], Ready(device.type, 1)


@contextlib.contextmanager
def ceiling(options: argparse.Namespace, _shutdown: object) -> Iterator[tuple[list[Callable], Ready]]:
    """Yield as many callables as the server has, which only tell the photos apart, by their lengths."""
    device = pick_device(options.device)
    instances = INSTANCES[device.type]
    images = {
        len(encoded): np.zeros((1, height, width, 3), np.uint8)
        for encoded, (width, height) in zip(photos(), SIZES, strict=True)
    }

    def answer(requests):
        image = images[requests[0].data["image"].size]
        return [dict.fromkeys(requests[0].requested_output_names, image)]

    yield [lambda requests: answer(requests) for _ in range(instances)], Ready(device.type, instances)


def free_ports(count: int = 3) -> list[int]:
    """Return ports of loopback that are free."""
    # Below those that the system hands out to connections: what is free now is free when the server gets to it.
    ports: set[int] = set()
    while len(ports) < count:
        port = random.randrange(20_000, 32_000)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            ports.add(port)
    return list(ports)


@contextlib.contextmanager
def running(name: str, device: str) -> Iterator[str]:
    """Start one of the three servers on free ports and yield its gRPC address."""
    http_port, grpc_port, metrics_port = map(str, free_ports())
    address = f"127.0.0.1:{grpc_port}"
    script = [str(ROOT / "server.py")] if name == "server" else [str(ROOT / "benchmark.py"), "--serve", name]
    ports = ["--http-port", http_port, "--grpc-port", grpc_port, "--metrics-port", metrics_port]
    command = [sys.executable, *script, "--weights", "demo", "--device", device, *ports]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        with tritonclient.grpc.InferenceServerClient(address) as client:
            deadline = time.monotonic() + 120
            while True:
                with contextlib.suppress(tritonclient.grpc.InferenceServerException):
                    if client.is_model_ready("ResNet101"):
                        break
                if process.poll() is not None or time.monotonic() > deadline:
                    sys.exit(f"benchmark.py: the server called {name} did not start; its lines above say why")
                time.sleep(0.2)
        yield address
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)


@cache
def connection(address: str) -> tritonclient.grpc.InferenceServerClient:
    return tritonclient.grpc.InferenceServerClient(address)


def send(address: str, first: int, outputs: Sequence[str], begin: float, seconds: float) -> list[tuple[float, int]]:
    """Send one photo after the other; return the seconds and the bytes of each, and -1 bytes where it failed."""
    client, results = connection(address), []
    wanted = [tritonclient.grpc.InferRequestedOutput(name) for name in outputs]
    time.sleep(max(0.0, begin - time.time()))
    while time.time() < begin + seconds:
        encoded = photos()[(first + len(results)) % len(SIZES)]
        photo = np.frombuffer(encoded, np.uint8)[None]
        began = time.perf_counter()
        image = tritonclient.grpc.InferInput("image", photo.shape, "UINT8")
        image.set_data_from_numpy(photo)
        try:
            result = client.infer("ResNet101", [image], outputs=wanted)
            size = len(encoded) + sum(result.as_numpy(name).nbytes for name in outputs)
        except tritonclient.grpc.InferenceServerException:
            size = -1
        results.append((time.perf_counter() - began, size))
    return results


def measure(
    pool: ProcessPoolExecutor, address: str, concurrency: int, outputs: Sequence[str], seconds: float
) -> tuple[list, float]:
    """Keep ``concurrency`` photos in flight for some seconds.

    Returns what :func:`send` returns, of all processes together, and how long it took to the last answer.
    """
    begin = time.time() + 0.3
    tasks = [pool.submit(send, address, index, outputs, begin, seconds) for index in range(concurrency)]
    results = [result for task in tasks for result in task.result()]
    return results, time.time() - begin


def summarise(rounds: list[tuple[list, float]]) -> dict:
    """Return what is in a row of the table."""
    results = [result for results, _ in rounds for result in results]
    seconds = sum(seconds for _, seconds in rounds)
    good = [(latency, size) for latency, size in results if size >= 0]
    latencies = sorted(1000 * latency for latency, _ in good) or [float("nan")]
    at = {
        f"p{percent}_ms": latencies[min(len(latencies) - 1, len(latencies) * percent // 100)]
        for percent in (50, 90, 99)
    }
    return {
        "photos_per_s": len(good) / seconds,
        "mb_per_s": sum(size for _, size in good) / seconds / 1e6,
        **at,
        "errors": len(results) - len(good),
    }


def measure_stages(device, batch_sizes: Sequence[int]) -> list[dict]:
    """Return for each batch size the milliseconds of each stage a batch, and the photos/s of the server's threads."""
    import torch

    from model_inference import CLASS_NAMES, GraphedNetwork, SegmentationNetwork, load_weights, pick_precision
    from pipelines import Postprocess, Preprocess
    from segmentation import HostMemory, Segmenter

    shared = SegmentationNetwork(load_weights("demo").state_dict, device, pick_precision("auto", device))
    person = CLASS_NAMES.index("person")

    def milliseconds(step: Callable, *arguments: object) -> tuple[float, object]:
        times = []
        for _ in range(12 if device.type == "cuda" else 4):
            shared.check_device()  # waits for the GPU
            began = time.perf_counter()
            result = step(*arguments)
            shared.check_device()
            times.append(1000 * (time.perf_counter() - began))
        return statistics.median(times), result

    memories = [
        [HostMemory(np.empty(6 * 1281 * 851, np.uint8), pin=device.type == "cuda") for _ in range(max(batch_sizes))]
        for _ in range(THREADS[device.type])
    ]

    def to_host(originals: Sequence, segmented: Sequence) -> None:
        for memory, *images in zip(memories[0], originals, segmented, strict=False):
            memory.store({name: torch.from_dlpack(image) for name, image in zip(BOTH, images, strict=True)})

    rows = []
    for size in batch_sizes:
        encoded = [np.frombuffer(photos()[index % len(SIZES)], np.uint8) for index in range(size)]
        threads = min(size, psutil.cpu_count())
        with torch.cuda.stream(torch.cuda.Stream(device) if device.type == "cuda" else None):
            network = GraphedNetwork(shared, 224, size) if device.type == "cuda" else shared
        row: dict = {"batch_size": size}
        row["preprocess_ms"], (originals, images) = milliseconds(Preprocess(device, 224, size, threads), encoded)
        row["network_ms"], probabilities = milliseconds(network, images)
        wanted = probabilities[:, person].contiguous()
        postprocess = Postprocess(device, size, threads)
        row["postprocess_ms"], segmented = milliseconds(postprocess, originals, wanted, [0.6] * size)
        row["to_host_ms"], _ = milliseconds(to_host, originals, segmented)
        workers = [Segmenter(shared, 224, size) for _ in range(THREADS[device.type])]
        batches = [
            [PhotoRequest(photo, person, 0.6, BOTH, memory) for photo, memory in zip(encoded, own, strict=False)]
            for own in memories
        ]
        with ThreadPoolExecutor(len(workers)) as pool:
            row["photos_per_s"] = sum(pool.map(partial(segment_for, 2.0), batches, workers))
        rows.append(row)
    return rows


def segment_for(seconds: float, batch: list[PhotoRequest], segmenter: Callable) -> float:
    """Return the photos a second of one worker that has the same batch again and again."""
    segmenter(batch)
    began, count = time.perf_counter(), 0
    while time.perf_counter() < began + seconds:
        segmenter(batch)
        count += len(batch)
    return count / (time.perf_counter() - began)


def describe(device) -> dict:
    """Return what the figures depend on."""
    import torch

    machine = {
        "device": platform.processor() or platform.machine(),
        "cores": psutil.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9),
        "python": platform.python_version(),
        "photos": ", ".join(f"{width} x {height}" for width, height in SIZES),
    }
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        machine["device"] = next(line.split(": ", 1)[1] for line in lines if line.startswith("model name"))
    if device.type == "cuda":
        machine["device"] = torch.cuda.get_device_name(device)
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        machine["driver"] = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split("\n")[0]
    packages = ("torch", "torchvision", "nvidia-dali-cuda120", "nvidia-pytriton", "tritonclient", "numpy")
    return machine | {"packages": ", ".join(f"{name} {version(name)}" for name in packages)}


def table(rows: Sequence[dict]) -> str:
    """Return the rows as a Markdown table."""
    cells = [[f"{value:,.1f}" if isinstance(value, float) else str(value) for value in row.values()] for row in rows]
    lines = [list(rows[0]), ["---:" if not isinstance(value, str) else "---" for value in rows[0].values()], *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def plot(rows: Sequence[dict], path: Path, title: str) -> None:
    """Draw throughput and latency over concurrency."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    figure.suptitle(title)
    for axis, key, label in ((axes[0], "photos_per_s", "photos/s"), (axes[1], "p50_ms", "median latency, ms")):
        for name in dict.fromkeys(row["server"] for row in rows):
            points = [(row["concurrency"], row[key]) for row in rows if row["server"] == name]
            axis.plot(*zip(*points, strict=True), marker="o", label=name)
        axis.set(xlabel="photos in flight", ylabel=label, ylim=(0, None))
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=120)


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--device", default="auto", help="cpu, cuda, cuda:N or auto: a GPU if there is one (default: auto)")
    add("--concurrency", type=int, nargs="+", help="photos in flight (default: 1 16 32 on a GPU, 1 4 8 without)")
    add("--rounds", type=int, default=3, help="how often each server is asked (default: 3)")
    add("--seconds", type=float, default=3, help="how long each time (default: 3)")
    add(
        "--output", type=Path, default=Path("benchmark.json"), help="the figures for programs (default: benchmark.json)"
    )
    add("--plot", type=Path, help="draw throughput and latency into this file; needs matplotlib")
    return parser.parse_args()


def main() -> None:
    """Start the servers, ask them in turn, print the tables and write the files."""
    from server import HEAP

    options = parse_options()
    device = pick_device(options.device)
    concurrencies = options.concurrency or DEFAULTS[device.type]["concurrency"]
    tasks = [(name, BOTH, concurrency) for concurrency in concurrencies for name in SERVERS]
    tasks += [("server", ("segmented",), concurrency) for concurrency in concurrencies]
    results: dict[tuple, list] = {task: [] for task in tasks}
    with contextlib.ExitStack() as stack:
        addresses = {name: stack.enter_context(running(name, str(device))) for name in SERVERS}
        os.environ.update(HEAP)  # the load is to cost little; Triton's processes have it, too
        pool = stack.enter_context(ProcessPoolExecutor(max(concurrencies), mp_context=get_context("spawn")))
        for name in SERVERS:  # starts the processes, and lets each server see each size
            measure(pool, addresses[name], max(concurrencies), BOTH, 2)
        for number in range(options.rounds):
            print(f"round {number + 1} of {options.rounds}", file=sys.stderr)
            for name, outputs, concurrency in tasks:
                task = measure(pool, addresses[name], concurrency, outputs, options.seconds)
                results[name, outputs, concurrency].append(task)
    rows = [
        {"server": name if outputs == BOTH else f"{name}, segmented only", "concurrency": concurrency}
        | summarise(results[name, outputs, concurrency])
        for name, outputs, concurrency in tasks
    ]
    report = {"machine": describe(device), "servers": rows}
    print(
        "\n".join(f"{name}: {value}" for name, value in report["machine"].items()), table(rows), sep="\n\n", flush=True
    )
    options.output.write_text(json.dumps(report, indent=2) + "\n")
    if options.plot:
        plot(rows, options.plot, report["machine"]["device"])
    report["stages"] = measure_stages(device, DEFAULTS[device.type]["batch_sizes"])
    print(f"\n{table(report['stages'])}")
    options.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        import server

        build = {"plain": plain, "ceiling": ceiling}[sys.argv[2]]
        server.run(server.parse_options(sys.argv[3:]), build)
    else:
        main()
