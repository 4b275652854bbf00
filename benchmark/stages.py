# SPDX-License-Identifier: Apache-2.0
"""Times the stages of server.py without Triton."""

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from pytriton.proxy.types import Request

import server
from benchmark.photos import SIZES, photos
from serving.channel import Channel, open_channels
from serving.device import check_device
from serving.memory import AnswerMemory
from serving.worker import Runner

STAGES = ("preprocess", "network", "postprocess", "encode")  # as Segmentation calls them
RUNNERS = {"cuda": 2, "cpu": 1}  # side by side, to keep a GPU busy
LOOPS = {"cuda": 12, "cpu": 2}  # how often each batch is timed
_channels: list[Channel] = []  # their memory is pinned, and stays until the end of the process
PARALLEL_S = 2.0  # how long the threads run side by side


def measure_stages(device: str, batch_sizes: Sequence[int], progress: Callable[[str], None]) -> list[dict]:
    """Return a row for each batch size with both raw outputs, and one for the largest batch as JPEG files.

    A row has the milliseconds of each stage per batch, one after the other, and the photos per second of several
    threads side by side, from the host's memory to the host's memory.
    """
    device_type = device.split(":")[0]
    options = server.parse_options(["--weights", "demo", "--device", device])
    rows = []
    for size, outputs in [(size, ["original", "segmented"]) for size in batch_sizes] + [
        (max(batch_sizes), ["encoded"])
    ]:
        progress(f"stages: batch of {size}, {' and '.join(outputs)}")
        options.max_batch_size = size
        runners = [Runner(server.Segmentation, options, device) for _ in range(RUNNERS[device_type])]
        batches = [_make_batch(runner, size, outputs) for runner in runners]
        with ThreadPoolExecutor(len(runners)) as pool:
            photos_per_s = sum(pool.map(_throughput, runners, batches))
        milliseconds = _time_stages(runners[0], batches[0], LOOPS[device_type])
        rows.append({"batch_size": size, "outputs": outputs, **milliseconds, "photos_per_s": photos_per_s})
    return rows


def _make_batch(runner: Runner, size: int, outputs: list[str]) -> list[tuple[AnswerMemory, object]]:
    """Return jobs for photos of all sizes in turn, each with memory for its answer."""
    answer_bytes = server.answer_bytes(max(width * height for width, height in SIZES))
    channels = open_channels(size, 0, answer_bytes)
    _channels.extend(channels)
    batch = []
    for index, channel in enumerate(channels):
        photo = np.frombuffer(photos()[index % len(photos())], np.uint8)
        job = runner.stages.read(Request(data={"image": photo}, parameters={}, requested_output_names=outputs))
        batch.append((AnswerMemory(channel.answer_memory, runner.device), job))
    return batch


def _throughput(runner: Runner, batch: list) -> float:
    """Return the photos per second of one thread that gets the same batch again and again."""
    runner(batch)
    began, count = time.perf_counter(), 0
    while time.perf_counter() < began + PARALLEL_S:
        runner(batch)
        count += len(batch)
    return count / (time.perf_counter() - began)


def _time_stages(runner: Runner, batch: list, loops: int) -> dict[str, float]:
    """Return the median milliseconds of each stage, and of the rest: the copy to the host. Changes the runner."""
    times = defaultdict(list)

    def timed(name: str, call: Callable) -> Callable:
        def wrapper(*arguments: object) -> object:
            check_device(runner.device)  # waits for the GPU
            began = time.perf_counter()
            result = call(*arguments)
            check_device(runner.device)
            times[f"{name}_ms"].append(1000 * (time.perf_counter() - began))
            return result

        return wrapper

    for name in STAGES:
        setattr(runner.stages, name, timed(name, getattr(runner.stages, name)))
    for _ in range(loops):
        timed("total", runner)(batch)
    medians = {name: statistics.median(values) for name, values in times.items()}
    total = medians.pop("total_ms")
    return medians | {"to_host_ms": max(0.0, total - sum(medians.values()))}
