# SPDX-License-Identifier: Apache-2.0
"""A server for pairs: two inputs, images of different sizes, which it shows side by side."""

import sys
from pathlib import Path

import numpy as np
from pytriton.model_config import ModelConfig, Tensor
from pytriton.proxy.types import Request

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from serving import InvalidRequest, Server, Stages
from serving.options import add_serving_options, make_parser

LARGEST_SIDE = 1000
CHANNELS = 3


class SideBySide(Stages):
    """Puts the second image to the right of the first one, on black."""

    @classmethod
    def limits(cls, options):  # noqa: ARG003
        size = 2 * LARGEST_SIDE * LARGEST_SIDE * CHANNELS
        return size, size

    @classmethod
    def example(cls, options):  # noqa: ARG003
        images = {"left": np.zeros((3, 5, CHANNELS), np.uint8), "right": np.zeros((4, 2, CHANNELS), np.uint8)}
        return Request(images, {}, requested_output_names=["both"])

    def __init__(self, options, device):
        pass

    def read(self, request):
        left, right = request["left"], request["right"]
        if max(*left.shape, *right.shape) > LARGEST_SIDE:
            raise InvalidRequest(f"an image can be at most {LARGEST_SIDE} pixels wide and high")
        return left, right

    def __call__(self, jobs):
        outputs = []
        for left, right in jobs:
            both = np.zeros((max(len(left), len(right)), left.shape[1] + right.shape[1], CHANNELS), np.uint8)
            both[: len(left), : left.shape[1]] = left
            both[: len(right), left.shape[1] :] = right
            outputs.append({"both": both})
        return outputs


def main():
    parser = make_parser("Show two images side by side.")
    add_serving_options(parser)
    parser.set_defaults(device="cpu")
    with Server(SideBySide, parser.parse_args()) as server:
        server.bind(
            model_name="SideBySide",
            infer_func=server.instances,
            inputs=[Tensor(name=name, dtype=np.uint8, shape=(-1, -1, CHANNELS)) for name in ("left", "right")],
            outputs=[Tensor(name="both", dtype=np.uint8, shape=(-1, -1, CHANNELS))],
            config=ModelConfig(max_batch_size=1),
        )
        server.serve()


if __name__ == "__main__":
    main()
