# SPDX-License-Identifier: Apache-2.0
"""Generates the load: each process keeps one photo in flight, over HTTP or gRPC."""

import contextlib
import functools
import signal
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, wait
from multiprocessing import active_children, get_context
from typing import NamedTuple

from benchmark.cases import Case
from benchmark.cpu import cpu_seconds
from benchmark.photos import photos
from client import Connection, InferenceError
from serving.processes import PR_SET_PDEATHSIG, prctl
from tools.launch import LaunchedServer

START_TIMEOUT_S = 120  # for all processes together
HEAD_START_S = 0.2  # for each process to get its task


class Response(NamedTuple):
    """The duration and the size of one response."""

    seconds: float
    sent_bytes: int
    received_bytes: int  # of the arrays
    error: str  # empty if there was none


class Measurement(NamedTuple):
    """The responses of a server, and its CPU time."""

    responses: list[Response]
    seconds: float  # to the last response
    cpu_seconds: Counter[str]  # see cpu.py


@contextlib.contextmanager
def running_processes(count: int) -> Iterator[ProcessPoolExecutor]:
    """Yield a pool whose processes have all started. Threads would compete for the GIL."""
    context = get_context("spawn")
    with ProcessPoolExecutor(count, context, initializer=_prepare, initargs=(context.Barrier(count),)) as pool:
        try:
            wait([pool.submit(int) for _ in range(count)])
            yield pool
        finally:
            for process in active_children():  # after Ctrl-C, they may wait for each other
                process.kill()


def measure(
    pool: ProcessPoolExecutor, server: LaunchedServer, case: Case, in_flight: int, seconds: float
) -> Measurement:
    """Keep ``in_flight`` photos in flight for this number of seconds."""
    url = server.http_url if case.protocol == "http" else server.grpc_url
    cpu_before = cpu_seconds(server.process.pid)
    begin = time.time() + HEAD_START_S
    tasks = [pool.submit(_send, url, case, first, begin, seconds) for first in range(in_flight)]
    responses = [response for task in tasks for response in task.result()]
    took = time.time() - begin
    return Measurement(responses, took, cpu_seconds(server.process.pid) - cpu_before)


def _prepare(barrier) -> None:
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # if the benchmark is killed, end as well
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it immediately, without a traceback
    photos()
    barrier.wait(START_TIMEOUT_S)  # otherwise, an early process would take a late one's task


@functools.cache
def _connection(url: str) -> Connection:
    return Connection(url)


def _send(url: str, case: Case, first: int, begin: float, seconds: float) -> list[Response]:
    """Send photos one after another until the time is over. The sizes alternate, from index ``first`` on."""
    responses: list[Response] = []
    time.sleep(max(0.0, begin - time.time()))
    while time.time() < begin + seconds:
        photo = photos()[(first + len(responses)) % len(photos())]
        began = time.perf_counter()
        try:
            arrays, error = _connection(url).infer(photo, case.outputs, case.parameters), ""
        except InferenceError as reason:
            arrays, error = {}, str(reason)
        took = time.perf_counter() - began
        responses.append(Response(took, len(photo), sum(array.nbytes for array in arrays.values()), error))
    return responses
