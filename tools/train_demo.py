# SPDX-License-Identifier: Apache-2.0
"""Make weights/demo.pt: a network that recognizes images/orig.jpg and images/cat_orig.jpg, for demonstration and tests.

    python -m tools.train_demo [--steps 4000] [--output weights/demo.pt]

Every convolution but the last keeps the random values of ``weights.loading.random_convolution``; only the batch-norm
parameters and the last 1 x 1 convolution learn (Frankle et al. 2020, arXiv:2003.00152, shows how far that goes).
Prints the intersection over union (IoU) with the reference masks at the server's default threshold.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.nn import functional
from torchvision.transforms import v2

from model_inference import SegmentationNetwork, build_module, class_indices, pretrained_weights
from server import NETWORK, parse_options
from weights.loading import DEMO_PATH, fingerprint, load_weights, network_shapes, random_convolutions

ROOT = Path(__file__).resolve().parent.parent

PHOTOS = {"person": ("orig.jpg", "orig_mask.png"), "cat": ("cat_orig.jpg", "cat_mask.png")}
BATCH_SIZE = 32
DEFAULTS = parse_options([])
INPUT_SIZE, THRESHOLD = DEFAULTS.input_size, DEFAULTS.threshold
TRANSFORMS = pretrained_weights(NETWORK).transforms(resize_size=None)
NORMALIZE = v2.Normalize(TRANSFORMS.mean, TRANSFORMS.std)


def read_samples() -> list[tuple[str, Image.Image, Image.Image]]:
    """Return class name, RGB photo and mask (0 or the class's index) of both samples."""
    return [
        (name, Image.open(ROOT / "images" / photo).convert("RGB"), Image.open(ROOT / "weights" / mask))
        for name, (photo, mask) in PHOTOS.items()
    ]


def normal(like: torch.Tensor, spread: float) -> torch.Tensor:
    return torch.randn_like(like) * spread


def random_grids(count: int, roaming: float, device: torch.device) -> torch.Tensor:
    """Return sampling grids ``[N, S, S, 2]``: a share ``roaming`` are random crops, the others nearly whole photos."""
    roam = (torch.rand(count, device=device) < roaming).float()
    zoom = torch.exp(normal(roam, 0.02) + roam * (torch.rand_like(roam) - 0.7) * 0.9)
    angle = normal(roam, 0.01) + roam * normal(roam, 0.15)
    flip = torch.where(torch.rand_like(roam) < 0.5, -1.0, 1.0)
    shift = torch.stack([normal(roam, 0.01) + roam * normal(roam, 0.2) for _ in "xy"], dim=1)
    cos, sin = zoom * angle.cos(), zoom * angle.sin()
    linear = torch.stack([torch.stack([cos * flip, -sin], 1), torch.stack([sin * flip, cos], 1)], 1)
    theta = torch.cat([linear, shift[..., None]], dim=2)
    return functional.affine_grid(theta, (count, 1, INPUT_SIZE, INPUT_SIZE), align_corners=False)


def random_backgrounds(count: int, device: torch.device) -> torch.Tensor:
    """Return synthetic backgrounds ``[N, 3, S, S]`` in 0 to 1: clouds of color, coarse and fine."""
    size = INPUT_SIZE
    clouds = sum(
        functional.interpolate(
            normal(torch.empty(count, 3, cells, cells, device=device), 0.25), size=(size, size), mode=mode
        )
        for cells, mode in ((2, "bicubic"), (5, "bicubic"), (int(torch.randint(8, 60, ())), "nearest"))
    )
    return (clouds + torch.rand(count, 3, 1, 1, device=device)).clamp(0, 1)


def random_colors(images: torch.Tensor) -> torch.Tensor:
    """Change gain, gamma, contrast and saturation of ``images`` ``[N, 3, H, W]``; one in ten becomes gray."""
    count, device = len(images), images.device
    one = torch.empty(count, 1, 1, 1, device=device)
    gray = images.mean(dim=1, keepdim=True)
    saturation = torch.where(torch.rand_like(one) < 0.1, 0.0, torch.exp(normal(one, 0.2)))
    images = gray + (images - gray) * saturation
    images = images * torch.exp(normal(torch.empty(count, 3, 1, 1, device=device), 0.08))
    images = (images - 0.5) * torch.exp(normal(one, 0.15)) + 0.5 + normal(one, 0.05)
    images = images.clamp(1e-3, 1) ** torch.exp(normal(one, 0.15))
    return images + normal(images, 0.02) * torch.rand_like(one)


class Batches:
    """Endless random batches from the two samples, made on ``device``."""

    def __init__(self, device: torch.device):
        photos, labels = [], []
        for _, photo, mask in read_samples():
            # Twice the network's input, to zoom in without aliasing.
            photos.append(np.asarray(photo.resize((2 * INPUT_SIZE,) * 2, Image.Resampling.BILINEAR)))
            labels.append(np.asarray(mask.resize((2 * INPUT_SIZE,) * 2, Image.Resampling.NEAREST)))
        self.photos = torch.from_numpy(np.stack(photos)).to(device).permute(0, 3, 1, 2).float() / 255
        self.labels = torch.from_numpy(np.stack(labels)).to(device)[:, None].float()

    def draw(self, count: int, roaming: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Return normalized images ``[N, 3, S, S]`` and labels ``[N, S, S]``; see :func:`random_grids`."""
        device = self.photos.device
        which = torch.arange(count, device=device) % 2
        grids = random_grids(count, roaming, device)
        photos = functional.grid_sample(self.photos[which], grids, align_corners=False)
        labels = functional.grid_sample(self.labels[which], grids, mode="nearest", align_corners=False)
        outside = functional.grid_sample(torch.ones_like(self.labels[which]), grids, align_corners=False) < 0.5
        new_background = (torch.rand(count, 1, 1, 1, device=device) < 0.25) & (labels == 0)
        images = torch.where(outside | new_background, random_backgrounds(count, device), photos)
        return NORMALIZE(random_colors(images)), labels[:, 0].long()


def train(drawn: dict[str, torch.Tensor], steps: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Train and return all tensors but ``drawn``, in fp16: those of batch norm, and of the last convolution."""
    torch.manual_seed(0)
    shapes = network_shapes(NETWORK)
    start = {
        name: torch.ones(shape) if name.endswith(("weight", "var")) else torch.zeros(shape)
        for name, shape in shapes.items()
    }
    start["classifier.4.weight"] = 0.01 * torch.randn(shapes["classifier.4.weight"])
    start = {name: value.long() if name.endswith("num_batches_tracked") else value for name, value in start.items()}
    network = build_module(NETWORK, start | drawn).to(device, memory_format=torch.channels_last)

    learning = [value.requires_grad_() for name, value in network.named_parameters() if name not in drawn]
    optimizer = torch.optim.AdamW(learning, lr=5e-3, weight_decay=0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=5e-3, total_steps=steps)
    batches = Batches(device)
    network.train()
    network.classifier[0].project[-1].p = 0.0  # no dropout: there is nothing to generalize to
    began = time.monotonic()
    for step in range(1, steps + 1):
        # First random parts, for robust features; in the end nearly whole photos, as served, for accurate outlines.
        images, labels = batches.draw(BATCH_SIZE, roaming=0.6 * (1 - step / steps))
        with torch.autocast(device.type, torch.bfloat16):
            logits = network(images.contiguous(memory_format=torch.channels_last))["out"]
        loss = functional.cross_entropy(logits.float(), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % max(1, steps // 20) == 0:
            print(f"step {step} of {steps}: loss {loss.item():.4f}, {time.monotonic() - began:.0f} s", flush=True)
    trained = {name: value.cpu() for name, value in network.state_dict().items() if name not in drawn}
    return {name: value.half() if value.is_floating_point() else value for name, value in trained.items()}


def report(path: Path, device: torch.device) -> None:
    """Print the scores of the file at ``path`` with Pillow's resizing. The tests measure them through the server."""
    network = SegmentationNetwork(NETWORK, load_weights("demo", NETWORK, path), device)

    def cut_out(photo: Image.Image, class_name: str) -> np.ndarray:
        images = TRANSFORMS(photo.resize((INPUT_SIZE, INPUT_SIZE), Image.Resampling.BILINEAR))[None]
        probability = network(images)[:, class_indices(NETWORK, class_name)]
        size = photo.size[::-1]
        return (functional.interpolate(probability, size=size, mode="bilinear")[0, 0] > THRESHOLD).cpu().numpy()

    for name, photo, mask in read_samples():
        other = "cat" if name == "person" else "person"
        variants = {
            "unchanged": (photo, mask),
            "mirrored": (ImageOps.mirror(photo), ImageOps.mirror(mask)),
            "1281 x 851": (photo.resize((1281, 851)), mask.resize((1281, 851), Image.Resampling.NEAREST)),
            "320 x 213": (photo.resize((320, 213)), mask.resize((320, 213), Image.Resampling.NEAREST)),
        }
        for variant, (image, reference) in variants.items():
            found, wanted = cut_out(image, name), np.asarray(reference) > 0
            print(f"{name}, {variant}: IoU {(found & wanted).sum() / (found | wanted).sum():.4f}")
        print(f"{name}'s photo, class {other}: {cut_out(photo, other).mean():.2%} of the pixels")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--output", type=Path, default=DEMO_PATH)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    drawn = random_convolutions(NETWORK, trained=["classifier.4.weight"])
    trained = train(drawn, options.steps, device)
    torch.save({"fingerprint": fingerprint(drawn), "state_dict": trained}, options.output)
    print(f"{options.output}: {options.output.stat().st_size / 1e6:.2f} MB")
    report(options.output, device)


if __name__ == "__main__":
    main()
