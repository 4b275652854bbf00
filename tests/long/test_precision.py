# SPDX-License-Identifier: Apache-2.0
"""Half the precision returns the same masks. Without a GPU, fp16 takes five seconds for each photo."""

import argparse

import numpy as np
import pytest
from conftest import SAMPLES, RunningStages, as_photo, iou
from gpu import DEVICES

import server
from encoders import ImageEncoding
from server import Job, Segmentation


@pytest.mark.parametrize("device", DEVICES)
def test_masks_in_fp16_agree_with_those_in_fp32(device):
    options, responses = server.parse_options(["--weights", "demo", "--max-batch-size", "1"]), {}
    for precision in ("fp16", "fp32"):
        running = RunningStages(Segmentation, argparse.Namespace(**vars(options) | {"precision": precision}), device)
        for class_name, (path, _) in SAMPLES.items():
            classes = running.stages.class_indices(class_name)
            job = Job(as_photo(path.read_bytes()), classes, 0.6, ("original", "segmented"), ImageEncoding("jpeg", 95))
            (response,) = running([running.job(job)])
            responses[class_name, precision] = {name: array.copy() for name, array in response.items()}
    for class_name in SAMPLES:
        fast, exact = responses[class_name, "fp16"], responses[class_name, "fp32"]
        np.testing.assert_array_equal(fast["original"], exact["original"])
        assert iou(fast["segmented"].any(axis=2), exact["segmented"].any(axis=2)) >= 0.99
