# SPDX-License-Identifier: Apache-2.0
"""A stand-in for server.py without a network: it keeps bright pixels, and starts in two seconds."""

import io
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from pytriton.model_config import ModelConfig, Tensor
from pytriton.proxy.types import Request

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from toy_server import Inversion

from photo import blank_photo, max_photo_bytes
from serving import Server, add_serving_options, make_parser

SHAPES = {"original": (-1, -1, 3), "mask": (-1, -1), "encoded": (-1,)}


class Bright(Inversion):
    """Keeps bright pixels."""

    @classmethod
    def limits(cls, options):
        return max_photo_bytes(options.max_pixels), 8 * options.max_pixels + 4096

    @classmethod
    def example(cls, options):
        return Request({"image": blank_photo(options.max_pixels)}, {}, requested_output_names=[*SHAPES])

    def __call__(self, jobs):
        responses = []
        for image, _, names in jobs:
            mask = np.where(image.mean(axis=2) > 127, np.uint8(255), np.uint8(0))
            outputs = {"original": lambda image=image: image, "mask": lambda mask=mask: mask}
            outputs["encoded"] = lambda image=image, mask=mask: encode(image, mask)
            responses.append({name: outputs[name]() for name in names})
        return responses


def encode(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    stream = io.BytesIO()
    Image.fromarray(np.dstack([image, mask])).save(stream, "PNG", compress_level=1)
    return np.frombuffer(stream.getvalue(), np.uint8)


def main():
    parser = make_parser("Keep what is bright in photos.")
    add_serving_options(parser)
    parser.set_defaults(device="cpu", instances=1, max_batch_size=1, max_pixels=300_000, start="")
    options = parser.parse_args()
    with Server(Bright, options) as server:
        server.bind(
            model_name="ResNet101",
            infer_func=server.instances,
            inputs=[Tensor(name="image", dtype=np.uint8, shape=(-1,))],
            outputs=[Tensor(name=name, dtype=np.uint8, shape=shape) for name, shape in SHAPES.items()],
            config=ModelConfig(max_batch_size=1),
        )
        server.serve()


if __name__ == "__main__":
    main()
