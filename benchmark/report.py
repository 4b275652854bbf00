# SPDX-License-Identifier: Apache-2.0
"""Turns measurements into rows, tables and a plot."""

import contextlib
import functools
import platform
import subprocess
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

from benchmark.cases import Case
from benchmark.load import Measurement
from benchmark.photos import SIZES

PACKAGES = ("torch", "torchvision", "nvidia-dali-cuda120", "nvidia-pytriton", "tritonclient", "numpy")
COLUMNS = ("name", "protocol", "outputs", "in_flight", "photos_per_s", "mb_per_s", "p50_ms", "p90_ms", "p99_ms")
COLUMNS += ("errors", "server_cpu_ms", "response_bytes")


def make_row(case: Case, in_flight: int, rounds: Sequence[Measurement]) -> dict:
    """Return a row of the report. Bytes and CPU milliseconds are per photo; MB/s counts both directions."""
    responses = [response for measurement in rounds for response in measurement.responses]
    good = [response for response in responses if not response.error]
    count = max(1, len(good))
    seconds = sum(measurement.seconds for measurement in rounds)
    cpu = sum((measurement.cpu_seconds for measurement in rounds), Counter())
    received = sum(response.received_bytes for response in good)
    latencies = sorted(1000 * response.seconds for response in good) or [None]
    percentiles = {f"p{percent}_ms": latencies[len(latencies) * percent // 100] for percent in (50, 90, 99)}
    return {
        **vars(case),
        "in_flight": in_flight,
        "photos": len(good),
        "errors": len(responses) - len(good),
        "photos_per_s": len(good) / seconds,
        "mb_per_s": (received + sum(response.sent_bytes for response in good)) / seconds / 1e6,
        **percentiles,
        "response_bytes": received / count,
        "server_cpu_ms": 1000 * cpu.total() / count,
        "server_cpu_ms_by_process": {kind: 1000 * used / count for kind, used in cpu.items()},
    }


def describe(device: str) -> dict[str, object]:
    """Return the hardware and the versions of packages, on which the figures depend."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.split(": ", 1)[1] for line in lines if line.startswith("model name")]
    machine: dict[str, object] = {"device": next(iter(models), platform.machine()), "cores": psutil.cpu_count()}
    if device != "cpu":
        import torch

        machine["device"] = torch.cuda.get_device_name(device)
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            machine["driver"] = subprocess.check_output(query, text=True).splitlines()[0]
    machine["python"] = platform.python_version()
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            machine[package] = version(package)
    return machine | {"photos": ", ".join(f"{width} x {height}" for width, height in SIZES)}


def tables(report: Mapping) -> str:
    """Return the report as Markdown."""
    parts = [" · ".join(f"{name} {value}" for name, value in report["machine"].items())]
    if rows := report["rows"]:
        by_process = [_pick(row, ("name", "in_flight")) | row["server_cpu_ms_by_process"] for row in rows]
        parts.append(_table([_pick(row, COLUMNS) for row in rows]))
        parts += ["CPU milliseconds per photo, by the server's processes:", _table(by_process)]
    if report["stages"]:
        parts += ["The stages without Triton, milliseconds per batch:", _table(report["stages"])]
    return "\n\n".join(parts)


def _pick(row: Mapping, keys: Sequence[str]) -> dict:
    return {key: row[key] for key in keys}


def _table(rows: Sequence[Mapping]) -> str:
    # Rows may lack columns: not every server has a worker.
    titles = list(dict.fromkeys(title for row in rows for title in row))
    samples = {title: value for row in rows for title, value in row.items()}
    names = {"_per_": "/", "_": " ", "mb": "MB", "cpu": "CPU"}
    lines = [[functools.reduce(lambda text, pair: text.replace(*pair), names.items(), title) for title in titles]]
    lines.append(["---:" if isinstance(samples[title], int | float) else "---" for title in titles])
    lines += [[_cell(row.get(title)) for title in titles] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: object) -> str:
    """Format a cell: a number with at least three digits, or names separated by commas."""
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
    return ", ".join(value) if isinstance(value, list | tuple) else "" if value is None else str(value)


def plot(report: Mapping, path: Path) -> None:
    """Draw throughput with the most photos in flight, and latency with the fewest. Needs matplotlib."""
    from matplotlib import pyplot

    rows = [row for row in report["rows"] if row["photos"]]
    counts = [row["in_flight"] for row in rows]
    names = list(dict.fromkeys(row["name"] for row in rows))
    panels = (("photos_per_s", max(counts), "photos/s"), ("p50_ms", min(counts), "median latency in ms"))
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 1.2 + 0.35 * len(names)), layout="constrained", sharey=True)
    figure.suptitle(report["machine"]["device"])
    for axis, (key, in_flight, title) in zip(axes, panels, strict=True):
        values = {row["name"]: row[key] for row in rows if row["in_flight"] == in_flight}
        bars = axis.barh(names, [values.get(name, 0) for name in names])
        axis.bar_label(bars, [_cell(float(values[name])) if name in values else "" for name in names], padding=4)
        axis.set_title(f"{title}, {in_flight} in flight", fontsize="medium")
        axis.margins(x=0.15)  # for the labels
        axis.xaxis.set_visible(False)
        axis.spines[["top", "right", "bottom"]].set_visible(False)
        axis.tick_params(left=False)
    axes[0].invert_yaxis()  # the first row on top
    figure.savefig(path, dpi=120)
