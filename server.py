# SPDX-License-Identifier: Apache-2.0
"""Serve a segmentation network with PyTriton and NVIDIA DALI: send a photo, get it back with one class cut out.

    python server.py [--help]

Read it from top to bottom: the contract, the three stages, the command line, and how the model is bound and served.
What any server needs in production, such as worker processes, batching, shared memory and signals, is in serving/.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from reprlib import repr as shorten
from typing import TYPE_CHECKING

import numpy as np
from pytriton.model_config import DynamicBatcher, ModelConfig, Tensor
from pytriton.proxy.types import Request

from photo import InvalidPhoto, Photo, blank_photo, max_photo_bytes, read_photo
from serving.errors import InferenceFailed, InvalidRequest, UsageError
from serving.lifecycle import Lifecycle
from serving.options import add_serving_options, configure_logging, make_parser, number
from serving.stages import Stages
from serving.triton import Triton
from serving.worker import Workers

if TYPE_CHECKING:
    from encoders import ImageFile

# torch, torchvision and DALI take seconds to import. They are imported where they are used, in the worker process, so
# that a mistake on the command line is answered at once.

# The contract: what clients send and get, and with which network. Change this and the class below to serve another
# network; see docs/your-own-network.md.
MODEL_NAME = "ResNet101"
NETWORK = "deeplabv3_resnet101"  # torchvision's name; its pretrained weights come with the names of the classes
INPUTS = [
    Tensor(name="image", dtype=np.uint8, shape=(-1,)),  # the bytes of an encoded photo
]
OUTPUTS = [
    Tensor(name="original", dtype=np.uint8, shape=(-1, -1, 3)),  # the decoded photo, RGB, upright
    Tensor(name="segmented", dtype=np.uint8, shape=(-1, -1, 3)),  # the photo where the class is, 0 elsewhere
    Tensor(name="mask", dtype=np.uint8, shape=(-1, -1)),  # 255 where the class is, 0 elsewhere
    Tensor(name="encoded", dtype=np.uint8, shape=(-1,)),  # segmented as an image file
]
DEFAULT_OUTPUTS = ("original", "segmented")
PARAMETERS = ("class_name", "threshold", "format", "quality")


def answer_bytes(pixels: int) -> int:
    """Return the maximum size of an answer in bytes for a photo of so many pixels: enough for the default outputs."""
    return 2 * 3 * pixels


@dataclass(frozen=True)
class Job:
    """What a request asks for."""

    photo: Photo
    classes: Sequence[int]
    threshold: float
    outputs: Sequence[str]
    file: "ImageFile"  # what the output "encoded" is


class Segmentation(Stages):
    """The stages: DALI preprocesses, the network infers, DALI postprocesses, and image files are encoded."""

    def __init__(self, options: argparse.Namespace, device: str):
        """Load the network onto a device, and warm up. Raises UsageError."""
        import torch

        from encoders import Encode
        from model_inference import load_network
        from pipelines import Postprocess, Preprocess
        from weights.loading import load_weights

        self.options, device, batch_size = options, torch.device(device), options.max_batch_size
        state_dict = load_weights(options.weights, NETWORK)
        self.preprocess = Preprocess(device, options.input_size, batch_size)
        self.network = load_network(NETWORK, state_dict, device, options.precision, options.input_size, batch_size)
        self.postprocess = Postprocess(device, batch_size)
        self.encode = Encode(device)
        try:
            classes = self.network.class_indices(options.class_name)
        except ValueError as error:
            raise UsageError(f"--class-name {error}") from None
        # The first run of each stage chooses kernels and allocates memory.
        job = Job(blank_photo(), classes, 0.5, [tensor.name for tensor in OUTPUTS], self.encode.read_parameters({}))
        for size in {1, batch_size}:
            self([job] * size)

    def read(self, request: Request) -> Job:
        """Check a request before it joins a batch. Raises InvalidRequest, whose message goes to the client."""
        parameters, outputs = request.parameters, request.requested_output_names
        try:
            photo = read_photo(request["image"], self.options.max_pixels)
        except InvalidPhoto as error:
            raise InvalidRequest(str(error)) from None
        if unknown := parameters.keys() - PARAMETERS:
            raise InvalidRequest(f"unknown parameter {shorten(min(unknown))}, not one of {', '.join(PARAMETERS)}")
        try:
            classes = self.network.class_indices(parameters.get("class_name", self.options.class_name))
        except ValueError as error:
            raise InvalidRequest(f"class_name {error}") from None
        threshold = parameters.get("threshold", self.options.threshold)
        if type(threshold) not in (int, float) or not 0 <= threshold <= 1:
            raise InvalidRequest(f"threshold must be a number between 0 and 1, not {shorten(threshold)}")
        file = self.encode.read_parameters(parameters)
        # To the server, a request that names no outputs looks like one that names them all.
        if len(outputs) == len(OUTPUTS) and not parameters.keys() & {"format", "quality"}:
            outputs = DEFAULT_OUTPUTS
        if "encoded" in outputs:
            file.check_size(photo.width, photo.height)
        return Job(photo, classes, threshold, outputs, file)

    def weigh(self, job: Job) -> float:
        """Return the share of the pixels that a photo can have."""
        return job.photo.width * job.photo.height / self.options.max_pixels

    def __call__(self, jobs: Sequence[Job]) -> list[dict]:
        """Return the outputs of each job, on the device, without a batch dimension. Raises InvalidRequest."""
        from torch.cuda import nvtx

        from model_inference import add_classes

        with nvtx.range("preprocess"):
            photos, images = self.preprocess([job.photo for job in jobs])
        outputs = {"original": photos}
        self.total = 0.0
        if any(set(job.outputs) - {"original"} for job in jobs):
            with nvtx.range("network"):
                probability = add_classes(self.network(images), [job.classes for job in jobs])
                self.total = probability.sum().to("cpu", non_blocking=True)  # not finite if a value is not
            with nvtx.range("postprocess"):
                cut_outs, masks = self.postprocess(photos, probability, [job.threshold for job in jobs])
            with nvtx.range("encode"):
                files = [job.file if "encoded" in job.outputs else None for job in jobs]
                encoded = self.encode(cut_outs, masks, files)
            outputs |= {"segmented": cut_outs, "mask": masks, "encoded": encoded}
        return [{name: outputs[name][index] for name in job.outputs} for index, job in enumerate(jobs)]

    def verify(self) -> None:
        """Raise InferenceFailed if the network overflowed in the last call: the cut-out would be black."""
        if not np.isfinite(float(self.total)):
            raise InferenceFailed("the network's result is not finite: start the server with --precision fp32")


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line. A mistake ends the process with one line and status 2."""
    parser = make_parser("Serve a segmentation network with PyTriton and DALI.")
    add = parser.add_argument_group("segmentation").add_argument
    add(
        "--weights",
        default="auto",
        help="pretrained (torchvision's, downloaded once), demo (knows only the two sample photos), the path of a "
        "state dict, or auto: pretrained, or demo if those are not available",
    )
    add("--class-name", default="person", help="class to cut out if a request names none; several: cat,dog")
    add("--threshold", type=number(float, 0, 1), default=0.6, help="probability to exceed if a request sets none")
    size = number(int, 32, 2048)
    add("--input-size", type=size, default=224, help="width and height of the network's input in pixels")
    add(
        "--precision",
        choices=("auto", "fp32", "bf16", "fp16"),
        default="auto",
        help="numeric precision; auto: fp16 on a GPU with tensor cores, bf16 on a CPU with AMX, fp32 otherwise",
    )
    add_serving_options(parser)
    return parser.parse_args(arguments)


def main() -> None:
    """Start a worker per device, bind the model and serve it until a signal ends the server."""
    options = parse_options()
    configure_logging(options.verbose)
    with Lifecycle(options.drain_s) as lifecycle:
        triton = Triton(options, lifecycle)
        with Workers(Segmentation, options, max_photo_bytes, answer_bytes, lifecycle) as workers:
            triton.bind(
                model_name=MODEL_NAME,
                # A list: PyTriton calls each instance in its own thread. An instance hands the request to a worker
                # process, which groups what is waiting into batches and calls Segmentation.
                infer_func=workers.instances,
                inputs=INPUTS,
                outputs=OUTPUTS,
                config=ModelConfig(
                    # Photos differ in size, and a Triton batch is one dense array: each request has one photo, and
                    # Triton's batcher only applies the limits of the queue.
                    max_batch_size=1,
                    batcher=DynamicBatcher(default_queue_policy=workers.queue_policy),
                ),
            )
            triton.serve()


if __name__ == "__main__":
    main()
