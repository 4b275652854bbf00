# SPDX-License-Identifier: Apache-2.0
"""What breaks around the server, and what its users see: it goes on, or it ends with an error and is started again."""

import re
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from conftest import (
    NEEDS_GPU,
    SAMPLES,
    Answers,
    Server,
    ask_until_refused,
    decode,
    encode,
    http_request,
    patched_server,
    running_server,
    with_tmpfs,
)
from PIL import Image
from tritonclient.utils import InferenceServerException

from model_inference import load_weights

PHOTO = SAMPLES["person"][0].read_bytes()


MISS_EACH_OTHER = """
from pytriton.models.model import Model

healthy, errors, starts = Model.get_proxy_model_files, {errors}, []

def proxy_files(self):  # what the instances run, of which the second asks the first where its memory is
    files = healthy(self)
    starts.append(self)
    if len(starts) <= len(errors):
        fail = "def get_config_from_handshake_server(_): raise " + errors[len(starts) - 1]
        files["file:1/communication.py"] += fail.encode()
    return files

Model.get_proxy_model_files = proxy_files
"""
MISSES = [
    "ConnectionRefusedError(111, 'Connection refused')",
    "BlockingIOError(11, 'Resource temporarily unavailable')",
]


@pytest.mark.timeout(300)
def test_instances_that_miss_each_other_are_started_again(tmp_path):
    script = patched_server(tmp_path, MISS_EACH_OTHER.format(errors=MISSES))
    arguments = ("--weights", "demo", "--instances", "2")
    with running_server(tmp_path / "server.log", *arguments, script=script) as server:
        assert server.log.read_text().count("; --verbose shows its log; trying again") == 2
        assert Answers(server, "grpc")(PHOTO)["original"].shape == (1, *decode(PHOTO).shape)
        assert server.stop() == 0
        assert server.left_behind() == []


@pytest.fixture
def hanging(tmp_path: Path) -> Iterator[Server]:
    """A server whose worker hangs, as where the GPU does; one photo is in work, another one waits."""
    arguments = ("--weights", "demo", "--instances", "1")
    with running_server(tmp_path / "server.log", *arguments) as server, ThreadPoolExecutor(2) as pool:
        (worker,) = server.workers()
        worker.suspend()
        clients = [pool.submit(ask_until_refused, server, protocol, PHOTO) for protocol in ("http", "grpc")]
        while server.metric("pending_request_count") < 1:
            time.sleep(0.05)
        yield server
        assert [client.result()[0] for client in clients] == [0, 0]
        assert server.left_behind() == []


def test_triton_killed_ends_the_server_with_an_error(hanging: Server):
    hanging.process_named("tritonserver").kill()
    assert hanging.process.wait(timeout=30) == 1
    assert "CRITICAL server: Triton has ended" in hanging.log.read_text()


def test_a_photo_that_takes_too_long_does_not_hold_up_the_end(hanging: Server):
    began = time.monotonic()
    hanging.process.send_signal(signal.SIGTERM)
    hanging.process.send_signal(signal.SIGINT)  # from somebody who does not wait
    assert hanging.process.wait(timeout=30) == 0
    assert time.monotonic() - began < 10


def test_a_worker_that_hangs_ends_the_server_with_an_error(tmp_path):
    script = patched_server(tmp_path, "server.MAX_WORK_S = 2")
    with running_server(tmp_path / "server.log", "--weights", "demo", script=script) as server:
        server.workers()[0].suspend()  # as where the GPU hangs
        good, said = ask_until_refused(server, "http", PHOTO)
        assert good == 0
        assert "InferenceFailed: the server took too long for this photo" in said
        assert server.process.wait(timeout=30) == 1
        assert "CRITICAL server: a worker has not answered for 2 s" in server.log.read_text()
        assert server.left_behind() == []


def test_a_worker_killed_ends_the_server_with_an_error(tmp_path):
    with running_server(tmp_path / "server.log", "--weights", "demo") as server, ThreadPoolExecutor(4) as pool:
        clients = [pool.submit(ask_until_refused, server, "http", PHOTO) for _ in range(4)]
        while server.metric("pending_request_count") + server.metric("request_success") < 4:
            time.sleep(0.05)
        server.workers()[0].kill()
        assert server.process.wait(timeout=30) == 1
        assert "CRITICAL server: a worker has ended" in server.log.read_text()
        assert all(
            re.search("worker process is gone|is stopping|refused|closed|UNAVAILABLE|not ready|unknown", said)
            for _, said in (client.result() for client in clients)
        )
        assert server.left_behind() == []


def test_a_helper_of_triton_killed_ends_the_server_with_an_error(tmp_path):
    with running_server(tmp_path / "server.log", "--weights", "demo") as server:
        server.process_named("triton_python").kill()
        assert server.process.wait(timeout=30) == 1
        assert "CRITICAL server: one of Triton's helper processes has ended" in server.log.read_text()
        assert server.left_behind() == []


def test_a_killed_server_takes_its_workers_along(tmp_path):
    with running_server(tmp_path / "server.log", "--weights", "demo") as server:
        orphans = server.workers()
        server.process.kill()
        assert orphans
        assert psutil.wait_procs(orphans, timeout=10)[1] == []


FAULTS = """
import segmentation, torch

healthy = segmentation.Segmenter.__call__

def segment(self, requests):
    if requests[0].threshold == 0.125:
        raise ValueError("a mistake in the code")
    if requests[0].threshold == 0.875:  # an index out of bounds: a sticky CUDA error, for all that this process does
        torch.zeros(1, device="cuda")[torch.full((1,), 7, device="cuda")].cpu()
    return healthy(self, requests)

segmentation.Segmenter.__call__ = segment
"""


