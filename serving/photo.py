# SPDX-License-Identifier: Apache-2.0
"""Checks an encoded photo before it is decoded."""

import io
import re

import numpy as np
from PIL import Image, UnidentifiedImageError

from serving.errors import InvalidRequest

# A JPEG of pure noise at the highest quality has 2 bytes per pixel (with 4:2:0 colors). A camera adds a header.
MAX_BYTES_PER_PIXEL = 2
MAX_HEADER_BYTES = 1 << 20

# Encoders write about 10 scans into a progressive JPEG. Each costs its sender a few bytes, and makes the decoder visit
# every pixel: 44 bytes cost 70 ms at 25 megapixels.
MAX_SCANS = 64
MAX_SEGMENTS = 20_000
# A marker that starts a segment or ends the image: not a stuffed 0xFF, padding, or a restart marker.
JPEG_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]", re.DOTALL)
END_OF_IMAGE, START_OF_SCAN = 0xD9, 0xDA
FRAME_HEADERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
SEGMENTS = FRAME_HEADERS | {0xC4, 0xCC, *range(0xDA, 0xDE), *range(0xE0, 0xF0), 0xFE}  # and tables, scans, metadata

# Pillow would refuse large photos before we do, in its own words.
Image.MAX_IMAGE_PIXELS = None

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"

ADVICE = "send a JPEG, PNG, BMP or WebP file"
DAMAGED_HEADER = f"the photo's header is damaged: {ADVICE}"
TOO_MUCH_METADATA = f"the photo has more than {MAX_SEGMENTS} segments: save it without metadata"


def max_photo_bytes(max_pixels: int) -> int:
    """Return the largest number of bytes that an encoded photo may have."""
    return max_pixels * MAX_BYTES_PER_PIXEL + MAX_HEADER_BYTES


def blank_photo(width: int = 640, height: int = 480) -> np.ndarray:
    """Return an encoded photo, uint8 ``[N]``, to warm up with."""
    stream = io.BytesIO()
    Image.new("RGB", (width, height)).save(stream, "JPEG")
    return np.frombuffer(stream.getvalue(), np.uint8)


def check_photo(encoded: np.ndarray, max_pixels: int) -> tuple[int, int]:
    """Check an encoded photo, uint8 ``[N]``, without decoding it, and return its width and height.

    EXIF orientation is not applied to them. Raises InvalidRequest.
    """
    data = encoded.tobytes()
    if not data:
        raise InvalidRequest(f"the photo is empty: {ADVICE}")
    width, height = _check_jpeg(data) if data.startswith(b"\xff\xd8") else _check_other(data)
    if width * height > max_pixels:
        raise InvalidRequest(
            f"the photo is {width} x {height} pixels, but this server accepts at most {max_pixels} pixels: "
            "scale it down, or raise the server's --max-pixels"
        )
    return width, height


def _check_other(data: bytes) -> tuple[int, int]:
    """Return the width and height of a photo that is not a JPEG. Raises InvalidRequest."""
    if data.startswith(PNG_SIGNATURE):
        _check_png(data)
    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "BMP", "WEBP")) as image:
            size, frames = image.size, getattr(image, "n_frames", 1)
    except UnidentifiedImageError:
        raise InvalidRequest(f"the photo ({len(data)} bytes) is damaged or of an unknown type: {ADVICE}") from None
    except Exception as error:  # Pillow's parsers raise whatever the damage makes them stumble over.
        raise InvalidRequest(f"the photo's header is damaged ({type(error).__name__}): {ADVICE}") from None
    if frames > 1:
        raise InvalidRequest(f"the photo is an animation of {frames} frames: send one of them as a still image")
    return size


def _check_jpeg(data: bytes) -> tuple[int, int]:
    """Walk the segments of a JPEG up to its end, and return its width and height. Raises InvalidRequest.

    nvJPEG decodes what is there of a truncated file and silently leaves the rest of the image gray. Pillow needs more
    than a minute for some headers.
    """
    # The content of a segment is skipped, because a preview in it has an end marker of its own. What follows the end is
    # ignored: phones append second pictures and videos.
    position, scans, size = 2, 0, (0, 0)
    for _ in range(MAX_SEGMENTS):
        marker = JPEG_MARKER.search(data, position)
        if not marker:
            raise InvalidRequest("the photo is truncated (no end-of-image marker): send the whole file")
        kind, start = marker[0][1], marker.end()
        if kind == END_OF_IMAGE:
            break
        length = int.from_bytes(data[start : start + 2])
        if length < 2 or kind not in SEGMENTS:  # decoders differ in where it ends
            raise InvalidRequest(DAMAGED_HEADER)
        scans += kind == START_OF_SCAN
        if scans > MAX_SCANS:
            raise InvalidRequest(f"the photo has more than {MAX_SCANS} scans: save it as a baseline JPEG")
        if kind in FRAME_HEADERS:
            if size != (0, 0):  # decoders differ in which one counts
                raise InvalidRequest(DAMAGED_HEADER)
            size = int.from_bytes(data[start + 5 : start + 7]), int.from_bytes(data[start + 3 : start + 5])
        position = start + length
    else:
        raise InvalidRequest(TOO_MUCH_METADATA)
    if not scans or 0 in size:
        raise InvalidRequest(DAMAGED_HEADER)
    return size


def _check_png(data: bytes) -> None:
    """Walk the chunks of a PNG up to its pixels. Raises InvalidRequest."""
    position = len(PNG_SIGNATURE)
    for index in range(MAX_SEGMENTS):
        length, kind = int.from_bytes(data[position : position + 4]), data[position + 4 : position + 8]
        if not kind:  # the file ends here, as Pillow will say
            return
        if (kind == b"IHDR") != (index == 0):  # Pillow reads the last of several, and the decoder the first
            raise InvalidRequest(f"the photo must have one header, at its beginning: {ADVICE}")
        if kind == b"IDAT":
            return
        position += 12 + length  # the length, the kind and a checksum
    raise InvalidRequest(TOO_MUCH_METADATA)
