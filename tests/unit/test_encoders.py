# SPDX-License-Identifier: Apache-2.0
"""Image files: the parameters of a request, and the pixels in each format."""

import io

import numpy as np
import pytest
import torch
from conftest import psnr, run_python, sample
from gpu import DEVICES
from PIL import Image

from encoders import Encode
from jobs import DEFAULT_QUALITY, MAX_SIDE, ImageEncoding, read_encoding
from serving.errors import InvalidRequest
from serving.stages import Deferred

CUT_OUT = np.asarray(sample("cat", (120, 80))) * (np.arange(120) < 70)[None, :, None].astype(np.uint8)
MASK = np.broadcast_to(np.where(np.arange(120) < 70, 255, 0).astype(np.uint8), (80, 120)).copy()


@pytest.fixture(scope="module", params=DEVICES)
def device(request) -> torch.device:
    return torch.device(request.param)


def encode(
    device: torch.device, *encodings: ImageEncoding | None, cut_out=CUT_OUT, mask=MASK, **others: np.ndarray
) -> list[np.ndarray | None]:
    arrays = {"segmented": cut_out, "mask": mask, **others}
    sources = {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}
    return [
        output.compute(output.source.cpu().numpy()) if isinstance(output, Deferred) else output
        for output in Encode(device)([sources] * len(encodings), encodings)
    ]


def pixels(file: np.ndarray) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(file.tobytes())))


def test_a_batch_may_mix_formats_and_qualities_and_photos_that_need_no_file(device):
    encodings = [ImageEncoding("jpeg", 95), None, ImageEncoding("png", 100), ImageEncoding("jpeg", 10)]
    encodings += [ImageEncoding("webp", 80), ImageEncoding("webp", 10)]
    good, nothing, png, coarse, webp, coarse_webp = encode(device, *encodings)
    assert nothing is None
    assert psnr(pixels(good), CUT_OUT) > 38 > 32 > psnr(pixels(coarse), CUT_OUT)
    assert len(coarse) < len(good) / 3
    assert len(coarse_webp) < len(webp) / 2
    np.testing.assert_array_equal(pixels(png), np.dstack([CUT_OUT, MASK]))
    np.testing.assert_array_equal(pixels(webp)[..., 3], MASK)
    assert psnr(pixels(webp)[MASK > 0][:, :3], CUT_OUT[MASK > 0]) > 30


def test_a_soft_edge_is_the_alpha_of_png_and_webp(device):
    alpha = np.broadcast_to(np.linspace(0, 255, 120).astype(np.uint8), (80, 120))
    soft = np.dstack([CUT_OUT, alpha])
    png, webp = encode(
        device, *(ImageEncoding(name, 90, edge=0.5) for name in ("png", "webp")), soft_cut_out=soft, mask=MASK
    )
    np.testing.assert_array_equal(pixels(png), soft)
    np.testing.assert_array_equal(pixels(webp)[..., 3], alpha)
    assert psnr(pixels(webp)[alpha > 0][:, :3], CUT_OUT[alpha > 0]) > 30


def test_labels_are_a_palette_png_with_the_colors_of_pascal_voc(device):
    labels = np.arange(256, dtype=np.uint8).repeat(3).reshape(32, 24)
    [encoded] = encode(device, ImageEncoding("png", 100, "labels"), labels=labels)
    image = Image.open(io.BytesIO(encoded.tobytes()))
    assert (image.format, image.mode) == ("PNG", "P")
    np.testing.assert_array_equal(np.asarray(image), labels)
    # As the devkit of the challenge shows them: background, aeroplane, bicycle, bird, cat, person and tvmonitor.
    colors = {0: (0, 0, 0), 1: (128, 0, 0), 2: (0, 128, 0), 3: (128, 128, 0), 8: (64, 0, 0), 15: (192, 128, 128)}
    colors |= {20: (0, 64, 128), 255: (224, 224, 192)}
    shown = np.asarray(image.convert("RGB"))
    for index, color in colors.items():
        assert (shown[labels == index] == color).all(), index


