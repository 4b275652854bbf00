# SPDX-License-Identifier: Apache-2.0
"""Maps of the photo's size, computed from the network's probabilities with torch, on any device.

All of them interpolate linearly, as :class:`pipelines.Postprocess` does, and are computed only for requests that name
them. At 25 megapixels, the probabilities of 21 classes would take 2.1 GB, so they are enlarged in bands of rows.
"""

from collections.abc import Callable, Sequence

import torch
from torch.nn.functional import interpolate

# Pixels of a band, for each class. On a CPU, 21 classes of this size fit into the cache; bands of 4 times the size
# took 3 times as long. A GPU needs fewer and larger bands to be busy.
BAND_PIXELS = {"cpu": 1 << 17, "cuda": 1 << 20}


def probability_map(probability: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Return a probability, float32 ``[S, S]``, enlarged to this height and width: uint8 ``[H, W]``, 255 for 1."""
    return _enlarge(probability[None], size, lambda band: (255 * band[0]).round_())


def label_map(probabilities: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Return the index of the most probable class in each pixel, uint8 ``[H, W]``.

    ``probabilities`` is float32 ``[C, S, S]``, for up to 256 classes, and ``size`` is the height and width.
    """
    classes = torch.arange(len(probabilities), device=probabilities.device)
    if probabilities.device.type == "cpu":
        # Skip most classes: one that is below the average everywhere is nowhere the most probable one. A GPU is fast
        # enough to enlarge all, and this code would have to wait for it. ``~`` keeps classes with NaN.
        classes = classes[~(probabilities.amax(dim=(1, 2)) < 1 / (len(classes) + 1))]
    # The same as argmax, which takes 7 times as long on a CPU.
    return _enlarge(probabilities[classes], size, lambda band: classes[band.max(dim=0).indices])


def soft_cut_out(photo: object, probability: torch.Tensor, threshold: float, edge: float) -> torch.Tensor:
    """Return a photo with an alpha channel, uint8 ``[H, W, 4]``: its own pixels where alpha is above 0, 0 elsewhere.

    ``photo`` is a tensor of torch or DALI, uint8 ``[H, W, 3]``, and ``probability`` float32 ``[S, S]``. Alpha is
    ``255 * (probability - low) / (high - low)``, rounded and limited to 0 to 255, with ``low = max(0, threshold -
    edge / 2)`` and ``high = min(1, threshold + edge / 2)``: a probability of 0 is always transparent, and 1 opaque.
    """
    photo = torch.from_dlpack(photo)
    edge = max(edge, 1e-6)  # about ten steps of float32 near 1
    low, high = max(0, threshold - edge / 2), min(1, threshold + edge / 2)
    slope = 255 / (high - low)
    # In float64: float32 would round a ``low`` just below 1 up to 1, and make a probability of 1 transparent.
    alpha = _enlarge(
        probability[None], photo.shape[:2], lambda band: (slope * (band[0].double() - low)).round_().clamp_(0, 255)
    )
    alpha = alpha[..., None]
    return torch.cat([photo * (alpha > 0), alpha], dim=2)


@torch.inference_mode()
def _enlarge(maps: torch.Tensor, size: Sequence[int], combine: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Interpolate maps, float32 ``[C, S, S]``, and combine the values of each pixel into one, uint8 ``[H, W]``.

    ``combine`` gets float32 ``[C, rows, W]`` and returns whole numbers from 0 to 255, ``[rows, W]`` of any dtype.
    """
    (height, width), (_, source_height, source_width) = size, maps.shape
    band_pixels = BAND_PIXELS[maps.device.type]
    if width > max(height, band_pixels):  # a single row would be too large
        return _enlarge(maps.mT, (width, height), combine).mT.contiguous()
    if width < source_width:  # do not compute rows that are wider than the photo
        maps = interpolate(maps[None], size=(source_height, width), mode="bilinear")[0]
    combined = torch.empty(height, width, dtype=torch.uint8, device=maps.device)
    count = max(1, band_pixels // width)
    for band, rows in zip(combined.split(count), torch.arange(height, device=maps.device).split(count), strict=True):
        # Pixel centers are at half-integers, and values repeat beyond the edge.
        position = ((rows.double() + 0.5) * (source_height / height) - 0.5).clamp_(0, source_height - 1)
        below = position.long()
        above = (below + 1).clamp_(max=source_height - 1)
        tall = torch.lerp(maps[:, below], maps[:, above], (position - below).float()[:, None])
        band.copy_(combine(interpolate(tall[None], size=(len(rows), width), mode="bilinear")[0]))
    return combined
