# SPDX-License-Identifier: Apache-2.0
"""The three stages together, as a worker runs them, without Triton."""

import argparse
from functools import partial

import numpy as np
import pytest
import torch
from conftest import DEVICES, SAMPLES, as_array, encode, iou, sample
from pytriton.proxy.types import Request

from model_inference import SegmentationNetwork, load_network
from server import NETWORK, Job, Segmentation
from serving.errors import InferenceFailed, InvalidRequest
from serving.memory import AnswerMemory
from serving.options import DEVICE_DEFAULTS
from serving.worker import _Runner
from weights.loading import load_weights

BOTH = ("original", "segmented")
OPTIONS = argparse.Namespace(
    input_size=224,
    max_batch_size=DEVICE_DEFAULTS["cuda"]["max_batch_size"],
    max_pixels=2_000_000,
    class_name="person",
    threshold=0.6,
)


@pytest.fixture(scope="module")
def state_dict() -> dict:
    return load_weights("demo", NETWORK)


@pytest.fixture(scope="module", params=DEVICES)
def runner(request, state_dict) -> _Runner:
    network = load_network(NETWORK, dict(state_dict), torch.device(request.param), "auto", 224)
    return _Runner(partial(Segmentation, network, OPTIONS), request.param)


def job(runner: _Runner, class_name: str, size: tuple[int, int] | None = None, outputs=BOTH):
    """Return a job for a sample photo, with memory for its answer."""
    memory = AnswerMemory(np.empty(1281 * 851 * 6 + 64, np.uint8), runner.device)
    index = runner.stages.class_names.index(class_name)
    return memory, Job(as_array(encode(sample(class_name, size), "JPEG", quality=90)), index, 0.6, outputs)


def mask(answer: dict) -> np.ndarray:
    return answer["segmented"].any(axis=2)


def test_an_answer_does_not_depend_on_the_batch(runner):
    others = [job(runner, "cat"), job(runner, "person", (1281, 851)), job(runner, "person", (20, 30))]
    wanted = job(runner, "person")
    alone = {name: array.copy() for name, array in runner([wanted])[0].items()}
    for size in (2, 3, 4):
        together = runner([*others[: size - 1], wanted])[-1]
        np.testing.assert_array_equal(together["original"], alone["original"])
        assert iou(mask(together), mask(alone)) > 0.995


def test_answers_outlive_the_next_batches(runner):
    answers = runner([job(runner, "person"), job(runner, "cat")])
    copies = [{name: array.copy() for name, array in answer.items()} for answer in answers]
    others = [job(runner, "cat", (700, 500)), job(runner, "person", (512, 512)), job(runner, "cat")]
    for _ in range(3 if runner.device == "cpu" else 10):
        runner(others)
    for answer, copy in zip(answers, copies, strict=True):
        for name in answer:
            np.testing.assert_array_equal(answer[name], copy[name])


def test_only_what_a_job_asks_for_is_computed(runner, monkeypatch):
    monkeypatch.setattr(runner.stages, "network", None)  # calling it would fail
    (answer,) = runner([job(runner, "cat", outputs=("original",))])
    assert set(answer) == {"original"}


@pytest.mark.parametrize("device", DEVICES)
def test_masks_in_fp16_agree_with_those_in_fp32(device, state_dict):
    options = argparse.Namespace(**vars(OPTIONS) | {"max_batch_size": 1})
    fast, exact = (
        _Runner(
            partial(Segmentation, SegmentationNetwork(NETWORK, dict(state_dict), torch.device(device), name), options),
            device,
        )
        for name in ("fp16", "fp32")
    )
    for class_name in SAMPLES:
        (one,), (other,) = fast([job(fast, class_name)]), exact([job(exact, class_name)])
        np.testing.assert_array_equal(one["original"], other["original"])
        assert iou(mask(one), mask(other)) >= 0.99


def test_a_result_that_is_not_finite_is_an_error(runner, monkeypatch):
    healthy = runner.stages.network
    monkeypatch.setattr(runner.stages, "network", lambda images: healthy(images) * float("nan"))
    with pytest.raises(InferenceFailed, match="not finite: start the server with --precision fp32"):
        runner([job(runner, "person")])
    assert set(runner([job(runner, "person", outputs=("original",))])[0]) == {"original"}
    monkeypatch.undo()
    assert mask(runner([job(runner, "person")])[0]).mean() > 0.3


def test_the_warm_up_does_not_depend_on_the_sample_photo_or_its_size(runner, state_dict):
    options = argparse.Namespace(**vars(OPTIONS) | {"max_pixels": 1, "max_batch_size": 1})
    network = SegmentationNetwork(NETWORK, dict(state_dict), torch.device(runner.device))
    assert _Runner(partial(Segmentation, network, options), runner.device).stages


def read(runner: _Runner, parameters: dict | None = None) -> Job:
    photo = as_array(SAMPLES["cat"][0].read_bytes())
    return runner.stages.read(Request(data={"image": photo}, parameters=parameters or {}, requested_output_names=BOTH))


def test_a_request_becomes_a_job_with_defaults(runner):
    assert (read(runner).class_index, read(runner).threshold, read(runner).outputs) == (15, 0.6, BOTH)
    wanted = read(runner, {"class_name": "cat", "threshold": 1})
    assert (wanted.class_index, wanted.threshold) == (8, 1)


@pytest.mark.parametrize("threshold", [-0.1, 1.1, 2, "high", True, "", float("nan"), None])
def test_a_bad_threshold_is_refused(runner, threshold):
    with pytest.raises(InvalidRequest, match="threshold must be a number between 0 and 1, not "):
        read(runner, {"threshold": threshold})
