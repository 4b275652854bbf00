# SPDX-License-Identifier: Apache-2.0
"""Serve a segmentation network with PyTriton and NVIDIA DALI: send a photo, get it back with one class cut out.

    python server.py [--help]

Read it from top to bottom: the contract, the three stages, the command line, and how the model is bound and served.
What any server needs in production, such as processes, batching, shared memory and signals, is in serving/.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from reprlib import repr as shorten
from typing import TYPE_CHECKING

import numpy as np
from pytriton.model_config import ModelConfig, Tensor
from pytriton.proxy.types import Request

from photo import InvalidPhoto, Photo, blank_photo, max_photo_bytes, read_photo
from serving import Checked, InferenceFailed, InvalidRequest, Server, Stages, UsageError
from serving.options import add_serving_options, make_parser, number

if TYPE_CHECKING:
    from encoders import ImageEncoding

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


@dataclass(frozen=True)
class Job:
    """What a request asks for."""

    photo: Photo
    classes: Sequence[int]
    threshold: float
    outputs: Sequence[str]
    encoding: "ImageEncoding"  # of the output "encoded"


class Segmentation(Stages):
    """The stages: DALI preprocesses, the network infers, DALI postprocesses, and image files are encoded."""

    size_option = "max_pixels"

    @classmethod
    def limits(cls, options: argparse.Namespace) -> tuple[int, int]:
        """Return the maximum size of a request and of a response, which has room for the default outputs, in bytes."""
        return max_photo_bytes(options.max_pixels), 2 * 3 * options.max_pixels

    @classmethod
    def example(cls, options: argparse.Namespace) -> Request:
        """Return a request with which the server warms up: a small photo, and all outputs."""
        photo, outputs = blank_photo(options.max_pixels), [tensor.name for tensor in OUTPUTS]
        return Request({"image": photo}, {"format": "jpeg"}, requested_output_names=outputs)

    def __init__(self, options: argparse.Namespace, device: str):
        """Load the network onto a device. Raises UsageError."""
        import torch

        from encoders import Encode
        from model_inference import load_network
        from pipelines import Postprocess, Preprocess
        from weights.loading import load_weights

        self.options, device, batch_size = options, torch.device(device), options.max_batch_size
        state_dict = load_weights(options.weights, NETWORK)
        self.preprocess = Preprocess(device, options.input_size, batch_size, options.jpeg_hardware)
        self.network = load_network(NETWORK, state_dict, device, options.precision, options.input_size, batch_size)
        self.postprocess = Postprocess(device, batch_size)
        self.encode = Encode(device)
        try:
            self.network.class_indices(options.class_name)
        except ValueError as error:
            raise UsageError(f"--class-name {error}") from None

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
        encoding = self.encode.read_parameters(parameters)
        # To the server, a request that names no outputs looks like one that names them all.
        if len(outputs) == len(OUTPUTS) and not parameters.keys() & {"format", "quality"}:
            outputs = DEFAULT_OUTPUTS
        if "encoded" in outputs:
            encoding.check_size(photo.width, photo.height)
        return Job(photo, classes, threshold, outputs, encoding)

    def weigh(self, job: Job) -> float:
        """Return the share of the pixels that a photo can have."""
        return job.photo.width * job.photo.height / self.options.max_pixels

    def __call__(self, jobs: Sequence[Job]) -> list[dict | Checked]:
        """Return the outputs of each job, on the device, without a batch dimension. Raises InvalidRequest."""
        from torch.cuda import nvtx

        from model_inference import add_classes

        with nvtx.range("preprocess"):
            photos, images = self.preprocess([job.photo for job in jobs])
        if all(set(job.outputs) == {"original"} for job in jobs):
            return [{"original": photo} for photo in photos]
        with nvtx.range("network"):
            probability = add_classes(self.network(images), [job.classes for job in jobs])
            finite = probability.isfinite().flatten(1).all(1).to("cpu", non_blocking=True)
        with nvtx.range("postprocess"):
            cut_outs, masks = self.postprocess(photos, probability, [job.threshold for job in jobs])
        with nvtx.range("encode"):
            encodings = [job.encoding if "encoded" in job.outputs else None for job in jobs]
            encoded = self.encode(cut_outs, masks, encodings)
        outputs = {"original": photos, "segmented": cut_outs, "mask": masks, "encoded": encoded}
        error = InferenceFailed("the network's result is not finite: start the server with --precision fp32")
        return [
            Checked({name: outputs[name][index] for name in job.outputs}, finite[index], error)
            for index, job in enumerate(jobs)
        ]


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
        help="numeric precision; auto: fp16 on a GPU with tensor cores, bf16 on a CPU if faster there, fp32 otherwise",
    )
    add(
        "--jpeg-hardware",
        action="store_true",
        help="decode JPEGs faster; only for trusted clients, see docs/security.md",
    )
    add("--max-pixels", type=number(int, 1), default=25_000_000, help="photos with more pixels are rejected")
    add_serving_options(parser)
    return parser.parse_args(arguments)


def main() -> None:
    """Bind the model and serve it until a signal ends the server."""
    with Server(Segmentation, parse_options()) as server:
        server.bind(
            model_name=MODEL_NAME,
            # PyTriton calls each instance with one request at a time. An instance hands the request to a worker
            # process, which groups queued requests into batches and calls Segmentation.
            infer_func=server.instances,
            inputs=INPUTS,
            outputs=OUTPUTS,
            # Photos differ in size, and a batch of Triton's is one dense array: each request has one photo.
            config=ModelConfig(max_batch_size=1),
        )
        server.serve()


if __name__ == "__main__":
    main()
