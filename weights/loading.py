# SPDX-License-Identifier: Apache-2.0
"""Loads the weights that the user chose, and checks that they fit the network."""

import logging
import math
import socket
import sys
import zlib
from collections.abc import Collection
from pathlib import Path

import torch

from model_inference import empty_module, pretrained_weights
from serving.errors import UsageError

DEMO_PATH = Path(__file__).parent / "demo.pt"
DEMO_NETWORK = "deeplabv3_resnet101"  # the only network that the file fits
DOWNLOAD_TIMEOUT_S = 10  # seconds without receiving data

LOGGER = logging.getLogger("server")

StateDict = dict[str, torch.Tensor]


def load_weights(choice: str, network: str, demo_path: Path = DEMO_PATH) -> StateDict:
    """Return a state dict that fits torchvision's network of this name, on the CPU, with floats as float32.

    ``choice`` is ``pretrained`` (torchvision's weights, through torch's download cache), ``demo`` (``demo_path``),
    ``auto`` (pretrained, or demo with a warning if those are not available) or the path of a state dict, with or
    without the auxiliary head. Raises UsageError.
    """
    if choice == "auto":
        try:
            return load_weights("pretrained", network)
        except UsageError as error:
            try:
                state_dict = load_weights("demo", network, demo_path)
            except UsageError:  # they fit another network only
                raise error from None
            LOGGER.warning(
                "DEMONSTRATION WEIGHTS: the server recognizes only images/orig.jpg and images/cat_orig.jpg, because "
                "the pretrained weights are not available. %s",
                error,
            )
            return state_dict
    if choice == "pretrained":
        return _load_pretrained(network)
    if choice == "demo":
        return _load_demo(demo_path, network)
    LOGGER.info("weights: %s", choice)
    return _check(_read_file(Path(choice)), f"--weights {choice}", network)


def _load_pretrained(network: str) -> StateDict:
    weights = pretrained_weights(network)
    path = Path(torch.hub.get_dir()) / "checkpoints" / weights.url.rsplit("/", 1)[1]
    LOGGER.info("weights: %s", weights)
    if not path.exists():
        LOGGER.info("downloading %.0f MB from %s to %s", weights.meta["_file_size"], weights.url, path)
    # torch's download has no timeout, and waits forever if the connection hangs.
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT_S)
    try:
        state_dict = weights.get_state_dict(
            progress=sys.stderr.isatty(), check_hash=True, map_location="cpu", weights_only=True
        )
    except Exception as error:
        choice = "demo" if network == DEMO_NETWORK else "with the path of a state dict"
        advice = (
            f"delete {path}, which is damaged, and start the server again"
            if path.exists()
            else f"download {weights.url} on another machine and put it at {path}, or use --weights {choice}"
        )
        raise UsageError(f"--weights pretrained failed ({_summary(error)}): {advice}") from error
    finally:
        socket.setdefaulttimeout(None)
    return _check(state_dict, str(path), network)


def _load_demo(path: Path, network: str) -> StateDict:
    LOGGER.info("weights: demonstration weights %s", path)
    content = _read_file(path)
    try:
        trained, expected = content["state_dict"], content["fingerprint"]
    except (KeyError, TypeError):
        raise UsageError(
            f"{path} is not a demonstration weights file: create it with python -m tools.train_demo"
        ) from None
    drawn = random_convolutions(network, trained)
    state_dict = _check(drawn | trained, str(path), network)  # which reports anything else that is missing
    if fingerprint(drawn) != expected:
        raise UsageError(
            f"{path} was trained for another network, or torch {torch.__version__} generates different random numbers: "
            "create it again with python -m tools.train_demo"
        )
    return state_dict


def _read_file(path: Path) -> object:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UsageError(f"--weights {path} does not exist: use a file, pretrained, demo or auto") from None
    except Exception as error:
        raise UsageError(f"--weights {path} is not a state dict that torch can read ({_summary(error)})") from error


def _check(state_dict: object, source: str, network: str) -> StateDict:
    """Return the state dict without the auxiliary head, with floats as float32.

    Raises UsageError if it does not fit.
    """
    if not isinstance(state_dict, dict):
        raise UsageError(f"{source} contains a {type(state_dict).__name__} instead of a state dict")
    shapes = network_shapes(network)
    state_dict = {name: value for name, value in state_dict.items() if not str(name).startswith("aux_classifier.")}
    problems = [f"{name} is missing" for name in shapes if name not in state_dict]
    for name, value in state_dict.items():
        if name not in shapes:
            problems.append(f"{name} is unknown")
        elif not isinstance(value, torch.Tensor):
            problems.append(f"{name} is not a tensor")
        elif value.shape != shapes[name]:
            problems.append(f"{name} has shape {list(value.shape)} instead of {list(shapes[name])}")
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise UsageError(f"{source} does not fit {network}: {problems[0]}{more}")
    return {name: value.float() if value.is_floating_point() else value for name, value in state_dict.items()}


def network_shapes(network: str) -> dict[str, torch.Size]:
    """Return the shapes in the network's state dict by name."""
    return {name: tensor.shape for name, tensor in empty_module(network).state_dict().items()}


def random_convolutions(network: str, trained: Collection[str]) -> StateDict:
    """Return the random weights of all convolutions of the network but those with the names in ``trained``."""
    return {
        name: random_convolution(name, shape)
        for name, shape in network_shapes(network).items()
        if len(shape) == 4 and name not in trained
    }


def random_convolution(name: str, shape: torch.Size) -> torch.Tensor:
    """Return the random weight of the convolution called ``name``, float32, the same on every machine.

    Uniform with He's variance of 2 / fan-out (He et al. 2015, arXiv:1502.01852, section 2.2). Drawn from [0, 1) and
    then scaled, so that every processor rounds the same way.
    """
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    fan_out = shape[0] * math.prod(shape[2:])
    bound = math.sqrt(3 * 2 / fan_out)
    return torch.rand(shape, generator=generator).sub_(0.5).mul_(2 * bound)


def fingerprint(tensors: StateDict) -> int:
    """Return a checksum of the values of the tensors, in the order of their names."""
    checksum = 0
    for _, tensor in sorted(tensors.items()):
        checksum = zlib.crc32(tensor.numpy(), checksum)
    return checksum


def _summary(error: Exception) -> str:
    # Only the first sentence: torch's messages continue with advice for developers.
    return f"{type(error).__name__}: {error}".splitlines()[0].split(". ")[0][:200]
