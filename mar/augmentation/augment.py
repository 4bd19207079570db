"""Augmentation of a batch on its device: random erasing, flip, mixup and cutmix (Table I).

Departure from the released code: mixup and cutmix mix a clip with its neighbour in the (shuffled)
batch, clip 2k with clip 2k + 1. The release mixes clip k with the k-th from the end. The pairs are
as random, but both clips of a pair are on one worker, so the result does not depend on the number
of workers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from mar.augmentation.randaugment import Operations, draw_operations, rand_augment
from mar.config.input_settings import AugmentConfig
from mar.config.randaugment_policy import RandAugmentPolicy
from mar.config.schema import TrainingConfig
from mar.model.masking import DrawnMask, training_mask
from mar.model.pixels import IMAGENET_MEAN, IMAGENET_STD, to_pixels
from mar.rng import Stream, rng, rng_seed

# The ranges of timm's RandomErasing.
_ERASED_AREA = (0.02, 1 / 3)
"""Range of a box's area, as a share of the picture."""
_ERASED_ASPECT = (0.3, 1 / 0.3)
"""Range of a box's height divided by its width."""
_SWITCH_TO_CUTMIX = 0.5
"""Share of batches that are mixed by cutmix if mixup and cutmix are both on."""


@dataclass(frozen=True)
class Erased:
    """A box of a clip to be replaced with noise, in pixels."""

    top: int
    left: int
    height: int
    width: int
    noise: int
    """Seed of the noise."""


@dataclass(frozen=True)
class Drawn:
    """The random choices of a step, for each of its clips."""

    hidden: DrawnMask
    mirrored: Bool[Tensor, " B"]
    operations: Operations
    erased: list[Erased | None]

    def of(self, indices: Sequence[int]) -> Drawn:
        """Return the choices for some of the clips, such as those of one worker."""
        chosen = torch.tensor(indices)
        operations = [self.operations[index] for index in indices]
        return Drawn(
            self.hidden[chosen],
            self.mirrored[chosen],
            operations,
            [self.erased[index] for index in indices],
        )


def draw_step(settings: TrainingConfig, step: int) -> Drawn:
    """Draw the choices for the whole batch of a step, on the CPU, from seed and step alone."""
    # The whole batch is drawn on every worker, which then takes its part: so the number of workers
    # changes nothing.
    size = settings.recipe.batch_size
    augment = settings.augment
    generator = torch.Generator().manual_seed(rng_seed(settings.seed, Stream.MASK_AND_FLIP, step))
    masks = settings.mask.in_training
    chosen = 0
    if len(masks) > 1:
        chosen = int(rng(settings.seed, Stream.RATIO, step).integers(len(masks)))
    hidden = training_mask(masks[chosen], settings.grid, size, generator)
    # Drawn after the masks, from the same generator, and also if flip is off: the order of draws is
    # part of every result.
    mirrored = (torch.rand(size, generator=generator) < 0.5) & augment.flip
    # Before the crop, the loader draws the operations itself (Stream.RANDAUGMENT_BEFORE_CROP).
    operations: Operations = [[] for _ in range(size)]
    if augment.randaugment and not augment.randaugment_before_crop:
        policy = RandAugmentPolicy.parse(augment.randaugment)
        operations = draw_operations(policy, size, rng(settings.seed, Stream.RANDAUGMENT, step))
    erased = draw_erased(
        augment, size, settings.clip.size, rng(settings.seed, Stream.ERASING, step)
    )
    return Drawn(hidden, mirrored, operations, erased)


def augmented(
    clips: UInt8[Tensor, "B T H W C"],
    labels: Int[Tensor, " B"],
    drawn: Drawn,
    settings: TrainingConfig,
) -> tuple[Float[Tensor, "B C T H W"], Float[Tensor, "B classes"]]:
    """Return pixels and class probabilities: RandAugment, erasing, mirroring, label smoothing.

    The caller applies :func:`mix` afterwards.
    """
    config = settings.augment
    pixels = to_pixels(clips)
    if config.randaugment and not config.randaugment_before_crop:
        pixels = rand_augment(pixels, drawn.operations, config.randaugment_interpolation)
    if config.erasing:
        pixels = erase(pixels, drawn.erased)
    if config.flip:
        mirrored = drawn.mirrored.to(pixels.device, non_blocking=True)
        pixels = flip(pixels, mirrored)
        labels = swapped(labels, mirrored, config.flip_swaps)
    return pixels, soft_labels(labels, settings.data.num_classes, config.smoothing)


def soft_labels(
    labels: Int[Tensor, " B"], num_classes: int, smoothing: float
) -> Float[Tensor, "B classes"]:
    """Return class probabilities: 1 - ε + ε/C for the label, ε/C for the others."""
    return F.one_hot(labels, num_classes) * (1 - smoothing) + smoothing / num_classes


def flip(pixels: Float[Tensor, "B C T H W"], mirrored: Tensor) -> Float[Tensor, "B C T H W"]:
    """Mirror the clips for which ``mirrored`` (B booleans) is true."""
    return torch.where(mirrored.view(-1, 1, 1, 1, 1), pixels.flip(-1), pixels)


