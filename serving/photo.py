# SPDX-License-Identifier: Apache-2.0
"""Checks an encoded photo before it is decoded."""

import io
import re

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

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

# Pillow would refuse large photos before we do, in its own words.
Image.MAX_IMAGE_PIXELS = None

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"

ADVICE = "send a JPEG, PNG, BMP or WebP file"
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
    if is_jpeg := data.startswith(b"\xff\xd8"):
        _check_jpeg(data)
    elif data.startswith(PNG_SIGNATURE):
        _check_png(data)
    stream = io.BytesIO(data)
    try:
        with JpegImageFile(stream) if is_jpeg else Image.open(stream, formats=("PNG", "BMP", "WEBP")) as image:
            width, height = image.size
            frames = getattr(image, "n_frames", 1)
    except UnidentifiedImageError:
        raise InvalidRequest(f"the photo ({len(data)} bytes) is damaged or of an unknown type: {ADVICE}") from None
    except Exception as error:  # Pillow's parsers raise whatever the damage makes them stumble over.
        raise InvalidRequest(f"the photo's header is damaged ({type(error).__name__}): {ADVICE}") from None
    if frames > 1:
        raise InvalidRequest(f"the photo is an animation of {frames} frames: send one of them as a still image")
    if width * height > max_pixels:
        raise InvalidRequest(
            f"the photo is {width} x {height} pixels, but this server accepts at most {max_pixels} pixels: "
            "scale it down, or raise the server's --max-pixels"
        )
    return width, height


def _check_jpeg(data: bytes) -> None:
    """Walk the segments of a JPEG up to its end. Raises InvalidRequest.

    nvJPEG decodes what is there of a truncated file and silently leaves the rest of the image gray.
    """
    # The content of a segment is skipped, because a preview in it has an end marker of its own. What follows the end is
    # ignored: phones append second pictures and videos.
    position, scans, records = 2, 0, 0
    for _ in range(MAX_SEGMENTS):
        marker = JPEG_MARKER.search(data, position)
        if not marker:
            raise InvalidRequest("the photo is truncated (no end-of-image marker): send the whole file")
        if marker[0] == b"\xff\xd9":
            return
        scans += marker[0] == b"\xff\xda"
        if scans > MAX_SCANS:
            raise InvalidRequest(f"the photo has more than {MAX_SCANS} scans: save it as a baseline JPEG")
        position = marker.end() + int.from_bytes(data[marker.end() : marker.end() + 2])
        records += data.count(b"8BIM", marker.end(), position)  # Photoshop's: one segment holds thousands
        if records > MAX_SEGMENTS:
            break
    raise InvalidRequest(TOO_MUCH_METADATA)


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
