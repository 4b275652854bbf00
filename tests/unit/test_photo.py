# SPDX-License-Identifier: Apache-2.0
"""Reading a photo: the rebuilt file, rejections, and the orientation."""

import contextlib
import io
import itertools
import random
import struct
import zlib

import numpy as np
import pytest
from conftest import PHOTO, as_photo, decode, encode, sample, with_chunk, with_segments
from hostile_photos import (
    ADAM7,
    ENCODERS,
    FORMATS,
    JFIF,
    any_bmp,
    blocks_jpeg,
    chunk,
    exif_block,
    hostile_photo,
    ihdr,
    riff,
    segment,
    split,
)
from PIL import Image

from photo import InvalidPhoto
from photo.base import read_orientation

PICTURE = sample("cat", (120, 80))
JPEG, PNG, WEBP = (encode(PICTURE, name) for name in ("JPEG", "PNG", "WEBP"))
XMP = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'


def exif(*orientations: int) -> list[bytes]:
    """Return an EXIF block for each orientation."""
    return [b"II*\0\x08\0\0\0\1\0" + struct.pack("<HHIH", 0x0112, 3, 1, value) + bytes(6) for value in orientations]


def jpeg_with(blocks: list[bytes]) -> bytes:
    return with_segments(JPEG, 0xE1, [b"Exif\0\0" + block for block in blocks])


def png_with(blocks: list[bytes]) -> bytes:
    """Return a PNG with one block before the pixels and the others after them."""
    parts = split(PNG, "PNG")
    chunks = [chunk(b"eXIf", block) for block in blocks]
    return b"".join([*parts[:2], chunks[0], *parts[2:-1], *chunks[1:], parts[-1]])


def webp_with(blocks: list[bytes]) -> bytes:
    size = struct.pack("<I", 119)[:3] + struct.pack("<I", 79)[:3]
    image = split(WEBP, "WEBP")[1]
    return riff((b"VP8X", b"\x08\0\0\0" + size), (image[:4], image[8:]), *[(b"EXIF", block) for block in blocks])


@pytest.mark.parametrize("with_exif", [jpeg_with, png_with, webp_with])
def test_the_first_exif_block_decides_about_the_orientation(with_exif):
    for first, second in itertools.product(range(10), repeat=2):
        photo = as_photo(with_exif(exif(first, second)))
        assert photo.orientation == (first if 1 <= first <= 8 else 1)
        assert b"II*" not in photo.encoded.tobytes()
        assert (photo.width, photo.height) == (120, 80)


def test_the_orientation_is_read_by_one_rule():
    for number in range(2000):
        block, orientation = exif_block(random.Random(number))
        assert read_orientation(block) == orientation, number
    for junk in (b"", b"II*\0", b"II*\0\xff\xff\xff\xff", bytes(70_000), b"MM\0*\0\0\0\x08\xff\xff" + bytes(65_000)):
        assert read_orientation(junk) == 1


def test_orientation_in_xmp_does_not_count():
    assert as_photo(with_segments(JPEG, 0xE1, [b"http://ns.adobe.com/xap/1.0/\0" + XMP])).orientation == 1
    assert as_photo(with_chunk(PNG, b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP)).orientation == 1


@pytest.mark.parametrize("file_format", FORMATS)
def test_a_rebuilt_photo_has_the_same_pixels_and_is_not_changed_again(file_format):
    for number in range(300):
        data = ENCODERS[file_format](random.Random(number))
        photo = as_photo(data)
        rebuilt = photo.encoded.tobytes()
        np.testing.assert_array_equal(as_photo(rebuilt).encoded, photo.encoded)
        pixels = decode(rebuilt)
        assert pixels.shape == (photo.height, photo.width, 3)
        np.testing.assert_array_equal(pixels, decode(data))


SECRETS = [b"secret %d" % number for number in range(12)]
WITH_METADATA = {
    "JPEG": with_segments(
        with_segments(with_segments(jpeg_with([exif(1)[0] + SECRETS[0]]), 0xFE, [SECRETS[1]]), 0xE2, [SECRETS[2]]),
        0xED,
        [SECRETS[3]],
    )
    + SECRETS[4],
    "PNG": with_chunk(with_chunk(with_chunk(PNG, b"tEXt", SECRETS[0]), b"iCCP", SECRETS[1]), b"prVt", SECRETS[2])
    + SECRETS[3],
    "WEBP": riff(
        *[(split(WEBP, "WEBP")[1][:4], split(WEBP, "WEBP")[1][8:])], (b"XMP ", SECRETS[0]), (b"abcd", SECRETS[1])
    )
    + SECRETS[2],
    "BMP": encode(PICTURE, "BMP") + SECRETS[0],
}


