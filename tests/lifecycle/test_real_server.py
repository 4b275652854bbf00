# SPDX-License-Identifier: Apache-2.0
"""server.py itself, where the network, the weights or a GPU make a difference. The other tests here use the toy."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    NEEDS_GPU,
    PHOTO,
    PROTOCOLS,
    ROOT,
    SAMPLES,
    Server,
    decode,
    psnr,
    running_server,
    wait_for,
    with_tmpfs,
)

from client import InferenceError
from model_inference import pretrained_weights
from server import NETWORK
from weights.loading import load_weights

CAT = SAMPLES["cat"][0].read_bytes()
# No proxy answers there: the download fails as on a machine without a network.
OFFLINE = dict.fromkeys(("https_proxy", "HTTPS_PROXY"), "http://127.0.0.1:9") | {"no_proxy": "", "NO_PROXY": ""}


def test_without_pretrained_weights_the_server_falls_back_loudly_to_the_demonstration(tmp_path):
    with running_server(tmp_path / "log", environment=OFFLINE | {"TORCH_HOME": str(tmp_path)}) as server:
        lines = server.log.read_text().splitlines()
        ready = next(index for index, line in enumerate(lines) if "ready: model" in line)
        assert "WARNING" in lines[ready - 1]
        assert "DEMONSTRATION WEIGHTS" in lines[ready - 1]
        assert pretrained_weights(NETWORK).url in lines[ready - 1]
        # While it starts, it says what it does; once it is ready, it says where.
        for expected in ("device: ", "weights: demonstration weights", "precision: ", "warming up"):
            assert any(expected in line for line in lines[: ready - 1])
        for url in (server.http_url, server.grpc_url, f"http://127.0.0.1:{server.metrics_port}/metrics"):
            assert url in lines[ready]
        assert psnr(server.connect("http").infer(PHOTO, ("original",))["original"][0], decode(PHOTO)) > 40


def test_your_own_weights_with_an_auxiliary_head_and_many_options_outlive_their_file_and_a_full_disk(tmp_path):
    # The network of the demonstration in double precision, with what torchvision's own files also contain.
    state_dict = {
        name: value.double() if value.is_floating_point() else value
        for name, value in load_weights("demo", NETWORK).items()
    }
    torch.save(state_dict | {"aux_classifier.4.bias": torch.zeros(21)}, tmp_path / "own.pth")
    options = "--weights own.pth --class-name cat --threshold 0.5 --device cpu --instances 2 --max-batch-size 1"
    options += " --input-size 225 --max-pixels 200000 --precision fp32 --address localhost"
    prefix = with_tmpfs("$PYTRITON_HOME", "64m")
    with running_server(tmp_path / "log", *options.split(), prefix=prefix) as server:
        connections = [server.connect(protocol) for protocol in PROTOCOLS]
        cat = connections[1].infer(CAT)
        assert cat["segmented"].any(axis=3).mean() > 0.7
        with pytest.raises(InferenceError, match="this server takes 200000 at most"):
            connections[0].infer(PHOTO)
        assert "DEMONSTRATION" not in server.log.read_text()

        filler = Path(f"/proc/{server.process.pid}/root{server.home}/filler")  # as the server sees it
        with pytest.raises(OSError, match="No space left"):
            filler.write_bytes(bytes(1 << 27))
        (tmp_path / "own.pth").write_bytes(b"half an upload")
        for connection in connections:
            np.testing.assert_array_equal(connection.infer(CAT)["segmented"], cat["segmented"])
        assert server.stop() == 0
        assert server.left_behind() == []


def assert_both_workers_answer(server: Server) -> None:
    connection = server.connect("grpc")

    def busy() -> list[float]:
        return [process.cpu_times().user for process in server.workers()]

    assert len(server.workers()) == 2
    before = busy()
    with ThreadPoolExecutor(4) as pool:
        for answer in pool.map(connection.infer, [PHOTO] * 4):
            assert psnr(answer["original"][0], decode(PHOTO)) > 40
            assert answer["segmented"].any(axis=3).mean() > 0.3
    wait_for(lambda: all(late > early for early, late in zip(before, busy(), strict=True)))


@NEEDS_GPU
def test_each_gpu_has_a_worker(tmp_path):
    devices = "all" if torch.cuda.device_count() == 2 else "cuda:0,cuda:0"
    with running_server(tmp_path / "log", "--weights", "demo", "--instances", 1, "--device", devices) as server:
        assert server.log.read_text().count(f"device: {torch.cuda.get_device_name()}") == 2
        assert_both_workers_answer(server)
        assert server.stop() == 0
        assert server.left_behind() == []


LOSE_THE_GPU = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import server

healthy = server.Segmentation.__call__

def call(self, jobs):
    if jobs[0].threshold == 0.875:  # an index out of bounds breaks all later CUDA calls of the process
        import torch
        torch.zeros(1, device="cuda")[torch.full((1,), 7, device="cuda")].cpu()
    return healthy(self, jobs)

server.Segmentation.__call__ = call
server.main()
"""


@NEEDS_GPU
def test_a_lost_gpu_ends_the_server(tmp_path):
    script = tmp_path / "lose_the_gpu.py"
    script.write_text(LOSE_THE_GPU)
    with running_server(tmp_path / "log", "--weights", "demo", script=script) as server:
        with pytest.raises(InferenceError):
            server.connect("http").infer(PHOTO, parameters={"threshold": 0.875})
        assert server.process.wait(timeout=60) == 1
        assert "the GPU is lost to this worker, which ends" in server.log.read_text()
        assert server.left_behind() == []
