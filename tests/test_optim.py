"""Parameter groups and schedule: the figures of the release, and timm's for VideoMAE's rule."""

from typing import Any

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay
from timm.scheduler import CosineLRScheduler

from mar.config.overrides import build
from mar.config.schema import RecipeConfig
from mar.model.mar import MAR
from mar.training.optim import learning_rate, parameter_groups, peak_lr

RELEASED = RecipeConfig(
    epochs=40,
    batch_size=512,
    base_lr=1e-3,
    lr_scaling="none",
    cosine_from="start",
    layer_decay_of="weights",
)
VIDEOMAE = RecipeConfig(epochs=40, batch_size=512, base_lr=1e-3)


def groups_by_name(recipe: RecipeConfig) -> dict[str, tuple[float, float]]:
    """Name -> (learning-rate factor, weight decay), of ViT-B; nothing is allocated."""
    with torch.device("meta"):
        model = MAR(build({}))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, recipe)
    assert sum(len(group["params"]) for group in groups) == len(names)
    return {
        names[id(p)]: (group["lr_scale"], group["weight_decay"])
        for group in groups
        for p in group["params"]
    }


@pytest.mark.parametrize(
    ("epoch", "rate"),
    [(0, 1e-6), (1, 1.932e-4), (2.5, 4.815e-4), (5, 9.620e-4), (10, 8.537e-4), (20, 5.005e-4)],
)
def test_the_released_schedule_has_the_released_rates(epoch: float, rate: float) -> None:
    assert learning_rate(RELEASED, float(epoch)) == pytest.approx(rate, rel=5e-4)


@pytest.mark.parametrize(
    ("name", "scale", "decay"),
    [
        ("encoder.blocks.11.attn.qkv.weight", 0.75, 0.05),
        ("encoder.blocks.0.mlp.fc1.weight", 0.031676, 0.05),
        ("encoder.embed.weight", 0.023757, 0.05),
        ("decoder.mask_token", 0.023757, 0.05),
        ("encoder.embed.bias", 1.0, 0.0),
        ("encoder.blocks.0.norm1.weight", 1.0, 0.0),
        ("encoder.blocks.0.attn.qkv.bias", 1.0, 0.0),
        ("encoder.norm.weight", 1.0, 0.0),
        ("decoder.project.weight", 1.0, 0.05),
        ("decoder.blocks.0.attn.proj.weight", 1.0, 0.05),
        ("decoder.head.weight", 1.0, 0.05),
        ("classifier.project.weight", 1.0, 0.05),
        ("classifier.blocks.1.norm2.bias", 1.0, 0.0),
        ("classifier.head.weight", 1.0, 0.05),
    ],
)
def test_the_released_groups_have_the_released_factors(
    name: str, scale: float, decay: float
) -> None:
    factors = groups_by_name(RELEASED)[name]
    assert factors == (pytest.approx(scale, abs=1e-6), pytest.approx(decay))


def test_videomaes_rule_is_timms() -> None:
    theirs = timm.create_model(
        "vit_base_patch16_224", class_token=False, global_pool="avg", fc_norm=False
    )
    names = {id(parameter): name for name, parameter in theirs.named_parameters()}
    groups = param_groups_layer_decay(theirs, weight_decay=0.05, layer_decay=0.75)
    expected = {
        names[id(parameter)]: (group["lr_scale"], group["weight_decay"])
        for group in groups
        for parameter in group["params"]
    }
    ours = groups_by_name(VIDEOMAE)
    compared = 0
    for name, factors in expected.items():
        same = f"encoder.{name}".replace("patch_embed.proj", "embed")
        if same in ours and not name.startswith(
            "norm."
        ):  # timm counts the last norm to the last block
            assert ours[same] == pytest.approx(factors), name
            compared += 1
    assert compared == 12 * 12 + 2
    assert ours["encoder.embed.weight"][0] == pytest.approx(0.75**13)
    assert ours["decoder.mask_token"] == (1.0, 0.0)


@pytest.mark.parametrize("epochs", [40, 100])
def test_videomaes_schedule_is_timms(epochs: int) -> None:
    recipe = VIDEOMAE.model_copy(update={"epochs": epochs})
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=peak_lr(recipe))
    options: dict[str, Any] = {
        "warmup_t": 5,
        "warmup_lr_init": 1e-6,
        "warmup_prefix": True,
        "lr_min": 1e-6,
    }
    schedule = CosineLRScheduler(optimizer, t_initial=epochs - 5, **options)
    for epoch in range(epochs):
        schedule.step(epoch)
        assert learning_rate(recipe, float(epoch)) == pytest.approx(
            optimizer.param_groups[0]["lr"], rel=1e-6
        )


def test_the_peak_is_scaled_by_the_batch_as_table_i_says() -> None:
    assert peak_lr(VIDEOMAE) == pytest.approx(2e-3)
    assert peak_lr(VIDEOMAE.model_copy(update={"batch_size": 128})) == pytest.approx(5e-4)
    assert peak_lr(RELEASED) == pytest.approx(1e-3)
    assert learning_rate(VIDEOMAE, 40.0) == pytest.approx(1e-6)
