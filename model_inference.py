# SPDX-License-Identifier: Apache-2.0
"""The network: torchvision's DeepLabV3-ResNet101, and where its weights come from.

Needs neither Triton nor DALI::

    network = SegmentationNetwork(load_weights("auto").state_dict, torch.device("cpu"))
    probabilities = network(images)  # [N, 3, S, S] normalised -> [N, 21, S, S]
"""

import math
import socket
import threading
import timeit
import urllib.request
import zlib
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
from torch.fx.experimental.optimization import fuse
from torchvision.models.segmentation import DeepLabV3_ResNet101_Weights, deeplabv3_resnet101

PRETRAINED = DeepLabV3_ResNet101_Weights.COCO_WITH_VOC_LABELS_V1
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CLASS_NAMES = tuple(PRETRAINED.meta["categories"])  # the 21 of Pascal VOC, background first
DEMO_PATH = Path(__file__).parent / "weights" / "demo.pt"
DOWNLOAD_TIMEOUT_S = 10


class WeightsError(Exception):
    """The weights cannot be had or do not fit; the message is one line for the user."""


@dataclass(frozen=True)
class Weights:
    """A state dict that fits the network, and where it came from.

    ``warning`` is a line that the user must see, or an empty string.
    """

    state_dict: dict[str, torch.Tensor]
    source: str
    warning: str = ""


class SegmentationNetwork:
    """DeepLabV3-ResNet101 without its auxiliary head, made for inference. Several threads may call it at once."""

    def __init__(self, state_dict: dict[str, torch.Tensor], device: torch.device, precision: str = "fp32"):
        """``state_dict``: one that fits, as :func:`load_weights` gives. ``precision``: a key of ``PRECISIONS``."""
        self.device = device
        self.precision = precision
        # Batch normalisation goes into the convolutions before them, in fp32 and so without loss.
        fused = fuse(build_module(state_dict))
        self._module = fused.to(device, PRECISIONS[precision], memory_format=torch.channels_last)

    @torch.inference_mode()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Return the probability of every class in every pixel.

        ``images``: float32 ``[N, 3, S, S]`` on any device, RGB, normalised with ImageNet's mean and standard
        deviation. Returns float32 ``[N, 21, S, S]`` on the network's device; the 21 add up to 1 in each pixel.
        """
        images = images.to(self.device, PRECISIONS[self.precision], memory_format=torch.channels_last)
        return self._module(images)["out"].float().softmax(dim=1)

    def overflows(self, input_size: int) -> bool:
        """Return whether the weights are too large for the precision, tried with an image of noise."""
        image = torch.randn(1, 3, input_size, input_size, generator=torch.Generator().manual_seed(0))
        return not bool(self(image).isfinite().all())

    def check_device(self) -> None:
        """Raise RuntimeError where a CUDA error has made the device unusable for this process."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class GraphedNetwork:
    """A network on a GPU, replayed from CUDA graphs: one launch, not hundreds. Belongs to one thread at a time."""

    def __init__(self, network: SegmentationNetwork, input_size: int, max_batch_size: int):
        """Capture a graph for each power of two up to ``max_batch_size``, for inputs of ``input_size`` squared.

        On torch's current stream, which must not be the default one.
        """
        self._graphs: dict[int, tuple[torch.Tensor, torch.Tensor, torch.cuda.CUDAGraph]] = {}
        size = 1 << (max_batch_size - 1).bit_length()
        # The largest first: the others find room in its memory.
        while size >= 1:
            images = torch.zeros(size, 3, input_size, input_size, device=network.device)
            for _ in range(2):  # cuDNN chooses its algorithms now, which it cannot do in a capture
                network(images)
            graph = torch.cuda.CUDAGraph()
            pool = next(iter(self._graphs.values()))[2].pool() if self._graphs else None
            with torch.cuda.graph(graph, pool=pool, stream=torch.cuda.current_stream(network.device)):
                probabilities = network(images)
            self._graphs[size] = images, probabilities, graph
            size //= 2

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Do the same for ``max_batch_size`` images at most; the result is valid until the next call."""
        count = len(images)
        inputs, probabilities, graph = self._graphs[1 << (count - 1).bit_length()]
        inputs[:count].copy_(images)
        graph.replay()
        return probabilities[:count]


def build_module(state_dict: dict[str, torch.Tensor]) -> torch.nn.Module:
    """Return torchvision's network with these weights, in evaluation mode, on the CPU."""
    module = _empty_module()
    module.load_state_dict(state_dict, assign=True)
    return module.eval().requires_grad_(False)


