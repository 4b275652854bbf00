# SPDX-License-Identifier: Apache-2.0
"""A bad request gets one error that says what is wrong, and does not affect other clients."""

import random
import struct
import urllib.error
import urllib.request
import zlib

import numpy as np
import pytest
from conftest import MODEL_NAME, PHOTO, ROOT, decode, encode, psnr, sample, with_chunk, with_segments
from hostile_photos import blocks_jpeg
from PIL import Image

from client import Connection, InferenceError
from tools.launch import DIRECT

PICTURE = sample("person")


def with_size(jpeg: bytes, width: int, height: int) -> bytes:
    """Return the JPEG with another size in its header."""
    position = jpeg.index(b"\xff\xc0") + 5
    return jpeg[:position] + struct.pack(">HH", height, width) + jpeg[position + 4 :]


# As a phone writes it: the preview at the front has its own end marker.
MPO = encode(PICTURE, "MPO", save_all=True, append_images=[PICTURE.resize((99, 99))])
WITH_PREVIEW = with_segments(MPO, 0xE1, [b"Exif\0\0" + encode(PICTURE.resize((99, 99)), "JPEG")])

# Little to send and much to unpack: a chunk of a PNG of 200 MB, and a JPEG with a scan for each coefficient.
PNG = encode(PICTURE, "PNG")
ZEROS = zlib.compress(bytes(200_000_000), 1)
MANY_SCANS = blocks_jpeg((40, 40), [(1, 1)] * 3, random.Random(0), progressive=True, bands=63)

SIZE = PHOTO[PHOTO.index(b"\xff\xc0") + 4 :][:15]  # the frame of a baseline JPEG, which states the size
FRAMES = {"save_all": True, "append_images": [PICTURE.resize((512, 512)).rotate(90)], "duration": 100}

