# SPDX-License-Identifier: Apache-2.0
"""The three stages together, as a worker runs them, without Triton."""

import argparse
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from conftest import SAMPLES, RunningStages, as_array, as_photo, encode, iou, sample
from gpu import DEVICES
from PIL import Image
from pytriton.proxy.types import Request

import server
from jobs import ImageEncoding, Job
from server import Segmentation
from serving.errors import InferenceFailed, InvalidRequest
from serving.executor import Job as QueuedJob
from serving.options import DEVICE_DEFAULTS

BOTH = ("original", "segmented")
# Smaller without a GPU, which saves half a minute.
INPUT_SIZE = {"cuda": 224, "cpu": 160}
MAX_BATCH_SIZE = {"cuda": DEVICE_DEFAULTS["cuda"]["max_batch_size"], "cpu": 2}


def options_for(device: str, **changes: object) -> argparse.Namespace:
    options = server.parse_options(["--weights", "demo", "--max-pixels", "2000000"])
    options.input_size, options.max_batch_size = INPUT_SIZE[device], MAX_BATCH_SIZE[device]
    return argparse.Namespace(**vars(options) | changes)


@pytest.fixture(scope="module", params=DEVICES)
def running(request) -> RunningStages:
    return RunningStages(Segmentation, options_for(request.param), request.param)


def job(
    running: RunningStages,
    class_name: str,
    size: tuple[int, int] | None = None,
    outputs: Sequence[str] = BOTH,
    encoding: ImageEncoding | None = None,
) -> QueuedJob:
    """Return a job for a sample photo, with memory for its response."""
    photo = as_photo(encode(sample(class_name, size), "JPEG", quality=90))
    classes = running.stages.class_indices(class_name)
    return running.job(Job(photo, classes, 0.6, outputs, encoding))


def mask(response: dict) -> np.ndarray:
    return response["segmented"].any(axis=2)


def test_a_response_does_not_depend_on_the_batch(running):
    others = [job(running, "cat"), job(running, "person", (1281, 851)), job(running, "person", (20, 30))] * 2
    wanted = job(running, "person")
    alone = {name: array.copy() for name, array in running([wanted])[0].items()}
    for size in range(2, MAX_BATCH_SIZE[running.device] + 1):
        together = running([*others[: size - 1], wanted])[-1]
        np.testing.assert_array_equal(together["original"], alone["original"])
        assert iou(mask(together), mask(alone)) > 0.995


def test_responses_outlive_the_next_batches(running):
    responses = running([job(running, "person"), job(running, "cat")])
    copies = [{name: array.copy() for name, array in response.items()} for response in responses]
    others = [job(running, "cat", (700, 500)), job(running, "person", (512, 512)), job(running, "cat")]
    for _ in range(3 if running.device == "cpu" else 10):
        running(others[: MAX_BATCH_SIZE[running.device]])
    for response, copy in zip(responses, copies, strict=True):
        for name in response:
            np.testing.assert_array_equal(response[name], copy[name])


def test_only_the_requested_outputs_are_computed(running, monkeypatch):
    nothing = job(running, "cat", outputs=("original",))
    cut_out = job(running, "cat", outputs=("mask", "encoded"), encoding=ImageEncoding("png", 100))
    maps = job(running, "cat", outputs=("probability", "labels"))
    # Calling None would fail.
    with monkeypatch.context() as without:
        without.setattr(running.stages, "network", None)
        assert set(running([nothing])[0]) == {"original"}
    with monkeypatch.context() as without:
        for name in ("probability_map", "label_map", "soft_cut_out"):
            without.setattr(f"maps.{name}", None)
        assert set(running([cut_out])[0]) == {"mask", "encoded"}
    with monkeypatch.context() as without:
        without.setattr(running.stages, "postprocess", None)
        assert set(running([maps])[0]) == {"probability", "labels"}


def test_jobs_with_different_outputs_share_a_batch(running):
    wanted = [
        job(running, "cat", (91, 60), ("labels",)),
        job(running, "person", (60, 91), ("mask", "probability", "encoded"), ImageEncoding("png", 100, edge=0.5)),
    ]
    alone = [{name: array.copy() for name, array in running([job])[0].items()} for job in wanted]
    assert (alone[0]["labels"].shape, alone[1]["probability"].shape) == ((60, 91), (91, 60))
    for one, together in zip(alone, running(wanted), strict=True):
        assert set(one) == set(together)
        for name in set(one) - {"encoded"}:
            # A network computes a batch in another order.
            assert (np.abs(one[name].astype(int) - together[name]) <= 3).mean() > 0.995, name


