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


def test_its_tokens_are_spread_over_space_and_time() -> None:
    for share in (0.25, 0.5, 0.75):
        chosen = (decoder_order((8, 14, 14)) < share * 1568).view(8, 14, 14)
        cells = chosen.view(8, 7, 2, 7, 2).sum(dim=(2, 4))
        assert (cells == 4 * share).all(), "as many of each 2 × 2 cell in each slice"
        assert (chosen.sum(dim=0) == 8 * share).all(), "and of each place over the slices"


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