def pick_precision(choice: str, device: torch.device) -> str:
    """Return the choice, or for ``auto`` the fastest precision of the device.

    On a GPU with tensor cores that is fp16, as fast as bf16 and nearer to fp32: the masks of the samples overlap with
    those of fp32 by 0.997 and more, with bf16 by 0.987 (H200; IoU). On a CPU it is measured with a convolution of the
    network: of two processors that announce bf16 instructions one was more than twice as fast with them, the other
    slower.
    """
    if choice != "auto":
        return choice
    if device.type == "cuda":
        return "fp16" if torch.cuda.get_device_capability(device) >= (7, 0) else "fp32"
    capabilities = torch.cpu.get_capabilities()
    if not (capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")):
        return "fp32"
    return min("fp32", "bf16", key=_convolution_seconds)


@torch.inference_mode()
def _convolution_seconds(precision: str) -> float:
    layout = {"dtype": PRECISIONS[precision], "memory_format": torch.channels_last}
    convolution = torch.nn.Conv2d(256, 256, 3, padding=2, dilation=2).to(**layout)
    images = torch.zeros(1, 256, 28, 28).to(**layout)
    return min(timeit.repeat(lambda: convolution(images), repeat=5, number=4))


def load_weights(choice: str, demo_path: Path = DEMO_PATH) -> Weights:
    """Load the weights that the user chose and check them key by key and shape by shape.

    ``choice``: ``pretrained`` (torchvision's, through torch's download cache), ``demo`` (the file in ``weights/``),
    ``auto`` (pretrained, or demo with a warning where that cannot be had) or the path of a state dict, with or
    without the auxiliary head. Raises :class:`WeightsError`.
    """
    if choice == "demo":
        return Weights(_demo_state_dict(demo_path), f"demonstration weights {demo_path}")
    if choice == "pretrained":
        return Weights(_pretrained_state_dict(), f"torchvision's {PRETRAINED}")
    if choice == "auto":
        try:
            return load_weights("pretrained")
        except WeightsError as error:
            warning = (
                "DEMONSTRATION WEIGHTS: they know the two photos in images/ and nothing else. "
                f"The pretrained weights could not be obtained: {error}"
            )
            return replace(load_weights("demo"), warning=warning)
    return Weights(_checked(_read_file(Path(choice)), choice), f"file {choice}")


def random_convolution(name: str, shape: torch.Size) -> torch.Tensor:
    """Draw the weight of the convolution called ``name``: the same values on every machine, float32.

    Uniform with He's variance of 2 / fan-out (He et al. 2015, arXiv:1502.01852, section 2.2). Uniform in [0, 1)
    first and scaled after, so that every processor rounds alike.
    """
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    fan_out = shape[0] * math.prod(shape[2:])
    bound = math.sqrt(3 * 2 / fan_out)
    return torch.rand(shape, generator=generator).sub_(0.5).mul_(2 * bound)


def fingerprint(tensors: dict[str, torch.Tensor]) -> int:
    """Return a checksum of the values of ``tensors``, in the order of their names."""
    checksum = 0
    for _, tensor in sorted(tensors.items()):
        checksum = zlib.crc32(tensor.numpy(), checksum)
    return checksum


@cache
def network_shapes() -> dict[str, torch.Size]:
    """Return the name and shape of everything in the network's state dict."""
    return {name: tensor.shape for name, tensor in _empty_module().state_dict().items()}


def _empty_module() -> torch.nn.Module:
    # On the meta device nothing is allocated and no time goes into random values that the weights replace.
    with torch.device("meta"):
        return deeplabv3_resnet101(weights=None, weights_backbone=None, num_classes=len(CLASS_NAMES), aux_loss=False)


def _pretrained_state_dict() -> dict[str, torch.Tensor]:
    path = Path(torch.hub.get_dir()) / "checkpoints" / PRETRAINED.url.rsplit("/", 1)[1]
    if not path.exists() and not _answers(PRETRAINED.url):
        raise WeightsError(
            f"{PRETRAINED.url} cannot be reached, and it is not at {path}: "
            "download it elsewhere and put it there, or use --weights demo"
        )
    # torch's download has no time-out of its own, and would wait for ever where the network falls silent.
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT_S)
    try:
        state_dict = PRETRAINED.get_state_dict(progress=False, check_hash=True, map_location="cpu", weights_only=True)
    except Exception as error:
        raise WeightsError(
            f"{PRETRAINED.url} could not be loaded through {path} ({_one_line(error)}); "
            "delete that file if it is there, download it again and put it there"
        ) from error
    finally:
        socket.setdefaulttimeout(None)
    return _checked(state_dict, str(path))


