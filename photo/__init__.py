# SPDX-License-Identifier: Apache-2.0
"""Reads an encoded photo, and rejects it or rebuilds it for the decoder. No other code parses clients' files.

Parsers disagree about ambiguous files, such as one with two EXIF blocks, a damaged segment or an animation. If the
parsers of one decoder disagree, the first allocates memory for the pixels, and the second writes beyond it, or leaves a
part of it unwritten, with the pixels of an earlier photo. Therefore, this package reads the file once, and writes a new
one with a single still image. Metadata, previews, further pictures and unknown segments never reach a decoder.

The orientation is that of the first EXIF block, as in most viewers. The new file does not contain it: Preprocess
rotates the pixels.
"""

import io
from math import isqrt

import numpy as np
from PIL import Image

from photo.base import ADVICE, InvalidPhoto, Photo
from photo.bmp import read_bmp
from photo.jpeg import read_jpeg
from photo.png import SIGNATURE, read_png
from photo.webp import read_webp

# The worst case is a JPEG of noise at the highest quality: 2 bytes per pixel (with 4:2:0 colors) and a large header.
MAX_BYTES_PER_PIXEL = 2
MAX_HEADER_BYTES = 1 << 20

__all__ = ["InvalidPhoto", "Photo", "blank_photo", "max_photo_bytes", "read_photo"]


def max_photo_bytes(max_pixels: int) -> int:
    """Return the maximum size of an encoded photo in bytes."""
    return max_pixels * MAX_BYTES_PER_PIXEL + MAX_HEADER_BYTES


def blank_photo(max_pixels: int) -> np.ndarray:
    """Return a JPEG for warming up, uint8 ``[N]``, with up to a quarter of this number of pixels."""
    side = max(1, isqrt(max_pixels // 4))
    stream = io.BytesIO()
    Image.new("RGB", (min(640, side), min(480, side))).save(stream, "JPEG")
    return np.frombuffer(stream.getvalue(), np.uint8)


def read_photo(encoded: np.ndarray, max_pixels: int) -> Photo:
    """Read the bytes of a JPEG, PNG, BMP or WebP file, uint8 ``[N]``, and rebuild it. Raises InvalidPhoto."""
    data = memoryview(np.ascontiguousarray(encoded))
    start = bytes(data[:12])
    if start.startswith(b"\xff\xd8"):
        read = read_jpeg
    elif start.startswith(SIGNATURE):
        read = read_png
    elif start.startswith(b"RIFF") and start.endswith(b"WEBP"):
        read = read_webp
    elif start.startswith(b"BM"):
        read = read_bmp
    else:
        raise InvalidPhoto(f"the photo ({len(data)} bytes) is damaged or of an unknown type: {ADVICE}")
    return read(data, max_pixels)
