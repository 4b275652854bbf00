# SPDX-License-Identifier: Apache-2.0
"""The two DALI stages around the network. Needs neither Triton nor the network.

Both take and give batches of photos that differ in size. An object of either class belongs to one thread at a time.
"""

import re
from collections.abc import Sequence

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.tensors import TensorListCPU, TensorListGPU

from request import InvalidRequest

IMAGENET_MEAN = (0.485, 0.456, 0.406)  # of RGB in 0 to 1: what torchvision's weights were trained with
IMAGENET_STD = (0.229, 0.224, 0.225)

# nvImageCodec's statuses that blame the file: invalid parameter, bad or unsupported code stream, as seen by the codec
# or by one of its extensions. The others are of memory, of CUDA and of the library itself. And what its parsers say of
# some damaged headers.
DECODING_ERROR = re.compile(r"Failed to decode|Invalid sample_type|nvImageCodec failure: '#(2|3|4|9|13|17|19)'")

TensorList = TensorListCPU | TensorListGPU


class Preprocess:
    """Decode photos, and resize and normalise them for the network."""

    def __init__(self, device: torch.device, input_size: int, max_batch_size: int = 1, num_threads: int = 1):
        """``input_size``: width and height of the network's input in pixels."""
        self._device = device
        self._pipeline = _preprocess_pipeline(
            decoder="cpu" if device.type == "cpu" else "mixed",
            input_size=input_size,
            **_common(device, max_batch_size, num_threads),
        )
        self._pipeline.build()

    def __call__(self, encoded: Sequence[np.ndarray]) -> tuple[TensorList, torch.Tensor]:
        """Return the decoded photos and the network's input.

        ``encoded``: for each photo a uint8 array ``[bytes]`` of a JPEG, PNG, BMP or WebP file. Returns the photos,
        upright, uint8 ``[H, W, 3]`` each, and a float32 tensor ``[N, 3, S, S]``, both on the device, in the order of
        torch's current stream. Raises InvalidRequest where one of the photos cannot be decoded.
        """
        try:
            photos, images = self._pipeline.run(_stream(self._device), encoded=list(encoded))
        except RuntimeError as error:
            # DALI has one class for all errors, and goes on after those of a decoder, whatever the text says.
            if not DECODING_ERROR.search(str(error)):
                raise
            raise InvalidRequest(
                "the photo cannot be decoded: it is damaged, or of a kind that DALI cannot read"
            ) from None
        return photos, torch.from_dlpack(images.as_tensor())


class Postprocess:
    """Bring a class's probability to the size of the photo and cut the class out."""

    def __init__(self, device: torch.device, max_batch_size: int = 1, num_threads: int = 1):
        self._device = device
        self._pipeline = _postprocess_pipeline(device=_backend(device), **_common(device, max_batch_size, num_threads))
        self._pipeline.build()

    def __call__(self, photos: TensorList, probability: torch.Tensor, threshold: Sequence[float]) -> TensorList:
        """Return the photos where the probability, interpolated linearly, exceeds the threshold, and 0 elsewhere.

        ``photos``: what :class:`Preprocess` returned, uint8 ``[H, W, 3]`` each. ``probability``: float32
        ``[N, S, S]`` on the device. ``threshold``: one a photo, 0 to 1. Returns uint8 ``[H, W, 3]`` each.
        """
        if probability.device.type == "cpu":
            # DALI asks torch for a CUDA stream when it is fed torch tensors, and torch has none without a GPU.
            probability = probability.numpy()
        (segmented,) = self._pipeline.run(
            _stream(self._device),
            photo=photos,
            probability=probability[..., None],
            threshold=np.asarray(threshold, np.float32),
        )
        return segmented


@pipeline_def
def _preprocess_pipeline(decoder: str, input_size: int):
    encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
    photo = fn.decoders.image(
        encoded,
        device=decoder,
        output_type=types.RGB,
        # Without it the colours of a 4:2:0 JPEG differ visibly from what every viewer shows.
        jpeg_fancy_upsampling=True,
        # By default a batch is shared out between the GPU's hardware decoders, where it has any, and its cores, which
        # round differently: a photo's pixels would depend on its company. See MAX_BATCH_SIZE in worker.py, too.
        hw_decoder_load=1.0,
    )
    small = fn.resize(photo, size=[input_size, input_size], interp_type=types.INTERP_LINEAR, dtype=types.FLOAT)
    image = fn.crop_mirror_normalize(
        small,
        mean=[255 * value for value in IMAGENET_MEAN],
        std=[255 * value for value in IMAGENET_STD],
        output_layout="CHW",
    )
    return photo, image


@pipeline_def
def _postprocess_pipeline(device: str):
    photo = fn.external_source(name="photo", device=device, dtype=types.UINT8, ndim=3, layout="HWC")
    probability = fn.external_source(name="probability", device=device, dtype=types.FLOAT, ndim=3, layout="HWC")
    threshold = fn.external_source(name="threshold", dtype=types.FLOAT, ndim=0)
    size = photo.shape(dtype=types.FLOAT, device="cpu")[:2]
    # No antialiasing: where the photo is smaller than the network's input, the values in between are skipped, as in
    # torch's interpolate and as "linear" says.
    probability = fn.resize(probability, size=size, interp_type=types.INTERP_LINEAR, antialias=False)
    return photo * (probability > threshold)


def _common(device: torch.device, max_batch_size: int, num_threads: int) -> dict:
    # A prefetch queue of one: a batch is fed, run and returned by one call.
    return {
        "batch_size": max_batch_size,
        "num_threads": num_threads,
        "device_id": None if device.type == "cpu" else device.index or 0,
        "prefetch_queue_depth": 1,
    }


def _stream(device: torch.device) -> torch.cuda.Stream | None:
    return None if device.type == "cpu" else torch.cuda.current_stream(device)


def _backend(device: torch.device) -> str:
    return "cpu" if device.type == "cpu" else "gpu"