BAD_PHOTOS = {
    "a JPEG of 191 scans": (MANY_SCANS, "more than 64 scans"),
    "a JPEG of 191 scans and a comment with an end": (
        with_segments(MANY_SCANS, 0xFE, [b"\xff\xd9"]),
        "more than 64 scans",
    ),
    "a JPEG with 30,000 comments": (with_segments(PHOTO, 0xFE, [b"comment"] * 30_000), "more than 20000 segments"),
    "a JPEG that ends before its pixels": (PHOTO[:2] + b"\xff\xd9" + PHOTO[2:], r"is damaged \("),
    "a JPEG with two sizes": (with_segments(PHOTO, 0xC0, [SIZE]), r"is damaged \("),
    "a JPEG of no width": (with_size(PHOTO, 0, 100), r"is damaged \("),
    "a JPEG of no height": (with_size(PHOTO, 100, 0), "states its height after its pixels"),
    "a JPEG with a reserved marker": (with_segments(PHOTO, 0xF0, [b"123456"]), r"is damaged \("),
    "a PNG with 30,000 chunks": (with_chunk(PNG, b"prVt", b"", 30_000), "more than 20000 segments"),
    "a PNG with two headers": (with_chunk(PNG, b"IHDR", PNG[16:29]), "it must start with its only IHDR chunk"),
    "random bytes": (np.random.default_rng(0).bytes(5000), "of an unknown type"),
    "a truncated JPEG": (PHOTO[:50_000], "truncated"),
    "a JPEG without its last byte": (PHOTO[:-1], "truncated"),
    "a progressive JPEG, truncated": (encode(PICTURE, "JPEG", progressive=True)[:20_000], "truncated"),
    "a JPEG with a preview and a second picture, truncated": (WITH_PREVIEW[: len(WITH_PREVIEW) // 3], "truncated"),
    "a JPEG cut off in the header": (PHOTO[:300], "truncated"),
    "a JPEG whose header is damaged": (PHOTO[:20] + b"damaged" + PHOTO[27:], "damaged"),
    "a truncated PNG": (PNG[:50_000], "truncated"),
    "a truncated WebP": (encode(PICTURE, "WEBP")[:10_000], "truncated"),
    "a truncated BMP": (encode(PICTURE, "BMP")[:50_000], "truncated"),
    "a GIF": (encode(PICTURE.quantize(64), "GIF"), "of an unknown type"),
    "a TIFF": (encode(PICTURE, "TIFF"), "of an unknown type"),
    "a PDF": (b"%PDF-1.7\n" + b"1 0 obj << >> endobj\n" * 50, "of an unknown type"),
    "an animated PNG": (encode(PICTURE, "PNG", **FRAMES), "an animation: send one of its frames"),
    "an animated WebP": (encode(PICTURE, "WEBP", **FRAMES), "an animation: send one of its frames"),
    "a header of 60,000 x 60,000": (with_size(PHOTO, 60_000, 60_000), "60000 x 60000 pixels"),
    "a PNG of 30,000 x 30,000": (encode(Image.new("1", (30_000, 30_000)), "PNG"), "30000 x 30000 pixels"),
}


def rejection(connection: Connection, encoded: bytes, **parameters: object) -> str:
    """Return the sentence with which the server rejects a request."""
    with pytest.raises(InferenceError) as error:
        connection.infer(encoded, parameters=parameters)
    assert str(ROOT) not in str(error.value.__cause__)  # no path of this machine
    return str(error.value)


def assert_it_serves(connection: Connection) -> None:
    # The original alone, because without a GPU the network takes most of the time.
    assert psnr(connection.infer(PHOTO, ("original",))["original"][0], decode(PHOTO)) > 40


@pytest.mark.parametrize("kind", BAD_PHOTOS)
def test_a_bad_photo_is_rejected_with_what_is_wrong(connection, kind):
    encoded, expected = BAD_PHOTOS[kind]
    with pytest.raises(InferenceError, match=f"^the photo.*{expected}") as error:
        connection.infer(encoded)
    assert f"InvalidRequest: {error.value}" in str(error.value.__cause__)
    assert str(ROOT) not in str(error.value.__cause__)  # no path of this machine
    assert_it_serves(connection)


LARGE_BUT_GOOD = {
    "a PNG whose text unpacks to 200 MB": with_chunk(PNG, b"zTXt", b"Comment\0\0" + ZEROS),
    "a PNG whose profile unpacks to 200 MB": with_chunk(PNG, b"iCCP", b"icc\0\0" + ZEROS),
    "a PNG with text of 1.5 MB": with_chunk(PNG, b"iTXt", b"parameters\0\0\0\0\0" + bytes(1_500_000)),
    "a JPEG with a profile of 13 MB": with_segments(
        PHOTO, 0xE2, (b"ICC_PROFILE\0" + bytes([number, 200]) + bytes(65_000) for number in range(1, 201))
    ),
    "a JPEG with EXIF data of 1 MB": with_segments(PHOTO, 0xE1, [b"Exif\0\0" + bytes(65_000)] * 16),
    "a JPEG with 10,000 comments": with_segments(PHOTO, 0xFE, [b"comment"] * 10_000),
    "a PNG of 100,000 x 1": encode(PICTURE.resize((100_000, 1)), "PNG"),
    "a PNG of 1 x 100,000": encode(PICTURE.resize((1, 100_000)), "PNG"),
    "a JPEG of 65,500 x 1": encode(PICTURE.resize((65_500, 1)), "JPEG"),
}


@pytest.mark.parametrize("kind", LARGE_BUT_GOOD)
def test_photos_with_large_headers_and_long_photos_are_processed(http_connection, kind):
    expected = decode(PNG if "unpacks" in kind else LARGE_BUT_GOOD[kind])  # Pillow rejects text of that size
    response = http_connection.infer(LARGE_BUT_GOOD[kind])
    assert psnr(response["original"][0], expected) > 30
    assert response["segmented"].shape == (1, *expected.shape)


def test_a_jpeg_of_20_scans_is_processed(http_connection):
    encoded = blocks_jpeg((40, 40), [(1, 1)] * 3, random.Random(0), progressive=True, bands=6)
    assert encoded.count(b"\xff\xda") == 20
    assert psnr(http_connection.infer(encoded, ("original",))["original"][0], decode(encoded)) > 40


def test_an_empty_body_is_rejected(connection):
    assert rejection(connection, b"") == "the input image is empty"
    assert_it_serves(connection)


@pytest.mark.parametrize("class_name", ["unicorn", "", "Person", 15, "cat,unicorn"])
def test_an_unknown_class_is_rejected_with_the_names_of_all_classes(connection, class_name):
    sentence = rejection(connection, PHOTO, class_name=class_name)
    valid, _, wrong = sentence.partition(", or several separated by commas, not ")
    names = valid.removeprefix("class_name must be one of ").split(", ")
    assert wrong == repr(class_name)
    assert len(names) == 21
    assert (names[0], names[15], names[20]) == ("__background__", "person", "tvmonitor")
    assert_it_serves(connection)


@pytest.mark.parametrize("threshold", [-0.1, 1.1, 2, "high", True, ""])
def test_a_bad_threshold_is_rejected_with_the_valid_range(connection, threshold):
    expected = f"threshold must be a number between 0 and 1, not {threshold!r}"
    assert rejection(connection, PHOTO, threshold=threshold) == expected
    assert_it_serves(connection)


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ({"format": "gif"}, "format must be one of jpeg, png, webp, not 'gif'"),
        ({"quality": 0}, "quality must be a whole number between 1 and 100, not 0"),
        ({"quality": 50.5}, "quality must be a whole number between 1 and 100, not 50.5"),
        ({"content": "mask"}, "content must be one of segmented, labels, not 'mask'"),
        ({"edge": 1.5}, "edge must be a number between 0 and 1, not 1.5"),
        ({"edge": 0.5}, "a jpeg file cannot have a soft edge: set format to png or webp, or omit edge"),
        (
            {"content": "labels", "format": "webp"},
            "a webp file cannot contain labels: set format to png, or omit format",
        ),
    ],
)
def test_a_bad_parameter_of_the_file_is_rejected_with_what_is_valid(connection, parameters, expected):
    assert rejection(connection, PHOTO, **parameters) == expected
    assert_it_serves(connection)


