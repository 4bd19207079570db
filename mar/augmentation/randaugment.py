"""RandAugment on the device: a batch of clips at once, each clip's frames alike (Table I).

What is drawn follows timm's ``rand-m9-mstd0.5-inc1`` notation and its fifteen operations of rising
severity; what is done follows PIL, level for level (``tests/test_randaugment.py`` compares each).
Values stay whole, from 0 to 255, from one operation to the next, as they do in an image. Operations
that move pixels interpolate bilinearly or as the release does, bicubically
(``augment.randaugment_interpolation``); a clip is cropped first and then augmented, or the other
way round (``augment.randaugment_before_crop``). Posterising keeps at least one bit: timm asks PIL
for none at magnitude 10, which PIL now refuses.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from mar.config.randaugment_policy import MAX_MAGNITUDE, RandAugmentPolicy

Operations = list[list[tuple[str, float]]]
"""For each clip its operations in order: a name and an argument."""
Images = Float[Tensor, "n 3 H W"]
Interpolation = Literal["bilinear", "bicubic"]
Levels = Float[Tensor, " n"]
"""An argument for each image."""
_APPLIED = 0.5
"""Chance of each chosen operation to be applied."""
_FILL = (124.0, 116.0, 104.0)
"""ImageNet's mean: what comes in from outside the picture."""


def draw_operations(
    policy: RandAugmentPolicy, num_clips: int, rng: np.random.Generator
) -> Operations:
    """Draw each clip's operations and their arguments, with replacement.

    Those that are not applied are left out.
    """
    names = list(OPERATIONS)
    drawn: Operations = []
    for _ in range(num_clips):
        chosen = [names[index] for index in rng.integers(len(names), size=policy.operations)]
        applied = rng.random(policy.operations) < _APPLIED
        levels = np.clip(
            rng.normal(policy.magnitude, policy.deviation, policy.operations), 0, MAX_MAGNITUDE
        )
        signs = np.where(rng.random(policy.operations) > 0.5, -1.0, 1.0)
        drawn.append(
            [
                (
                    name,
                    ARGUMENTS[name](float(level) / MAX_MAGNITUDE, float(sign))
                    if name in ARGUMENTS
                    else 0.0,
                )
                for name, is_applied, level, sign in zip(
                    chosen, applied, levels, signs, strict=True
                )
                if is_applied
            ]
        )
    return drawn


def rand_augment(
    pixels: Float[Tensor, "B C T H W"],
    operations: Operations,
    interpolation: Interpolation = "bilinear",
) -> Float[Tensor, "B C T H W"]:
    """Apply each clip's operations, in order, to all its frames; pixel values from 0 to 1."""
    num_frames = pixels.shape[2]
    images = (pixels * 255).round().transpose(1, 2).contiguous()
    for turn in range(max(map(len, operations), default=0)):
        for name, apply in OPERATIONS.items():
            clips = [
                clip
                for clip, chain in enumerate(operations)
                if len(chain) > turn and chain[turn][0] == name
            ]
            if clips:
                where = torch.tensor(clips).to(images.device, non_blocking=True)
                level = torch.tensor(
                    [operations[clip][turn][1] for clip in clips], dtype=torch.float64
                )
                level = level.repeat_interleave(num_frames).to(images.device, non_blocking=True)
                chosen = images[where].flatten(0, 1)
                if name in MATRICES:
                    done = moved(chosen, MATRICES[name](chosen, level), interpolation)
                else:
                    done = apply(chosen, level.float())
                images[where] = done.unflatten(0, (len(clips), num_frames))
    return images.transpose(1, 2) / 255


def _auto_contrast(images: Images, _: Levels) -> Images:
    low = images.amin((2, 3), keepdim=True)
    high = images.amax((2, 3), keepdim=True)
    scale = 255 / (high - low).clamp(min=1).double()
    stretched = (images.double() * scale - low.double() * scale).trunc().clamp(0, 255)
    return torch.where(high > low, stretched.float(), images)


