# SPDX-License-Identifier: Apache-2.0
"""The load: processes that each keep one photo in flight, over HTTP or gRPC."""

import functools
import signal
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, wait
from multiprocessing import get_context
from typing import NamedTuple

from benchmark.cases import Case
from benchmark.cpu import cpu_seconds
from benchmark.photos import photos
from client import Connection, InferenceError
from tools.launch import LaunchedServer

START_TIMEOUT_S = 120  # for all processes together
HEAD_START_S = 0.2  # until each process has its task


class Answer(NamedTuple):
    """How long one photo took, and what came back."""

    seconds: float
    sent_bytes: int
    received_bytes: int  # of the arrays
    error: str  # empty if there was none


class Measurement(NamedTuple):
    """What a server did while it was measured."""

    answers: list[Answer]
    seconds: float  # to the last answer
    cpu_seconds: Counter[str]  # see cpu.py


def start_processes(count: int) -> ProcessPoolExecutor:
    """Return a pool whose processes have all started. Threads would compete for the interpreter lock instead."""
    context = get_context("spawn")
    pool = ProcessPoolExecutor(count, context, initializer=_prepare, initargs=(context.Barrier(count),))
    wait([pool.submit(int) for _ in range(count)])
    return pool


def measure(
    pool: ProcessPoolExecutor, server: LaunchedServer, case: Case, in_flight: int, seconds: float
) -> Measurement:
    """Keep ``in_flight`` photos in flight for some seconds."""
    url = server.http_url if case.protocol == "http" else server.grpc_url
    cpu_before = cpu_seconds(server.process.pid)
    begin = time.time() + HEAD_START_S
    tasks = [pool.submit(_send, url, case, first, begin, seconds) for first in range(in_flight)]
    answers = [answer for task in tasks for answer in task.result()]
    took = time.time() - begin
    return Measurement(answers, took, cpu_seconds(server.process.pid) - cpu_before)


def _prepare(barrier) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started this one
    photos()
    barrier.wait(START_TIMEOUT_S)  # before that, a process that is up would take the first task of another


@functools.cache
def _connection(url: str) -> Connection:
    return Connection(url)


def _send(url: str, case: Case, first: int, begin: float, seconds: float) -> list[Answer]:
    """Send one photo after the other until the time is over: the sizes in turn, from number ``first`` on."""
    answers: list[Answer] = []
    time.sleep(max(0.0, begin - time.time()))
    while time.time() < begin + seconds:
        photo = photos()[(first + len(answers)) % len(photos())]
        began = time.perf_counter()
        try:
            arrays, error = _connection(url).infer(photo, case.outputs, case.parameters), ""
        except InferenceError as reason:
            arrays, error = {}, str(reason)
        took = time.perf_counter() - began
        answers.append(Answer(took, len(photo), sum(array.nbytes for array in arrays.values()), error))
    return answers
