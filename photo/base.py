# SPDX-License-Identifier: Apache-2.0
"""Code that the formats share: the result, the limits, the errors, and the orientation in EXIF."""

import struct
from dataclasses import dataclass

import numpy as np

MAX_SEGMENTS = 20_000  # of a JPEG, or chunks of a PNG or WebP; reading one takes about a microsecond
MAX_EXIF_BYTES = 1 << 16  # a JPEG cannot have more

ADVICE = "send a JPEG, PNG, BMP or WebP file"
TOO_MANY_SEGMENTS = f"the photo has more than {MAX_SEGMENTS} segments: save it without metadata"
ANIMATION = "the photo is an animation: send one of its frames as a still image"

ORIENTATION_TAG = 0x0112
INTEGER_BYTES = {3: 2, 4: 4}  # of the types SHORT and LONG


class InvalidPhoto(ValueError):
    """The photo is rejected. The message is one sentence for the client."""


@dataclass(frozen=True)
class Photo:
    """A rebuilt file: one still image and nothing else."""

    encoded: np.ndarray  # uint8 [N]
    width: int  # in pixels, before the orientation is applied
    height: int
    orientation: int  # 1 to 8, as in EXIF
    suits_nvjpeg: bool = False  # whether nvJPEG returns the same pixels as other decoders


def damaged(problem: str) -> InvalidPhoto:
    """Return the exception for a file that contradicts its format; ``problem`` says how."""
    return InvalidPhoto(f"the photo is damaged ({problem}): {ADVICE}")


def truncated(problem: str) -> InvalidPhoto:
    """Return the exception for a file of which a part is missing; ``problem`` says which."""
    return InvalidPhoto(f"the photo is truncated ({problem}): send the whole file")


def unpack(layout: str, data: bytes | memoryview, position: int = 0) -> tuple:
    """Return the fields at a position, as ``struct.unpack_from`` does. Raises InvalidPhoto if the data ends first."""
    try:
        return struct.unpack_from(layout, data, position)
    except struct.error:
        raise truncated("a part of its header is missing") from None


def check_size(width: int, height: int, max_pixels: int) -> None:
    """Raise InvalidPhoto if the photo has no pixels, or too many."""
    if width < 1 or height < 1:
        raise damaged(f"{width} x {height} pixels")
    if width * height > max_pixels:
        raise InvalidPhoto(
            f"the photo has {width} x {height} pixels, but this server's limit is {max_pixels} pixels: scale it down"
        )


def join(*parts: bytes | memoryview) -> np.ndarray:
    """Return a file of these parts, uint8 ``[N]``."""
    return np.frombuffer(b"".join(parts), np.uint8)


def read_orientation(exif: bytes) -> int:
    """Return the orientation that an EXIF block states, 1 to 8, or 1 if it states none or cannot be read.

    Reads only the first entry with this tag in the first directory, which must be a single SHORT, as the standard
    says, or LONG, as some programs write. Pillow would copy the data of each entry, and 5,000 entries can all refer to
    the same 60 KB.
    """
    exif = exif.removeprefix(b"Exif\0\0")
    order = {b"II*\0": "little", b"MM\0*": "big"}.get(exif[:4])
    if order is None:
        return 1
    directory = int.from_bytes(exif[4:8], order)
    count = int.from_bytes(exif[directory : directory + 2], order)
    for position in range(directory + 2, min(directory + 2 + 12 * count, len(exif) - 11), 12):
        tag, kind, length = (
            int.from_bytes(exif[position + begin : position + end], order) for begin, end in ((0, 2), (2, 4), (4, 8))
        )
        if tag == ORIENTATION_TAG:
            value = int.from_bytes(exif[position + 8 :][: INTEGER_BYTES.get(kind, 0)], order)
            return value if length == 1 and 1 <= value <= 8 else 1
    return 1
