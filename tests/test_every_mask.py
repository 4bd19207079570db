"""What every mask strategy promises: a new one is tested as soon as the settings name it."""

import itertools
from collections.abc import Callable
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mar.config.mask_settings import MASK_STRATEGIES, MaskConfig
from mar.config.overrides import build, merge
from mar.config.schema import TrainingConfig
from mar.model.content_masks import hidden_by_content
from mar.model.flops import cost
from mar.model.mar import MAR, num_hidden_of
from mar.model.masking import DrawnMask, evaluation_mask, training_mask
from orchestration.studies.identity import identity

NAMES = MASK_STRATEGIES
MOTIONS = get_args(MaskConfig.model_fields["motion"].annotation)


def is_allowed(strategy: str, motion: str) -> bool:
    """Whether the settings have this pair: a tube, for one, cannot run."""
    try:
        MaskConfig.model_validate({"strategy": strategy, "motion": motion})
    except ValueError:
        return False
    return True


EVERY = [pair for pair in itertools.product(NAMES, MOTIONS) if is_allowed(*pair)]
every_mask = pytest.mark.parametrize(("strategy", "motion"), EVERY)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def seen(mask: MaskConfig, drawn: DrawnMask, seed: int = 0) -> Tensor:
    """Return masks; those that see the clip see clips of noise."""
    if drawn.dtype == torch.bool:
        return drawn
    tubelets = torch.rand(len(drawn), drawn[0].numel(), 6, generator=generator(seed + 1000))
    return hidden_by_content(mask, drawn, num_hidden_of(drawn), tubelets, lambda values: values)


def test_every_strategy_has_a_motion() -> None:
    assert {strategy for strategy, _ in EVERY} == set(NAMES)


@every_mask
@given(
    ratio=st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.6, 0.75, 0.9]),
    grid=st.tuples(
        st.sampled_from([2, 4, 8]), st.sampled_from([4, 8, 14]), st.sampled_from([4, 8, 14])
    ),
    spatial=st.sampled_from(["repeated", "random"]),
    temporal=st.sampled_from(["shuffled", "fixed"]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=25, deadline=None)
def test_every_clip_has_the_stated_number_of_hidden_tokens(
    strategy: str,
    motion: str,
    ratio: float,
    grid: tuple[int, int, int],
    spatial: str,
    temporal: str,
    seed: int,
) -> None:
    mask = MaskConfig.model_validate(
        {
            "strategy": strategy,
            "motion": motion,
            "ratio": ratio,
            "spatial": spatial,
            "temporal": temporal,
        }
    )
    drawn = seen(mask, training_mask(mask, grid, 5, generator(seed)), seed)
    assert drawn.shape == (5, *grid)
    assert drawn.dtype == torch.bool
    assert drawn.flatten(1).sum(dim=1).tolist() == [mask.num_hidden(grid)] * 5
    assert abs(mask.num_hidden(grid) / drawn[0].numel() - ratio) <= 1 / min(
        grid[0], grid[1] * grid[2]
    )
    assert torch.equal(drawn, seen(mask, training_mask(mask, grid, 5, generator(seed)), seed))


@every_mask
def test_it_draws_from_its_generator_alone(strategy: str, motion: str) -> None:
    mask = MaskConfig.model_validate({"strategy": strategy, "motion": motion, "ratio": 0.5})
    before = torch.get_rng_state()
    first = training_mask(mask, (4, 8, 8), 3, generator())
    assert torch.equal(torch.get_rng_state(), before), "PyTorch's own generator has not moved"
    torch.rand(7)
    assert torch.equal(first, training_mask(mask, (4, 8, 8), 3, generator()))


@every_mask
def test_clips_and_seeds_get_masks_of_their_own(strategy: str, motion: str) -> None:
    mask = MaskConfig.model_validate({"strategy": strategy, "motion": motion, "ratio": 0.5})
    drawn = seen(mask, training_mask(mask, (8, 8, 8), 64, generator()))
    assert len({clip.numpy().tobytes() for clip in drawn}) > 1
    assert not torch.equal(drawn, seen(mask, training_mask(mask, (8, 8, 8), 64, generator(1)), 1))


@every_mask
def test_each_place_is_hidden_in_its_share_of_the_clips(strategy: str, motion: str) -> None:
    mask = MaskConfig.model_validate({"strategy": strategy, "motion": motion, "ratio": 0.5})
    share = seen(mask, training_mask(mask, (4, 4, 4), 4000, generator())).float().mean(dim=0)
    if strategy == "block":
        # A rectangle that lies in the grid covers the middle more often than the corners.
        assert share.mean().item() == pytest.approx(0.5)
        return
    assert (share - 0.5).abs().max() < 0.05, "four standard deviations are 0.03"


@every_mask
def test_the_mask_of_testing_is_one_and_never_changes(strategy: str, motion: str) -> None:
    tree = {"mask": {"strategy": strategy, "motion": motion, "ratio": 0.5}}
    one = build(merge(tree, {"seed": 1}))
    other = build(merge(tree, {"seed": 2}))
    assert evaluation_mask(one).shape == (1, *one.grid)
    assert torch.equal(evaluation_mask(one), evaluation_mask(other))
    assert num_hidden_of(evaluation_mask(one)) == one.test_mask.num_hidden(one.grid)


@every_mask
def test_a_model_learns_under_it_and_its_cost_is_that_of_its_tokens(
    tiny: Callable[..., TrainingConfig], strategy: str, motion: str
) -> None:
    trial = tiny({"mask": {"strategy": strategy, "motion": motion, "ratio": 0.5}})
    model = MAR(trial)
    clips = torch.rand(2, 3, trial.clip.frames, trial.clip.size, trial.clip.size)
    hidden = training_mask(trial.mask, trial.grid, 2, generator())
    losses = model(clips, hidden, torch.full((2, 2), 0.5))
    losses.total.sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all(gradient is not None for gradient in gradients.values()), "every part has learnt"
    assert all(bool(gradient.isfinite().all()) for gradient in gradients.values())
    assert cost(trial).visible_tokens == hidden[0].numel() - num_hidden_of(hidden)


@every_mask
@pytest.mark.parametrize(
    "change",
    [
        {"mask.cell": [4, 4]},
        {"mask.spatial": "random"},
        {"mask.temporal": "fixed"},
        {"evaluation.mask.start": 1},
    ],
)
def test_settings_that_change_no_mask_make_no_second_training(
    strategy: str, motion: str, change: dict[str, object]
) -> None:
    """Equal identities only for equal masks; where a mask has no cells, always."""
    base = {"mask.strategy": strategy, "mask.motion": motion, "clip.size": 64}
    one = build(merge({}, base))
    other = build(merge({}, {**base, **change}))
    masks = [
        [
            training_mask(each.mask, each.grid, 4, generator()),
            evaluation_mask(each, torch.device("cpu")),
        ]
        for each in (one, other)
    ]
    is_equal = all(torch.equal(*pair) for pair in zip(*masks, strict=True))
    is_one_training = identity(one, "data") == identity(other, "data")
    assert is_equal or not is_one_training
    if strategy not in ("cell", "uniform"):
        assert is_one_training


def test_the_start_state_of_a_test_that_hides_nothing_makes_no_second_training() -> None:
    shown = {"evaluation.mask.ratio": 0.0}
    one, other = (build(merge({}, {**shown, "evaluation.mask.start": start})) for start in (0, 1))
    assert identity(one, "data") == identity(other, "data")
