from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from mar.config.overrides import build, merge
from mar.config.schema import TrainingConfig
from mar.model.decoder import reconstruction_target
from mar.model.encoder import flat_conv_weight, patchify, take
from mar.model.mar import MAR, split_indices
from mar.model.masking import training_mask
from mar.model.pixels import IMAGENET_MEAN, IMAGENET_STD

Settings = Callable[..., TrainingConfig]
QUIET = {"encoder.drop_path": 0.0, "classifier.dropout": 0.0}


def clips_and_mask(settings: TrainingConfig) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(
        4, 3, settings.clip.frames, settings.clip.size, settings.clip.size, generator=generator
    )
    labels = F.one_hot(torch.tensor([0, 1, 0, 1]), settings.data.num_classes).float()
    return pixels, training_mask(settings.mask, settings.grid, 4, generator), labels


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"mask.ratio": 0.0},
        {"reconstruction.weight": 0.0},
        {"mask.ratio": 0.75, "reconstruction.normalize_target": False},
        {"classifier.kind": "linear"},
        {"classifier.kind": "linear", "classifier.norm": "pooled", "reconstruction.weight": 0.0},
        {"classifier.kind": "mlp", "classifier.depth": 2},
        {"classifier.positions": True},
        {"classifier.positions": True, "classifier.mask_tokens": True},
    ],
)
def test_every_variant_of_the_paper_learns(tiny: Settings, overrides: dict[str, Any]) -> None:
    settings = tiny(overrides)
    model = MAR(settings)
    losses = model(*clips_and_mask(settings))
    losses.total.mean().backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert without == []
    assert torch.isfinite(losses.total).all()


def test_the_loss_is_equation_5(tiny: Settings) -> None:
    settings = tiny({"reconstruction.weight": 0.3, **QUIET})
    losses = MAR(settings)(*clips_and_mask(settings))
    torch.testing.assert_close(losses.total, 0.3 * losses.reconstruction + losses.classification)
    assert (losses.reconstruction > 0).all()


def test_a_hidden_pixel_cannot_reach_the_classification(tiny: Settings) -> None:
    settings = tiny(QUIET)
    model = MAR(settings).eval()
    pixels, mask, _ = clips_and_mask(settings)
    frames, height, width = settings.encoder.tubelet
    hidden = (
        mask.repeat_interleave(frames, 1)
        .repeat_interleave(height, 2)
        .repeat_interleave(width, 3)[:, None]
    )
    scores = model.classify(pixels, mask)
    torch.testing.assert_close(model.classify(pixels + 5 * hidden, mask), scores)
    assert not torch.allclose(model.classify(pixels + 5 * ~hidden, mask), scores)


def test_embedding_visible_tubelets_equals_a_convolution_over_all_of_them(tiny: Settings) -> None:
    settings = tiny()
    pixels, _, _ = clips_and_mask(settings)
    convolution = torch.nn.Conv3d(3, 16, settings.encoder.tubelet, stride=settings.encoder.tubelet)
    everywhere = convolution(pixels).flatten(2).transpose(1, 2)
    tubelets = patchify(pixels, settings.encoder.tubelet)
    torch.testing.assert_close(
        F.linear(tubelets, flat_conv_weight(convolution.weight), convolution.bias), everywhere
    )


def test_a_raw_target_is_the_pixels_and_a_normalised_one_has_mean_0_and_deviation_1(
    tiny: Settings,
) -> None:
    settings = tiny()
    pixels, mask, _ = clips_and_mask(settings)
    _, hidden = split_indices(mask)
    tubelets = take(patchify(pixels, settings.encoder.tubelet), hidden)
    raw = reconstruction_target(tubelets, normalize=False)
    first = int(hidden[0, 0])
    t, h, w = first // 16, first // 4 % 4, first % 4
    block = pixels[0, :, 2 * t : 2 * t + 2, 4 * h : 4 * h + 4, 4 * w : 4 * w + 4]
    torch.testing.assert_close(raw[0, 0], block.permute(1, 2, 3, 0).flatten())
    channels = reconstruction_target(tubelets, normalize=True).unflatten(-1, (-1, 3))
    torch.testing.assert_close(channels.mean(dim=2), torch.zeros(4, 32, 3), atol=1e-5, rtol=0)
    torch.testing.assert_close(channels.std(dim=2), torch.ones(4, 32, 3), atol=1e-4, rtol=0)


def test_the_encoder_is_timms_vit_when_nothing_is_hidden(tiny: Settings) -> None:
    """timm's own loop over the same weights: positions, blocks, norm are those of a plain ViT."""
    settings = tiny({"mask.ratio": 0.0, **QUIET})
    model = MAR(settings).eval()
    pixels, mask, _ = clips_and_mask(settings)
    visible, _ = split_indices(mask)
    mean = torch.tensor(IMAGENET_MEAN).view(3, 1, 1, 1)
    std = torch.tensor(IMAGENET_STD).view(3, 1, 1, 1)
    tubelets = patchify((pixels - mean) / std, settings.encoder.tubelet)
    tokens = model.encoder.embed(tubelets) + model.encoder.positions
    for block in model.encoder.blocks:
        tokens = block(tokens)
    torch.testing.assert_close(model.encode(pixels, visible), model.encoder.norm(tokens))


def test_parts_start_as_the_released_model_and_videomae_start_them() -> None:
    torch.manual_seed(0)
    model = MAR(build({}))
    head = model.classifier.blocks[0].mlp.fc1
    assert head.weight.abs().max().item() == pytest.approx((6 / (512 + 2048)) ** 0.5, rel=0.01)
    assert model.classifier.project.weight.abs().max().item() == pytest.approx(768**-0.5, rel=0.01)
    assert model.encoder.blocks[0].attn.proj.weight.abs().max().item() == pytest.approx(
        (6 / 1536) ** 0.5, rel=0.01
    )
    assert model.decoder.mask_token.std().item() == pytest.approx(0.02, rel=0.2)
    assert not any(
        value.any()
        for name, value in model.named_parameters()
        if name.endswith(".bias") and "embed" not in name
    )
    linear = MAR(
        build(
            merge({}, {"classifier.kind": "linear", "classifier.norm": "pooled", "mask.ratio": 0.0})
        )
    )
    assert linear.classifier.head.weight.std().item() == pytest.approx(2e-5, rel=0.05)
    assert isinstance(linear.encoder.norm, torch.nn.Identity)


def test_weights_do_not_depend_on_the_pixel_statistics(tiny: Settings) -> None:
    names = set(MAR(tiny()).state_dict())
    assert not {name for name in names if "mean" in name or "std" in name or "positions" in name}
    assert len(IMAGENET_MEAN) == 3
