# SPDX-License-Identifier: Apache-2.0
"""Another program takes the GPU's memory: requests that need more fail, and the server lives."""

import subprocess
import sys

import pytest
from conftest import PHOTO, encode, running_server, sample
from gpu import NEEDS_GPU

from client import InferenceError

NEIGHBOR = """
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
@pytest.mark.alone
def test_photos_fail_while_a_neighbor_fills_the_gpu_and_are_processed_afterwards(tmp_path):
    large = encode(sample("person", (5000, 5000)), "JPEG")
    with running_server(tmp_path / "log", "--weights", "demo") as server:
        connection = server.connect("grpc")
        command = [sys.executable, "-c", NEIGHBOR]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as neighbor:
            assert neighbor.stdout.readline() == "full\n"
            for _ in range(3):
                with pytest.raises(InferenceError, match="the server could not process this request"):
                    connection.infer(large)
            neighbor.stdin.close()
        assert connection.infer(large)["segmented"].shape == (1, 5000, 5000, 3)
        assert connection.infer(PHOTO)["segmented"].any(axis=3).mean() > 0.3
        assert server.stop() == 0
        assert server.left_behind() == []
