# SPDX-License-Identifier: Apache-2.0
"""How much CPU time a server has used, over all of its processes."""

import contextlib
from collections import Counter

import psutil


def cpu_seconds(pid: int) -> Counter[str]:
    """Return the CPU seconds that each kind of process of a server has used since its start.

    ``pid`` is the process that was started, the main one. The others are its descendants: the workers, tritonserver,
    its stubs, and the helpers of PyTriton and of Python's multiprocessing.
    """
    main = psutil.Process(pid)
    command = main.cmdline()
    seconds: Counter[str] = Counter()
    for process in [main, *main.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended
            times = process.cpu_times()
            seconds[_kind(process, pid, command)] += times.user + times.system
    return seconds


def _kind(process: psutil.Process, main_pid: int, main_command: list[str]) -> str:
    if process.pid == main_pid:
        return "main"
    if process.cmdline() == main_command:  # workers are forked
        return "worker"
    name = process.name()
    return "tritonserver" if name == "tritonserver" else "stubs" if name.startswith("triton_python") else "helpers"
