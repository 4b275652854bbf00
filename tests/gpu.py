# SPDX-License-Identifier: Apache-2.0
"""Marks for tests that need a GPU. Apart from conftest.py, because torch takes seconds to import."""

import pytest
import torch

NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
DEVICES = [pytest.param("cpu"), pytest.param("cuda", marks=NEEDS_GPU)]
