# SPDX-License-Identifier: Apache-2.0
"""The way of a photo: preprocess, network, postprocess, and back to the host."""

import os
from collections.abc import Sequence

import numpy as np
import torch

from model_inference import GraphedNetwork, SegmentationNetwork
from pipelines import Postprocess, Preprocess, TensorList
from request import PhotoRequest


class Segmenter:
    """The three stages on a batch of photos of any sizes. An object belongs to one thread at a time."""

    def __init__(self, network: SegmentationNetwork, input_size: int, max_batch_size: int):
        device = network.device
        threads = min(max_batch_size, os.cpu_count() or 1)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        with torch.cuda.stream(self._stream):
            self._preprocess = Preprocess(device, input_size, max_batch_size, threads)
            self._network = network if self._stream is None else GraphedNetwork(network, input_size, max_batch_size)
            self._postprocess = Postprocess(device, max_batch_size, threads)

    def __call__(self, requests: Sequence[PhotoRequest]) -> list[dict[str, np.ndarray]]:
        """Return the outputs that each request asks for, uint8 ``[H, W, 3]``.

        Raises InvalidRequest where one of the photos cannot be decoded.
        """
        with torch.cuda.stream(self._stream):
            photos, images = self._preprocess([request.encoded for request in requests])
            outputs = {"original": photos}
            if any("segmented" in request.outputs for request in requests):
                probabilities = self._network(images)
                wanted = torch.stack([probabilities[i, request.class_index] for i, request in enumerate(requests)])
                outputs["segmented"] = self._postprocess(photos, wanted, [request.threshold for request in requests])
            answers = [
                {name: _to_host(outputs[name], index) for name in request.outputs}
                for index, request in enumerate(requests)
            ]
        # Up to here the GPU was only told what to do: this is the one time that the batch is waited for.
        if self._stream is not None:
            self._stream.synchronize()
        return [{name: tensor.numpy() for name, tensor in answer.items()} for answer in answers]


def _to_host(batch: TensorList, index: int) -> torch.Tensor:
    # From a GPU this copies in the background, to pinned memory, which torch keeps for the next photo of that size.
    return torch.from_dlpack(batch[index]).to("cpu", non_blocking=True)
