# SPDX-License-Identifier: Apache-2.0
"""What a client may send, and the one sentence it is told when it sends something else."""

from __future__ import annotations

import io
import re
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

if TYPE_CHECKING:
    from segmentation import HostMemory

# Of a progressive JPEG. Encoders write 10 or so; each takes a few bytes and makes the decoder go through all pixels.
MAX_SCANS = 64
MAX_SEGMENTS = 20_000
# What begins a segment or ends the picture: neither a byte of the picture's own nor a mark between parts of it.
JPEG_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]", re.DOTALL)

# Pillow's own limit would answer before ours, and with a text of its own.
Image.MAX_IMAGE_PIXELS = None


class RequestError(Exception):
    """A request that gets no answer; the message is one sentence for its client."""

    # PyTriton sends the client the exception as Python prints it. With neither traceback nor module that is the line
    # "InvalidRequest: sentence", and tells nothing of the files on this machine.
    __module__ = "builtins"
    __traceback__ = property(lambda _self: None, lambda _self, _traceback: None)  # contextlib sets it

    def __reduce__(self):  # for pickle, which would look into that module
        return _restore, (type(self).__name__, str(self))


class InvalidRequest(RequestError):
    """The client is at fault."""

    __module__ = "builtins"


class InferenceFailed(RequestError):
    """The server is at fault, with this request only."""

    __module__ = "builtins"


def _restore(name: str, sentence: str) -> RequestError:
    return globals()[name](sentence)


@dataclass(frozen=True)
class PhotoRequest:
    """The bytes of a photo, uint8 ``[N]``, what its client wants of it, and where that has room."""

    encoded: np.ndarray
    class_index: int
    threshold: float
    outputs: Sequence[str]
    memory: HostMemory


@dataclass(frozen=True)
class RequestReader:
    """Checks requests before any work goes into them."""

    class_names: Sequence[str]
    default_class_name: str
    default_threshold: float
    max_pixels: int

    def __call__(
        self, encoded: np.ndarray, parameters: Mapping[str, object], outputs: Sequence[str], memory: HostMemory
    ) -> PhotoRequest:
        """Return what the client wants. Raises InvalidRequest.

        ``parameters`` and ``outputs``: the request's parameters and the names of the outputs that it asks for.
        """
        check_photo(encoded, self.max_pixels)
        return PhotoRequest(
            encoded,
            self._class_index(parameters.get("class_name", self.default_class_name)),
            self._threshold(parameters.get("threshold", self.default_threshold)),
            outputs,
            memory,
        )

    def _class_index(self, class_name: object) -> int:
        if class_name not in self.class_names:
            raise InvalidRequest(f"class_name {reprlib.repr(class_name)} is none of {', '.join(self.class_names)}")
        return self.class_names.index(class_name)

    def _threshold(self, threshold: object) -> float:
        is_number = isinstance(threshold, int | float) and not isinstance(threshold, bool)
        if not is_number or not 0 <= threshold <= 1:
            raise InvalidRequest(f"threshold {reprlib.repr(threshold)} is no number from 0 to 1")
        return float(threshold)


def check_photo(encoded: np.ndarray, max_pixels: int) -> None:
    """Check the header of an encoded photo, uint8 ``[N]``, without decoding it. Raises InvalidRequest."""
    data = encoded.tobytes()
    kinds = "send a JPEG, PNG, BMP or WebP file"
    if not data:
        raise InvalidRequest(f"the photo is empty: {kinds}")
    if is_jpeg := data.startswith(b"\xff\xd8"):
        check_jpeg(data)
    stream = io.BytesIO(data)
    try:
        with JpegImageFile(stream) if is_jpeg else Image.open(stream, formats=("PNG", "BMP", "WEBP")) as image:
            width, height = image.size
    except UnidentifiedImageError:
        raise InvalidRequest(f"the photo's {len(data)} bytes are of no known kind, or damaged: {kinds}") from None
    except Exception as error:  # Pillow's parsers raise whatever the damage makes them stumble over.
        raise InvalidRequest(f"the photo's header is damaged ({type(error).__name__}): {kinds}") from None
    if width * height > max_pixels:
        raise InvalidRequest(
            f"the photo has {width} x {height} pixels, more than the {max_pixels} that this server takes: "
            "make it smaller, or have the server started with a larger --max-pixels and shared memory for it"
        )


def check_jpeg(data: bytes) -> None:
    """Go through the segments of a JPEG up to its end. Raises InvalidRequest.

    nvJPEG decodes what is there of a truncated file and leaves the rest of the picture grey, without a word.
    """
    # The content of a segment may be a preview with an end of its own, and behind the end may be anything, as phones
    # append second pictures and films: neither is looked at.
    position, scans = 2, 0
    for _ in range(MAX_SEGMENTS):
        marker = JPEG_MARKER.search(data, position)
        if not marker:
            raise InvalidRequest("the photo is truncated, its end is missing: send the whole file")
        if marker[0] == b"\xff\xd9":
            return
        scans += marker[0] == b"\xff\xda"
        if scans > MAX_SCANS:
            raise InvalidRequest(f"the photo has more than {MAX_SCANS} scans: save it as a baseline JPEG")
        position = marker.end() + int.from_bytes(data[marker.end() : marker.end() + 2])
    raise InvalidRequest(f"the photo has more than {MAX_SEGMENTS} segments: save it again")
