"""Positions of tokens: tables that are added, and rotations of queries and keys.

MAR and VideoMAE add a fixed sin-cos table to the tokens (section III-B). V-JEPA 2 adds nothing; it
turns parts of each query and key by the token's coordinates in time, height and width (rotary
positions). All tables have one row for each token of the grid, in the order t, h, w, so a hidden
token leaves its row out and the others keep theirs.
"""

from __future__ import annotations

from math import prod

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from mar.config.model_settings import EncoderConfig
from mar.config.types import Grid

_BASE = 10000.0
"""The longest wavelength of both kinds, over 2π."""
_PRETRAINED_SIDE = 16
"""Rows and columns of tokens at which V-JEPA 2.1 was pre-trained first: 256 / 16 pixels."""


def sin_cos_positions(num_tokens: int, width: int) -> Float[Tensor, "N D"]:
    """Return the fixed table of sin-cos positions.

    Sine in even and cosine in odd channels of p / 10000^(2⌊j/2⌋/D), where p is the flat index.
    """
    # In double precision, as the release computes it: the angle is up to N - 1 (1,567) radians, and
    # float32 would lose digits of its sine.
    position = torch.arange(num_tokens, dtype=torch.float64)[:, None]
    channel = torch.arange(width)
    angle = position / torch.pow(_BASE, 2 * (channel // 2).double() / width)
    return torch.where(channel % 2 == 0, angle.sin(), angle.cos()).float()


def added_positions(config: EncoderConfig, grid: Grid) -> Float[Tensor, "N D"]:
    """Return the table that an encoder adds to its tokens, for ``encoder.positions``."""
    width = config.dimensions[0]
    if config.positions == "computed":
        return sin_cos_positions(prod(grid), width)
    assert config.pretrained_grid
    return interpolated_positions(config.pretrained_grid, grid, width)


def interpolated_positions(pretrained: Grid, grid: Grid, width: int) -> Float[Tensor, "N D"]:
    """Return the sin-cos table of the grid ``pretrained``, resized to another grid.

    Bicubic in space and linear in time, as UMT and others resize theirs.
    """
    table = sin_cos_positions(prod(pretrained), width).unflatten(0, pretrained)
    if grid[1:] != pretrained[1:]:
        # t h w D -> t D h w: each slice is an image with D channels.
        slices = table.permute(0, 3, 1, 2)
        slices = F.interpolate(slices, size=grid[1:], mode="bicubic", align_corners=False)
        table = slices.permute(0, 2, 3, 1)
    if grid[0] != pretrained[0]:
        # t h w D -> 1 (h w D) t: each channel of each place is a signal over time.
        signals = table.flatten(1).T[None]
        signals = F.interpolate(signals, size=grid[0], mode="linear", align_corners=False)
        table = signals[0].T.unflatten(1, table.shape[1:])
    return table.flatten(0, 2).contiguous()


def rotations(config: EncoderConfig, grid: Grid) -> Float[Tensor, "2 N d"]:
    """Return cosine and sine of the angles by which each token's queries and keys are turned.

    d is the width of a head. Its first third is turned by the slice, its second by the row, its
    last by the column; channels that are left over are not turned (cosine 1, sine 0). Source:
    V-JEPA 2 (Assran et al., 2025), section 2.1; its released code for what follows.

    ``rotary_vjepa2``: channel j of a part of n has the frequency of number j mod n/2, though
    :func:`rotated` turns the channels 2i and 2i + 1 together, so that the two of a pair have other
    angles. Its weights were trained so. ``rotary_vjepa2_1``: both of a pair have frequency i, and
    rows and columns are counted as on the grid of the first stage of pre-training.
    """
    width, _, heads = config.dimensions
    head = width // heads
    part = rotated_part(head)
    frequency = torch.arange(part // 2, dtype=torch.float64) / (part / 2)
    frequency = 1 / _BASE**frequency
    if config.positions == "rotary_vjepa2":
        frequency = frequency.repeat(2)
    else:
        frequency = frequency.repeat_interleave(2)
    axes = [torch.arange(length, dtype=torch.float64) for length in grid]
    if config.positions == "rotary_vjepa2_1":
        # A grid with one row has it at 0: there is nothing to stretch.
        axes[1:] = [axis * (_PRETRAINED_SIDE - 1) / max(len(axis) - 1, 1) for axis in axes[1:]]
    coordinates = torch.cartesian_prod(*axes).reshape(-1, 3)
    angles = [coordinates[:, axis, None] * frequency for axis in range(3)]
    still = torch.zeros(len(coordinates), head - 3 * part, dtype=torch.float64)
    angle = torch.cat([*angles, still], dim=1)
    return torch.stack([angle.cos(), angle.sin()]).float()


def rotated_part(head: int) -> int:
    """Return the number of a head's channels that one of the three axes turns."""
    return 2 * (head // 3 // 2)


def rotated(
    x: Float[Tensor, "B heads N d"], rotation: Float[Tensor, "2 B 1 N d"]
) -> Float[Tensor, "B heads N d"]:
    """Return queries or keys turned by :func:`rotations`, those of each clip's own tokens."""
    cosine, sine = rotation.to(x.dtype)
    even = x[..., ::2]
    odd = x[..., 1::2]
    turned = torch.stack([-odd, even], dim=-1).flatten(-2)
    return x * cosine + turned * sine
