# SPDX-License-Identifier: Apache-2.0
"""What a client does wrong costs it one error that says so, and costs the others nothing."""

import shutil
import struct
import urllib.request
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import ROOT, SAMPLES, Answers, decode, encode, psnr, running_server, sentence
from PIL import Image
from tritonclient.utils import InferenceServerException

PHOTO = SAMPLES["person"][0].read_bytes()
PICTURE = Image.open(SAMPLES["person"][0]).convert("RGB")


def with_size(jpeg: bytes, width: int, height: int) -> bytes:
    """Return the JPEG with another size in its header."""
    position = jpeg.index(b"\xff\xc0") + 5
    return jpeg[:position] + struct.pack(">HH", height, width) + jpeg[position + 4 :]


# As a phone writes it: the preview in front has an end marker of its own.
MPO = encode(PICTURE, "MPO", save_all=True, append_images=[PICTURE.resize((99, 99))])
PREVIEW = b"Exif\0\0" + encode(PICTURE.resize((99, 99)), "JPEG")
WITH_PREVIEW = MPO[:2] + b"\xff\xe1" + struct.pack(">H", len(PREVIEW) + 2) + PREVIEW + MPO[2:]

# Little to send and much to unpack: a chunk of a PNG of 200 MB, and a scan of a JPEG again and again.
PNG, PROGRESSIVE = encode(PICTURE, "PNG"), encode(PICTURE.resize((40, 40)), "JPEG", progressive=True)
ZEROS = zlib.compress(bytes(200_000_000), 1)
LAST_SCAN = PROGRESSIVE[PROGRESSIVE.rindex(b"\xff\xda") : -2]


def with_chunk(png: bytes, kind: bytes, data: bytes) -> bytes:
    """Return the PNG with a chunk behind its first, the header."""
    chunk = struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return png[:33] + chunk + png[33:]


def with_segments(jpeg: bytes, marker: int, contents: Iterable[bytes]) -> bytes:
    """Return the JPEG with segments before all others."""
    segments = [bytes([0xFF, marker]) + struct.pack(">H", len(data) + 2) + data for data in contents]
    return b"".join([jpeg[:2], *segments, jpeg[2:]])


