# SPDX-License-Identifier: Apache-2.0
"""Encodes image files: JPEG on the device and PNG on the CPU with nvImageCodec, WebP and palette PNG with Pillow."""

import functools
import io
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from nvidia import nvimgcodec
from PIL import Image

from jobs import ImageEncoding
from palette import palette_png
from serving import Deferred, InferenceFailed, InvalidRequest

# Pillow's errors for a photo with too much detail, with libwebp's numbers: WebP limits the size of the first partition
# of a file to 512 KB, and of the others to 16 MB.
WEBP_LIMITS = ("encoding error 6", "encoding error 7")


class Encode:
    """Encodes cut-outs and labels as image files. Not thread-safe."""

    def __init__(self, device: torch.device):
        self._device = device
        self._encoder = _open_encoder(device)

    def __call__(
        self, sources: Sequence[Mapping[str, object]], encodings: Sequence[ImageEncoding | None]
    ) -> list[np.ndarray | Deferred | None]:
        """Return a file for each encoding, uint8 ``[N]``: JPEGs are encoded immediately, others are deferred.

        A mapping has the source of its encoding, on the device: ``segmented``, uint8 ``[H, W, 3]``, with its ``mask``,
        uint8 ``[H, W]``; ``soft_cut_out``, uint8 ``[H, W, 4]``; or ``labels``, uint8 ``[H, W]``. A JPEG has the black
        background of ``segmented``. In the other formats, the mask becomes the alpha channel. Raises InferenceFailed.
        """
        encoded: list[np.ndarray | Deferred | None] = [None] * len(encodings)
        jpegs: dict[int, list[int]] = {}  # indices in the batch by quality
        for index, encoding in enumerate(encodings):
            if encoding is None:
                continue
            source = sources[index]
            if encoding.format == "jpeg":
                jpegs.setdefault(encoding.quality, []).append(index)
            elif encoding.source == "labels":
                encoded[index] = Deferred(_encode_labels, source["labels"])
            else:
                encode = _encode_png if encoding.format == "png" else functools.partial(_encode_webp, encoding.quality)
                pixels = source["soft_cut_out"] if encoding.source == "soft_cut_out" else _add_alpha(source)
                encoded[index] = Deferred(encode, pixels)
        for quality, indices in jpegs.items():
            data = self._encode_jpegs([sources[index]["segmented"] for index in indices], quality)
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
        max_num_cpu_threads=1,  # the calling thread
        # One backend, so that it cannot silently fall back to the other. nvJPEG counts as hybrid.
        backends=[nvimgcodec.Backend(nvimgcodec.HYBRID_CPU_GPU if on_gpu else nvimgcodec.CPU_ONLY)],
    )


def _add_alpha(source: Mapping[str, object]) -> torch.Tensor:
    cut_out, mask = (torch.from_dlpack(source[name]) for name in ("segmented", "mask"))
    return torch.cat([cut_out, mask[..., None]], dim=2)


def _encode(
    encoder: nvimgcodec.Encoder,
    images: Sequence,
    name: str,
    parameters: nvimgcodec.EncodeParams | None = None,
    stream: int = 0,
) -> list[np.ndarray]:
    """Return the images as files of the format called ``name``, uint8 ``[N]`` each. Raises InferenceFailed."""
    images = nvimgcodec.as_images(images, cuda_stream=stream)
    # Not pinned memory, the default, which takes longer to allocate than it saves on the copy.
    files = [nvimgcodec.CodeStream(pin_memory=False) for _ in images]
    files = encoder.encode(images, name, code_stream_s=files, params=parameters, cuda_stream=stream)
    if any(file is None for file in files):
        raise InferenceFailed(f"the {name} encoder failed: try again later, or request another format")
    return [np.asarray(file) for file in files]


def _encode_png(pixels: np.ndarray) -> np.ndarray:
    """Return RGBA pixels, uint8 ``[H, W, 4]``, as a PNG file, uint8 ``[N]``. Thread-safe."""
    # Not with Pillow: its fastest level takes twice as long, for a file 5% smaller (one core, the sample, four sizes).
    return _encode(_open_encoder(torch.device("cpu")), [pixels], "png")[0]


def _encode_webp(quality: int, pixels: np.ndarray) -> np.ndarray:
    """Return RGBA pixels, uint8 ``[H, W, 4]``, as a WebP file, uint8 ``[N]``. Thread-safe. Raises InvalidRequest."""
    stream = io.BytesIO()
    try:
        # Method 0 is the fastest. The default takes 2.4 times as long, for a file a quarter smaller (the same photos).
        Image.fromarray(pixels).save(stream, "webp", quality=quality, method=0)
    except ValueError as error:
        if str(error) not in WEBP_LIMITS:
            raise
        raise InvalidRequest("the photo is too detailed for webp: lower the quality, or set format to png") from None
    return np.frombuffer(stream.getvalue(), np.uint8)


def _encode_labels(labels: np.ndarray) -> np.ndarray:
    """Return class indices, uint8 ``[H, W]``, as a palette PNG, uint8 ``[N]``."""
    return np.frombuffer(palette_png(labels), np.uint8)
