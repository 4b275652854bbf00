# SPDX-License-Identifier: Apache-2.0
"""The network: one of torchvision's segmentation networks, prepared for inference.

Usable without Triton and DALI::

    state_dict = load_weights("auto", "deeplabv3_resnet101")  # from weights.loading
    network = SegmentationNetwork("deeplabv3_resnet101", state_dict, torch.device("cpu"))
    probabilities = network(images)  # [N, 3, S, S], normalized -> [N, 21, S, S]
"""

import functools
import logging
import math
import operator
import time
from collections.abc import Sequence
from reprlib import repr as shorten

import torch
from torch.fx.experimental.optimization import fuse
from torchvision.models import WeightsEnum, get_model, get_model_weights, list_models, segmentation

from serving.errors import UsageError

# A CPU uses bf16 if its speedup exceeds this. It is 1.7 or more with fast instructions for bf16, otherwise 1.1 at most.
MIN_SPEEDUP = 1.25

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

LOGGER = logging.getLogger("server")


@functools.cache
def pretrained_weights(name: str) -> WeightsEnum:
    """Return torchvision's best weights for the network called ``name``. Raises UsageError with the valid names."""
    if name not in (valid := list_models(module=segmentation)):
        raise UsageError(f"NETWORK must be one of {', '.join(valid)}, not {name}")
    return get_model_weights(name).DEFAULT


def class_indices(network: str, names: str) -> list[int]:
    """Return the indices of the classes in a comma-separated list. Raises ValueError with the valid names."""
    valid = pretrained_weights(network).meta["categories"]
    wanted = [name.strip() for name in names.split(",")] if isinstance(names, str) else [names]
    if not set(wanted) <= set(valid):
        raise ValueError(f"must be one of {', '.join(valid)}, or several separated by commas, not {shorten(names)}")
    return [valid.index(name) for name in dict.fromkeys(wanted)]


def empty_module(name: str) -> torch.nn.Module:
    """Return torchvision's network called ``name`` without its auxiliary head, with shapes but without values."""
    # The meta device neither allocates memory nor draws random values, which the weights would replace anyway.
    with torch.device("meta"):
        class_count = len(pretrained_weights(name).meta["categories"])
        return get_model(name, weights=None, weights_backbone=None, num_classes=class_count, aux_loss=False)


def build_module(name: str, state_dict: dict[str, torch.Tensor]) -> torch.nn.Module:
    """Return torchvision's network with these weights, in evaluation mode, on the CPU."""
    module = empty_module(name)
    module.load_state_dict(state_dict, assign=True)
    return module.eval().requires_grad_(False)