def swapped(
    labels: Int[Tensor, " B"], mirrored: Bool[Tensor, " B"], pairs: tuple[tuple[int, int], ...]
) -> Int[Tensor, " B"]:
    """Return the labels of clips after mirroring: the classes of a pair are swapped."""
    # No class is in two pairs (TrainingConfig checks it), so the order of pairs has no effect.
    for one, other in pairs:
        traded = torch.where(labels == one, other, torch.where(labels == other, one, labels))
        labels = torch.where(mirrored, traded, labels)
    return labels


def draw_erased(
    config: AugmentConfig, num_clips: int, size: int, rng: np.random.Generator
) -> list[Erased | None]:
    """Draw the erased box of each clip, or none.

    Its area, the logarithm of its aspect ratio and its position are uniform.
    """
    low = np.log(_ERASED_ASPECT[0])
    high = np.log(_ERASED_ASPECT[1])
    boxes: list[Erased | None] = []
    for is_erased in rng.random(num_clips) < config.erasing:
        box = None
        # A long box of a large area does not fit and is drawn again; after the last attempt the
        # clip stays as it is.
        for _ in range(config.erasing_attempts if is_erased else 0):
            area = size**2 * rng.uniform(*_ERASED_AREA)
            aspect = np.exp(rng.uniform(low, high))
            height = round(float(np.sqrt(area * aspect)))
            width = round(float(np.sqrt(area / aspect)))
            if 0 < height < size and 0 < width < size:
                top = int(rng.integers(size - height + 1))
                left = int(rng.integers(size - width + 1))
                box = Erased(top, left, height, width, int(rng.integers(2**62)))
                break
        boxes.append(box)
    return boxes


def erase(
    pixels: Float[Tensor, "B C T H W"], boxes: list[Erased | None]
) -> Float[Tensor, "B C T H W"]:
    """Fill each clip's box with noise. The box is the same in all frames, the noise differs."""
    if not any(boxes):
        return pixels
    # Pixels are from 0 to 1 here. With ImageNet's mean and deviation the noise is a standard normal
    # once the model has normalised it, as in timm and the release.
    erased = pixels.clone()
    mean, std = (
        torch.tensor(values).view(3, 1, 1, 1).to(pixels.device, non_blocking=True)
        for values in (IMAGENET_MEAN, IMAGENET_STD)
    )
    for clip, box in enumerate(boxes):
        if box is not None:
            generator = torch.Generator(pixels.device).manual_seed(box.noise)
            shape = (pixels.shape[1], pixels.shape[2], box.height, box.width)
            noise = torch.randn(shape, generator=generator, device=pixels.device)
            erased[clip, :, :, box.top : box.top + box.height, box.left : box.left + box.width] = (
                mean + std * noise
            )
    return erased


def mix(
    pixels: Float[Tensor, "B C T H W"],
    labels: Float[Tensor, "B classes"],
    config: AugmentConfig,
    rng: np.random.Generator,
    good: Bool[Tensor, " B"] | None = None,
) -> tuple[Float[Tensor, "B C T H W"], Float[Tensor, "B classes"]]:
    """Mix neighbours by mixup or cutmix.

    The whole batch has one share, and for cutmix one box, which is the same in all frames. A clip
    whose neighbour is not ``good`` (its video could not be decoded) is not mixed.
    """
    # rng.random() is drawn only if both are on. More or fewer draws would change all later ones of
    # this stream.
    use_cutmix = bool(config.cutmix and (not config.mixup or rng.random() < _SWITCH_TO_CUTMIX))
    alpha = config.cutmix if use_cutmix else config.mixup
    if not alpha:
        return pixels, labels
    kept = float(rng.beta(alpha, alpha))
    # i ^ 1 exchanges 2k and 2k + 1. In a batch of odd size the last clip has no neighbour, and is
    # mixed with itself.
    partner = (torch.arange(len(pixels), device=pixels.device) ^ 1).clamp(max=len(pixels) - 1)
    if good is not None:
        partner = torch.where(
            good[partner], partner, torch.arange(len(pixels), device=pixels.device)
        )
    if use_cutmix:
        height, width = pixels.shape[-2:]
        top, bottom = _cut(height, kept, rng)
        left, right = _cut(width, kept, rng)
        mixed = pixels.clone()
        mixed[..., top:bottom, left:right] = pixels[partner][..., top:bottom, left:right]
        # The box may be clipped at the border, so the labels' share follows from its real area.
        kept = 1 - (bottom - top) * (right - left) / (height * width)
    else:
        mixed = pixels * kept + pixels[partner] * (1 - kept)
    return mixed, labels * kept + labels[partner] * (1 - kept)


def _cut(length: int, kept: float, rng: np.random.Generator) -> tuple[int, int]:
    """Return the ends of a cut with a random centre, √(1 - kept) of ``length``, clipped to it."""
    # The box has the share 1 - kept of the area, so each side has its square root.
    centre = int(rng.integers(length))
    half = int(length * np.sqrt(1 - kept)) // 2
    return max(centre - half, 0), min(centre + half, length)
