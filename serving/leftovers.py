# SPDX-License-Identifier: Apache-2.0
"""Removes the leftovers of Triton, above all if it was killed: processes, shared memory and folders."""

import contextlib
import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import psutil

SEGMENTS = "pytrtion"  # with which their names begin, followed by the server's process ID; PyTriton's spelling


def segments(server: int) -> Iterable[Path]:
    """Return Triton's segments of shared memory, through which requests pass. ``server`` is the server's process ID."""
    return Path("/dev/shm").glob(f"{SEGMENTS}{server}-*")


def helpers_of(tritonservers: Iterable[psutil.Process]) -> list[psutil.Process]:
    """Return the processes that tritonserver started."""
    helpers = []
    for process in tritonservers:
        with contextlib.suppress(psutil.NoSuchProcess):
            helpers += process.children(recursive=True)
    return helpers


def model_folders(helpers: Iterable[psutil.Process]) -> list[Path]:
    """Return the folders that Triton created for the model's code. Its stub processes run a file in them."""
    folders = []
    for helper in helpers:
        with contextlib.suppress(psutil.Error):
            files = [word for word in helper.cmdline() if re.fullmatch(r"/tmp/folder\w+/1/model\.py", word)]
            folders += [Path(file).parent.parent for file in files]
    return folders


def is_named(process: psutil.Process, *prefixes: str) -> bool:
    """Return whether the process is running and its name begins with one of ``prefixes``."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.name().startswith(prefixes)
    return False


def kill_processes(processes: Iterable[psutil.Process]) -> None:
    """Kill processes, some of which may have already ended."""
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.kill()


def remove_leftovers(server: int, helpers: Iterable[psutil.Process], folders: Iterable[Path]) -> None:
    """Kill the remaining helper processes of Triton, and remove segments and folders."""
    # The stub processes first, because some of the others clean up after them.
    kill_processes([helper for helper in helpers if is_named(helper, "triton_python")])
    kill_processes(psutil.wait_procs(helpers, timeout=1)[1])
    for segment in segments(server):
        segment.unlink(missing_ok=True)
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def remove_after_server(server: int, folders: Sequence[Path]) -> None:
    """Kill Triton after the end of its server, and remove the leftovers of both, and ``folders``."""
    kill_processes([process for process in _processes_of(server) if is_named(process, "tritonserver")])
    # Triton may have ended without its helpers, so look for them separately.
    helpers = _processes_of(server)
    remove_leftovers(server, helpers, [*folders, *model_folders(helpers)])


def _processes_of(server: int) -> list[psutil.Process]:
    """Return Triton's processes, whose command lines have the name of the segments, and those that they started."""
    processes = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if not is_named(process, "tritonserver", "triton_python"):
                continue
            named = any(f"{SEGMENTS}{server}-" in word for word in process.cmdline())
            # In a container, another server may have the same process ID.
            if named and Path(f"/proc/{process.pid}/ns/pid").samefile("/proc/self/ns/pid"):
                processes += [process, *process.children(recursive=True)]
    return processes
