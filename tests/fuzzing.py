# SPDX-License-Identifier: Apache-2.0
"""Sends hostile photos to a server, and compares each response with Pillow and with the photos of other clients."""

import io
import random
import re
from collections import deque
from collections.abc import Iterable

import numpy as np
import torch
from conftest import PROTOCOLS, ROOT, Server, as_rgb, decode_cut_out, encode
from hostile_photos import Sample, hostile_photo
from PIL import ExifTags, Image, ImageOps

from client import Connection, InferenceError

Image.MAX_IMAGE_PIXELS = None

# The mean difference between two decoders of JPEG, and between two ways to expand 5 bits to 8.
TOLERANCE = {"JPEG": 1, "PNG": 0.5, "WEBP": 0, "BMP": 4}


class Canaries:
    """Photos of patterns that occur nowhere else: no later response may contain them."""

    TILE = 8  # pixels; JPEG encodes all tiles alike

    def __init__(self, seed: int):
        self._random = np.random.default_rng(seed)
        self._rows: deque[bytes] = deque(maxlen=12 * self.TILE)

    def send(self, connection: Connection, width: int, height: int, file_format: str) -> None:
        """Send a photo of this size, and remember how the server decodes it."""
        tile = self._random.integers(0, 256, (self.TILE, self.TILE, 3), dtype=np.uint8)
        repeats = -(-height // self.TILE), -(-width // self.TILE), 1
        options = {"quality": 100, "subsampling": 0} if file_format == "JPEG" else {}
        photo = encode(Image.fromarray(np.tile(tile, repeats)[:height, :width]), file_format, **options)
        decoded = connection.infer(photo, ("original",))["original"][0][: self.TILE, : self.TILE]
        if decoded.shape == tile.shape:
            for turned in (decoded, decoded.transpose(1, 0, 2)):
                self._rows += [row.tobytes() for rows in (turned, turned[:, ::-1]) for row in rows]

    def are_in(self, pixels: np.ndarray) -> bool:
        """Return whether a response contains a part of them."""
        data = pixels.tobytes()
        return any(row in data for row in self._rows)


def expected_pixels(photo: Sample) -> list[np.ndarray]:
    """Return the valid ``original`` arrays, by Pillow, or an empty list if Pillow cannot decode the photo."""
    try:
        image = Image.open(io.BytesIO(photo.data), formats=("JPEG", "PNG", "WEBP", "BMP"))
        image.load()
    except Exception:  # Pillow can raise anything on a damaged file
        return []
    image = Image.fromarray(np.asarray(as_rgb(image)))  # without metadata
    expected = []
    for orientation in [photo.orientation] if photo.orientation else range(1, 9):
        image.getexif()[ExifTags.Base.Orientation] = orientation
        expected.append(np.asarray(ImageOps.exif_transpose(image)))
    return expected


def is_right(photo: Sample, original: np.ndarray) -> bool:
    """Return whether the pixels are those of the photo, as far as Pillow can tell."""
    expected = expected_pixels(photo)
    same_size = [pixels for pixels in expected if pixels.shape == original.shape]
    if not expected or (
        same_size and not photo.pixels_are_whole and photo.format == "JPEG" and torch.cuda.is_available()
    ):
        return True
    differences = [np.abs(pixels.astype(int) - original).mean() for pixels in same_size]
    return min(differences, default=np.inf) <= TOLERANCE[photo.format]


def send_hostile_photos(server: Server, numbers: Iterable[int]) -> list[str]:
    """Send the hostile photos with these numbers, and return their outcomes, which start with NOT if wrong."""
    connections = {protocol: server.connect(protocol) for protocol in PROTOCOLS}
    outcomes, canaries = [], None
    for number in numbers:
        photo, dice = hostile_photo(number), random.Random(number)
        connection = connections[dice.choice(PROTOCOLS)]
        canaries = canaries or Canaries(number)
        # Most requests do not use the network: damage does not reach it, and it is slow on a CPU.
        outputs = ("original", "segmented", "encoded") if dice.random() < 1 / 50 else ("original",)
        parameters = {"format": dice.choice(("jpeg", "png", "webp"))} if "encoded" in outputs else {}
        try:
            response = connection.infer(photo.data, outputs, parameters)
        except InferenceError as error:
            everything = str(error.__cause__)
            clean = "InvalidRequest: " in everything and str(ROOT) not in everything
            outcomes.append(
                f"{photo.format} rejected: " + re.sub(r"\d+", "N", str(error))
                if clean
                else f"NOT CLEAN, {number}: {everything}"
            )
            size = dice.choice(((120, 80), (80, 120), (64, 64)))
        else:
            original = response["original"][0]
            size = original.shape[1::-1]
            what = parameters.get("format", "original")
            if canaries.are_in(original):
                outcomes.append(f"NOT ITS OWN PIXELS, {number}")
            elif not is_right(photo, original):
                outcomes.append(f"NOT RIGHT, {number}: {photo.format} {original.shape}")
            elif "encoded" in response and not file_fits(response, what):
                outcomes.append(f"NOT THE FILE, {number}: {what}")
            else:
                outcomes.append(f"{photo.format} processed: {what}")
        if number % 2:
            canaries.send(connection, *size, dice.choice(("JPEG", "PNG")))
    return outcomes


def file_fits(response: dict, file_format: str) -> bool:
    """Return whether the image file in a response shows the raw cut-out."""
    cut_out, _, _ = decode_cut_out(response["encoded"][0].tobytes())
    segmented = response["segmented"][0]
    return cut_out.shape == segmented.shape and (file_format != "png" or np.array_equal(cut_out, segmented))
