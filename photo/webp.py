# SPDX-License-Identifier: Apache-2.0
"""WebP, RFC 9649. The new file has only the chunk with the pixels, without a separate alpha channel."""

import struct

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

ANIMATION_FLAG = 2


def read_webp(data: memoryview, max_pixels: int) -> Photo:
    """Return the WebP as a simple file, lossy or lossless. Raises InvalidPhoto."""
    (length,) = unpack("<I", data, 4)
    end = 8 + length
    if end > len(data):
        raise truncated("it is shorter than its header states")
    image = canvas = orientation = None
    position = 12
    for _ in range(MAX_SEGMENTS):
        if position >= end:
            break
        kind, length = unpack("<4sI", data, position)
        body = data[position + 8 : position + 8 + length]
        position += 8 + length
        if position > end:
            raise truncated("a chunk is incomplete")
        position += length % 2
        if kind in (b"VP8 ", b"VP8L"):
            if image:
                raise damaged("two images")
            image, size = (kind, body), _read_lossy_size(body) if kind == b"VP8 " else _read_lossless_size(body)
        elif kind == b"VP8X":
            flags, *sizes = unpack("<B3xHBHB", body)
            canvas = sizes[0] + (sizes[1] << 16) + 1, sizes[2] + (sizes[3] << 16) + 1
            if flags & ANIMATION_FLAG:
                raise InvalidPhoto(ANIMATION)
        elif kind in (b"ANIM", b"ANMF"):
            raise InvalidPhoto(ANIMATION)
        elif kind == b"EXIF" and orientation is None:
            orientation = read_orientation(bytes(body[:MAX_EXIF_BYTES]))
    else:
        raise InvalidPhoto(TOO_MANY_SEGMENTS)
    if not image:
        raise damaged("no image")
    if canvas not in (None, size):
        raise damaged("the canvas and the image differ in size")
    check_size(*size, max_pixels)
    kind, body = image
    padding = bytes(len(body) % 2)
    header = struct.pack("<4sI4s4sI", b"RIFF", 12 + len(body) + len(padding), b"WEBP", kind, len(body))
    return Photo(join(header, body, padding), *size, orientation or 1)


def _read_lossy_size(frame: memoryview) -> tuple[int, int]:
    tag, start_code, width, height = unpack("<Hx3sHH", frame)
    if tag & 1 or start_code != b"\x9d\x01\x2a":  # bit 0 means that it depends on an earlier frame
        raise damaged("invalid VP8 chunk")
    return width & 0x3FFF, height & 0x3FFF  # the other bits are a scaling hint


def _read_lossless_size(frame: memoryview) -> tuple[int, int]:
    signature, bits = unpack("<BI", frame)
    if signature != 0x2F or bits >> 29:  # the version
        raise damaged("invalid VP8L chunk")
    return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
