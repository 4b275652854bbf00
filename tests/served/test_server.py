# SPDX-License-Identifier: Apache-2.0
"""server.py as a whole: its fallbacks, a batch with a bad photo, several GPUs and a lost one."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import (
    MODEL_NAME,
    PHOTO,
    ROOT,
    SAMPLES,
    Server,
    decode,
    encode,
    psnr,
    running_server,
    sample,
    wait_for,
    with_wrong_checksum,
)
from gpu import NEEDS_GPU

from client import InferenceError
from model_inference import pretrained_weights
from server import NETWORK

CAT = SAMPLES["cat"][0].read_bytes()


def test_without_pretrained_weights_the_server_falls_back_loudly_to_the_demonstration(server):
    # Triton responds before the server says that it is ready.
    wait_for(lambda: "ready: model" in server.log.read_text())
    lines = [line for line in server.log.read_text().splitlines() if "a request failed" not in line]
    ready = next(index for index, line in enumerate(lines) if "ready: model" in line)
    assert "WARNING" in lines[ready - 1]
    assert "DEMONSTRATION WEIGHTS" in lines[ready - 1]
    assert pretrained_weights(NETWORK).url in lines[ready - 1]
    # During the start, it logs its steps; once it is ready, it logs its addresses.
    for expected in ("device: ", "weights: demonstration weights", "precision: ", "maximum batch size: "):
        assert any(expected in line for line in lines[: ready - 1])
    for url in (server.http_url, server.grpc_url, f"http://127.0.0.1:{server.metrics_port}/metrics"):
        assert url in lines[ready]
    assert psnr(server.connect("http").infer(PHOTO, ("original",))["original"][0], decode(PHOTO)) > 40


def test_the_queue_has_the_documented_limits(server):
    config = server.connect("http").client.get_model_config(MODEL_NAME)
    policy = config["dynamic_batching"]["default_queue_policy"]
    assert policy["max_queue_size"] == (512 if torch.cuda.is_available() else 12)
    assert int(policy["default_timeout_microseconds"]) == 60_000_000
    assert policy["allow_timeout_override"]
    assert policy.get("timeout_action", "REJECT") == "REJECT"


def test_a_bad_photo_costs_the_others_in_its_batch_nothing(server):
    png, connection = encode(sample("cat"), "PNG"), server.connect("grpc")
    bad = with_wrong_checksum(png)
    with ThreadPoolExecutor(6) as pool:
        responses = [pool.submit(connection.infer, photo, (), {"class_name": "cat"}) for photo in (CAT, bad) * 3]
        for good, rejected in zip(responses[::2], responses[1::2], strict=True):
            with pytest.raises(InferenceError, match="the photo cannot be decoded"):
                rejected.result()
            assert good.result()["segmented"].any(axis=3).mean() > 0.3


def assert_both_workers_respond(server: Server) -> None:
    connection = server.connect("grpc")

    def busy() -> list[float]:
        return [process.cpu_times().user for process in server.processes("worker")]

    assert len(server.processes("worker")) == 2
    before = busy()
    with ThreadPoolExecutor(4) as pool:

        def both_have_worked() -> bool:
            # CPU time is counted in ticks of 10 ms, and a photo on a GPU takes less than one.
            for response in pool.map(connection.infer, [PHOTO] * 4):
                assert psnr(response["original"][0], decode(PHOTO)) > 40
                assert response["segmented"].any(axis=3).mean() > 0.3
            return all(late > early for early, late in zip(before, busy(), strict=True))

        wait_for(both_have_worked)


@NEEDS_GPU
def test_each_gpu_has_a_worker(tmp_path):
    count = torch.cuda.device_count()
    devices = "all" if count > 1 else "cuda:0,cuda:0"
    with running_server(tmp_path / "log", "--weights", "demo", "--instances", 1, "--device", devices) as server:
        assert server.log.read_text().count(f"device: {torch.cuda.get_device_name()}") == max(2, count)
        assert ("GPUs share one Triton" in server.log.read_text()) == (count > 2)
        assert_both_workers_respond(server)
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
        assert "a worker lost its GPU and is exiting" in server.log.read_text()
        assert server.left_behind() == []
