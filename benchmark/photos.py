# SPDX-License-Identifier: Apache-2.0
"""The photos that all measurements use."""

import functools
import io
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
SIZES = ((1281, 851), (640, 426), (1024, 683), (500, 375))  # width and height in pixels


def encode(image: Image.Image, **options: object) -> bytes:
    """Return the image as a JPEG file."""
    stream = io.BytesIO()
    image.save(stream, "JPEG", **options)
    return stream.getvalue()


@functools.cache
def photos() -> list[bytes]:
    """Return the sample photo in each of the sizes, as a camera would save it: quality 90, 4:2:0 colors."""
    sample = Image.open(ROOT / "images" / "orig.jpg")
    return [encode(sample.resize(size), quality=90, subsampling="4:2:0") for size in SIZES]
