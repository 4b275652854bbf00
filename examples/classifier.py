# SPDX-License-Identifier: Apache-2.0
"""Serve a classifier with PyTriton and NVIDIA DALI: send a photo, get its most probable labels.

    python examples/classifier.py [--help]

The network is torchvision's ResNet-50, trained on ImageNet. docs/your-own-network.md explains this file.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as shorten

import numpy as np
from pytriton.model_config import ModelConfig, Tensor
from pytriton.proxy.types import Request

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the folder with serving/

from photo import InvalidPhoto, Photo, blank_photo, max_photo_bytes, read_photo
from serving import InvalidRequest, Server, Stages, UsageError
from serving.options import add_serving_options, make_parser, number

MODEL_NAME = "ResNet50"
INPUTS = [
    Tensor(name="image", dtype=np.uint8, shape=(-1,)),  # the bytes of an encoded photo
]
OUTPUTS = [
    Tensor(name="labels", dtype=np.bytes_, shape=(-1,)),  # the names of the most probable classes
    Tensor(name="probabilities", dtype=np.float32, shape=(-1,)),  # of these classes, the highest first
]
DEFAULT_TOP = 5
MAX_TOP = 10
MAX_LABEL_BYTES = 100


@dataclass(frozen=True)
class Job:
    """A valid request."""

    photo: Photo
    top: int
    outputs: Sequence[str]


class Classification(Stages):
    """The stages: DALI preprocesses, the network infers, and the most probable classes get their names."""

    size_option = "max_pixels"

    @classmethod
    def limits(cls, options: argparse.Namespace) -> tuple[int, int]:
        """Return the maximum size of a request and of a response, in bytes."""
        return max_photo_bytes(options.max_pixels), MAX_TOP * (MAX_LABEL_BYTES + np.float32().nbytes)

    @classmethod
    def example(cls, options: argparse.Namespace) -> Request:
        """Return the warm-up request: a small photo, with all outputs."""
        photo, outputs = blank_photo(options.max_pixels), [tensor.name for tensor in OUTPUTS]
        return Request({"image": photo}, {"top": MAX_TOP}, requested_output_names=outputs)

    def __init__(self, options: argparse.Namespace, device: str):
        """Load the network onto a device. Raises UsageError."""
        import torch
        from torchvision.models import ResNet50_Weights

        from pipelines import Preprocess

        self.options = options
        # Preprocess scales the whole photo to the input of the network. torchvision's own transform crops the photo.
        self.preprocess = Preprocess(torch.device(device), 224, options.max_batch_size)
        self.network = load_network(options.weights).to(device)
        self.names = np.array(ResNet50_Weights.DEFAULT.meta["categories"])

    def read(self, request: Request) -> Job:
        """Turn a request into a job, before it joins a batch. Raises InvalidRequest; its message goes to the client."""
        try:
            photo = read_photo(request["image"], self.options.max_pixels)
        except InvalidPhoto as error:
            raise InvalidRequest(str(error)) from None
        if unknown := request.parameters.keys() - {"top"}:
            raise InvalidRequest(f"unknown parameter {shorten(min(unknown))}: the only one is top")
        top = request.parameters.get("top", DEFAULT_TOP)
        if type(top) is not int or not 1 <= top <= MAX_TOP:
            raise InvalidRequest(f"top must be a whole number between 1 and {MAX_TOP}, not {shorten(top)}")
        return Job(photo, top, request.requested_output_names)

    def weigh(self, job: Job) -> float:
        """Return the size of the photo as a share of ``--max-pixels``, from 0 to 1."""
        return job.photo.width * job.photo.height / self.options.max_pixels

    def __call__(self, jobs: Sequence[Job]) -> list[dict]:
        """Return the outputs of each job, without a batch dimension. Raises InvalidRequest."""
        _, images = self.preprocess([job.photo for job in jobs])
        probabilities, classes = self.network(images).softmax(dim=1).topk(MAX_TOP)
        names = self.names[classes.cpu().numpy()]  # waits for the GPU: only the CPU has the names
        outputs = [
            {"labels": names[index, : job.top], "probabilities": probabilities[index, : job.top]}
            for index, job in enumerate(jobs)
        ]
        return [{name: output[name] for name in job.outputs} for output, job in zip(outputs, jobs, strict=True)]


def load_network(weights: str):
    """Return ResNet-50 with torchvision's weights of this name, or with those in a file. Raises UsageError."""
    import torch
    from torchvision.models import ResNet50_Weights, resnet50

    network, valid = resnet50(), ResNet50_Weights.__members__
    options = {"map_location": "cpu", "weights_only": True}  # which never executes code from the file
    try:
        if weights in valid:
            state_dict = ResNet50_Weights[weights].get_state_dict(progress=False, check_hash=True, **options)
        else:
            state_dict = torch.load(weights, **options)
        network.load_state_dict(state_dict)
    except Exception as error:  # of the internet connection, the file, pickle or torch
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        advice = f"use the path of a state dict, or {', '.join(valid)}"
        raise UsageError(f"--weights {weights} failed ({reason:.200}): {advice}") from error
    return network.eval().requires_grad_(False)


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line. An error ends the process with one line and status 2."""
    parser = make_parser("Serve a classifier with PyTriton and DALI.")
    add = parser.add_argument_group("classification").add_argument
    add("--weights", default="IMAGENET1K_V2", help="torchvision's, downloaded once, or the path of a state dict")
    add("--max-pixels", type=number(int, 1), default=25_000_000, help="photos with more pixels are rejected")
    add_serving_options(parser)
    return parser.parse_args(arguments)


def main() -> None:
    """Bind the model and serve it until a signal ends the server."""
    with Server(Classification, parse_options()) as server:
        server.bind(
            model_name=MODEL_NAME,
            infer_func=server.instances,
            inputs=INPUTS,
            outputs=OUTPUTS,
            config=ModelConfig(max_batch_size=1),
        )
        server.serve()


if __name__ == "__main__":
    main()
