# SPDX-License-Identifier: Apache-2.0
"""Turns a request into a job: reads its photo and parameters. If one is invalid, the error tells the client why."""

import argparse
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from reprlib import repr as shorten

from pytriton.proxy.types import Request

from photo import InvalidPhoto, Photo, read_photo
from serving import InvalidRequest

FILE_PARAMETERS = ("format", "quality", "content", "edge")  # of the output "encoded"
PARAMETERS = ("class_name", "threshold", *FILE_PARAMETERS)

CONTENTS = ("segmented", "labels")
DEFAULT_QUALITY = {"jpeg": 95, "png": 100, "webp": 80}  # PNG is lossless at any quality
MAX_SIDE = {"jpeg": 65_500, "png": 1_000_000, "webp": 16_383}  # in pixels; limits of the libraries or the formats


@dataclass(frozen=True)
class ImageEncoding:
    """The content and the encoding of an image file."""

    format: str  # a key of DEFAULT_QUALITY
    quality: int  # 1 to 100
    content: str = "segmented"  # one of CONTENTS
    edge: float = 0  # width of the transition in the alpha channel, in units of probability; 0: a hard edge

    @property
    def source(self) -> str:
        """Return the name of the image to encode: an output, or ``soft_cut_out``."""
        return "soft_cut_out" if self.edge else self.content

    def check_size(self, width: int, height: int) -> None:
        """Raise InvalidRequest if the photo is too large for the format."""
        if max(width, height) > MAX_SIDE[self.format]:
            advice = "set format to png, or " * (max(width, height) <= MAX_SIDE["png"]) + "scale the photo down"
            raise InvalidRequest(
                f"the width and height of a {self.format} file are limited to {MAX_SIDE[self.format]} pixels, but the "
                f"photo is {width} x {height}: {advice}"
            )


@dataclass(frozen=True)
class Job:
    """A valid request."""

    photo: Photo
    classes: Sequence[int]
    threshold: float
    outputs: Collection[str]
    encoding: ImageEncoding | None = None  # of the output "encoded", if it is one of the outputs

    def needs(self, *outputs: str) -> bool:
        """Return whether the job returns or encodes any of these outputs."""
        return any(name in self.outputs or (self.encoding and name == self.encoding.source) for name in outputs)


def read_job(
    request: Request,
    outputs: Collection[str],
    class_indices: Callable[[str], Sequence[int]],
    options: argparse.Namespace,
) -> Job:
    """Return the job of a request for these outputs. Raises InvalidRequest.

    ``class_indices`` turns the names of classes into their indices, or raises ValueError with the valid names.
    ``options`` has the limit ``max_pixels``, and the defaults ``class_name`` and ``threshold``.
    """
    try:
        photo = read_photo(request["image"], options.max_pixels)
    except InvalidPhoto as error:
        raise InvalidRequest(str(error)) from None
    parameters = request.parameters
    if unknown := parameters.keys() - PARAMETERS:
        raise InvalidRequest(f"unknown parameter {shorten(min(unknown))}, not one of {', '.join(PARAMETERS)}")
    try:
        classes = class_indices(parameters.get("class_name", options.class_name))
    except ValueError as error:
        raise InvalidRequest(f"class_name {error}") from None
    threshold = _read_number(parameters, "threshold", 0, 1, options.threshold)
    encoding = read_encoding(parameters)
    if "encoded" in outputs:
        encoding.check_size(photo.width, photo.height)
        return Job(photo, classes, threshold, outputs, encoding)
    if unused := [name for name in FILE_PARAMETERS if name in parameters]:
        raise InvalidRequest(f"{unused[0]} is for the output encoded: request that output, or omit {unused[0]}")
    return Job(photo, classes, threshold, outputs)


def read_encoding(parameters: Mapping[str, object]) -> ImageEncoding:
    """Return the encoding that the parameters of a request set, JPEG by default. Raises InvalidRequest."""
    content = _read_choice(parameters, "content", CONTENTS, "segmented")
    name = _read_choice(parameters, "format", [*DEFAULT_QUALITY], "png" if content == "labels" else "jpeg")
    quality = _read_number(parameters, "quality", 1, 100, DEFAULT_QUALITY[name], whole=True)
    edge = _read_number(parameters, "edge", 0, 1, 0)
    if content == "labels" and name != "png":
        raise InvalidRequest(f"a {name} file cannot contain labels: set format to png, or omit format")
    if edge and content == "labels":
        raise InvalidRequest("labels have no edge: omit edge, or set content to segmented")
    if edge and name == "jpeg":
        raise InvalidRequest("a jpeg file cannot have a soft edge: set format to png or webp, or omit edge")
    return ImageEncoding(name, int(quality), content, edge)


def _read_choice(parameters: Mapping[str, object], name: str, choices: Sequence[str], default: str) -> str:
    value = parameters.get(name, default)
    if value not in choices:
        raise InvalidRequest(f"{name} must be one of {', '.join(choices)}, not {shorten(value)}")
    return value


def _read_number(
    parameters: Mapping[str, object], name: str, low: int, high: int, default: float, whole: bool = False
) -> float:
    value = parameters.get(name, default)
    # JSON and gRPC clients may send whole numbers as doubles.
    if type(value) not in (int, float) or not low <= value <= high or (whole and value != int(value)):
        kind = "whole number" if whole else "number"
        raise InvalidRequest(f"{name} must be a {kind} between {low} and {high}, not {shorten(value)}")
    return value
