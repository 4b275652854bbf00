# SPDX-License-Identifier: Apache-2.0
"""The three stages together, as a worker runs them, without Triton."""

import argparse

import numpy as np
import pytest
import torch
from conftest import SAMPLES, answer_memory, as_array, as_photo, encode, iou, sample
from gpu import DEVICES
from PIL import Image
from pytriton.proxy.types import Request

import server
from encoders import ImageFile
from server import Job, Segmentation
from serving.errors import InferenceFailed, InvalidRequest
from serving.options import DEVICE_DEFAULTS
from serving.worker import Runner

BOTH = ("original", "segmented")
# Less without a GPU, which saves half a minute.
INPUT_SIZE = {"cuda": 224, "cpu": 160}
MAX_BATCH_SIZE = {"cuda": DEVICE_DEFAULTS["cuda"]["max_batch_size"], "cpu": 2}


def options_for(device: str, **changes: object) -> argparse.Namespace:
    options = server.parse_options(["--weights", "demo", "--max-pixels", "2000000"])
    options.input_size, options.max_batch_size = INPUT_SIZE[device], MAX_BATCH_SIZE[device]
    return argparse.Namespace(**vars(options) | changes)


@pytest.fixture(scope="module", params=DEVICES)
def runner(request) -> Runner:
    return Runner(Segmentation, options_for(request.param), request.param)


def job(runner: Runner, class_name: str, size: tuple[int, int] | None = None, outputs=BOTH):
    """Return a job for a sample photo, with memory for its answer."""
    memory = answer_memory(1281 * 851 * 6 + 64, runner.device)
    photo = as_photo(encode(sample(class_name, size), "JPEG", quality=90))
    return memory, Job(photo, runner.stages.network.class_indices(class_name), 0.6, outputs, ImageFile("jpeg", 95))


def mask(answer: dict) -> np.ndarray:
    return answer["segmented"].any(axis=2)


def test_an_answer_does_not_depend_on_the_batch(runner):
    others = [job(runner, "cat"), job(runner, "person", (1281, 851)), job(runner, "person", (20, 30))] * 2
    wanted = job(runner, "person")
    alone = {name: array.copy() for name, array in runner([wanted])[0].items()}
    for size in range(2, MAX_BATCH_SIZE[runner.device] + 1):
        together = runner([*others[: size - 1], wanted])[-1]
        np.testing.assert_array_equal(together["original"], alone["original"])
        assert iou(mask(together), mask(alone)) > 0.995


def test_answers_outlive_the_next_batches(runner):
    answers = runner([job(runner, "person"), job(runner, "cat")])
    copies = [{name: array.copy() for name, array in answer.items()} for answer in answers]
    others = [job(runner, "cat", (700, 500)), job(runner, "person", (512, 512)), job(runner, "cat")]
    for _ in range(3 if runner.device == "cpu" else 10):
        runner(others[: MAX_BATCH_SIZE[runner.device]])
    for answer, copy in zip(answers, copies, strict=True):
        for name in answer:
            np.testing.assert_array_equal(answer[name], copy[name])


def test_only_what_a_job_asks_for_is_computed(runner, monkeypatch):
    wanted = job(runner, "cat", outputs=("original",))
    monkeypatch.setattr(runner.stages, "network", None)  # calling it would fail
    (answer,) = runner([wanted])
    assert set(answer) == {"original"}


def test_a_result_that_is_not_finite_is_an_error(runner, monkeypatch):
    healthy = runner.stages.network
    both, original = job(runner, "person"), job(runner, "person", outputs=("original",))

    def broken(images: torch.Tensor) -> torch.Tensor:
        probabilities = healthy(images).clone()
        probabilities[-1, :, -1, -1] = float("nan")  # one pixel of the last photo
        return probabilities

    monkeypatch.setattr(runner.stages, "network", broken)
    with pytest.raises(InferenceFailed, match="not finite: start the server with --precision fp32"):
        runner([both, both])
    assert set(runner([original])[0]) == {"original"}
    monkeypatch.undo()
    assert mask(runner([both])[0]).mean() > 0.3


def test_the_warm_up_does_not_depend_on_the_sample_photo_or_its_size(runner):
    assert Runner(Segmentation, options_for(runner.device, max_pixels=1, max_batch_size=1), runner.device).stages


def read(runner: Runner, parameters: dict | None = None) -> Job:
    photo = as_array(SAMPLES["cat"][0].read_bytes())
    return runner.stages.read(Request(data={"image": photo}, parameters=parameters or {}, requested_output_names=BOTH))


def test_a_request_becomes_a_job_with_defaults(runner):
    assert (read(runner).classes, read(runner).threshold, read(runner).outputs) == ([15], 0.6, BOTH)
    wanted = read(runner, {"class_name": "cat, dog,cat", "threshold": 1, "format": "webp", "quality": 50})
    assert (wanted.classes, wanted.threshold, wanted.file) == ([8, 12], 1, ImageFile("webp", 50))


def test_a_photo_too_large_for_the_file_is_refused_if_the_file_is_wanted(runner):
    data = {"image": as_array(encode(Image.new("RGB", (16_384, 1)), "PNG"))}
    with pytest.raises(InvalidRequest, match="a webp file can be at most 16383 pixels wide and high"):
        runner.stages.read(Request(data, parameters={"format": "webp"}, requested_output_names=("encoded",)))
    runner.stages.read(Request(data, parameters={"format": "webp"}, requested_output_names=("mask",)))


@pytest.mark.parametrize("threshold", [-0.1, 1.1, 2, "high", True, "", float("nan"), None])
def test_a_bad_threshold_is_refused(runner, threshold):
    with pytest.raises(InvalidRequest, match="threshold must be a number between 0 and 1, not "):
        read(runner, {"threshold": threshold})
