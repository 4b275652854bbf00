# SPDX-License-Identifier: Apache-2.0
"""PNG, third edition. The new file has the header, the palette if the pixels need one, and the pixels.

Gamma, color profile and transparency are omitted, because the server does not use them. The pixels are inflated once to
count them: libpng also inflates data after the last row, and 4 MB can become 4 GB, which takes 7 s.
"""

import zlib
from collections.abc import Sequence
from math import ceil

from photo.base import (
    ANIMATION,
    MAX_EXIF_BYTES,
    MAX_SEGMENTS,
    TOO_MANY_SEGMENTS,
    InvalidPhoto,
    Photo,
    check_size,
    damaged,
    join,
    read_orientation,
    truncated,
    unpack,
)

SIGNATURE = b"\x89PNG\r\n\x1a\n"
END = b"\0\0\0\0IEND\xae\x42\x60\x82"
BIT_DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}  # by color type
PALETTE = 3  # the color type that needs a palette
CHANNELS = {0: 1, 2: 3, PALETTE: 1, 4: 2, 6: 4}
# The passes of an interlaced image: the first column and row, and the steps to the next ones.
ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
ANIMATION_CHUNKS = (b"acTL", b"fcTL", b"fdAT")
STEP = 1 << 16  # bytes to inflate at a time
ANCILLARY = 0x20  # the bit of a chunk's name that marks it as optional


def read_png(data: memoryview, max_pixels: int) -> Photo:
    """Return the PNG with only the chunks that its pixels need. Raises InvalidPhoto."""
    header = palette = orientation = None
    pixels: list[memoryview] = []
    position, previous = len(SIGNATURE), b""
    for _ in range(MAX_SEGMENTS):
        length, kind = unpack(">I4s", data, position)
        end = position + 12 + length  # including length, kind and a checksum, which the decoder verifies
        if end > len(data):
            raise truncated("no IEND chunk")
        chunk, body = data[position:end], data[position + 8 : end - 4]
        if (kind == b"IHDR") != (not header):
            raise damaged("it must start with its only IHDR chunk")
        if kind == b"IHDR":
            header = chunk
            width, height, color_type, raw_bytes = _read_header(body, max_pixels)
        elif kind == b"PLTE":
            if palette or pixels or length % 3 or not 3 <= length <= 768:
                raise damaged("invalid palette")
            palette = chunk
        elif kind == b"IDAT":
            if pixels and previous != b"IDAT":
                raise damaged("pixels in several places")
            pixels.append(chunk)
        elif kind == b"IEND":
            break
        elif kind in ANIMATION_CHUNKS:
            raise InvalidPhoto(ANIMATION)
        elif kind == b"eXIf" and orientation is None:
            orientation = read_orientation(bytes(body[:MAX_EXIF_BYTES]))
        elif not kind[0] & ANCILLARY:
            raise damaged("an unknown critical chunk")
        position, previous = end, kind
    else:
        raise InvalidPhoto(TOO_MANY_SEGMENTS)
    if not pixels:
        raise damaged("no pixels")
    if color_type != PALETTE:
        palette = b""  # only a hint for displays with few colors
    elif not palette:
        raise damaged("no palette")
    _count_pixels([chunk[8:-4] for chunk in pixels], raw_bytes)
    return Photo(join(SIGNATURE, header, palette, *pixels, END), width, height, orientation or 1)


def _read_header(body: memoryview, max_pixels: int) -> tuple[int, int, int, int]:
    """Return width, height, color type and the number of bytes that the pixels inflate to."""
    width, height, depth, color_type, compression, filters, interlace = unpack(">IIBBBBB", body)
    if len(body) != 13 or depth not in BIT_DEPTHS.get(color_type, ()) or compression or filters or interlace > 1:
        raise damaged("invalid IHDR chunk")
    check_size(width, height, max_pixels)
    raw_bytes = 0
    for x, y, x_step, y_step in ADAM7 if interlace else ((0, 0, 1, 1),):
        columns, rows = ceil((width - x) / x_step), ceil((height - y) / y_step)
        if columns > 0 and rows > 0:
            # Each row starts with the number of its filter.
            raw_bytes += rows * (1 + ceil(columns * depth * CHANNELS[color_type] / 8))
    return width, height, color_type, raw_bytes


def _count_pixels(parts: Sequence[memoryview], raw_bytes: int) -> None:
    """Check that the parts of a zlib stream inflate to this many bytes. Raises InvalidPhoto."""
    stream, count = zlib.decompressobj(), 0
    try:
        for part in parts:
            for start in range(0, len(part), STEP):
                data = part[start : start + STEP]
                while len(data) and not stream.eof:
                    count += len(stream.decompress(data, STEP))
                    if count > raw_bytes:
                        raise damaged("more pixel data than its size allows")
                    data = stream.unconsumed_tail
    except zlib.error:
        raise damaged("invalid pixel data") from None
    if count < raw_bytes:
        raise truncated("pixels are missing")
