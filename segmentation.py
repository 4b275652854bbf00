# SPDX-License-Identifier: Apache-2.0
"""The way of a photo: preprocess, network, postprocess, and back to the host."""

import os
from collections.abc import Sequence

import numpy as np
import torch
from torch.cuda import nvtx

from batching import lay_out
from model_inference import GraphedNetwork, SegmentationNetwork
from pipelines import Postprocess, Preprocess
from request import PhotoRequest


class Segmenter:
    """The three stages on a batch of photos of any sizes. An object belongs to one thread at a time."""

    def __init__(self, network: SegmentationNetwork, input_size: int, max_batch_size: int):
        device = network.device
        threads = min(max_batch_size, os.cpu_count() or 1)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        with self._on_device():
            self._preprocess = Preprocess(device, input_size, max_batch_size, threads)
            self._network = network if self._stream is None else GraphedNetwork(network, input_size, max_batch_size)
            self._postprocess = Postprocess(device, max_batch_size, threads)

    def __call__(self, requests: Sequence[PhotoRequest]) -> list[dict[str, np.ndarray]]:
        """Return the outputs that each request asks for, uint8 ``[H, W, 3]``, in the memory of the request.

        Raises InvalidRequest where one of the photos cannot be decoded.
        """
        with self._on_device():
            with nvtx.range("preprocess"):
                photos, images = self._preprocess([request.encoded for request in requests])
            outputs = {"original": photos}
            if any("segmented" in request.outputs for request in requests):
                with nvtx.range("network"):
                    probabilities = self._network(images)
                with nvtx.range("postprocess"):
                    wanted = torch.stack([probabilities[i, request.class_index] for i, request in enumerate(requests)])
                    thresholds = [request.threshold for request in requests]
                    outputs["segmented"] = self._postprocess(photos, wanted, thresholds)
            with nvtx.range("to host"):
                answers = [
                    request.memory.store({name: torch.from_dlpack(outputs[name][index]) for name in request.outputs})
                    for index, request in enumerate(requests)
                ]
        # Up to here the GPU was only told what to do: this is the one time that the batch is waited for.
        if self._stream is not None:
            with nvtx.range("wait"):
                self._stream.synchronize()
        return answers

    def _on_device(self) -> torch.cuda.StreamContext:
        if self._stream is not None:
            # Leaving the stream selects the GPU of before, which makes a context there: by default on the first GPU.
            torch.cuda.set_device(self._stream.device)
        return torch.cuda.stream(self._stream)


class HostMemory:
    """Memory of the host that images are copied to, used again and again."""

    def __init__(self, array: np.ndarray, pin: bool = False):
        """``array``: the memory, uint8 ``[N]``. ``pin``: whether a GPU is to copy there in the background."""
        self._array = array
        self._pin = pin
        self._pinned = 0

    def store(self, images: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
        """Copy images there, uint8 of any shape, on a GPU in the order of torch's current stream, and return them."""
        size = sum(image.numel() for image in images.values())
        if self._pin and size > self._pinned:
            self._pin_at_least(size)
        copies = lay_out(self._array, {name: image.shape for name, image in images.items()})
        for name, image in images.items():
            torch.from_numpy(copies[name]).copy_(image, non_blocking=True)
        return copies

    def _pin_at_least(self, size: int) -> None:
        # As much as was ever needed, not all: pinned pages take memory, whether they are used or not.
        cudart, pointer = torch.cuda.cudart(), self._array.ctypes.data
        if self._pinned:
            torch.cuda.check_error(cudart.cudaHostUnregister(pointer))
            self._pinned = 0
        size = min(len(self._array), 1 << (size - 1).bit_length())
        torch.cuda.check_error(cudart.cudaHostRegister(pointer, size, 0))
        self._pinned = size