def test_a_parameter_of_the_file_without_the_file_is_rejected(connection):
    with pytest.raises(
        InferenceError, match=r"^format is for the output encoded: request that output, or omit format$"
    ):
        connection.infer(PHOTO, ("mask",), {"format": "png"})
    assert_it_serves(connection)


def test_an_unknown_parameter_is_rejected_with_the_names_of_all(connection):
    expected = "unknown parameter 'treshold', not one of class_name, threshold, format, quality, content, edge"
    assert rejection(connection, PHOTO, treshold=0.9, threshold=0.5) == expected
    assert_it_serves(connection)


@pytest.mark.parametrize(
    "body",
    [
        b'{"inputs": [{"name": "image", "datatype": "FP32", "shape": [1, 2], "data": [1, 2]}]}',
        b'{"inputs": [{"name": "picture", "datatype": "UINT8", "shape": [1, 2], "data": [1, 2]}]}',
        b'{"inputs": []}',
        b"no JSON",
    ],
)
def test_a_request_of_the_wrong_form_is_an_error(server, http_connection, body):
    request = urllib.request.Request(f"{server.http_url}/v2/models/{MODEL_NAME}/infer", data=body)
    with pytest.raises(urllib.error.HTTPError) as error:
        DIRECT.open(request)
    assert error.value.code in (400, 500)
    assert_it_serves(http_connection)


def test_the_log_has_one_line_for_each_rejected_request(server, http_connection):
    before = len(server.log.read_text().splitlines())
    rejection(http_connection, PHOTO, class_name="unicorn")
    rejection(http_connection, PHOTO[:50_000])
    lines = server.log.read_text().splitlines()[before:]
    assert len([line for line in lines if "WARNING server: a request failed: " in line]) == len(lines) == 2
