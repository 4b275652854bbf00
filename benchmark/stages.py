# SPDX-License-Identifier: Apache-2.0
"""Times the stages of server.py without Triton."""

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle

import numpy as np
from pytriton.proxy.types import Request

import server
from benchmark.photos import SIZES, photos
from serving.channel import Channel, open_channels
from serving.device import check_device
from serving.executor import Executor, Job, open_memories
from serving.options import device_default

TIMED = ("preprocess", "network", "postprocess", "encode")  # attributes of Segmentation
LOOPS = {"cuda": 12, "cpu": 2}  # repetitions of each batch
_channels: list[Sequence[Channel]] = []  # kept until the process ends, because their memory is pinned
PARALLEL_S = 2.0  # duration of the parallel measurement


def measure_stages(device: str, batch_sizes: Sequence[int], progress: Callable[[str], None]) -> list[dict]:
    """Return a row for each batch size with both raw outputs, and one for the largest batch as JPEG files.

    A row has the milliseconds of each stage per batch in one thread, and the photos per second of several threads in
    parallel, from host memory to host memory.
    """
    device_type = device.split(":")[0]
    options = server.parse_options(["--weights", "demo", "--device", device])
    options.max_pixels = max(width * height for width, height in SIZES)
    limits = server.Segmentation.limits(options)
    count = device_default(options, "executors", device_type)
    tasks = [*((size, ["original", "segmented"]) for size in batch_sizes), (max(batch_sizes), ["encoded"])]
    rows = []
    for size, outputs in tasks:
        progress(f"stages: batch of {size}, {' and '.join(outputs)}")
        options.max_batch_size = size
        channels = [open_channels(size, *limits) for _ in range(count)]
        _channels.extend(channels)
        memories = [open_memories(group, limits[1], device) for group in channels]
        executors = [Executor(server.Segmentation, options, device, memory) for memory in memories]
        batches = [_make_batch(executor, group, outputs) for executor, group in zip(executors, channels, strict=True)]
        with ThreadPoolExecutor(len(executors)) as pool:
            photos_per_s = sum(pool.map(_throughput, executors, batches))
        milliseconds = _time_stages(executors[0], batches[0], LOOPS[device_type])
        rows.append({"batch_size": size, "outputs": outputs, **milliseconds, "photos_per_s": photos_per_s})
    return rows


def _make_batch(executor: Executor, channels: Sequence[Channel], outputs: list[str]) -> list[Job]:
    """Return a job for each channel. The sizes of the photos alternate."""
    requests = [
        Request({"image": np.frombuffer(photo, np.uint8)}, {}, requested_output_names=outputs) for photo in photos()
    ]
    return [executor.read(channel, request) for channel, request in zip(channels, cycle(requests), strict=False)]


def _throughput(executor: Executor, batch: list[Job]) -> float:
    """Return the photos per second of one thread that computes the same batch repeatedly."""
    executor.compute(batch)
    began, count = time.perf_counter(), 0
    while time.perf_counter() < began + PARALLEL_S:
        executor.compute(batch)
        count += len(batch)
    return count / (time.perf_counter() - began)


def _time_stages(executor: Executor, batch: list[Job], loops: int) -> dict[str, float]:
    """Return the median milliseconds of each stage, and of the copy to the host. Wraps the executor's stages."""
    times = defaultdict(list)

    def timed(name: str, call: Callable) -> Callable:
        def wrapper(*arguments: object) -> object:
            check_device(executor.device)  # waits for the GPU
            began = time.perf_counter()
            result = call(*arguments)
            check_device(executor.device)
            times[f"{name}_ms"].append(1000 * (time.perf_counter() - began))
            return result

        return wrapper

    for name in TIMED:
        setattr(executor.stages, name, timed(name, getattr(executor.stages, name)))
    for _ in range(loops):
        timed("total", executor.compute)(batch)
    medians = {name: statistics.median(values) for name, values in times.items()}
    total = medians.pop("total_ms")
    return medians | {"to_host_ms": max(0.0, total - sum(medians.values()))}