def _equalize(images: Images, _: Levels) -> Images:
    """Equalise as PIL does.

    A level's new value is the number of pixels below it, in steps of a 255th of all but the last
    level's.
    """
    values = images.long().flatten(2)
    counts = torch.zeros(*values.shape[:2], 256, dtype=torch.long, device=images.device)
    counts.scatter_add_(2, values, torch.ones_like(values))
    levels = torch.arange(256, device=images.device)
    last = torch.where(counts > 0, levels, -1).amax(2, keepdim=True)
    step = (values.shape[2] - counts.gather(2, last)) // 255
    below = counts.cumsum(2) - counts
    table = ((step // 2 + below) // step.clamp(min=1)).clamp(max=255)
    table = torch.where(step > 0, table, levels)
    return table.gather(2, values).view(images.shape).float()


def _invert(images: Images, _: Levels) -> Images:
    return 255 - images


def _posterize(images: Images, bits: Levels) -> Images:
    step = torch.pow(2, 8 - bits.clamp(min=1))[:, None, None, None]
    return (images / step).floor() * step


def _solarize(images: Images, threshold: Levels) -> Images:
    return torch.where(images < threshold[:, None, None, None], images, 255 - images)


def _solarize_add(images: Images, added: Levels) -> Images:
    return torch.where(images < 128, (images + added[:, None, None, None]).clamp(max=255), images)


def _blend(images: Images, other: Tensor, factor: Levels) -> Images:
    """PIL's: from ``other`` at 0 through the image at 1 and beyond, cut off to whole levels."""
    return (other + factor[:, None, None, None] * (images - other)).clamp(0, 255).add(1e-3).floor()


def _grey(images: Images) -> Float[Tensor, "n 1 H W"]:
    red, green, blue = images.int().split(1, dim=1)
    return ((red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16).float()


def _color(images: Images, factor: Levels) -> Images:
    return _blend(images, _grey(images), factor)


def _contrast(images: Images, factor: Levels) -> Images:
    return _blend(images, (_grey(images).mean((1, 2, 3), keepdim=True) + 0.5).floor(), factor)


def _brightness(images: Images, factor: Levels) -> Images:
    return _blend(images, torch.zeros_like(images), factor)


def _sharpness(images: Images, factor: Levels) -> Images:
    """Away from, or towards, a smoothed image; the border is not smoothed."""
    if min(images.shape[2:]) < 3:
        return images
    kernel = torch.ones(3, 1, 3, 3, device=images.device)
    kernel[:, :, 1, 1] = 5
    smooth = images.clone()
    smooth[:, :, 1:-1, 1:-1] = (F.conv2d(images, kernel / 13, groups=3) + 0.5).floor().clamp(0, 255)
    return _blend(images, smooth, factor)


def moved(
    images: Images, matrix: Float[Tensor, "n 2 3"], interpolation: Interpolation = "bilinear"
) -> Images:
    """Sample each image where ``matrix`` sends a pixel's centre, in pixels.

    Fill where that lies outside.
    """
    height, width = images.shape[2:]
    y, x = torch.meshgrid(
        torch.arange(height, device=images.device) + 0.5,
        torch.arange(width, device=images.device) + 0.5,
        indexing="ij",
    )
    positions = torch.einsum("nij,jhw->nhwi", matrix, torch.stack([x, y, torch.ones_like(x)]))
    size = torch.tensor([width, height]).to(images.device, non_blocking=True)
    if interpolation == "bicubic":
        sampled = _bicubic(images, positions)
    else:
        sampled = F.grid_sample(
            images, positions / size * 2 - 1, padding_mode="border", align_corners=False
        ).round()
    inside = ((positions >= 0) & (positions < size)).all(-1)[:, None]
    return torch.where(
        inside, sampled, torch.tensor(_FILL).to(images.device, non_blocking=True).view(1, 3, 1, 1)
    )


def _bicubic(images: Images, positions: Float[Tensor, "n H W 2"]) -> Images:
    """Sample bicubically as PIL does, which differs from PyTorch.

    The cubic's free parameter is -1, and values are cut off to whole levels.
    """
    height, width = images.shape[2:]
    first = (positions - 0.5).floor()
    x, y = first.long().unbind(-1)
    flat = images.flatten(2)
    sampled = torch.zeros_like(images)
    weights = [_cubic_weights(part) for part in (positions - 0.5 - first).unbind(-1)]
    for row in range(4):
        line = torch.zeros_like(images)
        for column in range(4):
            at = (y + row - 1).clamp(0, height - 1) * width + (x + column - 1).clamp(0, width - 1)
            values = flat.gather(2, at.flatten(1)[:, None].expand(-1, 3, -1)).view_as(images)
            line += weights[0][column][:, None] * values
        sampled += weights[1][row][:, None] * line
    return sampled.clamp(0, 255).add(1e-3).floor()


def _cubic_weights(d: Float[Tensor, "n H W"]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the weights of four neighbours, the second of which is ``d`` away."""
    square = d * d
    cube = d * d * d
    return -d + 2 * square - cube, 1 - 2 * square + cube, d + square - cube, cube - square


def _matrix(*rows: Tensor | float, like: Levels) -> Float[Tensor, "n 2 3"]:
    return torch.stack([torch.zeros_like(like) + row for row in rows], dim=1).view(-1, 2, 3).float()


def _rotate(images: Images, degrees: Levels) -> Float[Tensor, "n 2 3"]:
    """Counter-clockwise about the centre."""
    height, width = images.shape[2:]
    cosine = torch.cos(torch.deg2rad(degrees))
    sine = torch.sin(torch.deg2rad(degrees))
    x = width / 2
    y = height / 2
    shift_x = x - cosine * x + sine * y
    shift_y = y - sine * x - cosine * y
    return _matrix(cosine, -sine, shift_x, sine, cosine, shift_y, like=degrees)


def _shear_x(images: Images, factor: Levels) -> Float[Tensor, "n 2 3"]:
    return _matrix(1.0, factor, 0.0, 0.0, 1.0, 0.0, like=factor)


def _shear_y(images: Images, factor: Levels) -> Float[Tensor, "n 2 3"]:
    return _matrix(1.0, 0.0, 0.0, factor, 1.0, 0.0, like=factor)


def _translate_x(images: Images, share: Levels) -> Float[Tensor, "n 2 3"]:
    return _matrix(1.0, 0.0, share * images.shape[3], 0.0, 1.0, 0.0, like=share)


def _translate_y(images: Images, share: Levels) -> Float[Tensor, "n 2 3"]:
    return _matrix(1.0, 0.0, 0.0, 0.0, 1.0, share * images.shape[2], like=share)


MATRICES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "Rotate": _rotate,
    "ShearX": _shear_x,
    "ShearY": _shear_y,
    "TranslateXRel": _translate_x,
    "TranslateYRel": _translate_y,
}
"""Operations that move pixels -> where each pixel comes from. Their arguments stay in double
precision until the matrix is made: half a pixel must stay half a pixel."""


def _by_matrix(name: str) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda images, level: moved(images, MATRICES[name](images, level))


OPERATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "AutoContrast": _auto_contrast,
    "Equalize": _equalize,
    "Invert": _invert,
    "Rotate": _by_matrix("Rotate"),
    "PosterizeIncreasing": _posterize,
    "SolarizeIncreasing": _solarize,
    "SolarizeAdd": _solarize_add,
    "ColorIncreasing": _color,
    "ContrastIncreasing": _contrast,
    "BrightnessIncreasing": _brightness,
    "SharpnessIncreasing": _sharpness,
    "ShearX": _by_matrix("ShearX"),
    "ShearY": _by_matrix("ShearY"),
    "TranslateXRel": _by_matrix("TranslateXRel"),
    "TranslateYRel": _by_matrix("TranslateYRel"),
}
"""timm's names, in timm's order."""


def _enhanced(level: float, sign: float) -> float:
    return max(0.1, 1 + sign * level * 0.9)


ARGUMENTS: dict[str, Callable[[float, float], float]] = {
    "Rotate": lambda level, sign: sign * level * 30,
    "PosterizeIncreasing": lambda level, _: 4.0 - math.floor(level * 4),
    "SolarizeIncreasing": lambda level, _: 256.0 - min(256, math.floor(level * 256)),
    "SolarizeAdd": lambda level, _: float(min(128, math.floor(level * 110))),
    "ColorIncreasing": _enhanced,
    "ContrastIncreasing": _enhanced,
    "BrightnessIncreasing": _enhanced,
    "SharpnessIncreasing": _enhanced,
    "ShearX": lambda level, sign: sign * level * 0.3,
    "ShearY": lambda level, sign: sign * level * 0.3,
    "TranslateXRel": lambda level, sign: sign * level * 0.45,
    "TranslateYRel": lambda level, sign: sign * level * 0.45,
}
"""Name -> from the level (0 to 1) and a random sign to the argument: degrees, bits, a threshold, a
factor, a share."""
