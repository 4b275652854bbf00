# SPDX-License-Identifier: Apache-2.0
"""A server that inverts photos, without torch and DALI: it starts in two seconds, and shows that serving/ is general.

Parameters of a request: ``add`` (to each inverted pixel), ``sleep_s``, ``hold`` (until a file exists), ``print`` (as a
native library does), ``raise`` (a message) and ``exit``.
"""

import argparse
import io
import logging
import os
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image
from pytriton.model_config import ModelConfig, Tensor
from pytriton.proxy.types import Request

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from photo import InvalidPhoto, blank_photo, max_photo_bytes, read_photo
from serving import InvalidRequest, Server, Stages, UsageError, add_serving_options, make_parser, number

LOGGER = logging.getLogger("server")


class Inversion(Stages):
    """Inverts photos, and returns the mean of each color channel."""

    size_option = "max_pixels"

    @classmethod
    def limits(cls, options):
        return max_photo_bytes(options.max_pixels), 3 * options.max_pixels + 64

    @classmethod
    def example(cls, options):
        return Request({"image": blank_photo(options.max_pixels)}, {}, requested_output_names=["inverted", "mean"])

    def __init__(self, options: argparse.Namespace, device: str):  # noqa: ARG002
        """Follow ``--start``: how the worker starts."""
        self.options = options
        if options.start == "hang":
            time.sleep(1000)
        if options.start.startswith("/"):  # when this file exists
            while not Path(options.start).exists():
                time.sleep(0.01)
        if options.start == "no memory":
            raise RuntimeError("CUDA out of memory. Tried to allocate 20 MiB.\nAnd advice.")
        if options.start == "wrong option":
            raise UsageError("--start must not be wrong")
        if options.start == "exit":
            os._exit(3)
        if options.start == "warn":
            LOGGER.warning("FALLBACK: of this worker")

    def read(self, request):
        try:
            photo = read_photo(request["image"], self.options.max_pixels)
        except InvalidPhoto as error:
            raise InvalidRequest(str(error)) from None
        image = Image.open(io.BytesIO(photo.encoded)).convert("RGB")
        return np.asarray(image), request.parameters, request.requested_output_names

    def __call__(self, jobs):
        for _, parameters, _ in jobs:
            if seconds := float(parameters.get("sleep_s", 0)):
                LOGGER.info("sleeping for %g s", seconds)
                time.sleep(seconds)
            if path := parameters.get("hold"):
                LOGGER.info("holding until %s exists", path)
                while not Path(path).exists():
                    time.sleep(0.01)
            if "print" in parameters:
                os.write(2, parameters["print"].encode())
            if "raise" in parameters:
                raise ValueError(parameters["raise"])
            if "exit" in parameters:
                os._exit(1)
        outputs = [
            {"inverted": 255 - image - np.uint8(parameters.get("add", 0)), "mean": image.mean(axis=(0, 1))}
            for image, parameters, _ in jobs
        ]
        return [{name: output[name] for name in names} for output, (_, _, names) in zip(outputs, jobs, strict=True)]


def main():
    parser = make_parser("Invert photos.")
    parser.add_argument("--start", default="")
    parser.add_argument("--triton-batch-size", type=int, default=1)
    parser.add_argument("--max-pixels", type=number(int, 1), default=25_000_000)
    add_serving_options(parser)
    parser.set_defaults(device="cpu", instances=1, max_batch_size=1)
    options = parser.parse_args()
    with Server(Inversion, options) as server:
        server.bind(
            model_name="Toy",
            infer_func=server.instances,
            inputs=[Tensor(name="image", dtype=np.uint8, shape=(-1,))],
            outputs=[
                Tensor(name="inverted", dtype=np.uint8, shape=(-1, -1, 3)),
                Tensor(name="mean", dtype=np.float64, shape=(3,)),
            ],
            config=ModelConfig(max_batch_size=options.triton_batch_size),
        )
        server.serve()


if __name__ == "__main__":
    main()
