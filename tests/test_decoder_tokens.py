"""A decoder that reconstructs a share of the hidden tokens."""

from collections.abc import Callable

import pytest
import torch

from mar.config.overrides import build
from mar.config.schema import TrainingConfig
from mar.model.decoder import reconstruction_loss, reconstruction_target
from mar.model.encoder import patchify, take
from mar.model.flops import cost
from mar.model.mar import MAR
from mar.model.masking import decoder_order, training_mask
from orchestration.studies.identity import identity


@pytest.mark.parametrize(
    "mask",
    [
        {},
        {"temporal": "fixed"},
        {"spatial": "random"},
        {"ratio": 0.75},
        {"cell": [7, 7]},
        {"strategy": "random", "motion": "standard"},
        {"strategy": "tube", "motion": "standard", "ratio": 0.9},
    ],
)
def test_its_tokens_are_spread_over_space_and_time(mask: dict[str, object]) -> None:
    """Also where the mask is a running cell itself, with which they must not keep step."""
    settings = build({"mask": mask, "reconstruction": {"tokens": 0.5}})
    generator = torch.Generator().manual_seed(0)
    hidden = training_mask(settings.mask, settings.grid, 16, generator)
    order = decoder_order(settings.grid)
    shares: list[torch.Tensor] = []
    for clip in hidden:
        unseen = torch.nonzero(clip.flatten())[:, 0]
        chosen = unseen[order[unseen].argsort()[: len(unseen) // 2]]
        counts = torch.zeros(1568).index_fill(0, chosen, 1.0).view(8, 14, 14)
        shares.append(counts.sum(dim=(1, 2)) / clip.sum(dim=(1, 2)))
        # A quarter of the picture, over all slices.
        for part in (slice(0, 7), slice(7, 14)):
            of_part = counts[:, part, part].sum() / clip[:, part, part].sum()
            assert 0.35 < of_part < 0.65
    assert torch.cat(shares).min() > 0.3
    assert torch.cat(shares).max() < 0.7


def test_the_loss_in_training_is_that_of_its_share_and_in_testing_of_all(
    tiny: Callable[..., TrainingConfig],
) -> None:
    settings = tiny({"reconstruction.tokens": 0.5, "mask.strategy": "random"})
    torch.manual_seed(0)
    model = MAR(settings)
    pixels = torch.rand(3, 3, 8, 16, 16)
    labels = torch.full((3, 2), 0.5)
    hidden = training_mask(settings.mask, settings.grid, 3, torch.Generator().manual_seed(1))
    trained = model(pixels, hidden, labels).reconstruction
    tubelets = patchify(pixels, settings.encoder.tubelet)
    order = decoder_order(settings.grid)
    expected: list[torch.Tensor] = []
    for clip in range(3):
        (unseen,) = torch.nonzero(hidden[clip].flatten(), as_tuple=True)
        (visible,) = torch.nonzero(~hidden[clip].flatten(), as_tuple=True)
        chosen = torch.tensor(sorted(sorted(unseen.tolist(), key=lambda token: order[token])[:16]))
        tokens = model.encode(pixels[clip : clip + 1], visible[None])
        assert model.decoder is not None
        predicted = model.decoder(tokens, visible[None], chosen[None])
        target = reconstruction_target(take(tubelets[clip : clip + 1], chosen[None]), True)
        expected.append(reconstruction_loss(predicted, target))
    torch.testing.assert_close(trained, torch.cat(expected))
    model.eval()
    with torch.no_grad():
        tested = model(pixels, hidden, labels).reconstruction
        whole = MAR(tiny({"mask.strategy": "random"})).eval()
        whole.load_state_dict(model.state_dict())
        torch.testing.assert_close(tested, whole(pixels, hidden, labels).reconstruction)


def test_it_costs_what_its_tokens_cost() -> None:
    whole = cost(build({}))
    half = cost(build({"reconstruction": {"tokens": 0.5}}))
    assert half.gflops == whole.gflops
    assert half.train_gflops < whole.train_gflops
    assert identity(build({"reconstruction": {"tokens": 0.5, "weight": 0.0}}), "data") == identity(
        build({"reconstruction": {"weight": 0.0}}), "data"
    )


@pytest.mark.parametrize("share", [0.0, 1.5])
def test_a_share_is_more_than_nothing_and_at_most_all(share: float) -> None:
    with pytest.raises(ValueError, match=r"reconstruction\.tokens"):
        build({"reconstruction": {"tokens": share}})
