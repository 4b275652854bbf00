# SPDX-License-Identifier: Apache-2.0
"""Encodes cut-outs as image files: JPEG on the device and PNG on the CPU with nvImageCodec, WebP with Pillow."""

import functools
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from reprlib import repr as shorten

import numpy as np
import torch
from nvidia import nvimgcodec
from PIL import Image

from serving import Deferred, InferenceFailed, InvalidRequest

DEFAULT_QUALITY = {"jpeg": 95, "png": 100, "webp": 80}  # PNG is lossless at any quality
MAX_SIDE = {"jpeg": 65_500, "png": 1_000_000, "webp": 16_383}  # in pixels; limits of the libraries or the formats

# What Pillow raises if a photo has too much detail: WebP limits the size of one part of a file to 512 KB, and of the
# others to 16 MB. The numbers are libwebp's.
WEBP_LIMITS = ("encoding error 6", "encoding error 7")


@dataclass(frozen=True)
class ImageEncoding:
    """How to encode an image file."""

    format: str  # a key of DEFAULT_QUALITY
    quality: int  # 1 to 100

    def check_size(self, width: int, height: int) -> None:
        """Raise InvalidRequest if the photo is too large for the format."""
        if max(width, height) > MAX_SIDE[self.format]:
            advice = "set format to png, or " * (max(width, height) <= MAX_SIDE["png"]) + "scale the photo down"
            raise InvalidRequest(
                f"a {self.format} file can be at most {MAX_SIDE[self.format]} pixels wide and high, but the photo is "
                f"{width} x {height}: {advice}"
            )


class Encode:
    """Encode cut-outs as image files. Not thread-safe."""

    def __init__(self, device: torch.device):
        self._device = device
        self._encoder = _open_encoder(device)

    @staticmethod
    def read_parameters(parameters: Mapping[str, object]) -> ImageEncoding:
        """Return the encoding that the parameters of a request set, JPEG by default. Raises InvalidRequest."""
        name = parameters.get("format", "jpeg")
        if name not in DEFAULT_QUALITY:
            raise InvalidRequest(f"format must be one of {', '.join(DEFAULT_QUALITY)}, not {shorten(name)}")
        quality = parameters.get("quality", DEFAULT_QUALITY[name])
        if type(quality) not in (int, float) or not 1 <= quality <= 100 or quality != int(quality):
            raise InvalidRequest(f"quality must be a whole number between 1 and 100, not {shorten(quality)}")
        return ImageEncoding(name, int(quality))

    def __call__(
        self, cut_outs: Sequence, masks: Sequence, encodings: Sequence[ImageEncoding | None]
    ) -> list[np.ndarray | Deferred | None]:
        """Return a file for each encoding, uint8 ``[N]``: JPEGs are encoded now, the others deferred.

        ``cut_outs`` are uint8 ``[H, W, 3]`` and ``masks`` uint8 ``[H, W]``, on the device. JPEGs have the black
        background of the cut-out. In the other formats, the mask becomes the alpha channel. Raises InferenceFailed.
        """
        encoded: list[np.ndarray | Deferred | None] = [None] * len(encodings)
        jpegs: dict[int, list[int]] = {}  # their places in the batch, by quality
        for index, encoding in enumerate(encodings):
            if encoding is None:
                continue
            if encoding.format == "jpeg":
                jpegs.setdefault(encoding.quality, []).append(index)
            else:
                cut_out, mask = torch.from_dlpack(cut_outs[index]), torch.from_dlpack(masks[index])
                pixels = torch.cat([cut_out, mask[..., None]], dim=2)
                encode = _encode_png if encoding.format == "png" else functools.partial(_encode_webp, encoding.quality)
                encoded[index] = Deferred(encode, pixels)
        for quality, indices in jpegs.items():
            data = self._encode_jpegs([cut_outs[index] for index in indices], quality)
            for index, jpeg in zip(indices, data, strict=True):
                encoded[index] = jpeg
        return encoded

    def _encode_jpegs(self, images: Sequence, quality: int) -> list[np.ndarray]:
        parameters = nvimgcodec.EncodeParams(
            quality_type=nvimgcodec.QualityType.QUALITY,
            quality_value=quality,
            # Chroma subsampling would blur the edge between the cut-out and the background.
            chroma_subsampling=nvimgcodec.CSS_444,
        )
        if self._device.type == "cpu":
            images, stream = [np.asarray(image) for image in images], 0
        else:
            stream = torch.cuda.current_stream(self._device).cuda_stream
        return _encode(self._encoder, images, "jpeg", parameters, stream)


def _open_encoder(device: torch.device) -> nvimgcodec.Encoder:
    on_gpu = device.type == "cuda"
    return nvimgcodec.Encoder(
        device_id=device.index or 0 if on_gpu else nvimgcodec.NVIMGCODEC_DEVICE_CPU_ONLY,
        max_num_cpu_threads=1,  # the caller's
        # One backend, because a fallback to the other would go unnoticed. nvJPEG counts as hybrid.
        backends=[nvimgcodec.Backend(nvimgcodec.HYBRID_CPU_GPU if on_gpu else nvimgcodec.CPU_ONLY)],
    )


def _encode(
    encoder: nvimgcodec.Encoder,
    images: Sequence,
    name: str,
    parameters: nvimgcodec.EncodeParams | None = None,
    stream: int = 0,
) -> list[np.ndarray]:
    """Return the images as files of the format called ``name``, uint8 ``[N]`` each. Raises InferenceFailed."""
    images = nvimgcodec.as_images(images, cuda_stream=stream)
    # By default each file gets new pinned memory, and allocating that takes longer than the copy that it speeds up.
    files = [nvimgcodec.CodeStream(pin_memory=False) for _ in images]
    files = encoder.encode(images, name, code_stream_s=files, params=parameters, cuda_stream=stream)
    if any(file is None for file in files):
        raise InferenceFailed(f"the {name} encoder failed: try again later, or ask for another format")
    return [np.asarray(file) for file in files]


def _encode_png(pixels: np.ndarray) -> np.ndarray:
    """Return RGBA pixels, uint8 ``[H, W, 4]``, as a file, uint8 ``[N]``. From any thread."""
    # Pillow takes twice as long at its fastest level, for a file 5% smaller (one core, the sample photo in four sizes).
    return _encode(_open_encoder(torch.device("cpu")), [pixels], "png")[0]


def _encode_webp(quality: int, pixels: np.ndarray) -> np.ndarray:
    """Return RGBA pixels, uint8 ``[H, W, 4]``, as a file, uint8 ``[N]``. From any thread. Raises InvalidRequest."""
    stream = io.BytesIO()
    try:
        # Speed first: the default method takes 2.4 times as long, for a file a quarter smaller (the same photos).
        Image.fromarray(pixels).save(stream, "webp", quality=quality, method=0)
    except ValueError as error:
        if str(error) not in WEBP_LIMITS:
            raise
        raise InvalidRequest("webp cannot hold so much detail: lower the quality, or set format to png") from None
    return np.frombuffer(stream.getvalue(), np.uint8)
