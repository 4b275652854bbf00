# SPDX-License-Identifier: Apache-2.0
"""The two DALI pipelines around the network. Usable without Triton and the network.

Both work on batches of photos that differ in size. Neither class is thread-safe.
"""

import os
import re
from collections.abc import Sequence

import numpy as np
import torch
from nvidia.dali import Pipeline, fn, pipeline_def, types
from nvidia.dali.tensors import TensorListCPU, TensorListGPU

from photo import Photo
from serving.errors import InvalidRequest

IMAGENET_MEAN = (0.485, 0.456, 0.406)  # of RGB in 0 to 1, as in the training of torchvision's weights
IMAGENET_STD = (0.229, 0.224, 0.225)

# Errors of nvImageCodec that are blamed on the file. The first two phrases come from its parsers, for some damaged
# headers. The statuses of the library (2, 3, 4, 9) and of its codecs (13, 17, 19) mean an invalid parameter, a bad,
# incomplete or unsupported code stream, or an internal error of a codec. Most others mean a lack of memory or a failure
# of CUDA.
DECODING_ERROR = re.compile(r"Failed to decode|Invalid sample_type|nvImageCodec failure: '#(2|3|4|9|13|17|19)'")

NVJPEG = {
    "device": "mixed",
    # nvJPEG pads each of its buffers, several per thread. With DALI's defaults, 8 MB on the host and 16 MB on the GPU,
    # a worker grows by hundreds of megabytes as its threads decode more kinds of JPEG.
    "host_memory_padding": 1 << 20,
    "device_memory_padding": 1 << 20,
}

TensorList = TensorListCPU | TensorListGPU


class Preprocess:
    """Decodes photos, and resizes and normalizes them for the network."""

    def __init__(self, device: torch.device, input_size: int, max_batch_size: int = 1, jpeg_hardware: bool = False):
        """``input_size`` is the width and height of the network's input in pixels.

        ``jpeg_hardware`` lets the GPU's hardware decode JPEGs, for trusted clients only: if the data of a JPEG is
        damaged, the hardware reports no error, and leaves a part of the photo uninitialized, with pixels of an earlier
        photo. nvJPEG's other decoders detect the damage.
        """
        self._device = device
        on_gpu, options = device.type == "cuda", _pipeline_options(device, max_batch_size)
        # A condition in a pipeline takes time even if it is never true. Most batches need none.
        self._common, self._general = (
            _preprocess_pipeline(on_gpu, general, jpeg_hardware, input_size, **options) for general in (False, True)
        )
        for pipeline in (self._common, self._general):
            pipeline.build()

    def __call__(self, photos: Sequence[Photo]) -> tuple[TensorList, torch.Tensor]:
        """Return the decoded photos and the network's input.

        Returns the photos, RGB, upright, uint8 ``[H, W, 3]`` each, and a float32 tensor ``[N, 3, S, S]``, both on the
        device, and ordered on torch's current stream. Raises InvalidRequest if one of the photos cannot be decoded.
        """
        inputs = {"encoded": [photo.encoded for photo in photos]}
        on_gpu = self._device.type == "cuda"
        pipeline = self._common
        if any(photo.orientation != 1 or (on_gpu and not photo.suits_nvjpeg) for photo in photos):
            pipeline = self._general
            inputs["orientation"] = [np.int32(photo.orientation) for photo in photos]
            if on_gpu:
                inputs["suits_nvjpeg"] = [np.bool_(photo.suits_nvjpeg) for photo in photos]
        try:
            decoded, images = pipeline.run(_current_stream(self._device), **inputs)
        except RuntimeError as error:
            # DALI raises RuntimeError for every failure. After a decoder's error, the pipeline is still usable.
            if not DECODING_ERROR.search(str(error)):
                raise
            raise InvalidRequest(
                "the photo cannot be decoded: it is damaged, or of a variant that DALI does not support"
            ) from None
        return decoded, torch.from_dlpack(images.as_tensor())


