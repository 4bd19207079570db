"""Masks that see the clip: what they show, and that they leave all else as it was."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from test_export import SMALL, weights_of
from torch import Tensor

from mar.config.mask_settings import MaskConfig
from mar.config.overrides import SettingError, build, merge
from mar.config.schema import TrainingConfig
from mar.data.annotations import read_split
from mar.data.dataset import evaluation_views
from mar.data.frame_cache import open_video
from mar.evaluation.evaluator import Evaluator, class_probabilities
from mar.inference import Model
from mar.model.content_masks import hidden_by_content, run_lengths
from mar.model.encoder import patchify
from mar.model.flops import cost
from mar.model.mar import MAR, num_hidden_of
from mar.model.masking import evaluation_mask, evaluation_masks, training_mask
from mar.model.pixels import to_pixels
from mar.weights.onnx_export import write_onnx
from mar.weights.pretrained import load
from orchestration.studies.identity import identity

GRID = (4, 4, 4)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def config(**settings: object) -> MaskConfig:
    return MaskConfig.model_validate({"ratio": 0.5, **settings})


def made(mask: MaskConfig, tubelets: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return the drawn order and the mask of clips on ``GRID``."""
    order = training_mask(mask, GRID, len(tubelets), generator(seed))
    number = num_hidden_of(order)
    return order, hidden_by_content(mask, order, number, tubelets, lambda values: values)


@pytest.fixture
def clips(tiny: Callable[..., TrainingConfig]) -> Tensor:
    """Two real test clips, as tubelets on a grid of 4 × 4 × 4."""
    settings = tiny()
    assert settings.grid == GRID
    return patchify(torch.cat(_clips(settings)[:2]), settings.encoder.tubelet)


@pytest.mark.parametrize("keep", ["most", "least"])
@pytest.mark.parametrize("strategy", ["motion", "redundancy"])
def test_the_tokens_that_change_most_are_visible_or_least(
    clips: Tensor, strategy: str, keep: str
) -> None:
    order, hidden = made(config(strategy=strategy, keep=keep), clips)
    for clip, ranks, mask in zip(clips.numpy(), order.flatten(1).numpy(), hidden, strict=True):
        tokens = clip.reshape(4, 16, -1).astype(np.float64)
        difference = np.diff(tokens, axis=0)
        if strategy == "motion":
            change = np.abs(difference).mean(axis=-1)
        else:
            change = np.sqrt((difference**2).sum(axis=-1))
        # The first slice has none before it: it is compared with the second.
        change = np.concatenate([change[:1], change]).round(6).flatten()
        sign = 1 if keep == "most" else -1
        rank = np.where(ranks < 0, -1 - ranks, ranks)
        best = sorted(range(64), key=lambda token: (-sign * change[token], rank[token]))
        assert set(np.flatnonzero(~mask.flatten().numpy())) == set(best[:32])


def test_tokens_like_those_before_them_are_hidden_first_and_the_others_by_chance() -> None:
    tubelets = torch.zeros(1, 64, 6)
    moving = [20, 25, 40, 41, 63]
    for number, token in enumerate(moving):
        tubelets[0, token] = 0.5 + 0.05 * number
    # Every token that moves in one slice is new there, and again where it stops: 16 + 5 + 4.
    new = {*range(16), *moving, *(token + 16 for token in moving if token < 48)}
    masks = [made(config(strategy="static", ratio=0.5), tubelets, seed)[1] for seed in range(20)]
    for mask in masks:
        visible = set(torch.nonzero(~mask.flatten())[:, 0].tolist())
        assert new <= visible and len(visible) == 32
    assert len({mask.numpy().tobytes() for mask in masks}) > 1, "the rest is drawn"
    few = made(config(strategy="static", ratio=0.9), tubelets)[1]
    assert set(torch.nonzero(~few.flatten())[:, 0].tolist()) < new


def test_a_token_knows_how_many_hidden_ones_after_it_are_like_it() -> None:
    mask = config(strategy="static", lengths=True)
    tubelets = torch.zeros(1, 4, 1, 3, 2)
    # Place 0 rests; place 1 changes in slice 2; place 2 in every slice.
    tubelets[0, 2:, 0, 1] = 1.0
    tubelets[0, :, 0, 2] = torch.arange(4.0)[:, None]
    visible = torch.tensor([[0, 1, 2, 5, 7, 8]])
    # 0: slices 1 to 3 follow. 1: slice 1. 2, 5, 8: the next is new. 7 (slice 2): slice 3.
    assert run_lengths(mask, visible, tubelets).tolist() == [[3, 1, 0, 0, 1, 0]]
    # A token that is seen ends the run before it.
    assert run_lengths(mask, torch.tensor([[0, 6]]), tubelets).tolist() == [[1, 1]]


