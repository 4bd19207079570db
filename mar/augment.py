"""Augmentation of a batch on its device: pixels from uint8, flip, mixup and cutmix (Table I).

Departure from the released code: mixup and cutmix mix a clip with its neighbour in the (shuffled) batch,
clip 2k with clip 2k + 1, and not with its mirror image in the batch. The pairs are as random, and they never
straddle two workers, so that the result does not depend on how many there are.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from mar.config import AugmentConfig

_SWITCH_TO_CUTMIX = 0.5
"""Share of batches that take cutmix when both are on."""


def to_pixels(clips: UInt8[Tensor, "B T H W C"]) -> Float[Tensor, "B C T H W"]:
    """Return pixel values from 0 to 1."""
    return clips.permute(0, 4, 1, 2, 3).float() / 255


def soft_labels(labels: Int[Tensor, " B"], num_classes: int, smoothing: float) -> Float[Tensor, "B classes"]:
    """Return class probabilities: 1 - ε + ε/C for the label, ε/C for the others."""
    return F.one_hot(labels, num_classes) * (1 - smoothing) + smoothing / num_classes


def flip(pixels: Float[Tensor, "B C T H W"], mirrored: Tensor) -> Float[Tensor, "B C T H W"]:
    """Mirror the clips for which ``mirrored`` (B booleans) is true."""
    return torch.where(mirrored.view(-1, 1, 1, 1, 1), pixels.flip(-1), pixels)


def mix(
    pixels: Float[Tensor, "B C T H W"],
    labels: Float[Tensor, "B classes"],
    config: AugmentConfig,
    rng: np.random.Generator,
) -> tuple[Float[Tensor, "B C T H W"], Float[Tensor, "B classes"]]:
    """Mix neighbours by mixup or cutmix; one share, and one box for all frames, for the whole batch."""
    use_cutmix = bool(config.cutmix and (not config.mixup or rng.random() < _SWITCH_TO_CUTMIX))
    alpha = config.cutmix if use_cutmix else config.mixup
    if not alpha:
        return pixels, labels
    kept = float(rng.beta(alpha, alpha))
    partner = torch.arange(len(pixels), device=pixels.device) ^ 1
    partner[partner == len(pixels)] = len(pixels) - 1  # an odd clip at the end has no neighbour
    if use_cutmix:
        height, width = pixels.shape[-2:]
        (top, bottom), (left, right) = _cut(height, kept, rng), _cut(width, kept, rng)
        mixed = pixels.clone()
        mixed[..., top:bottom, left:right] = pixels[partner][..., top:bottom, left:right]
        kept = 1 - (bottom - top) * (right - left) / (height * width)
    else:
        mixed = pixels * kept + pixels[partner] * (1 - kept)
    return mixed, labels * kept + labels[partner] * (1 - kept)


def _cut(length: int, kept: float, rng: np.random.Generator) -> tuple[int, int]:
    """Return the ends of a cut of √(1 - kept) of ``length`` round a random centre, clipped at the borders."""
    centre, half = int(rng.integers(length)), int(length * np.sqrt(1 - kept)) // 2
    return max(centre - half, 0), min(centre + half, length)
