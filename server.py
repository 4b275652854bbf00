# SPDX-License-Identifier: Apache-2.0
"""Serve a segmentation network with PyTriton and NVIDIA DALI: send a photo, get it back with one class cut out.

    python server.py [--help]

Read it from top to bottom: the contract, the three stages, the command line, and how the model is bound and served.
What any server needs in production, such as worker processes, batching, shared memory and signals, is in serving/.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from reprlib import repr as shorten

import numpy as np
from pytriton.model_config import DynamicBatcher, ModelConfig, Tensor
from pytriton.proxy.types import Request

from serving.errors import InferenceFailed, InvalidRequest, UsageError
from serving.lifecycle import Lifecycle
from serving.options import add_serving_options, configure_logging, make_parser, number
from serving.photo import blank_photo, check_photo
from serving.stages import Stages
from serving.triton import Triton
from serving.worker import Workers

# torch, torchvision and DALI take seconds to import. They are imported where they are used, in the worker process, so
# that a mistake on the command line is answered at once.

# The contract: what clients send and get, and with which network. This and the class below is what changes if you serve
# another network; see docs/your-own-network.md.
MODEL_NAME = "ResNet101"
NETWORK = "deeplabv3_resnet101"  # torchvision's name; its pretrained weights come with the names of the classes
INPUTS = [
    Tensor(name="image", dtype=np.uint8, shape=(-1,)),  # the bytes of an encoded photo
]
OUTPUTS = [
    Tensor(name="original", dtype=np.uint8, shape=(-1, -1, 3)),  # the decoded photo, RGB, upright
    Tensor(name="segmented", dtype=np.uint8, shape=(-1, -1, 3)),  # the photo where the class is, 0 elsewhere
]


def answer_bytes(pixels: int) -> int:
    """Return the largest number of bytes in the answer to a photo with so many pixels: both outputs, RGB."""
    return 2 * 3 * pixels


@dataclass(frozen=True)
class Job:
    """What a request asks for."""

    encoded: np.ndarray  # uint8 [N]
    class_index: int
    threshold: float
    outputs: Sequence[str]


class Segmentation(Stages):
    """The three stages, for one thread: DALI preprocesses, the network infers, DALI postprocesses."""

    def __init__(self, network, options: argparse.Namespace):
        """``network`` is a SegmentationNetwork, which all threads of a worker share."""
        from pipelines import Postprocess, Preprocess

        self.options = options
        self.class_names = network.class_names
        self.preprocess = Preprocess(network.device, options.input_size, options.max_batch_size)
        self.network = network.for_one_thread(options.input_size, options.max_batch_size)
        self.postprocess = Postprocess(network.device, options.max_batch_size)
        # The first run of each stage chooses kernels and allocates memory.
        for size in {1, options.max_batch_size}:
            self([Job(blank_photo(), 0, 0.5, ("original", "segmented"))] * size)

    def read(self, request: Request) -> Job:
        """Check a request before it joins a batch. Raises InvalidRequest, whose message goes to the client."""
        check_photo(request["image"], self.options.max_pixels)
        class_name = request.parameters.get("class_name", self.options.class_name)
        threshold = request.parameters.get("threshold", self.options.threshold)
        if class_name not in self.class_names:
            raise InvalidRequest(f"class_name must be one of {', '.join(self.class_names)}, not {shorten(class_name)}")
        if type(threshold) not in (int, float) or not 0 <= threshold <= 1:
            raise InvalidRequest(f"threshold must be a number between 0 and 1, not {shorten(threshold)}")
        return Job(request["image"], self.class_names.index(class_name), threshold, request.requested_output_names)

    def __call__(self, jobs: Sequence[Job]) -> list[dict]:
        """Return the outputs of each job, uint8 ``[H, W, 3]`` each, on the device. Nothing here waits for a GPU.

        Raises InvalidRequest if one of the photos cannot be decoded.
        """
        import torch
        from torch.cuda import nvtx

        with nvtx.range("preprocess"):
            photos, images = self.preprocess([job.encoded for job in jobs])
        outputs = {"original": photos}
        self.finite = True
        if any("segmented" in job.outputs for job in jobs):
            with nvtx.range("network"):
                probabilities = self.network(images)
                wanted = torch.stack([probabilities[index, job.class_index] for index, job in enumerate(jobs)])
                self.finite = wanted.isfinite().all()
            with nvtx.range("postprocess"):
                outputs["segmented"] = self.postprocess(photos, wanted, [job.threshold for job in jobs])
        return [{name: outputs[name][index] for name in job.outputs} for index, job in enumerate(jobs)]

    def verify(self) -> None:
        """Raise InferenceFailed if the network overflowed in the last call: the cut-out would be black."""
        if not self.finite:
            raise InferenceFailed("the network's result is not finite: start the server with --precision fp32")


def load(options: argparse.Namespace, device: str) -> Callable[[], Segmentation]:
    """Load the network onto a device, in its worker process. Returns what makes the stages of each thread."""
    import torch

    from model_inference import load_network
    from weights.loading import load_weights

    state_dict = load_weights(options.weights, NETWORK)
    network = load_network(NETWORK, state_dict, torch.device(device), options.precision, options.input_size)
    if options.class_name not in network.class_names:
        raise UsageError(f"--class-name must be one of {', '.join(network.class_names)}, not {options.class_name}")
    return partial(Segmentation, network, options)


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line. A mistake ends the process with one line and status 2."""
    parser = make_parser("Serve a segmentation network with PyTriton and DALI.")
    add = parser.add_argument_group("segmentation").add_argument
    add(
        "--weights",
        default="auto",
        help="pretrained (torchvision's, downloaded once), demo (knows only the two sample photos), the path of a "
        "state dict, or auto: pretrained, and demo if those are not available",
    )
    add("--class-name", default="person", help="class to cut out if a request names none")
    add("--threshold", type=number(float, 0, 1), default=0.6, help="probability to exceed if a request names none")
    add(
        "--input-size",
        type=number(int, 32, 2048),
        default=224,
        help="width and height of the network's input in pixels",
    )
    add(
        "--precision",
        choices=("auto", "fp32", "bf16", "fp16"),
        default="auto",
        help="of the network; auto: fp16 on a GPU with tensor cores, bf16 on a CPU with AMX, fp32 otherwise",
    )
    add_serving_options(parser)
    return parser.parse_args(arguments)


def main() -> None:
    """Start a worker per device, bind the model and serve it until a signal ends the server."""
    options = parse_options()
    configure_logging(options.verbose)
    with Lifecycle(options.drain_s) as lifecycle:
        triton = Triton(options, lifecycle)
        with Workers(load, options, answer_bytes, lifecycle) as workers:
            triton.bind(
                model_name=MODEL_NAME,
                # PyTriton calls each instance in a thread of its own. An instance hands the request to a worker
                # process, which groups what is waiting into batches and calls Segmentation.
                infer_func=workers.instances,
                inputs=INPUTS,
                outputs=OUTPUTS,
                config=ModelConfig(
                    # Photos differ in size, and a Triton batch is one dense array: each request has one photo.
                    max_batch_size=1,
                    batcher=DynamicBatcher(default_queue_policy=workers.queue_policy),
                ),
            )
            triton.serve()


if __name__ == "__main__":
    main()
