# SPDX-License-Identifier: Apache-2.0
"""The processes of a server, and the CPU time that they have used."""

import contextlib
from collections import Counter

import psutil


def cpu_seconds(pid: int) -> Counter[str]:
    """Return the CPU seconds that each kind of process of a server has used since its start.

    ``pid`` is the process that was started, the main one. The others are its descendants: the workers and frontends,
    tritonserver, its stubs, and the helpers of PyTriton and of Python's multiprocessing.
    """
    main = psutil.Process(pid)
    seconds: Counter[str] = Counter()
    for process in [main, *main.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended
            times = process.cpu_times()
            seconds[kind(process, main)] += times.user + times.system
    return seconds


def kind(process: psutil.Process, main: psutil.Process) -> str:
    """Return ``main``, ``worker``, ``frontend``, ``tritonserver``, ``stubs`` or ``helpers``."""
    if process == main:
        return "main"
    name = process.name()
    if name in ("worker", "frontend", "tritonserver"):
        return name
    return "stubs" if name.startswith("triton_python") else "helpers"
