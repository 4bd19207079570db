"""RandAugment on the device: a batch of clips at once, each clip's frames alike (Table I).

The random choices follow timm: its notation ``rand-m9-mstd0.5-inc1`` and its fifteen operations of
rising severity. The operations follow PIL, level for level (``tests/test_randaugment.py`` compares
each). Values stay whole numbers from 0 to 255 between operations, as in an image.

Operations that move pixels interpolate bilinearly, or bicubically as in the release
(``augment.randaugment_interpolation``). A clip is cropped first and then augmented, or the other
way round (``augment.randaugment_before_crop``). Posterising keeps at least one bit: at magnitude 10
timm asks PIL for no bits, which PIL now refuses.
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
"""The operations of each clip in order, each with a name and an argument."""
Images = Float[Tensor, "n 3 H W"]
Clips = Float[Tensor, "n C H W"]
"""Clips that move as one image: red, green and blue of the first frame, of the second, …"""
Interpolation = Literal["bilinear", "bicubic"]
Levels = Float[Tensor, " n"]
"""The argument of an operation for each image."""
_APPLIED = 0.5
"""Probability that a chosen operation is applied (timm's)."""
_FILL = (124.0, 116.0, 104.0)
"""Colour of pixels from outside the picture, from 0 to 255: ImageNet's mean, rounded."""


def draw_operations(
    policy: RandAugmentPolicy, num_clips: int, rng: np.random.Generator
) -> Operations:
    """Draw each clip's operations, with replacement, and their arguments.

    Operations that are chosen but not applied are left out.
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
    # Frames become images of their own, with whole values from 0 to 255 as in PIL. contiguous()
    # copies nothing here: to_pixels() has the frames before the channels in memory already.
    num_frames = pixels.shape[2]
    images = (pixels * 255).round().transpose(1, 2).contiguous()
    # All clips that have the same operation in the same turn are processed together: at most
    # fifteen calls for a batch of any size, instead of one for each clip.
    for turn in range(max(map(len, operations), default=0)):
        for name, apply in OPERATIONS.items():
            clips = [
                clip
                for clip, chain in enumerate(operations)
                if len(chain) > turn and chain[turn][0] == name
            ]
            if clips:
                where = torch.tensor(clips).to(images.device, non_blocking=True)
                # In double precision, which the matrices below need (see MATRICES).
                level = torch.tensor(
                    [operations[clip][turn][1] for clip in clips], dtype=torch.float64
                )
                level = level.to(images.device, non_blocking=True)
                chosen = images[where]
                if name in MATRICES:
                    # All frames of a clip move alike: they are channels of one image here.
                    stacked = chosen.flatten(1, 2)
                    done = moved(stacked, MATRICES[name](stacked, level), interpolation)
                else:
                    each_frame = level.float().repeat_interleave(num_frames)
                    done = apply(chosen.flatten(0, 1), each_frame)
                images[where] = done.view_as(chosen)
    return images.transpose(1, 2) / 255


def _auto_contrast(images: Images, _: Levels) -> Images:
    low = images.amin((2, 3), keepdim=True)
    high = images.amax((2, 3), keepdim=True)
    # In double precision, as PIL computes: in float32 some levels would be truncated to the one
    # below. The clamp to 1 avoids a division by zero in a channel of one level, which is kept.
    scale = 255 / (high - low).clamp(min=1).double()
    stretched = (images.double() * scale - low.double() * scale).trunc().clamp(0, 255)
    return torch.where(high > low, stretched.float(), images)


def _equalize(images: Images, _: Levels) -> Images:
    """Equalise the histogram of each channel as PIL does.

    A level's new value is the number of pixels below it, divided by a step. The step is a 255th of
    the number of pixels, without those of the highest level that occurs.
    """
    # scatter_add_ counts each level of each channel: torch.histc takes no batch.
    values = images.long().flatten(2)
    counts = torch.zeros(*values.shape[:2], 256, dtype=torch.long, device=images.device)
    counts.scatter_add_(2, values, torch.ones_like(values))
    levels = torch.arange(256, device=images.device)
    last = torch.where(counts > 0, levels, -1).amax(2, keepdim=True)
    step = (values.shape[2] - counts.gather(2, last)) // 255
    below = counts.cumsum(2) - counts
    table = ((step // 2 + below) // step.clamp(min=1)).clamp(max=255)
    # With fewer than 255 pixels below the highest level the step is 0, and PIL changes nothing.
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
    """Blend as PIL does: ``other`` at factor 0, the image at 1, cut off to whole levels.

    Factors above 1 extrapolate.
    """
    # PIL truncates. The small number lifts a value such as 99.99999, a rounding error of float32,
    # to its level.
    return (other + factor[:, None, None, None] * (images - other)).clamp(0, 255).add(1e-3).floor()


def _grey(images: Images) -> Float[Tensor, "n 1 H W"]:
    # PIL's conversion to "L": the weights 0.299, 0.587 and 0.114 in units of 2⁻¹⁶, rounded.
    red, green, blue = images.int().split(1, dim=1)
    return ((red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16).float()


def _color(images: Images, factor: Levels) -> Images:
    return _blend(images, _grey(images), factor)


def _contrast(images: Images, factor: Levels) -> Images:
    # The other image has one grey everywhere, the mean of all pixels, which PIL rounds.
    return _blend(images, (_grey(images).mean((1, 2, 3), keepdim=True) + 0.5).floor(), factor)


def _brightness(images: Images, factor: Levels) -> Images:
    return _blend(images, torch.zeros_like(images), factor)


def _sharpness(images: Images, factor: Levels) -> Images:
    """Sharpen or smooth: move away from, or towards, a smoothed image. PIL leaves the border."""
    # PIL's kernel "SMOOTH": 5 in the centre, 1 around it, divided by 13.
    if min(images.shape[2:]) < 3:
        return images
    kernel = torch.ones(3, 1, 3, 3, device=images.device)
    kernel[:, :, 1, 1] = 5
    smooth = images.clone()
    smooth[:, :, 1:-1, 1:-1] = (F.conv2d(images, kernel / 13, groups=3) + 0.5).floor().clamp(0, 255)
    return _blend(images, smooth, factor)


def moved(
    images: Clips, matrix: Float[Tensor, "n 2 3"], interpolation: Interpolation = "bilinear"
) -> Clips:
    """Sample each clip at the position to which ``matrix`` maps a pixel's centre, in pixels.

    Positions outside of the frame get the fill colour.
    """
    height, width = images.shape[2:]
    y, x = torch.meshgrid(
        torch.arange(height, device=images.device) + 0.5,
        torch.arange(width, device=images.device) + 0.5,
        indexing="ij",
    )
    positions = torch.einsum("nij,jhw->nhwi", matrix, torch.stack([x, y, torch.ones_like(x)]))
    # Copies with non_blocking do not make the host wait for the device.
    size = torch.tensor([width, height]).to(images.device, non_blocking=True)
    if interpolation == "bicubic":
        sampled = _bicubic(images, positions)
    else:
        # grid_sample takes positions from -1 to 1 across the image. The padding at the border is
        # PIL's: a position inside, less than half a pixel from the edge, repeats the edge.
        sampled = F.grid_sample(
            images, positions / size * 2 - 1, padding_mode="border", align_corners=False
        ).round()
    inside = ((positions >= 0) & (positions < size)).all(-1)[:, None]
    fill = torch.tensor(_FILL).repeat(images.shape[1] // 3).to(images.device, non_blocking=True)
    return torch.where(inside, sampled, fill.view(1, -1, 1, 1))


def _bicubic(images: Clips, positions: Float[Tensor, "n H W 2"]) -> Clips:
    """Sample bicubically as PIL does: values are cut off to whole levels."""
    # F.grid_sample cannot do this: its cubic has the free parameter -0.75, PIL's has -1.
    height, width = images.shape[2:]
    first = (positions - 0.5).floor()
    x, y = first.long().unbind(-1)
    flat = images.flatten(2)
    sampled = torch.zeros_like(images)
    weights = [_cubic_weights(part) for part in (positions - 0.5 - first).unbind(-1)]
    # 4 × 4 neighbours, one at a time: all at once would take 16 times the memory of the images.
    # Neighbours outside of the image repeat its edge.
    for row in range(4):
        line = torch.zeros_like(images)
        for column in range(4):
            at = (y + row - 1).clamp(0, height - 1) * width + (x + column - 1).clamp(0, width - 1)
            where = at.flatten(1)[:, None].expand(-1, images.shape[1], -1)
            values = flat.gather(2, where).view_as(images)
            line += weights[0][column][:, None] * values
        sampled += weights[1][row][:, None] * line
    return sampled.clamp(0, 255).add(1e-3).floor()


def _cubic_weights(d: Float[Tensor, "n H W"]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the weights of four neighbours, of which the second is ``d`` (0 to 1) away."""
    square = d * d
    cube = d * d * d
    return -d + 2 * square - cube, 1 - 2 * square + cube, d + square - cube, cube - square


def _matrix(*rows: Tensor | float, like: Levels) -> Float[Tensor, "n 2 3"]:
    return torch.stack([torch.zeros_like(like) + row for row in rows], dim=1).view(-1, 2, 3).float()


def _rotate(images: Clips, degrees: Levels) -> Float[Tensor, "n 2 3"]:
    """Return the matrices that rotate images counter-clockwise about the centre."""
    height, width = images.shape[2:]
    cosine = torch.cos(torch.deg2rad(degrees))
    sine = torch.sin(torch.deg2rad(degrees))
    x = width / 2
    y = height / 2
    # The shifts keep the centre (x, y) in its position.
    shift_x = x - cosine * x + sine * y
    shift_y = y - sine * x - cosine * y
    return _matrix(cosine, -sine, shift_x, sine, cosine, shift_y, like=degrees)


def _shear_x(images: Clips, factor: Levels) -> Float[Tensor, "n 2 3"]:
    return _matrix(1.0, factor, 0.0, 0.0, 1.0, 0.0, like=factor)


def _shear_y(images: Clips, factor: Levels) -> Float[Tensor, "n 2 3"]:
    return _matrix(1.0, 0.0, 0.0, factor, 1.0, 0.0, like=factor)


def _translate_x(images: Clips, share: Levels) -> Float[Tensor, "n 2 3"]:
    return _matrix(1.0, 0.0, share * images.shape[3], 0.0, 1.0, 0.0, like=share)


def _translate_y(images: Clips, share: Levels) -> Float[Tensor, "n 2 3"]:
    return _matrix(1.0, 0.0, 0.0, 0.0, 1.0, share * images.shape[2], like=share)


MATRICES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "Rotate": _rotate,
    "ShearX": _shear_x,
    "ShearY": _shear_y,
    "TranslateXRel": _translate_x,
    "TranslateYRel": _translate_y,
}
"""Operations that move pixels -> the matrix from a pixel to the position it is sampled at. Their
arguments stay in double precision until the matrix is made, so that half a pixel stays exact."""


def _by_matrix(name: str) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda images, level: moved(images, MATRICES[name](images, level))


# draw_operations() draws an index of this table, so its order is part of every result.
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
    # A factor of 1 changes nothing; both directions grow with the level, and 0.1 is the least.
    return max(0.1, 1 + sign * level * 0.9)


# timm's ranges. Operations with "Increasing" in their name get stronger with the level; timm's
# variants without it do not.
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
"""Name -> function from the level (0 to 1) and a random sign (-1 or 1) to the argument, in degrees,
bits, levels of a pixel, a factor, or a share of the side."""
