"""Which tokens are hidden: cell running masking (section III-B) and the masks it is compared with.

A mask is True where a token is **hidden**. For one setting every clip has the same number of hidden
tokens, so that the visible ones of a batch form a dense tensor.

Departures from the released code, and choices where the paper is silent:

- A cell whose share of hidden tokens is not whole (7 × 7 at 50 %, 7 × 2 at 25 %) alternates between the two
  neighbouring counts, so that the clip's total is kept; the released code rounds each cell's share up, or crashes.
- Random and block running masks move by one column a slice; the paper does not say how far.
- A standard block mask is one rectangle, the same in every slice.
- A uniform mask is a running cell as large as the token grid (section III-B).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mar.config.schema import Grid, MaskConfig, TrainingConfig


def training_mask(
    mask: MaskConfig, grid: Grid, num_clips: int, generator: torch.Generator
) -> Bool[Tensor, "B t h w"]:
    """Draw an independent mask for each clip, on the generator's device."""
    if mask.ratio == 0:
        return torch.zeros(num_clips, *grid, dtype=torch.bool, device=generator.device)
    return _STRATEGIES[mask.strategy](mask, grid, num_clips, generator)


def evaluation_mask(
    settings: TrainingConfig, device: torch.device | None = None
) -> Bool[Tensor, "1 t h w"]:
    """Return the one mask that all clips of an evaluation share (section III-B, last paragraph).

    Cells run in order from ``evaluation.mask.start``; strategies that are random in testing too are
    drawn once, from a fixed seed.
    """
    mask = settings.test_mask
    if mask.strategy in ("cell", "uniform") and mask.ratio > 0:
        _, h, w = settings.grid
        cell = (h, w) if mask.strategy == "uniform" else mask.cell
        starts = torch.full((1, h // cell[0], w // cell[1]), settings.evaluation.mask.start)
        return _run_cells(mask, settings.grid, cell, starts).to(device)
    generator = torch.Generator().manual_seed(0)
    return training_mask(mask, settings.grid, 1, generator).to(device)


def _cell(
    mask: MaskConfig, grid: Grid, num_clips: int, generator: torch.Generator
) -> Bool[Tensor, "B t h w"]:
    return _cells(mask, grid, mask.cell, num_clips, generator)


def _uniform(
    mask: MaskConfig, grid: Grid, num_clips: int, generator: torch.Generator
) -> Bool[Tensor, "B t h w"]:
    return _cells(mask, grid, (grid[1], grid[2]), num_clips, generator)


def _cells(
    mask: MaskConfig, grid: Grid, cell: tuple[int, int], num_clips: int, generator: torch.Generator
) -> Bool[Tensor, "B t h w"]:
    """Cell running masking with its augmentations (Fig. 4): random starts, shuffled slices."""
    (t, h, w), (r, q) = grid, cell
    device = generator.device
    rows, columns = h // r, w // q
    if mask.spatial == "repeated":
        starts = torch.randint(r * q, (num_clips, 1, 1), generator=generator, device=device).expand(
            -1, rows, columns
        )
    else:
        starts = torch.randint(
            r * q, (num_clips, rows, columns), generator=generator, device=device
        )
    hidden = _run_cells(mask, grid, cell, starts)
    if mask.temporal == "fixed":
        return hidden
    order = torch.rand(num_clips, t, generator=generator, device=device).argsort(dim=1)
    return torch.take_along_dim(hidden, order[:, :, None, None], dim=1)


def _run_cells(
    mask: MaskConfig, grid: Grid, cell: tuple[int, int], starts: Int[Tensor, "B rows columns"]
) -> Bool[Tensor, "B t h w"]:
    """Eq. 1: in slice t, a cell that started in state i is in state t + i, each state the last one rotated by one."""
    (t, h, w), (r, q) = grid, cell
    rows, columns, area = h // r, w // q, r * q
    table, extra = _cell_states(cell, int(mask.ratio * t * h * w), t * rows * columns)
    slices = torch.arange(t, device=starts.device)[None, :, None, None]
    steps = slices if mask.motion == "running" else torch.zeros_like(slices)
    state = (steps + starts[:, None]) % area
    extra = extra.view(1, t, rows, columns).expand(len(starts), -1, -1, -1)
    hidden = table.to(starts.device)[extra.to(starts.device), state]
    return hidden.unflatten(-1, (r, q)).permute(0, 1, 2, 4, 3, 5).reshape(len(starts), t, h, w)


def _cell_states(
    cell: tuple[int, int], hidden_total: int, num_cells: int
) -> tuple[Bool[Tensor, "2 area area"], Int[Tensor, " num_cells"]]:
    """Return the rotations of state A with the mean count of hidden tokens rounded down, and with one more.

    The second tensor says, for each cell of a clip, which of the two it has: 0 or 1, so that the total is exact.
    """
    few, area = hidden_total // num_cells, cell[0] * cell[1]
    edges = torch.arange(num_cells + 1) * hidden_total // num_cells
    table = torch.stack(
        [torch.stack([_state_a(cell, m).roll(i) for i in range(area)]) for m in (few, few + 1)]
    )
    return table, edges.diff() - few


def _state_a(cell: tuple[int, int], num_hidden: int) -> Bool[Tensor, " area"]:
    """State A, row by row: the first tokens of a 2 × 2 cell; in another, the rarer kind is spread.

    Packed, the mask of a large cell would be a block (section IV-B, "the spatial size of the running cell"). The
    released code spreads with a whole stride; where that leaves tokens over and it fails, ours are spread evenly.
    """
    area = cell[0] * cell[1]
    if cell == (2, 2):
        return torch.arange(area) < num_hidden
    rarer = max(min(num_hidden, area - num_hidden), 0)
    spread = torch.zeros(area, dtype=torch.bool)
    stride = -(-area // max(rarer, 1))
    whole = (rarer - 1) * stride < area
    spread[torch.arange(rarer) * stride if whole else torch.arange(rarer) * area // rarer] = True
    return spread if num_hidden == rarer else ~spread


def _random(
    mask: MaskConfig, grid: Grid, num_clips: int, generator: torch.Generator
) -> Bool[Tensor, "B t h w"]:
    t, h, w = grid
    if mask.motion == "running":
        noise = torch.rand(num_clips, h * w, generator=generator, device=generator.device)
        return _run_across(_smallest(noise, int(mask.ratio * h * w)).view(num_clips, h, w), t)
    noise = torch.rand(num_clips, t * h * w, generator=generator, device=generator.device)
    return _smallest(noise, mask.num_hidden(grid)).view(num_clips, t, h, w)


def _block(
    mask: MaskConfig, grid: Grid, num_clips: int, generator: torch.Generator
) -> Bool[Tensor, "B t h w"]:
    """A rectangle of random place and shape: the tokens nearest to its centre, by the larger of two scaled distances."""
    t, h, w = grid
    device = generator.device
    centre, shape = torch.rand(2, num_clips, 2, 1, generator=generator, device=device)
    stretch = torch.exp((2 * shape[:, 0] - 1) * torch.log(torch.tensor(3.0)) / 2)[..., None]
    dy = (torch.arange(h, device=device)[None] + 0.5 - centre[:, 0] * h).abs()[:, :, None] * stretch
    dx = (torch.arange(w, device=device)[None] + 0.5 - centre[:, 1] * w).abs()[:, None, :] / stretch
    block = _smallest(torch.maximum(dy, dx).flatten(1), int(mask.ratio * h * w)).view(
        num_clips, h, w
    )
    return (
        _run_across(block, t) if mask.motion == "running" else block[:, None].expand(-1, t, -1, -1)
    )


def _tube(
    mask: MaskConfig, grid: Grid, num_clips: int, generator: torch.Generator
) -> Bool[Tensor, "B t h w"]:
    t, h, w = grid
    noise = torch.rand(num_clips, h * w, generator=generator, device=generator.device)
    return _smallest(noise, int(mask.ratio * h * w)).view(num_clips, 1, h, w).expand(-1, t, -1, -1)


def _frame(
    mask: MaskConfig, grid: Grid, num_clips: int, generator: torch.Generator
) -> Bool[Tensor, "B t h w"]:
    t, h, w = grid
    noise = torch.rand(num_clips, t, generator=generator, device=generator.device)
    return _smallest(noise, round(mask.ratio * t))[:, :, None, None].expand(-1, -1, h, w)


def _smallest(values: Float[Tensor, "B n"], count: int) -> Bool[Tensor, "B n"]:
    """True at the ``count`` smallest values of each row, ties broken by place."""
    chosen = values.argsort(dim=1, stable=True)[:, :count]
    return torch.zeros_like(values, dtype=torch.bool).scatter_(1, chosen, True)


def _run_across(first: Bool[Tensor, "B h w"], t: int) -> Bool[Tensor, "B t h w"]:
    """Eq. 1 with s = one column to the right, round the edge."""
    return torch.stack([first.roll(step, dims=2) for step in range(t)], dim=1)


_STRATEGIES: dict[str, Callable[[MaskConfig, Grid, int, torch.Generator], Tensor]] = {
    "cell": _cell,
    "random": _random,
    "block": _block,
    "uniform": _uniform,
    "tube": _tube,
    "frame": _frame,
}
