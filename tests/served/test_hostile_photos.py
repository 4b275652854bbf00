# SPDX-License-Identifier: Apache-2.0
"""No photo harms the server or another client. tests/long/test_fuzz.py is the long form of the first test."""

import hashlib
import re
import threading
import time
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import chain

import pytest
from conftest import PHOTO, decode, encode, psnr, sample, with_chunk, with_segments, with_wrong_checksum
from fuzzing import Canaries, send_hostile_photos
from hostile_photos import FORMATS, chunk, ihdr, riff, split

from client import InferenceError

COUNT, CLIENTS = 400, 4
PICTURE = sample("cat", (120, 80))
JPEG, PNG, WEBP, BMP = (encode(PICTURE, name) for name in ("JPEG", "PNG", "WEBP", "BMP"))
WEBP_CHUNK = split(WEBP, "WEBP")[1]


def test_each_hostile_photo_gets_its_own_pixels_or_one_sentence(server):
    with ThreadPoolExecutor(CLIENTS) as pool:
        shares = [range(client, COUNT, CLIENTS) for client in range(CLIENTS)]
        outcomes = Counter(chain.from_iterable(pool.map(send_hostile_photos, [server] * CLIENTS, shares)))
    assert outcomes.total() == COUNT
    assert not [outcome for outcome in outcomes if outcome.startswith("NOT")]
    assert {f"{file_format} processed: original" for file_format in FORMATS} < set(outcomes)


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("options", [{"subsampling": 0}, {"subsampling": 2}, {"restart_marker_rows": 1}])
def test_a_jpeg_that_ends_early_contains_nothing_of_other_photos(http_connection, options, kept):
    # The GPU's JPEG hardware leaves the rest of such a photo as it was in memory. See pipelines.py.
    whole = encode(sample("person", (320, 240)), "JPEG", quality=90, **options)
    data = split(whole, "JPEG")[-2]
    end = len(whole) - 2 - round((1 - kept) * len(data))
    end -= whole[end - 1] == 0xFF
    canaries = Canaries(seed=end)
    for _ in range(20):
        canaries.send(http_connection, 320, 240, "JPEG")
        try:
            response = http_connection.infer(whole[:end] + b"\xff\xd9", ("original",))
        except InferenceError:
            continue
        assert response["original"].shape == (1, 240, 320, 3)
        assert not canaries.are_in(response["original"])


ESCAPES = b"a\n2026-11-26 20:00:00,000 CRITICAL server: forged\x1b[2J\rforged"
WITH_ESCAPES = {
    "JPEG": with_segments(with_segments(JPEG, 0xFE, [ESCAPES]), 0xE2, [b"ICC_PROFILE\0" + ESCAPES]),
    "PNG": with_chunk(with_chunk(PNG, b"iCCP", ESCAPES + b"\0\0" + zlib.compress(bytes(100))), b"tEXt", ESCAPES, 4000),
    "WebP": riff((WEBP_CHUNK[:4], WEBP_CHUNK[8:]), (b"ICCP", ESCAPES), (b"XMP ", ESCAPES)),
    "BMP": BMP + ESCAPES,
    "damaged PNG": with_wrong_checksum(PNG),
}


@pytest.mark.parametrize("kind", WITH_ESCAPES)
def test_a_photo_does_not_write_lines_into_the_log(server, http_connection, kind):
    photo, before = WITH_ESCAPES[kind], len(server.log.read_bytes())
    try:
        assert psnr(http_connection.infer(photo, ("original",))["original"][0], decode(photo)) > 40
        lines = server.log.read_bytes()[before:].decode().splitlines()
        assert lines == []
    except InferenceError:
        printed, rejected = server.log.read_bytes()[before:].decode().splitlines()
        assert re.search(r'WARNING server: a library printed "[ -~]+" while it processed image of ', printed)
        assert printed.endswith(f"{len(photo)} bytes with SHA-256 {hashlib.sha256(photo).hexdigest()}")
        assert "WARNING server: a request failed: the photo cannot be decoded" in rejected
        assert kind == "damaged PNG"


# One row of one pixel, and zeros after it, compressed a part at a time.
stream = zlib.compressobj()
BOMB = stream.compress(b"\0abc") + stream.flush(zlib.Z_FULL_FLUSH)
BOMB += 128 * (stream.compress(bytes(1 << 24)) + stream.flush(zlib.Z_FULL_FLUSH))

SLOW = {
    "a PNG whose pixels inflate to 2 GB": PNG[:8] + ihdr(1, 1) + chunk(b"IDAT", BOMB) + chunk(b"IEND", b""),
    "a JPEG with 19,900 comments": with_segments(JPEG, 0xFE, [bytes(2000)] * 19_900),
    "a JPEG with 700 EXIF blocks": with_segments(
        JPEG, 0xE1, [b"Exif\0\0MM\0*\0\0\0\x08\x15\x50" + bytes(65_000)] * 700
    ),
    "a JPEG with 40 MB of fill bytes": JPEG[:2] + bytes([0xFF]) * 40_000_000 + JPEG[2:],
    "a JPEG with 2 million tables": with_segments(JPEG, 0xC4, [(b"\0\1" + bytes(16)) * 3600] * 600),
    "a PNG with 19,900 profiles of 1 MB": with_chunk(PNG, b"iCCP", b"a\0\0" + zlib.compress(bytes(1 << 20)), 19_900),
    "a PNG with 19,900 chunks of pixels": with_chunk(PNG, b"IDAT", b"", 19_900),
    "a WebP with 19,900 nested chunks": riff(*[(b"RIFF", riff((b"RIFF", bytes(1900))))] * 19_900),
    "a BMP with 40 MB before its pixels": BMP[:10] + (40_000_000).to_bytes(4, "little") + BMP[14:] + bytes(40_000_000),
}


@pytest.mark.parametrize("kind", SLOW)
def test_a_photo_that_takes_long_to_read_does_not_hold_up_another(server, kind):
    connection = server.connect("http")

    def seconds() -> float:
        began = time.monotonic()
        connection.infer(PHOTO, ("original",))
        return time.monotonic() - began

    usual = max(seconds() for _ in range(5))
    with ThreadPoolExecutor(1) as pool:
        slow, waited = pool.submit(server.connect("grpc").infer, SLOW[kind], ("original",)), []
        while not slow.done():
            waited.append(seconds())
    assert max(waited) < usual + 0.5


def test_clients_that_are_rejected_again_and_again_do_not_keep_others_from_being_processed(server):
    rejected, over = with_segments(JPEG, 0xFE, [b""] * 20_001), threading.Event()

    def send() -> int:
        connection, count = server.connect("grpc"), 0
        while not over.is_set():
            with pytest.raises(InferenceError, match="more than 20000 segments"):
                connection.infer(rejected, ("original",))
            count += 1
        return count

    connection = server.connect("grpc")
    with ThreadPoolExecutor(4) as pool:
        senders = [pool.submit(send) for _ in range(4)]
        waited = []
        for _ in range(20):
            began = time.monotonic()
            connection.infer(PHOTO, ("original",))
            waited.append(time.monotonic() - began)
        over.set()
        assert min(sender.result() for sender in senders) > 1
    assert max(waited) < 1.5
