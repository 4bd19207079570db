"""Which tokens are hidden: cell running masking (section III-B) and the masks it is compared with.

A mask is True where a token is **hidden**. Every clip of a batch has the same number of hidden
tokens (``MaskConfig.num_hidden``), so that the visible ones form a dense tensor.

Departures from the released code, and choices where the paper is silent:

- A cell whose share of hidden tokens is not whole (7 × 7 at 50 %, 7 × 2 at 25 %) alternates between
  the two neighbouring counts, so that the clip's total is kept; the released code rounds each
  cell's share up, or crashes.
- Random and block running masks move by one column a slice; the paper does not say how far.
- A standard block mask is one rectangle, the same in every slice.
- A uniform mask is a running cell as large as the token grid (section III-B).

The strategies are those of Fig. 3 and Table II. All but ``frame`` and ``tube`` can run, by Eq. 1:
M_t = s(M_{t-1} | M_{t-2}, ..., M_1), where s rotates the mask from one slice to the next.

Of a strategy that sees the clip, what is drawn here is an order of its tokens, from which the model
makes the mask (:mod:`mar.model.content_masks`).

A new strategy is a function like those below, an entry in ``_STRATEGIES``, and a name in
``MASK_STRATEGIES``; or it is in a package of its own (``mar.plugins``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mar import plugins
from mar.config.mask_settings import MASKS_WITH_CELLS, MaskConfig
from mar.config.schema import TrainingConfig
from mar.config.types import Grid
from mar.errors import UserError
from mar.model.content_masks import drawn_order

_WIDEST_BLOCK = 3.0
"""Largest ratio of a block's height to its width, or of its width to its height."""

DrawnMask = Bool[Tensor, "B t h w"] | Int[Tensor, "B t h w"]
"""A mask; or the order from which a mask that sees the clip is made."""
Strategy = Callable[[MaskConfig, Grid, int, int, torch.Generator], Tensor]
"""(settings, token grid, hidden tokens of a clip, clips, generator) -> mask, B × t × h × w."""


def training_mask(
    mask: MaskConfig, grid: Grid, num_clips: int, generator: torch.Generator
) -> DrawnMask:
    """Draw an independent mask for each clip, on the generator's device."""
    # At ratio 0 every strategy gives the same mask, and a grid that the cell does not divide is
    # allowed (TrainingConfig checks the cell only where a ratio is above 0).
    if mask.first_ratio == 0:
        return torch.zeros(num_clips, *grid, dtype=torch.bool, device=generator.device)
    strategy = _STRATEGIES.get(mask.strategy, _of_package)
    if mask.sees_clip and mask.strategy != "cell":
        # Only the number of its hidden tokens matters.
        strategy = _random
    hidden = strategy(mask, grid, mask.num_hidden(grid), num_clips, generator)
    if mask.sees_clip:
        return drawn_order(hidden, generator)
    return hidden