def test_lengths_are_part_of_the_position(tiny: Callable[..., TrainingConfig]) -> None:
    plain = tiny({"mask": {"strategy": "static"}})
    lasting = tiny({"mask": {"strategy": "static", "lengths": True}})
    assert identity(plain, "data") != identity(lasting, "data")
    torch.manual_seed(0)
    one, other = MAR(plain).eval(), MAR(lasting).eval()
    other.load_state_dict(one.state_dict())
    still = torch.rand(1, 3, 1, 16, 16).expand(-1, -1, 8, -1, -1)
    moving = torch.rand(1, 3, 8, 16, 16)
    drawn = evaluation_mask(plain)
    with torch.no_grad():
        assert torch.equal(one.classify(moving, drawn), other.classify(moving, drawn))
        assert not torch.equal(one.classify(still, drawn), other.classify(still, drawn))
    with pytest.raises(SettingError, match=r"mask\.lengths"):
        tiny({"mask": {"strategy": "motion", "lengths": True}})


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75, 0.6])
def test_a_cell_shows_as_many_tokens_as_in_the_paper_and_content_says_which(
    clips: Tensor, ratio: float
) -> None:
    mask = config(strategy="cell", choice="motion", ratio=ratio)
    order, hidden = made(mask, clips)

    def in_cells(values: Tensor) -> Tensor:
        return values.reshape(2, 4, 2, 2, 2, 2).permute(0, 1, 2, 4, 3, 5).flatten(-2)

    counts = in_cells(hidden).sum(dim=-1)
    assert torch.equal(counts, in_cells(order >= 0).sum(dim=-1))
    tokens = clips.unflatten(1, GRID)
    change = (tokens[:, 1:] - tokens[:, :-1]).abs().mean(dim=-1)
    change = in_cells(torch.cat([change[:, :1], change], dim=1))
    shown, unseen = ~in_cells(hidden), in_cells(hidden)
    least_shown = change.masked_fill(~shown, torch.inf).amin(dim=-1)
    most_hidden = change.masked_fill(~unseen, -torch.inf).amax(dim=-1)
    assert (least_shown >= most_hidden - 1e-7).all()


def test_content_decides_in_its_share_of_the_cells(clips: Tensor) -> None:
    order, half = made(config(strategy="cell", choice="motion", content=0.5), clips)
    _, whole = made(config(strategy="cell", choice="motion"), clips)

    def by_cell(values: Tensor) -> Tensor:
        return values.reshape(2, 4, 2, 2, 2, 2).permute(0, 1, 2, 4, 3, 5).reshape(2, 16, 4)

    as_state = (by_cell(half) == by_cell(order >= 0)).all(dim=-1)
    as_content = (by_cell(half) == by_cell(whole)).all(dim=-1)
    assert (as_state | as_content).all()
    assert ((~as_content).sum(dim=1) <= 8).all() and ((~as_state).sum(dim=1) <= 8).all()
    assert (~as_content).any() and (~as_state).any()


def test_a_cell_without_a_choice_is_the_papers_bit_for_bit_and_the_same_training() -> None:
    plain = build({})
    same = build({"mask": {"choice": "motion", "content": 0.0, "keep": "least"}})
    assert identity(plain, "data") == identity(same, "data")
    drawn = training_mask(same.mask, same.grid, 3, generator())
    assert torch.equal(drawn, training_mask(plain.mask, plain.grid, 3, generator()))
    assert torch.equal(evaluation_mask(same), evaluation_mask(plain))


def test_the_views_of_a_test_see_the_same_where_they_are_to(
    tiny: Callable[..., TrainingConfig],
) -> None:
    settings = tiny({"mask": {"choice": "motion", "content": 0.5}})
    first, second = evaluation_mask(settings, views=2)
    assert torch.equal(first, second)
    with pytest.raises(SettingError, match="no state decides"):
        tiny({"mask": {"choice": "motion"}, "evaluation.mask.views": "complementary"})
    start = {"mask": {"choice": "motion"}, "evaluation.mask.start": 1}
    assert identity(tiny(start), "data") == identity(tiny({"mask": {"choice": "motion"}}), "data")


@pytest.mark.parametrize(
    "mask",
    [
        {"mask": {"choice": "motion", "content": 0.5}},
        {"mask": {"strategy": "random"}, "evaluation.mask.per_video": True},
        {"evaluation.mask.views": "complementary"},
    ],
)
def test_features_are_of_the_tokens_that_a_prediction_sees(
    tiny: Callable[..., TrainingConfig], mask: dict[str, object]
) -> None:
    settings = tiny({**mask, "evaluation.clips": 2})
    model = Model(MAR(settings), settings, (), frozenset({"encoder", "classifier"}))
    seen: list[Tensor] = []
    model.network.encoder.register_forward_pre_hook(lambda _, given: seen.append(given[1]))
    video = np.random.default_rng(0).integers(0, 255, (16, 20, 20, 3), np.uint8)
    model.probabilities(video)
    model.features(video)
    assert torch.equal(seen[0], seen[1])


def test_an_earlier_choice_of_cells_changes_no_other_strategy() -> None:
    motion = {"strategy": "motion"}
    plain, chosen = build({"mask": motion}), build({"mask": {**motion, "choice": "redundancy"}})
    assert identity(plain, "data") == identity(chosen, "data")
    assert cost(plain) == cost(chosen)


