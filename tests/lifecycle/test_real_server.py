# SPDX-License-Identifier: Apache-2.0
"""server.py itself, where the network, the weights or a GPU make a difference. The other tests here use the toy."""

from collections.abc import Iterator
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
    encode,
    psnr,
    running_server,
    sample,
    wait_for,
    with_tmpfs,
)

from client import InferenceError
from model_inference import pretrained_weights
from server import NETWORK
from weights.loading import load_weights

CAT = SAMPLES["cat"][0].read_bytes()


def test_without_pretrained_weights_the_server_falls_back_loudly_to_the_demonstration(server):
    # Triton answers before the server says that it is ready.
    wait_for(lambda: "ready: model" in server.log.read_text())
    lines = [line for line in server.log.read_text().splitlines() if "a request failed" not in line]
    ready = next(index for index, line in enumerate(lines) if "ready: model" in line)
    assert "WARNING" in lines[ready - 1]
    assert "DEMONSTRATION WEIGHTS" in lines[ready - 1]
    assert pretrained_weights(NETWORK).url in lines[ready - 1]
    # While it starts, it says what it does; once it is ready, it says where.
    for expected in ("device: ", "weights: demonstration weights", "precision: ", "photos per batch: "):
        assert any(expected in line for line in lines[: ready - 1])
    for url in (server.http_url, server.grpc_url, f"http://127.0.0.1:{server.metrics_port}/metrics"):
        assert url in lines[ready]
    assert psnr(server.connect("http").infer(PHOTO, ("original",))["original"][0], decode(PHOTO)) > 40


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with your own weights and many options, on a small disk."""
    folder = tmp_path_factory.mktemp("own")
    # The network of the demonstration in double precision, with what torchvision's own files also contain.
    state_dict = {
        name: value.double() if value.is_floating_point() else value
        for name, value in load_weights("demo", NETWORK).items()
    }
    torch.save(state_dict | {"aux_classifier.4.bias": torch.zeros(21)}, folder / "own.pth")
    options = "--weights own.pth --class-name cat --threshold 0.5 --device cpu --instances 2 --max-batch-size 2"
    options += " --input-size 225 --max-pixels 200000 --precision fp32 --address localhost"
    with running_server(folder / "log", *options.split(), prefix=with_tmpfs("$PYTRITON_HOME", "64m")) as server:
        yield server


def test_the_server_does_what_its_options_say(own):
    assert own.connect("grpc").infer(CAT)["segmented"].any(axis=3).mean() > 0.7
    with pytest.raises(InferenceError, match="this server accepts at most 200000 pixels"):
        own.connect("http").infer(PHOTO)
    assert "DEMONSTRATION" not in own.log.read_text()


def test_a_bad_photo_costs_the_others_in_its_batch_nothing(own):
    bad, connection = encode(sample("cat"), "PNG")[:20_000], own.connect("grpc")
    with ThreadPoolExecutor(6) as pool:
        answers = [pool.submit(connection.infer, photo) for photo in (CAT, bad) * 3]
        for good, refused in zip(answers[::2], answers[1::2], strict=True):
            with pytest.raises(InferenceError, match="the photo cannot be decoded"):
                refused.result()
            assert good.result()["segmented"].any(axis=3).mean() > 0.3


def test_a_running_server_outlives_a_full_disk_and_changes_of_its_weights(own):
    connections = [own.connect(protocol) for protocol in PROTOCOLS]
    before = connections[0].infer(CAT)["segmented"]
    filler = Path(f"/proc/{own.process.pid}/root{own.home}/filler")  # as the server sees it
    with pytest.raises(OSError, match="No space left"):
        filler.write_bytes(bytes(1 << 27))
    (own.log.parent / "own.pth").write_bytes(b"half an upload")
    for connection in connections:
        np.testing.assert_array_equal(connection.infer(CAT)["segmented"], before)
    assert own.stop() == 0
    assert own.left_behind() == []


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
        assert "a worker lost its GPU and exits" in server.log.read_text()
        assert server.left_behind() == []