def test_a_result_that_is_not_finite_is_an_error(running, monkeypatch):
    healthy = running.stages.network
    both, also_both = job(running, "person"), job(running, "person")
    original = job(running, "person", outputs=("original",))

    def broken(images: torch.Tensor) -> torch.Tensor:
        probabilities = healthy(images).clone()
        probabilities[-1, :, -1, -1] = float("nan")  # one pixel of the last photo
        return probabilities

    monkeypatch.setattr(running.stages, "network", broken)
    response, error = running([also_both, both])
    assert type(error) is InferenceFailed
    assert "not finite: the precision of the server may be too low" in str(error)
    assert mask(response).mean() > 0.3
    assert set(running([original])[0]) == {"original"}
    monkeypatch.undo()
    assert mask(running([both])[0]).mean() > 0.3


def test_a_response_that_is_too_large_does_not_fail_its_batch(running):
    large = job(running, "cat", (1400, 1400), ("original", "segmented", "probability", "labels"))
    error, response = running([large, job(running, "person")])
    assert type(error) is InvalidRequest
    assert "request fewer outputs" in str(error)
    assert mask(response).mean() > 0.3


def test_the_warm_up_does_not_depend_on_the_sample_photo_or_its_size(running):
    options = options_for(running.device, max_pixels=1, max_batch_size=1)
    assert RunningStages(Segmentation, options, running.device).stages


ALL = tuple(tensor.name for tensor in server.OUTPUTS)


def read(running: RunningStages, parameters: dict | None = None, outputs: Sequence[str] = BOTH) -> Job:
    data = {"image": as_array(SAMPLES["cat"][0].read_bytes())}
    return running.stages.read(Request(data, parameters=parameters or {}, requested_output_names=outputs))


def test_a_request_becomes_a_job_with_defaults(running):
    assert (read(running).classes, read(running).threshold, read(running).outputs) == ([15], 0.6, BOTH)
    assert (read(running).encoding, read(running, {}, ("encoded",)).encoding) == (None, ImageEncoding("jpeg", 95))
    parameters = {"class_name": "cat, dog,cat", "threshold": 1, "format": "webp", "quality": 50}
    wanted = read(running, parameters, ("mask", "encoded"))
    assert (wanted.classes, wanted.threshold, wanted.encoding) == ([8, 12], 1, ImageEncoding("webp", 50))


def test_a_request_that_names_all_outputs_gets_them_if_it_has_a_parameter_of_the_file(running):
    # Triton lists all outputs for a request that names none.
    assert read(running, {"threshold": 0.5}, ALL).outputs == BOTH
    for parameters in ({"format": "jpeg"}, {"quality": 90}, {"content": "labels"}, {"edge": 0}):
        assert read(running, parameters, ALL).outputs == ALL


@pytest.mark.parametrize("parameters", [{"format": "png"}, {"quality": 90}, {"content": "labels"}, {"edge": 0}])
def test_a_parameter_of_the_file_without_the_file_is_rejected(running, parameters):
    (name,) = parameters
    expected = f"^{name} is for the output encoded: request that output, or omit {name}$"
    with pytest.raises(InvalidRequest, match=expected):
        read(running, parameters, ("segmented", "mask"))


def test_a_photo_too_large_for_the_file_is_rejected_if_the_file_is_wanted(running):
    data = {"image": as_array(encode(Image.new("RGB", (16_384, 1)), "PNG"))}
    with pytest.raises(InvalidRequest, match="the width and height of a webp file are limited to 16383 pixels"):
        running.stages.read(Request(data, parameters={"format": "webp"}, requested_output_names=("encoded",)))
    running.stages.read(Request(data, requested_output_names=("mask",), parameters={}))


@pytest.mark.parametrize("threshold", [-0.1, 1.1, 2, "high", True, "", float("nan"), None])
def test_a_bad_threshold_is_rejected(running, threshold):
    with pytest.raises(InvalidRequest, match="threshold must be a number between 0 and 1, not "):
        read(running, {"threshold": threshold})