def evaluation_mask(
    settings: TrainingConfig, device: torch.device | None = None, views: int = 1
) -> DrawnMask:
    """Return the mask of an evaluation: one that all clips share (section III-B), or one a view.

    Of a mask that sees the clip it is the order that they share. Cells run in order from
    ``evaluation.mask.start``. The other strategies are random in testing too: their mask is drawn
    once, from a fixed seed. With ``evaluation.mask.views: complementary`` there is a mask for each
    of a video's ``views``, else the one is repeated.
    """
    mask = settings.test_mask
    grid = settings.grid
    # "In inference, we simply use the spatially repeated running masking": all cells start in the
    # same state, and the slices are not shuffled.
    if mask.strategy in ("cell", "uniform") and mask.first_ratio > 0:
        _, h, w = grid
        cell = mask.cell
        if mask.strategy == "uniform":
            cell = (h, w)
        start = settings.evaluation.mask.start
        starts = torch.full((views,), start)
        if settings.evaluation.mask.views == "complementary":
            num_hidden = int(mask.first_ratio * cell[0] * cell[1])
            starts = _complementary_starts(cell, num_hidden, start, views)
        starts = starts[:, None, None].expand(-1, h // cell[0], w // cell[1])
        hidden = _run_cells(mask, grid, cell, mask.num_hidden(grid), starts)
        if mask.sees_clip:
            hidden = drawn_order(hidden, torch.Generator().manual_seed(0), is_shared=True)
        return hidden.to(device)
    # The seed is a constant and not settings.seed: trials that differ only in their seed are tested
    # under the same mask.
    generator = torch.Generator().manual_seed(0)
    return training_mask(mask, grid, 1, generator).expand(views, -1, -1, -1).to(device)


def evaluation_masks(settings: TrainingConfig, views: int, videos: Sequence[int]) -> DrawnMask:
    """Return the masks of the test views of some videos, one video after another.

    ``videos`` are their numbers in the split, on which a mask depends that is drawn for each video
    (``evaluation.mask.per_video``).
    """
    is_drawn = settings.mask.strategy not in MASKS_WITH_CELLS and settings.test_ratio > 0
    if not (settings.evaluation.mask.per_video and is_drawn):
        return evaluation_mask(settings, views=views).repeat(len(videos), 1, 1, 1)
    drawn: list[Tensor] = []
    for video in videos:
        # 0 is the seed of the one mask for all.
        generator = torch.Generator().manual_seed(1 + video)
        mask = training_mask(settings.test_mask, settings.grid, 1, generator)
        drawn.append(mask.expand(views, -1, -1, -1))
    return torch.cat(drawn)


def _complementary_starts(
    cell: tuple[int, int], num_hidden: int, start: int, views: int
) -> Int[Tensor, " V"]:
    """Return start states of a cell, such that the views together see as much as they can.

    Each view has the state whose visible tokens the views before it saw least often; of several
    the next one after ``start``. In a 2 × 2 cell these are states A and C at ρ = 50 %, which are
    disjoint, and all four at 75 %.
    """
    area = cell[0] * cell[1]
    state_a = _state_a(cell, num_hidden)
    # In the order from ``start`` on, so that the first of equal ones is the next after it.
    states = torch.stack([state_a.roll(start + step) for step in range(area)])
    times_seen = torch.zeros(area)
    steps: list[int] = []
    for _ in range(views):
        overlap = (~states).float() @ times_seen
        steps.append(int(overlap.argmin()))
        times_seen += ~states[steps[-1]]
    return (start + torch.tensor(steps)) % area


def _cell(
    mask: MaskConfig, grid: Grid, num_hidden: int, num_clips: int, generator: torch.Generator
) -> Bool[Tensor, "B t h w"]:
    """Draw cell running masks with cells of ``mask.cell`` tokens (Fig. 3 d, e)."""
    return _cells(mask, grid, mask.cell, num_hidden, num_clips, generator)


def _uniform(
    mask: MaskConfig, grid: Grid, num_hidden: int, num_clips: int, generator: torch.Generator
) -> Bool[Tensor, "B t h w"]:
    """Draw uniform running masks: one cell as large as the token grid (Fig. 3 c)."""
    return _cells(mask, grid, (grid[1], grid[2]), num_hidden, num_clips, generator)


def _cells(
    mask: MaskConfig,
    grid: Grid,
    cell: tuple[int, int],
    num_hidden: int,
    num_clips: int,
    generator: torch.Generator,
) -> Bool[Tensor, "B t h w"]:
    """Draw cell running masks with their augmentations: random starts (Fig. 4), shuffled slices."""
    t, h, w = grid
    r, q = cell
    device = generator.device
    rows = h // r
    columns = w // q
    # "Repeated" (Fig. 4 b): all cells of a clip start in the same state. "Random" (Fig. 4 a): each
    # cell starts in a state of its own.
    shape = (num_clips, rows, columns)
    if mask.spatial == "repeated":
        shape = (num_clips, 1, 1)
    starts = torch.randint(r * q, shape, generator=generator, device=device)
    starts = starts.expand(-1, rows, columns)
    hidden = _run_cells(mask, grid, cell, num_hidden, starts)
    if mask.temporal == "fixed":
        return hidden
    # "Shuffled": whole slices of each clip are permuted, all cells together, as in the release.
    # A permutation keeps the number of hidden tokens, which is the same for every clip.
    order = torch.rand(num_clips, t, generator=generator, device=device).argsort(dim=1)
    return torch.take_along_dim(hidden, order[:, :, None, None], dim=1)


def _run_cells(
    mask: MaskConfig,
    grid: Grid,
    cell: tuple[int, int],
    num_hidden: int,
    starts: Int[Tensor, "B rows columns"],
) -> Bool[Tensor, "B t h w"]:
    """Return the masks of cells that run from given start states (Eq. 1).

    In slice t, a cell that started in state i is in state t + i (modulo the cell's area). Each
    state is the one before it, rotated by one token: this is the function s of Eq. 1.
    """
    t, h, w = grid
    r, q = cell
    rows = h // r
    columns = w // q
    states, has_one_more = _cell_states(cell, num_hidden, t * rows * columns)
    slices = torch.arange(t, device=starts.device)[None, :, None, None]
    # A standard mask stays in its start state: as if every slice were the first.
    if mask.motion == "standard":
        slices = torch.zeros_like(slices)
    state = (slices + starts[:, None]) % (r * q)
    has_one_more = has_one_more.view(1, t, rows, columns).expand(len(starts), -1, -1, -1)
    hidden = states.to(starts.device)[has_one_more.to(starts.device), state]
    # B × t × rows × columns × area -> B × t × (rows r) × (columns q)
    hidden = hidden.unflatten(-1, (r, q)).permute(0, 1, 2, 4, 3, 5)
    return hidden.reshape(len(starts), t, h, w)


def _cell_states(
    cell: tuple[int, int], num_hidden: int, num_cells: int
) -> tuple[Bool[Tensor, "2 area area"], Int[Tensor, " num_cells"]]:
    """Return the states of a cell, and which count of hidden tokens each cell of a clip has.

    The first tensor has all rotations of state A: at index 0 with the mean count of hidden tokens
    rounded down, at index 1 with one more. The second tensor chooses 0 or 1 for each cell. The ones
    are spread evenly over the clip, and its total is ``num_hidden``.
    """
    area = cell[0] * cell[1]
    few = num_hidden // num_cells
    # Hidden tokens before each cell, if they are spread evenly over the cells. The differences are
    # the cells' counts, few or few + 1, and add up to num_hidden.
    before = torch.arange(num_cells + 1) * num_hidden // num_cells
    rotations: list[Tensor] = []
    for count in (few, few + 1):
        state_a = _state_a(cell, count)
        rotations.append(torch.stack([state_a.roll(step) for step in range(area)]))
    return torch.stack(rotations), before.diff() - few


def _state_a(cell: tuple[int, int], num_hidden: int) -> Bool[Tensor, " area"]:
    """Return state A of a cell, row by row (section III-B, "Running cell").

    In a 2 × 2 cell the first tokens are hidden. In a larger cell the tokens of the rarer kind,
    hidden or visible, are spread over it: side by side, the hidden tokens of a large cell would
    form a block (section IV-B, "the spatial size of the running cell"). The released code spreads
    with a whole stride. Where that stride would leave the cell, and the released code fails, the
    tokens are spread evenly here.
    """
    area = cell[0] * cell[1]
    # The paper puts "the masks in the first patches" of a 2 × 2 cell and calls this state A.
    if cell == (2, 2):
        return torch.arange(area) < num_hidden
    rarer = max(min(num_hidden, area - num_hidden), 0)
    stride = math.ceil(area / max(rarer, 1))
    # The whole stride of the release gives its stripes and checkerboards (7 × 2, 2 × 7, 14 × 14).
    positions = torch.arange(rarer) * stride
    if (rarer - 1) * stride >= area:
        positions = torch.arange(rarer) * area // rarer
    spread = torch.zeros(area, dtype=torch.bool)
    spread[positions] = True
    # The spread tokens are the hidden ones if the hidden ones are rarer, else the visible ones.
    if num_hidden == rarer:
        return spread
    return ~spread


def _random(
    mask: MaskConfig, grid: Grid, num_hidden: int, num_clips: int, generator: torch.Generator
) -> Bool[Tensor, "B t h w"]:
    """Draw tokens at random from the whole clip; running: from the first slice, and move them."""
    t, h, w = grid
    device = generator.device
    # Fig. 3 a: the random mask of the first slice moves on, so every slice hides the same number.
    if mask.motion == "running" and not mask.sees_clip:
        noise = torch.rand(num_clips, h * w, generator=generator, device=device)
        first = _smallest(noise, num_hidden // t).view(num_clips, h, w)
        return _run_across(first, t)
    noise = torch.rand(num_clips, t * h * w, generator=generator, device=device)
    return _smallest(noise, num_hidden).view(num_clips, t, h, w)


def _block(
    mask: MaskConfig, grid: Grid, num_hidden: int, num_clips: int, generator: torch.Generator
) -> Bool[Tensor, "B t h w"]:
    """Draw a rectangle of random position and shape, the same in every slice, or running.

    Its tokens are those nearest to its centre, by the larger of two scaled distances. So their
    number is exact, which a rectangle with whole sides could not be.
    """
    t, h, w = grid
    device = generator.device
    # Both from one call: centre has a row and a column, shape uses the first of its two numbers.
    centre, shape = torch.rand(2, num_clips, 2, 1, generator=generator, device=device)
    # The ratio of height to width is 1 / stretch², and uniform in its logarithm: a high block is
    # as likely as a wide one.
    longest = torch.log(torch.tensor(_WIDEST_BLOCK)) / 2
    stretch = torch.exp((2 * shape[:, 0] - 1) * longest)[..., None]
    # Distances are measured between centres of tokens, which lie at half numbers.
    rows = torch.arange(h, device=device)[None] + 0.5
    columns = torch.arange(w, device=device)[None] + 0.5
    dy = (rows - centre[:, 0] * h).abs()[:, :, None] * stretch
    dx = (columns - centre[:, 1] * w).abs()[:, None, :] / stretch
    distance = torch.maximum(dy, dx).flatten(1)
    block = _smallest(distance, num_hidden // t).view(num_clips, h, w)
    # Fig. 3 b: the block of the first slice moves on.
    if mask.motion == "running":
        return _run_across(block, t)
    return block[:, None].expand(-1, t, -1, -1)


def _tube(
    mask: MaskConfig, grid: Grid, num_hidden: int, num_clips: int, generator: torch.Generator
) -> Bool[Tensor, "B t h w"]:
    """Draw tokens at random, the same ones in every slice (VideoMAE's tube masking)."""
    t, h, w = grid
    noise = torch.rand(num_clips, h * w, generator=generator, device=generator.device)
    tube = _smallest(noise, num_hidden // t).view(num_clips, 1, h, w)
    return tube.expand(-1, t, -1, -1)


def _frame(
    mask: MaskConfig, grid: Grid, num_hidden: int, num_clips: int, generator: torch.Generator
) -> Bool[Tensor, "B t h w"]:
    """Draw whole slices at random."""
    t, h, w = grid
    noise = torch.rand(num_clips, t, generator=generator, device=generator.device)
    slices = _smallest(noise, num_hidden // (h * w))
    return slices[:, :, None, None].expand(-1, -1, h, w)


def _of_package(
    mask: MaskConfig, grid: Grid, num_hidden: int, num_clips: int, generator: torch.Generator
) -> Bool[Tensor, "B t h w"]:
    """Draw masks by a strategy that an installed package adds.

    Raises:
        UserError: it returns something else than masks that each hide ``num_hidden`` tokens.
    """
    strategy: plugins.MaskStrategy = plugins.load(plugins.MASKS, mask.strategy)
    options = plugins.options(plugins.MASKS, mask.strategy, mask.options)
    if strategy.draw is None:
        raise UserError(
            f"mask.strategy {mask.strategy}, of the package "
            f"{plugins.origin(plugins.MASKS, mask.strategy)}, has neither draw nor score"
        )
    drawn: Tensor = strategy.draw(options, grid, num_hidden, num_clips, generator)
    is_mask = drawn.dtype == torch.bool and drawn.shape == (num_clips, *grid)
    # A wrong count would only show in the model, as tokens of other clips.
    if not is_mask or not (drawn.flatten(1).sum(dim=1) == num_hidden).all():
        raise UserError(
            f"mask.strategy {mask.strategy}, of the package "
            f"{plugins.origin(plugins.MASKS, mask.strategy)}: expected {num_clips} boolean masks "
            f"of {' × '.join(map(str, grid))} tokens that each hide {num_hidden}"
        )
    return drawn


def decoder_order(grid: Grid) -> Int[Tensor, " N"]:
    """Return the order in which hidden tokens are chosen to be reconstructed, the lowest first.

    A running cell, as VideoMAE V2's decoder mask is: of four squares side by side each comes at
    another turn, and from slice to slice they change turns. A square has 2 × 2 tokens, and not one:
    a cell of the running mask, whose period is the same, would otherwise have all or none of its
    hidden tokens chosen. Tokens of one turn are in an order of chance that is always the same.
    """
    t, h, w = grid
    # On the CPU also where the model is built without memory, on the meta device.
    cpu = torch.device("cpu")
    slices = torch.arange(t, device=cpu)[:, None, None]
    rows = torch.arange(h, device=cpu)[None, :, None] // 2 % 2
    columns = torch.arange(w, device=cpu)[None, None, :] // 2 % 2
    turn = ((2 * rows + columns + slices) % 4).flatten()
    chance = torch.rand(t * h * w, generator=torch.Generator().manual_seed(0), device=cpu)
    return (turn + chance).argsort().argsort()


def _smallest(values: Float[Tensor, "B n"], count: int) -> Bool[Tensor, "B n"]:
    """Return a mask that is True at the ``count`` smallest values of each row.

    Of equal values the earlier one counts as smaller.
    """
    # Distances in a block are often equal. An unstable sort would order them differently on other
    # devices and versions of PyTorch.
    chosen = values.argsort(dim=1, stable=True)[:, :count]
    return torch.zeros_like(values, dtype=torch.bool).scatter_(1, chosen, True)


def _run_across(first: Bool[Tensor, "B h w"], t: int) -> Bool[Tensor, "B t h w"]:
    """Apply Eq. 1, where s moves the mask by one column to the right, round the edge."""
    return torch.stack([first.roll(step, dims=2) for step in range(t)], dim=1)


_STRATEGIES: dict[str, Strategy] = {
    "cell": _cell,
    "random": _random,
    "block": _block,
    "uniform": _uniform,
    "tube": _tube,
    "frame": _frame,
}