def test_embeddings_are_those_of_the_models_own_patches(
    tiny: Callable[..., TrainingConfig],
) -> None:
    settings = tiny({"mask": {"strategy": "redundancy"}})
    torch.manual_seed(0)
    model = MAR(settings)
    pixels = torch.rand(2, 3, 8, 16, 16)
    tubelets = patchify(pixels, settings.encoder.tubelet)
    order = evaluation_mask(settings).expand(2, -1, -1, -1)
    normalised = (pixels - model.mean.view(3, 1, 1, 1)) / model.std.view(3, 1, 1, 1)
    embedded = model.encoder.embed(patchify(normalised, settings.encoder.tubelet))
    wanted = hidden_by_content(
        settings.mask, order, num_hidden_of(order), embedded, lambda values: values
    )
    assert torch.equal(model.masked(order, tubelets), wanted)
    assert not torch.equal(wanted[0], wanted[1]), "a mask of testing is the clip's own"


def test_a_clips_scores_do_not_depend_on_the_clips_beside_it(
    tiny: Callable[..., TrainingConfig],
) -> None:
    settings = tiny({"mask": {"strategy": "motion"}})
    model = MAR(settings).eval()
    pixels = torch.rand(3, 3, 8, 16, 16)
    with torch.no_grad():
        together = model.classify(pixels, evaluation_mask(settings).expand(3, -1, -1, -1))
        alone = model.classify(pixels[1:2], evaluation_mask(settings))
    torch.testing.assert_close(together[1:2], alone)


@pytest.mark.parametrize(
    "mask",
    [
        {"strategy": "motion"},
        {"strategy": "redundancy", "keep": "least"},
        {"strategy": "static", "ratio": 0.75, "lengths": True},
        {"choice": "motion", "content": 0.5},
    ],
)
def test_onnx_makes_the_mask_that_pytorch_makes(mask: dict[str, object], tmp_path: Path) -> None:
    settings = build(merge(SMALL, {"mask": mask}))
    weights = weights_of(settings)
    assert write_onnx(tmp_path / "model.onnx", weights, settings) < 1e-4
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    # A background that rests, where many tokens are equal and the order decides.
    pixels = torch.rand(1, 3, 1, 64, 64).repeat(3, 1, 4, 1, 1)
    pixels[:, :, 2:, 8:30, 20:44] = torch.rand(3, 3, 2, 22, 24)
    model = MAR(settings).eval()
    load(model, weights, settings, ("encoder.", "classifier."))
    with torch.no_grad():
        expected = model.classify(pixels, evaluation_mask(settings).expand(3, -1, -1, -1))
    (scores,) = session.run(None, {"pixels": pixels.numpy()})
    np.testing.assert_allclose(scores, expected.numpy(), rtol=1e-3, atol=1e-4)


def test_chance_decides_for_each_video_anew_where_that_is_asked_for(
    tiny: Callable[..., TrainingConfig],
) -> None:
    control = {"mask": {"strategy": "random"}, "evaluation.mask.per_video": True}
    settings = tiny(control)
    masks = evaluation_masks(settings, 2, [3, 8])
    assert torch.equal(masks[0], masks[1]), "the views of a video share theirs"
    assert not torch.equal(masks[0], masks[2])
    assert torch.equal(evaluation_masks(settings, 2, [8])[0], masks[2])
    shared = evaluation_masks(tiny({"mask": {"strategy": "random"}}), 1, [3, 8])
    assert torch.equal(shared[0], shared[1])
    # A split is tested in batches of some videos: their size changes no prediction.
    videos = read_split(settings.data, "val")
    torch.manual_seed(0)
    model = MAR(settings)
    whole = Evaluator(settings, videos, torch.device("cpu"))(model).probabilities
    videos_apart = [
        class_probabilities(model.eval(), clip, settings, [number])
        for number, clip in enumerate(_clips(settings))
    ]
    torch.testing.assert_close(whole, torch.cat(videos_apart).double(), check_dtype=False)
    cells = {"evaluation.mask.per_video": True}
    assert identity(tiny(cells), "data") == identity(tiny(), "data"), "cells draw nothing"


def _clips(settings: TrainingConfig) -> list[Tensor]:
    """Return the test clip of each video of the split, 1 × C × T × H × W."""
    pixels: list[Tensor] = []
    for video in read_split(settings.data, "val"):
        with open_video(settings.data, video) as reader:
            pixels.append(to_pixels(evaluation_views(settings, reader, 1, 1)))
    return pixels


def test_what_selects_is_counted() -> None:
    blind = cost(build({"mask": {"strategy": "random", "motion": "standard"}}))
    tokens, values, width = 1568, 3 * 2 * 16 * 16, 768
    motion = cost(build({"mask": {"strategy": "motion"}}))
    assert motion.gflops - blind.gflops == pytest.approx(tokens * values / 1e9)
    assert motion.train_gflops - blind.train_gflops == pytest.approx(tokens * values / 1e9)
    redundancy = cost(build({"mask": {"strategy": "redundancy"}}))
    added = tokens * values * width + tokens * width
    assert redundancy.gflops - blind.gflops == pytest.approx(added / 1e9)