class Postprocess:
    """Resizes the probability to the size of the photo, and keeps the pixels that exceed the threshold."""

    def __init__(self, device: torch.device, max_batch_size: int = 1):
        self._device = device
        self._options = {"device": "cpu", **_pipeline_options(device, max_batch_size)}
        if device.type == "cuda":
            # One thread: all operators run on the GPU, and waking idle threads takes time.
            self._options |= {"device": "gpu", "num_threads": 1}
        self._pipeline: Pipeline | None = None

    def __call__(
        self, photos: TensorList, probability: torch.Tensor, thresholds: Sequence[float]
    ) -> tuple[TensorList, TensorList]:
        """Return the cut-outs and their masks.

        ``photos`` are what :class:`Preprocess` returned. ``probability`` is float32 ``[N, S, S]`` on the device, and
        ``thresholds`` has a number from 0 to 1 for each photo. A mask, uint8 ``[H, W]``, is 255 where the probability,
        interpolated linearly, exceeds the threshold, and 0 elsewhere. A cut-out, uint8 ``[H, W, 3]``, is the photo
        where its mask is 255, and 0 elsewhere.
        """
        if probability.device.type == "cpu":
            # Fed a torch tensor, DALI asks torch for a CUDA stream, which does not exist without a GPU.
            probability = probability.numpy()
        # Discard a pipeline that fails: inputs that were fed before the error, such as the photos, are still in it, and
        # would become part of the next response.
        pipeline, self._pipeline = self._pipeline or _postprocess_pipeline(**self._options), None
        outputs = pipeline.run(
            _current_stream(self._device),
            photo=photos,
            probability=probability[..., None],
            threshold=np.asarray(thresholds, np.float32),
        )
        self._pipeline = pipeline
        return outputs


@pipeline_def(enable_conditionals=True)
def _preprocess_pipeline(on_gpu: bool, general: bool, jpeg_hardware: bool, input_size: int):
    encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
    if not on_gpu:
        photo = _decode(encoded, device="cpu")
    elif not general or fn.external_source(name="suits_nvjpeg", dtype=types.BOOL, ndim=0):
        photo = _decode(encoded, hw_decoder_load=1.0 if jpeg_hardware else 0.0, **NVJPEG)
    else:
        # Also all PNGs: device="mixed" returns wrong colors for those of 2 and 4 bits.
        photo = _decode(encoded, device="cpu").gpu()
    if general:
        orientation = fn.external_source(name="orientation", dtype=types.INT32, ndim=0)
        if orientation >= 5:
            photo = fn.transpose(photo, perm=[1, 0, 2], transpose_layout=False, output_layout="HWC")
        if orientation >= 2:
            mirrored = (orientation == 2) | (orientation == 3) | (orientation == 6) | (orientation == 7)
            upside_down = (orientation == 3) | (orientation == 4) | (orientation == 7) | (orientation == 8)
            photo = fn.flip(
                photo,
                horizontal=fn.cast(mirrored, dtype=types.INT32),
                vertical=fn.cast(upside_down, dtype=types.INT32),
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
    # Without antialiasing, as in torch's interpolate. This matters if the photo is smaller than the network's input.
    probability = fn.resize(probability, size=size, interp_type=types.INTERP_LINEAR, antialias=False)
    mask = (probability > threshold) * types.Constant(255, dtype=types.UINT8)
    return photo & mask, fn.squeeze(mask, axes=2)


def _decode(encoded, **options):
    return fn.decoders.image(
        encoded,
        output_type=types.RGB,
        jpeg_fancy_upsampling=True,  # as in every viewer; otherwise, the colors of 4:2:0 JPEGs differ visibly
        adjust_orientation=False,  # photo/ has already read the orientation
        **options,
    )


def _pipeline_options(device: torch.device, max_batch_size: int) -> dict:
    # No prefetching: each call feeds, runs and returns one batch.
    return {
        "batch_size": max_batch_size,
        "num_threads": min(max_batch_size, os.cpu_count() or 1),
        "device_id": None if device.type == "cpu" else device.index or 0,
        "prefetch_queue_depth": 1,
    }


def _current_stream(device: torch.device) -> torch.cuda.Stream | None:
    return None if device.type == "cpu" else torch.cuda.current_stream(device)
