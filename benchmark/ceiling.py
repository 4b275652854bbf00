# SPDX-License-Identifier: Apache-2.0
"""A server that does no work, to show what PyTriton itself can carry: it answers with ready-made images.

    python -m benchmark.ceiling [--device cpu] [--http-port 8000]

It has the contract and the number of instances of server.py, and knows only the benchmark's photos.
"""

import numpy as np
from PIL import Image
from pytriton.model_config import DynamicBatcher, ModelConfig

from benchmark.photos import ROOT, SIZES, encode, photos
from server import INPUTS, MODEL_NAME, OUTPUTS
from serving.device import resolve_device
from serving.lifecycle import Lifecycle
from serving.options import device_default, parse_serving_options
from serving.triton import Triton


def ready_made(size: tuple[int, int]) -> dict[str, np.ndarray]:
    """Return all outputs for a photo of this width and height, with a batch dimension of 1."""
    original, segmented = (Image.open(ROOT / "images" / name).resize(size) for name in ("orig.jpg", "segm.jpg"))
    outputs = {
        "original": np.asarray(original),
        "segmented": np.asarray(segmented),
        "mask": np.asarray(segmented.convert("L")),
        "encoded": np.frombuffer(encode(segmented, quality=95, subsampling=0), np.uint8),
    }
    return {name: array[None] for name, array in outputs.items()}


class Instance:
    """Answers with its own images: if all instances shared them, they would stay in the processor's cache."""

    def __init__(self):
        self._answers = {len(photo): ready_made(size) for photo, size in zip(photos(), SIZES, strict=True)}

    def __call__(self, requests):
        """Return the outputs that each request names. A photo is recognized by its length."""
        return [
            {name: self._answers[request["image"].size][name] for name in request.requested_output_names}
            for request in requests
        ]


def main() -> None:
    """Serve until a signal arrives."""
    options = parse_serving_options("Answer with ready-made images.")
    with Lifecycle(options.drain_s) as lifecycle:
        triton = Triton(options, lifecycle)
        instances = device_default(options, "instances", resolve_device(options.device).split(":")[0])
        triton.bind(
            model_name=MODEL_NAME,
            infer_func=[Instance() for _ in range(instances)],
            inputs=INPUTS,
            outputs=OUTPUTS,
            config=ModelConfig(max_batch_size=1, batcher=DynamicBatcher()),
        )
        triton.serve()


if __name__ == "__main__":
    main()
