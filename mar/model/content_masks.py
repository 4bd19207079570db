"""Masks that see the clip: its pixels decide which of its tokens are hidden.

A token has a score, and the tokens of the highest scores are visible (with ``mask.keep: least`` of
the lowest). Their number is that of the mask's ratio in every clip, so that shapes stay static, and
nothing here waits for an accelerator.

What chance decides is drawn before, without the pixels, and is called a clip's *order*: an integer
for each token. Its magnitude ranks the tokens at random, all differently, and decides between equal
scores: the patches of a background that does not move are all alike. Its sign is a mask that has
not seen the clip: negative where a token is visible. From that mask a running cell takes how many
of its tokens are visible.

The strategies:

- ``motion``: the change of a tubelet's pixels from the tubelet before it, at the same place;
- ``redundancy``: the distance of its patch embedding from that of the tubelet before it (EVEREST,
  Hwang et al., 2024: tokens at little distance are redundant);
- ``static``: tubelets that are like the one before them are hidden first, the others by chance
  (run-length tokenization, Choudhury et al., 2024); ``mask.lengths`` adds the length of a run to
  the position of its first token, as fixed sin-cos codes where that paper learns them;
- ``cell`` with ``mask.choice``: in each running cell as many tokens are visible as in the paper,
  but content decides which. Ours.

A clip's first slice has none before it. For ``motion`` and ``redundancy`` it is compared with the
second, and for ``static`` it is new.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mar import plugins
from mar.config.mask_settings import MaskConfig
from mar.errors import UserError

Embed = Callable[[Float[Tensor, "B N P"]], Float[Tensor, "B N D"]]
"""The encoder's patch embedding of tubelets with pixel values from 0 to 1."""


def drawn_order(
    hidden: Bool[Tensor, "B t h w"], generator: torch.Generator, is_shared: bool = False
) -> Int[Tensor, "B t h w"]:
    """Return an order for each clip, whose sign is the mask ``hidden``.

    With ``is_shared`` all clips have the same ranks.
    """
    num_clips = 1 if is_shared else len(hidden)
    noise = torch.rand(
        (num_clips, hidden.shape[1:].numel()), generator=generator, device=generator.device
    )
    rank = noise.argsort(dim=1).view(num_clips, *hidden.shape[1:])
    # -1 - rank and not -rank: 0 has no sign.
    return torch.where(hidden, rank, -1 - rank)


@torch.no_grad()
def hidden_by_content(
    mask: MaskConfig,
    order: Int[Tensor, "B t h w"],
    num_hidden: int,
    tubelets: Float[Tensor, "B N P"],
    embed: Embed,
) -> Bool[Tensor, "B t h w"]:
    """Return the masks of clips, on their device; each hides ``num_hidden`` tokens.

    Args:
        mask: Its strategy sees the clip.
        order: From :func:`drawn_order`, on the device of ``tubelets``.
        num_hidden: How many values of a clip's order are not negative.
        tubelets: Pixel values from 0 to 1.
        embed: Used by ``redundancy`` alone.

    Raises:
        UserError: a package's strategy returns something else than a score for each token.
    """
    score = _score(mask, tubelets.unflatten(1, order.shape[1:]), embed)
    if mask.keep == "least":
        score = -score
    rank = torch.where(order < 0, -1 - order, order)
    if mask.strategy == "cell":
        return _hidden_in_cells(mask, order, rank, score)
    num_visible = order[0].numel() - num_hidden
    position = _order_by_score(score.flatten(1), rank.flatten(1))
    return (position >= num_visible).view_as(order)


def _order_by_score(score: Float[Tensor, "*B n"], rank: Int[Tensor, "*B n"]) -> Int[Tensor, "*B n"]:
    """Return each token's position by score, the highest first; of equal scores by rank."""
    by_rank = rank.argsort(dim=-1)
    by_score = score.gather(-1, by_rank).argsort(dim=-1, descending=True, stable=True)
    # A permutation's argsort is its inverse: from the token of each position, the position of each
    # token.
    return by_rank.gather(-1, by_score).argsort(dim=-1)


def _hidden_in_cells(
    mask: MaskConfig,
    order: Int[Tensor, "B t h w"],
    rank: Int[Tensor, "B t h w"],
    score: Float[Tensor, "B t h w"],
) -> Bool[Tensor, "B t h w"]:
    """Return masks whose cells each show as many tokens as the mask of ``order`` does."""
    order, rank, score = (_in_cells(each, mask.cell) for each in (order, rank, score))
    num_visible = (order < 0).sum(dim=-1, keepdim=True)
    hidden = _order_by_score(score, rank) >= num_visible
    if mask.content < 1:
        # The ranks of the cells' first tokens order the cells at random.
        first = rank[..., 0].flatten(1)
        num_chosen = round(mask.content * first.shape[1])
        is_chosen = first.argsort(dim=1).argsort(dim=1) < num_chosen
        is_chosen = is_chosen.view(*order.shape[:-1], 1)
        # Not torch.where: onnxruntime has none for booleans.
        hidden = (is_chosen & hidden) | (~is_chosen & (order >= 0))
    rows, columns = mask.cell
    # B × t × cells down × cells across × tokens of a cell -> B × t × h × w
    return hidden.unflatten(-1, (rows, columns)).transpose(3, 4).flatten(4, 5).flatten(2, 3)