def test_the_colors_of_a_jpeg_keep_their_resolution(device):
    [encoded] = encode(device, ImageEncoding("jpeg", 95))
    assert [component[1:3] for component in Image.open(io.BytesIO(encoded.tobytes())).layer] == [(1, 1)] * 3


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ({}, ImageEncoding("jpeg", 95)),
        ({"format": "webp"}, ImageEncoding("webp", 80)),
        ({"format": "png", "quality": 1}, ImageEncoding("png", 1)),
        ({"quality": 100}, ImageEncoding("jpeg", 100)),
        ({"quality": 90.0}, ImageEncoding("jpeg", 90)),  # JSON and gRPC clients may send any number as a double
        ({"content": "segmented", "edge": 0}, ImageEncoding("jpeg", 95)),
        ({"content": "labels"}, ImageEncoding("png", 100, "labels")),
        ({"content": "labels", "format": "png", "edge": 0.0}, ImageEncoding("png", 100, "labels")),
        ({"format": "webp", "edge": 0.25}, ImageEncoding("webp", 80, edge=0.25)),
        ({"format": "png", "edge": 1}, ImageEncoding("png", 100, edge=1)),
    ],
)
def test_the_format_and_the_quality_have_defaults(parameters, expected):
    assert read_encoding(parameters) == expected


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ({"format": "gif"}, "format must be one of jpeg, png, webp, not 'gif'"),
        ({"format": 5}, "format must be one of jpeg, png, webp, not 5"),
        ({"quality": 0}, "quality must be a whole number between 1 and 100, not 0"),
        ({"quality": 101}, "quality must be a whole number between 1 and 100, not 101"),
        ({"quality": 9.5}, "quality must be a whole number between 1 and 100, not 9.5"),
        ({"quality": float("nan")}, "quality must be a whole number between 1 and 100, not nan"),
        ({"quality": float("inf")}, "quality must be a whole number between 1 and 100, not inf"),
        ({"quality": True}, "quality must be a whole number between 1 and 100, not True"),
        ({"quality": "high"}, "quality must be a whole number between 1 and 100, not 'high'"),
        ({"content": "mask"}, "content must be one of segmented, labels, not 'mask'"),
        ({"content": 1}, "content must be one of segmented, labels, not 1"),
        ({"edge": -0.1}, "edge must be a number between 0 and 1, not -0.1"),
        ({"edge": 2}, "edge must be a number between 0 and 1, not 2"),
        ({"edge": float("nan")}, "edge must be a number between 0 and 1, not nan"),
        ({"edge": "soft"}, "edge must be a number between 0 and 1, not 'soft'"),
        ({"edge": True}, "edge must be a number between 0 and 1, not True"),
        ({"edge": 0.2}, "a jpeg file cannot have a soft edge: set format to png or webp, or omit edge"),
        ({"content": "labels", "edge": 0.2}, "labels have no edge: omit edge, or set content to segmented"),
        (
            {"content": "labels", "format": "jpeg"},
            "a jpeg file cannot contain labels: set format to png, or omit format",
        ),
        (
            {"content": "labels", "format": "webp"},
            "a webp file cannot contain labels: set format to png, or omit format",
        ),
    ],
)
def test_a_bad_parameter_is_rejected_with_the_valid_range(parameters, expected):
    with pytest.raises(InvalidRequest) as error:
        read_encoding(parameters)
    assert str(error.value) == expected


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("name", MAX_SIDE)
def test_each_format_can_be_as_large_as_it_claims(device, name, transposed):
    size = (MAX_SIDE[name], 2) if transposed else (2, MAX_SIDE[name])
    encoding = ImageEncoding(name, DEFAULT_QUALITY[name])
    encoding.check_size(*size[::-1])
    [encoded] = encode(device, encoding, cut_out=np.zeros((*size, 3), np.uint8), mask=np.zeros(size, np.uint8))
    assert pixels(encoded).shape[:2] == size


@pytest.mark.parametrize(
    ("name", "size", "expected"),
    [
        ("jpeg", (1, 65_501), "65500 pixels, but the photo is 1 x 65501: set format to png, or scale"),
        ("webp", (16_384, 1), "16383 pixels, but the photo is 16384 x 1: set format to png, or scale"),
        ("png", (1_000_001, 1), "1000000 pixels, but the photo is 1000001 x 1: scale the photo down"),
        ("jpeg", (1_000_001, 1), "65500 pixels, but the photo is 1000001 x 1: scale the photo down"),
    ],
)
def test_a_photo_that_is_too_large_for_a_format_is_rejected(name, size, expected):
    with pytest.raises(InvalidRequest, match=f"^the width and height of a {name} file are limited to {expected}"):
        ImageEncoding(name, 95).check_size(*size)


def test_a_photo_with_too_much_detail_for_webp_is_rejected(device):
    noise = np.random.default_rng(0).integers(0, 256, (5000, 5000, 3), dtype=np.uint8)
    opaque = np.full(noise.shape[:2], 255, np.uint8)
    with pytest.raises(InvalidRequest, match=r"^the photo is too detailed for webp: lower the quality, or "):
        encode(device, ImageEncoding("webp", 90), cut_out=noise, mask=opaque)
    encode(device, ImageEncoding("webp", 85), cut_out=noise, mask=opaque)


ENCODE_WITHOUT_MEMORY = """
import resource, numpy, psutil
from encoders import _encode_webp
noise = numpy.random.default_rng(0).integers(0, 256, (4000, 4000, 4), dtype=numpy.uint8)
limit = psutil.Process().memory_info().vms + 100_000_000
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
_encode_webp(80, noise)
"""


def test_a_lack_of_memory_is_not_blamed_on_the_photo():
    done = run_python("-c", ENCODE_WITHOUT_MEMORY)
    assert done.stderr.splitlines()[-1] in ("ValueError: encoding error 1", "MemoryError")