def _answers(url: str) -> bool:
    # In a thread of its own, because no timeout of urlopen's covers a name server that keeps silent.
    answered = threading.Event()

    def ask() -> None:
        try:
            with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=DOWNLOAD_TIMEOUT_S):
                answered.set()
        except Exception:  # whatever it is, the download would fail of it, too
            pass

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(DOWNLOAD_TIMEOUT_S)
    return answered.is_set()


def _demo_state_dict(path: Path) -> dict[str, torch.Tensor]:
    content = _read_file(path)
    try:
        trained, expected = content["state_dict"], content["fingerprint"]
    except (KeyError, TypeError):
        raise WeightsError(f"{path} is no demonstration weights file; make it with weights/train_demo.py") from None
    shapes = network_shapes()
    drawn = {name: random_convolution(name, shape) for name, shape in shapes.items() if name not in trained}
    if fingerprint(drawn) != expected:
        raise WeightsError(
            f"torch {torch.__version__} draws other random numbers than the ones that {path} was trained on; "
            "install the version in requirements.txt or make the file again with weights/train_demo.py"
        )
    return _checked(drawn | trained, str(path))


def _read_file(path: Path) -> dict:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise WeightsError(f"there is no weights file {path}") from None
    except Exception as error:
        raise WeightsError(f"{path} is no state dict that torch can read ({_one_line(error)})") from error


def _checked(state_dict: dict, source: str) -> dict[str, torch.Tensor]:
    """Return ``state_dict`` without the auxiliary head, its floats as float32, or say what does not fit."""
    if not isinstance(state_dict, dict):
        raise WeightsError(f"{source} holds a {type(state_dict).__name__}, not a state dict")
    shapes = network_shapes()
    state_dict = {name: value for name, value in state_dict.items() if not str(name).startswith("aux_classifier.")}
    problems = [f"{name} is missing" for name in shapes if name not in state_dict]
    for name, value in state_dict.items():
        if name not in shapes:
            problems.append(f"{name} does not belong there")
        elif not isinstance(value, torch.Tensor):
            problems.append(f"{name} is no tensor")
        elif value.shape != shapes[name]:
            problems.append(f"{name} has shape {list(value.shape)} instead of {list(shapes[name])}")
    if problems:
        more = f" (and {len(problems) - 1} more like it)" if len(problems) > 1 else ""
        raise WeightsError(f"{source} does not fit DeepLabV3-ResNet101 with 21 classes: {problems[0]}{more}")
    return {name: value.float() if value.is_floating_point() else value for name, value in state_dict.items()}


def _one_line(error: Exception) -> str:
    # torch's errors go on with advice to programmers.
    return f"{type(error).__name__}: {error}".splitlines()[0].split(". ")[0][:200]