def _in_cells(values: Tensor, cell: tuple[int, int]) -> Tensor:
    """Return values of tokens by cells: B × t × cells down × cells across × tokens of a cell."""
    rows, columns = cell
    parts = values.unflatten(3, (-1, columns)).unflatten(2, (-1, rows))
    return parts.transpose(3, 4).flatten(-2)


def _score(
    mask: MaskConfig, tubelets: Float[Tensor, "B t h w P"], embed: Embed
) -> Float[Tensor, "B t h w"]:
    """Return the score of each token: the higher, the sooner it is visible."""
    kind = mask.choice if mask.strategy == "cell" else mask.strategy
    if kind == "motion":
        return _changes(tubelets)
    if kind == "redundancy":
        return _distances(tubelets, embed)
    if kind == "static":
        return _is_new(mask, tubelets).float()
    return _score_of_package(mask, tubelets)


def _is_new(mask: MaskConfig, tubelets: Float[Tensor, "B t h w P"]) -> Bool[Tensor, "B t h w"]:
    """Return which tokens are unlike those before them; in the first slice all are."""
    is_new = _changes(tubelets) >= mask.static_below
    return torch.cat([torch.ones_like(is_new[:, :1]), is_new[:, 1:]], dim=1)


@torch.no_grad()
def run_lengths(
    mask: MaskConfig, visible: Int[Tensor, "B K"], tubelets: Float[Tensor, "B t h w P"]
) -> Int[Tensor, "B K"]:
    """Return for each visible token how many hidden ones directly after it are like it."""
    shown = torch.zeros_like(tubelets[..., 0], dtype=torch.bool).flatten(1)
    shown = shown.scatter(1, visible, True).view(tubelets.shape[:-1])
    goes_on = ~shown & ~_is_new(mask, tubelets)
    # From the last slice to the first: the run of a token is one more than that of the next.
    after = torch.zeros_like(visible[:, :1]).expand(-1, shown[0, 0].numel())
    lengths: list[Tensor] = []
    for step in reversed(range(shown.shape[1])):
        lengths.append(after)
        after = torch.where(goes_on[:, step].flatten(1), after + 1, torch.zeros_like(after))
    return torch.stack(lengths[::-1], dim=1).flatten(1).gather(1, visible)


def _changes(tubelets: Float[Tensor, "B t h w P"]) -> Float[Tensor, "B t h w"]:
    """Return the mean absolute difference of a tubelet's pixels from those one slice before."""
    return _after_first((tubelets[:, 1:] - tubelets[:, :-1]).abs().mean(dim=-1), tubelets)


def _distances(tubelets: Float[Tensor, "B t h w P"], embed: Embed) -> Float[Tensor, "B t h w"]:
    """Return the distance of a tubelet's embedding from that one slice before."""
    embedded = embed(tubelets.flatten(1, 3)).float().unflatten(1, tubelets.shape[1:4])
    return _after_first((embedded[:, 1:] - embedded[:, :-1]).norm(dim=-1), tubelets)


def _after_first(
    later: Float[Tensor, "B u h w"], tubelets: Float[Tensor, "B t h w P"]
) -> Float[Tensor, "B t h w"]:
    """Return values of all slices from those of the second on: the first has the second's."""
    # A clip of one slice has no change.
    if tubelets.shape[1] == 1:
        return torch.zeros_like(tubelets[..., 0])
    return torch.cat([later[:, :1], later], dim=1)


def _score_of_package(
    mask: MaskConfig, tubelets: Float[Tensor, "B t h w P"]
) -> Float[Tensor, "B t h w"]:
    added: plugins.MaskStrategy = plugins.load(plugins.MASKS, mask.strategy)
    options = plugins.options(plugins.MASKS, mask.strategy, mask.options)
    assert added.score is not None
    with plugins.package_errors(plugins.MASKS, mask.strategy):
        score: Tensor = added.score(options, tubelets)
    if score.shape != tubelets.shape[:-1] or not score.is_floating_point():
        raise UserError(
            f"mask.strategy {mask.strategy}, of the package "
            f"{plugins.origin(plugins.MASKS, mask.strategy)}: expected a score for each token, "
            f"{' × '.join(map(str, tubelets.shape[:-1]))}"
        )
    return score
