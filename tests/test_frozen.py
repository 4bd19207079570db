"""An encoder of which all, nothing, or the last blocks are trained."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_step import batch_of
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from trainings import assert_same_weights, train

from mar.config.model_settings import ClassifierConfig
from mar.config.overrides import SettingError, build
from mar.config.schema import TrainingConfig
from mar.errors import Stopped
from mar.model.classifier import AttentiveClassifier
from mar.model.flops import cost
from mar.model.mar import MAR
from mar.training.checkpoint import Progress
from mar.training.optim import build_optimizer
from mar.training.reports import TrainingSignal
from mar.training.step import RuntimeConfig, TrainState, train_step
from orchestration.studies.identity import identity

CPU = torch.device("cpu")


def changed(settings: TrainingConfig) -> set[str]:
    """Return the parameters that two steps of training change."""
    torch.manual_seed(0)
    model = MAR(settings)
    before = {name: each.detach().clone() for name, each in model.named_parameters()}
    optimizer = build_optimizer(model, settings.recipe)
    state = TrainState(settings, RuntimeConfig(CPU), model.train(), optimizer, Progress())
    for _ in range(2):
        train_step(state, batch_of(settings))
    return {name for name, each in model.named_parameters() if not torch.equal(each, before[name])}


def test_only_what_is_to_be_trained_changes(tiny: Callable[..., TrainingConfig]) -> None:
    base: dict[str, Any] = {"encoder.depth": 3, "recipe.batch_size": 4}
    everything = changed(tiny(base))
    assert {name for name in everything if name.startswith("encoder.embed")}
    last = changed(tiny({**base, "encoder.train": {"last": 1}}))
    blocks = {name.split(".")[2] for name in last if name.startswith("encoder.blocks")}
    assert blocks == {"2"}
    assert not [name for name in last if name.startswith("encoder.embed")]
    assert "encoder.norm.weight" in last
    none = changed(tiny({**base, "encoder.train": "none"}))
    assert not [name for name in none if name.startswith("encoder.")]
    for part in ("classifier.", "decoder."):
        heads = {name for name in everything if name.startswith(part)}
        assert heads == {name for name in none if name.startswith(part)}


def test_what_is_not_trained_has_no_stochastic_depth(tiny: Callable[..., TrainingConfig]) -> None:
    settings = tiny({"encoder.train": "none", "encoder.drop_path": 0.9, "encoder.depth": 3})
    model = MAR(settings).train()
    tubelets, visible = torch.rand(4, 10, 96), torch.arange(10).expand(4, -1)
    first: Tensor = model.encoder(tubelets, visible)
    assert torch.equal(first, model.encoder(tubelets, visible))
    assert not first.requires_grad, "nothing is kept for a backward pass"
    assert model.classifier is not None and model.classifier.training


@pytest.mark.parametrize("part", ["none", {"last": 1}])
def test_a_stopped_training_of_a_part_equals_one_that_was_not(
    part: Any, tiny: Callable[..., TrainingConfig], tmp_path: Path
) -> None:
    """Frozen parts have no stochastic depth from the first step on, and from a resumption on."""
    settings = tiny({"encoder.train": part, "encoder.drop_path": 0.9, "encoder.depth": 3})
    straight = train(settings, tmp_path / "straight")
    steps: list[int] = []

    def stop(step: int, _: int) -> TrainingSignal:
        steps.append(step)
        return TrainingSignal.STOP if len(steps) == 3 else TrainingSignal.CONTINUE

    with pytest.raises(Stopped):
        train(settings, tmp_path / "stopped", {"on_step": stop})
    assert train(settings, tmp_path / "stopped")[-1] == straight[-1]
    assert_same_weights(tmp_path / "straight", tmp_path / "stopped")


def test_it_costs_less_and_is_another_training() -> None:
    whole, last, none = (
        build({"encoder": {"train": train}}) for train in ("all", {"last": 4}, "none")
    )
    figures = [cost(each).train_gflops for each in (whole, last, none)]
    assert figures == sorted(figures, reverse=True)
    assert cost(none).gflops == cost(whole).gflops
    assert len({identity(each, "data") for each in (whole, last, none)}) == 3
    assert build({"encoder": {"train": "last: 4"}}) == last


@pytest.mark.parametrize("depth", [1, 3])
def test_the_attentive_classifier_is_a_query_that_attends_to_the_tokens(depth: int) -> None:
    config = ClassifierConfig.model_validate(
        {"kind": "attentive", "width": 16, "heads": 2, "depth": depth, "dropout": 0.0}
    )
    torch.manual_seed(0)
    ours = AttentiveClassifier(config, 24, 5).eval()
    reference = nn.MultiheadAttention(16, 2, batch_first=True)
    with torch.no_grad():
        query_weight, query_bias = ours.to_query.weight, ours.to_query.bias
        reference.in_proj_weight.copy_(torch.cat([query_weight, ours.to_keys_and_values.weight]))
        reference.in_proj_bias.copy_(torch.cat([query_bias, ours.to_keys_and_values.bias]))
        reference.out_proj.load_state_dict(ours.attended.state_dict())
        tokens = torch.randn(3, 10, 24)
        x = ours.norm_tokens(ours.blocks(ours.project(tokens)))
        query = ours.query.expand(3, -1, -1)
        query = query + reference(query, x, x)[0]
        query = query + ours.mlp(ours.norm_query(query))
        expected = ours.head(ours.norm(query[:, 0]))
        torch.testing.assert_close(ours(tokens, torch.arange(10).expand(3, -1)), expected)
    assert len(ours.blocks) == depth - 1


@pytest.mark.parametrize("depth", [1, 2])
def test_the_attentive_classifiers_operations_are_those_that_pytorch_counts(depth: int) -> None:
    settings = {"kind": "attentive", "width": 16, "heads": 2, "depth": depth}
    whole = build({"classifier": settings, "mask": {"ratio": 0.0}, "data": {"num_classes": 5}})
    model = AttentiveClassifier(whole.classifier, 768, 5).eval().requires_grad_(False)
    math = sdpa_kernel(SDPBackend.MATH)
    with math, FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.randn(1, 1568, 768), torch.arange(1568)[None])
    norms = 5 * 16 * (1568 * (1 + 2 * (depth - 1)) + 2)
    linear = {"classifier": {"kind": "linear"}, "mask": {"ratio": 0.0}, "data": {"num_classes": 5}}
    ours = (cost(whole).gflops - cost(build(linear)).gflops) * 1e9 + 768 * 5
    assert ours - norms == pytest.approx(counter.get_total_flops() / 2)


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"last": 13}, r"encoder: train: the last 13 of 12 blocks"),
        ({"last": 0}, r"encoder\.train"),
        ("some", r"encoder\.train: must be 'all' or 'none'"),
        ({"first": 2}, r"encoder\.train"),
    ],
)
def test_what_cannot_be_trained_is_refused(train: object, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        build({"encoder": {"train": train}})
