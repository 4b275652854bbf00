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
from pytriton.model_config import DynamicBatcher, ModelConfig, Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from photo import InvalidPhoto, max_photo_bytes, read_photo
from serving.errors import InvalidRequest, UsageError
from serving.lifecycle import Lifecycle
from serving.options import add_serving_options, configure_logging, make_parser
from serving.stages import Stages
from serving.triton import Triton
from serving.worker import Workers

LOGGER = logging.getLogger("server")


class Inversion(Stages):
    """Inverts photos, and returns the mean of each color channel."""

    def __init__(self, options: argparse.Namespace, device: str):  # noqa: ARG002
        """Follow ``--start``: how the worker starts."""
        self.options = options
        if options.start == "hang":
            time.sleep(1000)
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
    add_serving_options(parser)
    parser.set_defaults(device="cpu", instances=1, max_batch_size=1)
    options = parser.parse_args()
    configure_logging(options.verbose)
    with Lifecycle(options.drain_s) as lifecycle:
        triton = Triton(options, lifecycle)
        with Workers(Inversion, options, max_photo_bytes, lambda pixels: 3 * pixels + 64, lifecycle) as workers:
            triton.bind(
                model_name="Toy",
                infer_func=workers.instances,
                inputs=[Tensor(name="image", dtype=np.uint8, shape=(-1,))],
                outputs=[
                    Tensor(name="inverted", dtype=np.uint8, shape=(-1, -1, 3)),
                    Tensor(name="mean", dtype=np.float64, shape=(3,)),
                ],
                config=ModelConfig(
                    max_batch_size=options.triton_batch_size,
                    batcher=DynamicBatcher(default_queue_policy=workers.queue_policy),
                ),
            )
            triton.serve()


if __name__ == "__main__":
    main()