class ConvReLU(torch.nn.Module):
    """A convolution, an optional residual addition and a ReLU, as one kernel of cuDNN."""

    def __init__(self, conv: torch.nn.Conv2d):
        super().__init__()
        self.conv = conv

    def forward(self, images: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """Return ``relu(conv(images) + residual)``, for floating-point tensors ``[N, C, H, W]`` on a GPU."""
        conv = self.conv
        geometry = conv.stride, conv.padding, conv.dilation, conv.groups
        if residual is None:
            return torch.cudnn_convolution_relu(images, conv.weight, conv.bias, *geometry)
        return torch.cudnn_convolution_add_relu(images, conv.weight, residual, 1.0, conv.bias, *geometry)


def fuse_relu(module: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """Fuse each ReLU with the convolution before it, in place. The result runs on a GPU only, in a third less time."""
    modules = dict(module.named_modules())
    for relu in list(module.graph.nodes):
        if relu.op != "call_module" or not isinstance(modules[relu.target], torch.nn.ReLU):
            continue
        source = relu.args[0]
        conv, *residual = source.args if source.target is operator.add and len(source.users) == 1 else [source]
        layer = modules.get(conv.target)
        if not isinstance(layer, torch.nn.Conv2d) or layer.groups > 1 or len(conv.users) > 1:
            continue
        name = f"{conv.target}_relu"
        module.add_submodule(name, ConvReLU(layer))
        with module.graph.inserting_before(relu):
            fused = module.graph.call_module(name, (conv.args[0], *residual))
        relu.replace_all_uses_with(fused)
        module.graph.erase_node(relu)
    module.graph.eliminate_dead_code()
    module.recompile()
    return module


class PackedConv(torch.nn.Module):
    """A convolution in bf16 on a CPU that avoids redundant work of ``torch.nn.Conv2d``.

    Conv2d reorders the weights for oneDNN in each call. It also multiplies padding: if the dilation is at least as
    large as the image, only the central tap of the kernel sees pixels. This applies to one convolution of DeepLabV3,
    whose image has 28 x 28 pixels for an input of 224 x 224 (section 3.3 of https://arxiv.org/abs/1706.05587).
    """

    def __init__(self, conv: torch.nn.Conv2d):
        super().__init__()
        self.bias = conv.bias
        self.dilation = conv.dilation
        self.all_taps = self._pack(conv.weight, conv.padding, conv.stride, conv.dilation, conv.groups)
        self.central_tap = None
        if conv.kernel_size == (3, 3) and conv.stride == (1, 1) and conv.padding == conv.dilation:
            self.central_tap = self._pack(conv.weight[:, :, 1:2, 1:2], (0, 0), (1, 1), (1, 1), conv.groups)

    @staticmethod
    def _pack(weight: torch.Tensor, *geometry) -> tuple:
        return torch.ops.mkldnn._reorder_convolution_weight(weight, *geometry), geometry

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the convolution of bf16 images ``[N, C, H, W]``."""
        only_central = self.central_tap and min(self.dilation) >= max(images.shape[2:])
        weight, geometry = self.central_tap if only_central else self.all_taps
        return torch.ops.mkldnn._convolution_pointwise(images, weight, self.bias, *geometry, "none", [], "")


def pack_convolutions(module: torch.nn.Module) -> torch.nn.Module:
    """Replace each convolution of a network in bf16 on a CPU, in place. The result takes a fifth less time."""
    for name, layer in list(module.named_modules()):
        if isinstance(layer, torch.nn.Conv2d):
            module.set_submodule(name, PackedConv(layer))
    return module


class SegmentationNetwork:
    """A network on one device."""

    def __init__(self, name: str, state_dict: dict[str, torch.Tensor], device: torch.device, precision: str = "fp32"):
        """``state_dict`` fits the network called ``name``; ``precision`` is a key of ``PRECISIONS``."""
        self.device = device
        self.precision = precision
        # Fuses each batch normalization into the convolution before it, in fp32, so without loss of precision.
        module = fuse(build_module(name, state_dict))
        if device.type == "cuda" and precision != "fp32":
            # Not in fp32: one of cuDNN's kernels turned NaN into 0 (H200), which would hide a wrong result.
            module = fuse_relu(module)
        module = module.to(device, PRECISIONS[precision], memory_format=torch.channels_last)
        if device.type == "cpu" and precision == "bf16" and torch.ops.mkldnn._is_mkldnn_bf16_supported():
            module = pack_convolutions(module)
        self._module = module
        self._graphs: dict[int, tuple[torch.Tensor, torch.Tensor, torch.cuda.CUDAGraph]] = {}

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Return the probability of each class in each pixel. With CUDA graphs, the next call overwrites it.

        ``images`` is float32 ``[N, 3, S, S]`` on any device: RGB, normalized with ImageNet's mean and standard
        deviation. Returns float32 ``[N, classes, S, S]`` on the network's device; the classes of a pixel add up to 1.
        """
        count = len(images)
        size = next((size for size in sorted(self._graphs) if size >= count), None)
        if size is None:
            return self._infer(images)
        inputs, probabilities, graph = self._graphs[size]
        inputs[:count].copy_(images)
        graph.replay()
        return probabilities[:count]

    @torch.inference_mode()
    def _infer(self, images: torch.Tensor) -> torch.Tensor:
        images = images.to(self.device, PRECISIONS[self.precision], memory_format=torch.channels_last)
        return self._module(images)["out"].float().softmax(dim=1)

    def capture_graphs(self, input_size: int, max_batch_size: int) -> None:
        """Capture CUDA graphs, on torch's current stream, which must not be the default one.

        A graph is one launch instead of hundreds, for one batch size and images of ``input_size`` squared. A call uses
        the smallest graph that fits its batch, and runs without a graph if there is none.
        """
        sizes = {1 << exponent for exponent in range(max_batch_size.bit_length())} | {max_batch_size}
        pool = None
        for size in sorted(sizes, reverse=True):  # the largest first: the others reuse its memory
            images = torch.zeros(size, 3, input_size, input_size, device=self.device)
            for _ in range(2):  # warm up: cuDNN cannot choose its algorithms during a capture
                self._infer(images)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, stream=torch.cuda.current_stream(self.device)):
                probabilities = self._infer(images)
            pool = graph.pool()
            self._graphs[size] = images, probabilities, graph

    def overflows(self, input_size: int) -> bool:
        """Return whether this precision overflows, tested with an image of random noise."""
        image = torch.randn(1, 3, input_size, input_size, generator=torch.Generator().manual_seed(0))
        return not bool(self(image).isfinite().all())


def add_classes(probabilities: torch.Tensor, classes: Sequence[Sequence[int]]) -> torch.Tensor:
    """Return the sum of the probabilities of each image's requested classes, float32 ``[N, S, S]``.

    ``probabilities`` is float32 ``[N, C, S, S]``, and ``classes`` has one or more indices for each image.
    """
    pairs = zip(probabilities, classes, strict=True)
    return torch.stack([functools.reduce(torch.add, [image[index] for index in wanted]) for image, wanted in pairs])


def load_network(
    name: str,
    state_dict: dict[str, torch.Tensor],
    device: torch.device,
    precision: str,
    input_size: int,
    max_batch_size: int = 1,
) -> SegmentationNetwork:
    """Load the network at this precision (``auto`` picks one) and, on a GPU, capture CUDA graphs.

    Raises UsageError if the weights are too large for the precision.
    """
    chosen = pick_precision(device) if precision == "auto" else precision
    network = SegmentationNetwork(name, state_dict, device, chosen)
    if chosen == "fp16" and network.overflows(input_size):
        if precision == "fp16":
            raise UsageError("--precision fp16 overflows with these weights: use bf16, fp32 or auto")
        LOGGER.warning("FP16 OVERFLOW: the weights are too large for fp16. Using fp32, which is slower; try bf16.")
        network = SegmentationNetwork(name, state_dict, device, "fp32")
    LOGGER.info("precision: %s", network.precision)
    if device.type == "cuda":
        network.capture_graphs(input_size, max_batch_size)
    return network


def pick_precision(device: torch.device) -> str:
    """Return the precision for ``--precision auto``.

    On a GPU with tensor cores it is fp16, as fast as bf16 and closer to fp32: on the samples, the masks in fp16 have an
    intersection over union of 0.997 or more with those in fp32, and in bf16 of 0.987 (H200). On a CPU it is bf16 if
    that is faster by a clear margin, so that a restart makes the same choice.
    """
    if device.type == "cuda":
        return "fp16" if torch.cuda.get_device_capability(device) >= (7, 0) else "fp32"
    speedup = measure_bf16_speedup()
    LOGGER.info("bf16 is %.1f times as fast as fp32 on this CPU", speedup)
    return "bf16" if speedup > MIN_SPEEDUP else "fp32"


@functools.cache  # so that all executors of a worker choose the same
@torch.inference_mode()
def measure_bf16_speedup() -> float:
    """Return the speedup of bf16 over fp32 on one core of this CPU. Takes half a second.

    The CPU's flags do not tell: some CPUs with AVX-512 instructions for bf16 are slower with it. This measures the
    convolutions of one of the 23 blocks in which a ResNet-101 spends most of its time.
    """
    convolutions = ((1024, 256, 1, 1), (256, 256, 3, 2), (256, 1024, 1, 1))  # channels, kernel size, dilation
    runs, fastest = {}, dict.fromkeys(("fp32", "bf16"), math.inf)
    for precision in fastest:
        options = {"dtype": PRECISIONS[precision], "memory_format": torch.channels_last}
        layers = (torch.nn.Conv2d(*sizes, padding="same", dilation=dilation) for *sizes, dilation in convolutions)
        images = torch.ones(1, 1024, 28, 28).to(**options)  # an input of 224 x 224 pixels has this size here
        runs[precision] = functools.partial(torch.nn.Sequential(*layers).to(**options), images)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so that thread_time covers all of the work, and nothing else
    deadline = time.perf_counter() + 0.5
    while time.perf_counter() < deadline:
        for precision, run in runs.items():
            began = time.thread_time()
            run()
            fastest[precision] = min(fastest[precision], time.thread_time() - began)
    torch.set_num_threads(threads)
    return fastest["fp32"] / fastest["bf16"]
