# SPDX-License-Identifier: Apache-2.0
"""Serve a segmentation network with PyTriton and NVIDIA DALI: send a photo, get back the pixels of one class.

    python server.py [--help]

Read it from top to bottom: the contract, the stages, the command line, and main(), which binds and serves the model.
Processes, batching, shared memory and signals, which any server needs in production, are in serving/.
"""

import argparse
from collections.abc import Sequence
from functools import partial

import numpy as np
from pytriton.model_config import ModelConfig, Tensor
from pytriton.proxy.types import Request

from jobs import FILE_PARAMETERS, Job, read_job
from photo import blank_photo, max_photo_bytes
from serving import Checked, InferenceFailed, Server, Stages, UsageError
from serving.options import add_serving_options, make_parser, number

# torch, torchvision and DALI take seconds to import. They are imported where they are used, in the worker process, so
# that an error on the command line is reported immediately.

# The contract: the model's name, its network, its inputs and its outputs. jobs.py has the parameters. To serve another
# network, change this and the class below; see docs/your-own-network.md.
MODEL_NAME = "ResNet101"
NETWORK = "deeplabv3_resnet101"  # torchvision's name; the pretrained weights include the names of the classes
INPUTS = [
    Tensor(name="image", dtype=np.uint8, shape=(-1,)),  # the bytes of an encoded photo
]
OUTPUTS = [
    Tensor(name="original", dtype=np.uint8, shape=(-1, -1, 3)),  # the decoded photo, RGB, upright
    Tensor(name="segmented", dtype=np.uint8, shape=(-1, -1, 3)),  # the photo's pixels of the class, 0 elsewhere
    Tensor(name="mask", dtype=np.uint8, shape=(-1, -1)),  # 255 where the class is, 0 elsewhere
    Tensor(name="probability", dtype=np.uint8, shape=(-1, -1)),  # of the class; 255 means 1
    Tensor(name="labels", dtype=np.uint8, shape=(-1, -1)),  # the index of the most probable class
    Tensor(name="encoded", dtype=np.uint8, shape=(-1,)),  # "segmented" or "labels" as an image file
]
DEFAULT_OUTPUTS = ("original", "segmented")


class Segmentation(Stages):
    """The stages: DALI preprocesses, the network infers, DALI postprocesses, and encoders.py writes image files."""

    size_option = "max_pixels"

    @classmethod
    def limits(cls, options: argparse.Namespace) -> tuple[int, int]:
        """Return the maximum size of a request, and of a response with the default outputs, in bytes."""
        return max_photo_bytes(options.max_pixels), 2 * 3 * options.max_pixels

    @classmethod
    def example(cls, options: argparse.Namespace) -> Request:
        """Return the warm-up request: a small photo, with all outputs."""
        photo, outputs = blank_photo(options.max_pixels), [tensor.name for tensor in OUTPUTS]
        return Request({"image": photo}, {"format": "jpeg"}, requested_output_names=outputs)

    def __init__(self, options: argparse.Namespace, device: str):
        """Load the network onto a device. Raises UsageError."""
        import torch

        from encoders import Encode
        from model_inference import class_indices, load_network
        from pipelines import Postprocess, Preprocess
        from weights.loading import load_weights

        self.options, device, batch_size = options, torch.device(device), options.max_batch_size
        self.class_indices = partial(class_indices, NETWORK)
        try:
            self.class_indices(options.class_name)  # first, because the weights may be a download
        except ValueError as error:
            raise UsageError(f"--class-name {error}") from None
        state_dict = load_weights(options.weights, NETWORK)
        self.preprocess = Preprocess(device, options.input_size, batch_size, options.jpeg_hardware)
        self.network = load_network(NETWORK, state_dict, device, options.precision, options.input_size, batch_size)
        self.postprocess = Postprocess(device, batch_size)
        self.encode = Encode(device)

    def read(self, request: Request) -> Job:
        """Turn a request into a job, before it joins a batch. Raises InvalidRequest; its message goes to the client."""
        outputs = request.requested_output_names
        # Triton lists all outputs for a request that names none. Return the default ones, unless a parameter of the
        # output "encoded" shows that the client wants all.
        if len(outputs) == len(OUTPUTS) and not request.parameters.keys() & FILE_PARAMETERS:
            outputs = DEFAULT_OUTPUTS
        return read_job(request, outputs, self.class_indices, self.options)

    def weigh(self, job: Job) -> float:
        """Return the size of the photo as a share of ``--max-pixels``, from 0 to 1."""
        return job.photo.width * job.photo.height / self.options.max_pixels

    def __call__(self, jobs: Sequence[Job]) -> list[dict | Checked]:
        """Return the outputs of each job, on the device, without a batch dimension. Raises InvalidRequest."""
        from torch.cuda import nvtx

        from maps import label_map, probability_map, soft_cut_out
        from model_inference import add_classes

        with nvtx.range("preprocess"):
            photos, images = self.preprocess([job.photo for job in jobs])
            outputs = [{"original": photo} for photo in photos]
        if all(set(job.outputs) == {"original"} for job in jobs):
            return outputs
        with nvtx.range("network"):
            probabilities = self.network(images)
            probability = add_classes(probabilities, [job.classes for job in jobs])
            finite = probability.isfinite().flatten(1).all(1).to("cpu", non_blocking=True)
        with nvtx.range("postprocess"):
            if any(job.needs("segmented", "mask") for job in jobs):
                cut_outs, masks = self.postprocess(photos, probability, [job.threshold for job in jobs])
                for output, cut_out, mask in zip(outputs, cut_outs, masks, strict=True):
                    output |= {"segmented": cut_out, "mask": mask}
            for job, output, photo, wanted, each in zip(jobs, outputs, photos, probability, probabilities, strict=True):
                size = photo.shape()[:2]
                if job.needs("probability"):
                    output["probability"] = probability_map(wanted, size)
                if job.needs("labels"):
                    output["labels"] = label_map(each, size)
                if job.needs("soft_cut_out"):
                    output["soft_cut_out"] = soft_cut_out(photo, wanted, job.threshold, job.encoding.edge)
        with nvtx.range("encode"):
            for output, file in zip(outputs, self.encode(outputs, [job.encoding for job in jobs]), strict=True):
                output["encoded"] = file
        error = InferenceFailed("the network's result is not finite: the precision of the server may be too low")
        return [
            Checked({name: output[name] for name in job.outputs}, valid, error)
            for job, output, valid in zip(jobs, outputs, finite, strict=True)
        ]


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line. An error ends the process with one line and status 2."""
    parser = make_parser("Serve a segmentation network with PyTriton and DALI.")
    add = parser.add_argument_group("segmentation").add_argument
    add(
        "--weights",
        default="auto",
        help="pretrained (torchvision's, downloaded once), demo (recognizes only the two sample photos), the path of a "
        "state dict, or auto: pretrained, or demo if those are not available",
    )
    add("--class-name", default="person", help="class to keep if a request names none; several: cat,dog")
    add("--threshold", type=number(float, 0, 1), default=0.6, help="probability to exceed if a request sets none")
    size = number(int, 32, 2048)
    add("--input-size", type=size, default=224, help="width and height of the network's input in pixels")
    add(
        "--precision",
        choices=("auto", "fp32", "bf16", "fp16"),
        default="auto",
        help="numeric precision; auto: fp16 on a GPU with tensor cores, bf16 on a CPU if it is faster, fp32 otherwise",
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
            # Photos differ in size, but a batch in Triton is one dense array, so each request has one photo.
            config=ModelConfig(max_batch_size=1),
        )
        server.serve()


if __name__ == "__main__":
    main()
