# SPDX-License-Identifier: Apache-2.0
"""Pascal VOC's colors for labels."""

import io

import numpy as np
from PIL import Image

# The bits of a class's index go to red, green and blue in turn. The lowest bits of the index become the highest ones of
# the color, so that classes with similar indices look different.
PALETTE = bytes(
    sum((index >> (3 * place + channel) & 1) << (7 - place) for place in range(3))
    for index in range(256)
    for channel in range(3)
)


def palette_png(labels: np.ndarray) -> bytes:
    """Return class indices, uint8 ``[H, W]``, as a palette PNG file with the same indices."""
    image, stream = Image.fromarray(labels), io.BytesIO()
    image.putpalette(PALETTE)
    image.save(stream, "png", compress_level=1)
    return stream.getvalue()
