# SPDX-License-Identifier: Apache-2.0
"""The three stages together, as a worker runs them, without Triton."""

import argparse

import numpy as np
import pytest
import torch
from conftest import SAMPLES, RunningStages, as_array, as_photo, encode, iou, sample
from gpu import DEVICES
from PIL import Image
from pytriton.proxy.types import Request

import server
from encoders import ImageEncoding
from server import Job, Segmentation
from serving.errors import InferenceFailed, InvalidRequest
from serving.executor import Job as QueuedJob
from serving.options import DEVICE_DEFAULTS

BOTH = ("original", "segmented")
# Less without a GPU, which saves half a minute.
INPUT_SIZE = {"cuda": 224, "cpu": 160}
MAX_BATCH_SIZE = {"cuda": DEVICE_DEFAULTS["cuda"]["max_batch_size"], "cpu": 2}


def options_for(device: str, **changes: object) -> argparse.Namespace:
    options = server.parse_options(["--weights", "demo", "--max-pixels", "2000000"])
    options.input_size, options.max_batch_size = INPUT_SIZE[device], MAX_BATCH_SIZE[device]
    return argparse.Namespace(**vars(options) | changes)


@pytest.fixture(scope="module", params=DEVICES)
def running(request) -> RunningStages:
    return RunningStages(Segmentation, options_for(request.param), request.param)


def job(running: RunningStages, class_name: str, size: tuple[int, int] | None = None, outputs=BOTH) -> QueuedJob:
    """Return a job for a sample photo, with memory for its response."""
    photo = as_photo(encode(sample(class_name, size), "JPEG", quality=90))
    classes = running.stages.network.class_indices(class_name)
    return running.job(Job(photo, classes, 0.6, outputs, ImageEncoding("jpeg", 95)))


def mask(answer: dict) -> np.ndarray:
    return answer["segmented"].any(axis=2)


def test_an_answer_does_not_depend_on_the_batch(running):
    others = [job(running, "cat"), job(running, "person", (1281, 851)), job(running, "person", (20, 30))] * 2
    wanted = job(running, "person")
    alone = {name: array.copy() for name, array in running([wanted])[0].items()}
    for size in range(2, MAX_BATCH_SIZE[running.device] + 1):
        together = running([*others[: size - 1], wanted])[-1]
        np.testing.assert_array_equal(together["original"], alone["original"])
        assert iou(mask(together), mask(alone)) > 0.995


def test_answers_outlive_the_next_batches(running):
    answers = running([job(running, "person"), job(running, "cat")])
    copies = [{name: array.copy() for name, array in answer.items()} for answer in answers]
    others = [job(running, "cat", (700, 500)), job(running, "person", (512, 512)), job(running, "cat")]
    for _ in range(3 if running.device == "cpu" else 10):
        running(others[: MAX_BATCH_SIZE[running.device]])
    for answer, copy in zip(answers, copies, strict=True):
        for name in answer:
            np.testing.assert_array_equal(answer[name], copy[name])


def test_only_what_a_job_asks_for_is_computed(running, monkeypatch):
    wanted = job(running, "cat", outputs=("original",))
    monkeypatch.setattr(running.stages, "network", None)  # calling it would fail
    (answer,) = running([wanted])
    assert set(answer) == {"original"}


def test_a_result_that_is_not_finite_is_an_error(running, monkeypatch):
    healthy = running.stages.network
    both, also_both = job(running, "person"), job(running, "person")
    original = job(running, "person", outputs=("original",))

    def broken(images: torch.Tensor) -> torch.Tensor:
        probabilities = healthy(images).clone()
        probabilities[-1, :, -1, -1] = float("nan")  # one pixel of the last photo
        return probabilities

    monkeypatch.setattr(running.stages, "network", broken)
    answer, error = running([also_both, both])
    assert type(error) is InferenceFailed
    assert "not finite: start the server with --precision fp32" in str(error)
    assert mask(answer).mean() > 0.3
    assert set(running([original])[0]) == {"original"}
    monkeypatch.undo()
    assert mask(running([both])[0]).mean() > 0.3


def test_the_warm_up_does_not_depend_on_the_sample_photo_or_its_size(running):
    options = options_for(running.device, max_pixels=1, max_batch_size=1)
    assert RunningStages(Segmentation, options, running.device).stages


def read(running: RunningStages, parameters: dict | None = None) -> Job:
    photo = as_array(SAMPLES["cat"][0].read_bytes())
    return running.stages.read(Request(data={"image": photo}, parameters=parameters or {}, requested_output_names=BOTH))


def test_a_request_becomes_a_job_with_defaults(running):
    assert (read(running).classes, read(running).threshold, read(running).outputs) == ([15], 0.6, BOTH)
    wanted = read(running, {"class_name": "cat, dog,cat", "threshold": 1, "format": "webp", "quality": 50})
    assert (wanted.classes, wanted.threshold, wanted.encoding) == ([8, 12], 1, ImageEncoding("webp", 50))


def test_a_photo_too_large_for_the_file_is_refused_if_the_file_is_wanted(running):
    data = {"image": as_array(encode(Image.new("RGB", (16_384, 1)), "PNG"))}
    with pytest.raises(InvalidRequest, match="a webp file can be at most 16383 pixels wide and high"):
        running.stages.read(Request(data, parameters={"format": "webp"}, requested_output_names=("encoded",)))
    running.stages.read(Request(data, parameters={"format": "webp"}, requested_output_names=("mask",)))


@pytest.mark.parametrize("threshold", [-0.1, 1.1, 2, "high", True, "", float("nan"), None])
def test_a_bad_threshold_is_refused(running, threshold):
    with pytest.raises(InvalidRequest, match="threshold must be a number between 0 and 1, not "):
        read(running, {"threshold": threshold})