@pytest.mark.parametrize("file_format", FORMATS)
def test_nothing_but_the_image_reaches_the_decoder(file_format):
    data = WITH_METADATA[file_format]
    rebuilt = as_photo(data).encoded.tobytes()
    assert b"secret" in data
    assert b"secret" not in rebuilt
    np.testing.assert_array_equal(
        decode(rebuilt), decode({"JPEG": JPEG, "PNG": PNG, "WEBP": WEBP}.get(file_format, data))
    )


def test_reading_a_truncated_file_raises_nothing_but_invalid_photo():
    for number in range(300):
        data = hostile_photo(number).data
        for end in {1, 2, 3, 11, 12, 13, 20, 30, len(data) // 2, len(data) - 1} & {*range(len(data))}:
            with contextlib.suppress(InvalidPhoto):
                as_photo(data[:end])


FRAME = PHOTO.index(b"\xff\xc0") + 4  # after the frame's length
DC_ONLY = blocks_jpeg((64, 64), [(1, 1)], random.Random(0))


def bmp(bits: int, compression: int) -> bytes:
    """Return a BMP with these numbers in its header, and more pixels than it needs."""
    header = struct.pack("<IiiHHIIiiII", 40, 10, 10, 1, bits, compression, 0, 1, 1, 0, 0)
    return struct.pack("<2sIHHI", b"BM", 3000, 0, 0, 1078) + header.ljust(1064, b"\0") + bytes(2000)


REJECTED = {
    "a BMP of 16 bits": (bmp(16, 0), "a BMP with 16 bits per pixel and no color masks, which is not supported"),
    "a BMP with RLE4": (bmp(4, 2), "a BMP with 4 bits per pixel and RLE4 compression, which is not supported"),
    "a BMP with RLE8": (bmp(8, 1), "a BMP with 8 bits per pixel and RLE8 compression, which is not supported"),
    "a BMP with a JPEG in it": (bmp(24, 4), "a BMP with 24 bits per pixel and an unknown compression"),
    "a BMP with 4 bits per color": (bmp(16, 3), "a BMP with unusual color masks"),
    "a JPEG of 12 bits": (PHOTO[:FRAME] + b"\x0c" + PHOTO[FRAME + 1 :], "has 12 bits per color: save it with 8"),
    "a JPEG with DNL": (with_segments(PHOTO, 0xDC, [b"\0\x40"]), "states its height after its pixels (DNL)"),
    "a JPEG without a height": (
        PHOTO[: FRAME + 1] + b"\0\0" + PHOTO[FRAME + 3 :],
        "states its height after its pixels",
    ),
    "an arithmetic-coded JPEG": (PHOTO.replace(b"\xff\xc0", b"\xff\xc9", 1), "an arithmetic-coded, lossless or hier"),
    "a JPEG with a table too many": (with_segments(PHOTO, 0xDB, [65 * b"\1"] * 1001), "more than 1000 tables"),
    "a JPEG with a scan twice": (DC_ONLY[:-2] + DC_ONLY[DC_ONLY.index(b"\xff\xda") :], "scans out of order"),
    "an APNG by its count": (with_chunk(PNG, b"acTL", struct.pack(">II", 1, 0)), "an animation"),
    "an APNG with two counts": (with_chunk(PNG, b"acTL", struct.pack(">II", 1 << 31, 0), 2), "an animation"),
    "an APNG without a count": (PNG[:-12] + chunk(b"fdAT", bytes(9)) + PNG[-12:], "an animation"),
    "a WebP that says it is animated": (
        webp_with([]).replace(b"VP8X\x0a\0\0\0\x08", b"VP8X\x0a\0\0\0\2"),
        "an animation",
    ),
    "a WebP with a frame": (riff((b"ANMF", bytes(20)), (b"VP8 ", WEBP[20:])), "an animation"),
    "a WebP with two images": (riff((b"VP8 ", WEBP[20:]), (b"VP8 ", WEBP[20:])), "two images"),
    "a WebP with two sizes": (webp_with([]).replace(b"\x77\0\0\x4f", b"\x78\0\0\x4f"), "differ in size"),
    "a PNG of Apple's": (with_chunk(PNG, b"CgBI", bytes(4)), "an unknown critical chunk"),
    "a PNG with pixels in two places": (
        PNG[:-12] + chunk(b"tEXt", b"") + chunk(b"IDAT", b"") + PNG[-12:],
        "several places",
    ),
}


@pytest.mark.parametrize("kind", REJECTED)
def test_an_unsupported_photo_is_rejected_with_a_sentence_that_says_so(kind):
    data, expected = REJECTED[kind]
    with pytest.raises(InvalidPhoto) as error:
        as_photo(data)
    assert expected in str(error.value)
    assert str(error.value).startswith("the photo")


def as_pixels(data: bytes) -> np.ndarray:
    return decode(as_photo(data).encoded.tobytes())


def test_unusual_files_of_some_encoders_are_accepted():
    dice = random.Random(0)
    restarts = blocks_jpeg((64, 64), [(1, 1)], dice, interval=3)
    surplus = restarts[:-2] + bytes([0xFF, 0xD0 + (64 + 2) // 3 % 8 - 1, 0xFF, 0xD9])
    np.testing.assert_array_equal(as_pixels(surplus), decode(restarts))
    separate = blocks_jpeg((64, 64), [(1, 1)] * 3, dice, interleaved=False)
    table, scan = segment(0xDB, b"\0" + 64 * b"\x10"), separate.rindex(b"\xff\xda")
    np.testing.assert_array_equal(as_pixels(separate[:scan] + table + separate[scan:]), decode(separate))
    # libjpeg's progressive CMYK has 18 scans.
    large = io.BytesIO()
    Image.new("CMYK", (5000, 5000)).save(large, "JPEG", progressive=True)
    assert as_photo(large.getvalue()).width == 5000


@pytest.mark.parametrize("surplus", [-300, -1, 0, 1, 100_000])
@pytest.mark.parametrize("interlaced", [False, True])
def test_a_png_has_as_many_pixels_as_its_size(surplus, interlaced):
    size = range(10)
    passes = [(size[y::down], size[x::right]) for x, y, right, down in (ADAM7 if interlaced else ((0, 0, 1, 1),))]
    raw = sum(len(rows) * (1 + 3 * len(columns)) for rows, columns in passes if columns)
    pixels = chunk(b"IDAT", zlib.compress(bytes(raw + surplus)))
    data = PNG[:8] + ihdr(10, 10, interlaced=interlaced) + pixels + PNG[-12:]
    if surplus == 0:
        assert not as_pixels(data).any()
    else:
        with pytest.raises(
            InvalidPhoto, match="pixels are missing" if surplus < 0 else "more pixel data than its size"
        ):
            as_photo(data)


@pytest.mark.parametrize("transform", [None, 0, 2])
def test_four_colors_mean_what_they_mean_in_pillow(transform):
    colors = b"" if transform is None else segment(0xEE, b"Adobe\0\x64\0\0\0\0" + bytes([transform]))
    data = blocks_jpeg((40, 30), [(1, 1)] * 4, random.Random(0), colors=colors)
    rebuilt = as_photo(data).encoded.tobytes()
    assert Image.open(io.BytesIO(rebuilt)).mode == "CMYK"
    np.testing.assert_array_equal(decode(rebuilt), decode(data))


def test_only_what_nvjpeg_decodes_like_others_is_sent_to_it():
    dice, adobe = random.Random(0), segment(0xEE, b"Adobe\0\x64\0\0\0\0\0")
    three = [(1, 1)] * 3
    suits = {
        "gray": blocks_jpeg((64, 64), [(1, 1)], dice),
        "YCbCr": blocks_jpeg((64, 64), three, dice),
        "YCbCr without a marker": blocks_jpeg((64, 64), three, dice, colors=b""),
        "progressive": blocks_jpeg((64, 64), three, dice, progressive=True),
        "both markers": blocks_jpeg((64, 64), three, dice, colors=JFIF + adobe),
    }
    does_not = {
        "RGB": blocks_jpeg((64, 64), three, dice, colors=adobe),
        "RGB by its numbers": blocks_jpeg((64, 64), three, dice, colors=b"", ids=b"RGB"),
        "CMYK": blocks_jpeg((64, 64), [(1, 1)] * 4, dice, colors=adobe),
        "restart markers": blocks_jpeg((64, 64), three, dice, interval=2),
        "only edges": blocks_jpeg((64, 15), three, dice),
        "PNG": PNG,
        "WebP": WEBP,
        "BMP": any_bmp(random.Random(1)),
    }
    assert {kind: as_photo(data).suits_nvjpeg for kind, data in (suits | does_not).items()} == dict.fromkeys(
        suits, True
    ) | dict.fromkeys(does_not, False)