def test_an_error_of_the_server_costs_one_request(tmp_path):
    script = patched_server(tmp_path, FAULTS)
    with running_server(tmp_path / "server.log", "--weights", "demo", script=script) as server:
        segment = Answers(server, "http")
        with pytest.raises(InferenceServerException, match="InferenceFailed: the server failed at this photo") as error:
            segment(PHOTO, threshold=0.125)
        assert "ValueError" not in str(error.value)
        assert "ValueError: a mistake in the code" in server.log.read_text()
        assert segment(PHOTO)["original"].shape == (1, *decode(PHOTO).shape)
        assert server.stop() == 0


@NEEDS_GPU
def test_a_lost_gpu_ends_the_server_with_an_error(tmp_path):
    script = patched_server(tmp_path, FAULTS)
    with running_server(tmp_path / "server.log", "--weights", "demo", script=script) as server:
        with pytest.raises(InferenceServerException):
            Answers(server, "http")(PHOTO, threshold=0.875)
        assert server.process.wait(timeout=60) != 0
        assert "the GPU is lost to this process" in server.log.read_text()
        assert server.left_behind() == []


FULL_GPU = """
import segmentation

def no_memory(self, *_):
    raise RuntimeError("CUDA out of memory. Tried to allocate 20 MiB.\\nAnd advice.")

segmentation.Segmenter.__init__ = no_memory
"""


def test_a_worker_that_cannot_start_is_one_line(tmp_path):
    script = patched_server(tmp_path, FULL_GPU)
    with Server(tmp_path / "server.log", "--weights", "demo", script=script) as server:
        assert server.process.wait(timeout=60) == 1
        log = server.log.read_text()
        assert log.splitlines()[-1].startswith("server.py: the worker failed at its start: CUDA out of memory.")
        assert "Traceback" not in log


NEIGHBOUR = """
import sys, torch
taken, size = [], 1 << 30
while size > 1 << 20:
    try:
        taken.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
    except torch.OutOfMemoryError:
        size //= 2
print("full", flush=True)
sys.stdin.read()
"""


@NEEDS_GPU
def test_a_neighbour_takes_the_gpus_memory(tmp_path):
    large = encode(Image.open(SAMPLES["person"][0]).resize((5000, 5000)), "JPEG")
    with running_server(tmp_path / "server.log", "--weights", "demo") as server:
        segment = Answers(server, "grpc")
        command = [sys.executable, "-c", NEIGHBOUR]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as neighbour:
            assert neighbour.stdout.readline() == "full\n"
            for _ in range(3):
                with pytest.raises(InferenceServerException, match="InferenceFailed: the server failed at this photo"):
                    segment(large)
            neighbour.stdin.close()
        assert segment(large)["segmented"].shape == (1, 5000, 5000, 3)
        assert segment(PHOTO)["segmented"].any(axis=3).mean() > 0.3
        assert server.stop() == 0
        assert server.left_behind() == []


def test_the_disk_fills_up_and_the_weights_are_replaced(tmp_path):
    weights = tmp_path / "own.pth"
    torch.save(load_weights("demo").state_dict, weights)
    prefix = with_tmpfs("$PYTRITON_HOME", "64m")
    with running_server(tmp_path / "server.log", "--weights", str(weights), prefix=prefix) as server:
        segment = Answers(server, "http")
        before = segment(PHOTO)
        filler = Path(f"/proc/{server.process.pid}/root{server.home}/filler")  # as the server sees it
        with pytest.raises(OSError, match="No space left"):
            filler.write_bytes(bytes(1 << 27))
        weights.write_bytes(b"half an upload")
        for _ in range(3):
            np.testing.assert_array_equal(segment(PHOTO)["segmented"], before["segmented"])
        assert server.stop() == 0


def test_no_disk_to_start_with(tmp_path):
    with Server(tmp_path / "server.log", "--weights", "demo", prefix=with_tmpfs("$PYTRITON_HOME", "1m")) as server:
        assert server.process.wait(timeout=60) == 1
        log = server.log.read_text()
    assert "No space left on device" in log.splitlines()[-1]
    assert "Traceback" not in log


def connect(server: Server, share: float) -> socket.socket:
    """Return a connection over which the first part of a request was sent, and nothing is read."""
    request = http_request(PHOTO)
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(("127.0.0.1", server.http_port))
    connection.sendall(request[: int(share * len(request))])
    return connection


def hang_up(connection: socket.socket) -> None:
    """Close the connection without a word to the other side but "reset"."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def test_clients_that_give_up_or_do_not_read(tmp_path):
    with running_server(tmp_path / "server.log", "--weights", "demo", "--max-queue", "100") as server:
        tritonserver = server.process_named("tritonserver")
        Answers(server, "http")(PHOTO)
        before = tritonserver.num_fds()
        half, slow, gone = ([connect(server, share) for _ in range(5)] for share in (0.5, 1, 1))
        for connection in gone:
            hang_up(connection)
        impatient = Answers(server, "grpc")
        for _ in range(5):
            with pytest.raises(InferenceServerException, match="Deadline Exceeded"):
                impatient(PHOTO, client_timeout=0.001)
        for protocol in ("http", "grpc"):
            assert Answers(server, protocol)(PHOTO)["segmented"].any(axis=3).mean() > 0.3
        for connection in half[1:] + slow[1:]:
            hang_up(connection)
        deadline = time.monotonic() + 20
        while tritonserver.num_fds() > before + 5:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        # With one of each still there.
        assert server.stop() == 0
        assert server.left_behind() == []
        assert "Traceback" not in server.log.read_text()