BAD_PHOTOS = {
    "a PNG whose text unpacks to 200 MB": (with_chunk(PNG, b"zTXt", b"Comment\0\0" + ZEROS), "header is damaged"),
    "a PNG whose profile unpacks to 200 MB": (with_chunk(PNG, b"iCCP", b"icc\0\0" + ZEROS), "header is damaged"),
    "a JPEG of 1,010 scans": (PROGRESSIVE[:-2] + 1000 * LAST_SCAN + b"\xff\xd9", "more than 64 scans"),
    "a JPEG of 1,010 scans and a comment with an end": (
        PROGRESSIVE[:-2] + b"\xff\xfe\x00\x04\xff\xd9" + 1000 * LAST_SCAN + b"\xff\xd9",
        "more than 64 scans",
    ),
    "a JPEG with 30,000 comments": (with_segments(PHOTO, 0xFE, [b"comment"] * 30_000), "more than 20000 segments"),
    "random bytes": (np.random.default_rng(0).bytes(5000), "of no known kind"),
    "a truncated JPEG": (PHOTO[:50_000], "truncated"),
    "a JPEG without its last byte": (PHOTO[:-1], "truncated"),
    "a progressive JPEG, truncated": (encode(PICTURE, "JPEG", progressive=True)[:20_000], "truncated"),
    "a JPEG with a preview and a second picture, truncated": (WITH_PREVIEW[: len(WITH_PREVIEW) // 3], "truncated"),
    "a JPEG cut off in the header": (PHOTO[:300], "truncated"),
    "a JPEG whose header is damaged": (PHOTO[:20] + b"damaged" + PHOTO[27:], "damaged"),
    "a truncated PNG": (encode(PICTURE, "PNG")[:50_000], "cannot be decoded"),
    "a truncated WebP": (encode(PICTURE, "WEBP")[:10_000], "damaged"),
    "a truncated BMP": (encode(PICTURE, "BMP")[:50_000], "cannot be decoded"),
    "a GIF": (encode(PICTURE.quantize(64), "GIF"), "of no known kind"),
    "a TIFF": (encode(PICTURE, "TIFF"), "of no known kind"),
    "a PDF": (b"%PDF-1.7\n" + b"1 0 obj << >> endobj\n" * 50, "of no known kind"),
    "a header of 60,000 x 60,000": (with_size(PHOTO, 60_000, 60_000), "60000 x 60000 pixels"),
    "a PNG of 30,000 x 30,000": (encode(Image.new("1", (30_000, 30_000)), "PNG"), "30000 x 30000 pixels"),
}


def refusal(segment: Answers, encoded: bytes, **parameters: object) -> str:
    with pytest.raises(InferenceServerException) as error:
        segment(encoded, **parameters)
    assert str(ROOT) not in str(error.value)  # nothing of where our files are
    return sentence(error.value)


def assert_serves(segment: Answers) -> None:
    # The original alone: the network, which never saw the bad request, takes most of the time without a GPU.
    assert psnr(segment(PHOTO, outputs=("original",))["original"][0], decode(PHOTO)) > 40


@pytest.mark.parametrize("kind", BAD_PHOTOS)
def test_bad_photos(segment, kind):
    encoded, expected = BAD_PHOTOS[kind]
    said = refusal(segment, encoded)
    assert said.startswith("InvalidRequest: the photo")
    assert expected in said
    assert_serves(segment)


LARGE_BUT_GOOD = {
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
def test_large_headers_and_long_photos_are_answered(segment_http, kind):
    answer, expected = segment_http(LARGE_BUT_GOOD[kind]), decode(LARGE_BUT_GOOD[kind])
    assert psnr(answer["original"][0], expected) > 30
    assert answer["segmented"].shape == (1, *expected.shape)


def test_a_jpeg_with_20_scans_is_answered(segment_http):
    # The last one again and again, which the standard does not know: the GPU's decoder makes something else of it.
    encoded = PROGRESSIVE[:-2] + 10 * LAST_SCAN + b"\xff\xd9"
    original, expected = segment_http(encoded)["original"][0], decode(encoded)
    assert original.shape == expected.shape
    assert torch.cuda.is_available() or psnr(original, expected) > 30


def test_empty_body(segment):
    # PyTriton fails before the server sees the request: the sentence is its own.
    assert "cannot cast view with zeros in shape" in refusal(segment, b"")
    assert_serves(segment)


@pytest.mark.parametrize("class_name", ["unicorn", "", "Person", 15])
def test_unknown_class_lists_the_classes(segment, class_name):
    said = refusal(segment, PHOTO, class_name=class_name)
    assert said.startswith(f"InvalidRequest: class_name {class_name!r} is none of ")
    assert len(said.split(" is none of ")[1].split(", ")) == 21
    assert "person" in said
    assert_serves(segment)


@pytest.mark.parametrize("threshold", [-0.1, 1.1, 2, "high", True, ""])
def test_bad_threshold(segment, threshold):
    assert (
        refusal(segment, PHOTO, threshold=threshold)
        == f"InvalidRequest: threshold {threshold!r} is no number from 0 to 1"
    )
    assert_serves(segment)


def test_wrong_type_and_missing_input(server, segment_http):
    for body in (
        b'{"inputs": [{"name": "image", "datatype": "FP32", "shape": [1, 2], "data": [1, 2]}]}',
        b'{"inputs": [{"name": "picture", "datatype": "UINT8", "shape": [1, 2], "data": [1, 2]}]}',
        b'{"inputs": []}',
        b"no JSON",
    ):
        request = urllib.request.Request(f"{server.http_url}/v2/models/ResNet101/infer", data=body)
        with pytest.raises(urllib.error.HTTPError) as error:
            urllib.request.urlopen(request)
        assert error.value.code in (400, 500)
    assert_serves(segment_http)


def test_nothing_grows_and_nothing_restarts(server, segment_http):
    def memory() -> int:  # with what is in /dev/shm and no process has any more
        return server.memory() + shutil.disk_usage("/dev/shm").used

    bad = [b"", *(encoded for encoded, _ in BAD_PHOTOS.values())]
    for encoded in bad * 40:  # until each instance has seen its share
        refusal(segment_http, encoded)
    before, processes = memory(), {process.pid for process in server.family()}
    for encoded in bad * 40:
        refusal(segment_http, encoded)
    # Triton's processes, several an instance, keep the memory that they once used; the requests alone would be 190 MB.
    assert memory() < before + 2e6 * len(processes)
    assert {process.pid for process in server.family()} == processes
    assert segment_http(PHOTO)["segmented"].any(axis=3).mean() > 0.3


def test_the_log_has_one_line_for_each_refused_request(server, segment_http):
    before = len(server.log.read_text().splitlines())
    refusal(segment_http, PHOTO, class_name="unicorn")
    refusal(segment_http, PHOTO[:50_000])
    lines = server.log.read_text().splitlines()[before:]
    assert len([line for line in lines if "refused a request" in line]) == len(lines) == 2


def test_a_bad_photo_costs_its_company_nothing(tmp_path):
    bad, good = encode(PICTURE, "PNG")[:20_000], PHOTO
    options = "--weights demo --device cpu --instances 2 --max-batch-size 2"
    with running_server(tmp_path / "server.log", *options.split()) as server, ThreadPoolExecutor(6) as pool:
        answers = [pool.submit(Answers(server, "grpc"), photo) for photo in (good, bad, good, bad, good, bad)]
        for index, answer in enumerate(answers):
            if index % 2:
                with pytest.raises(InferenceServerException, match="InvalidRequest: the photo cannot be decoded"):
                    answer.result()
            else:
                assert answer.result()["segmented"].any(axis=3).mean() > 0.3
