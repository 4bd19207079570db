"""The cost of what an installed package adds: its matrix products, counted by PyTorch.

:mod:`mar.model.flops` has formulas for the paper's own parts. A package's module is run once on the
meta device, where tensors have shapes and no values.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from math import prod

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mar import plugins
from mar.config.overrides import build
from mar.config.schema import TrainingConfig
from mar.errors import UserError
from mar.model.classifier import build_classifier
from mar.model.encoder import build_encoder


@dataclass(frozen=True)
class PackageCost:
    """Of one clip: multiply-adds of matrix products, convolutions and attention; parameters."""

    operations: int
    params: int


def encoder_cost(settings: TrainingConfig, visible: int) -> PackageCost:
    """Return the cost of a package's encoder that sees ``visible`` tokens.

    Raises:
        UserError: the encoder fails, or returns tokens of another shape.
    """
    return _encoder_cost(_key(settings), visible)


def classifier_cost(settings: TrainingConfig, visible: int) -> PackageCost:
    """Return the cost of a package's classifier of ``visible`` tokens.

    Raises:
        UserError: the classifier fails, or returns scores of another shape.
    """
    return _classifier_cost(_key(settings), visible)


def _key(settings: TrainingConfig) -> str:
    # Settings are not hashable. Only these branches matter here, and a study's trials share them.
    kept = {"data.num_classes": settings.data.num_classes}
    branches = settings.model_dump(mode="json", include={"clip", "encoder", "classifier"})
    branches["encoder"]["weights"] = None
    return json.dumps([kept, branches])


def _settings(key: str) -> TrainingConfig:
    classes, branches = json.loads(key)
    # The mask and the reconstruction have no part in this, and might not fit each other.
    rest = {"mask": {"ratio": 0.0}, "reconstruction": {"weight": 0.0}}
    return build({**branches, **rest, "data": {"num_classes": classes["data.num_classes"]}})


# Thousands of trials have a few models.
@lru_cache
def _encoder_cost(key: str, visible: int) -> PackageCost:
    settings = _settings(key)
    with torch.device("meta"):
        module = build_encoder(settings)
        tubelets = torch.zeros(2, visible, 3 * prod(settings.encoder.tubelet))
    expected = (2, visible, settings.encoder.dimensions[0])
    return _counted(plugins.ENCODERS, settings.encoder.size, module, tubelets, expected)


@lru_cache
def _classifier_cost(key: str, visible: int) -> PackageCost:
    settings = _settings(key)
    with torch.device("meta"):
        module = build_classifier(settings)
        tokens = torch.zeros(2, visible, settings.encoder.dimensions[0])
    expected = (2, settings.data.num_classes)
    return _counted(plugins.CLASSIFIERS, settings.classifier.kind, module, tokens, expected)


def _counted(
    group: str, name: str, module: nn.Module, values: torch.Tensor, expected: tuple[int, ...]
) -> PackageCost:
    """Run a module on two clips; return the cost of one.

    Raises:
        UserError: the module fails, or its output has another shape than expected.
    """
    # Of the first so many tokens. Two clips, because one would hide a mistake with that dimension.
    indices = torch.arange(values.shape[1], device="meta").expand(2, -1)
    counter = FlopCounterMode(display=False)
    with plugins.package_errors(group, name), counter, torch.no_grad():
        shape = tuple(module.eval()(values, indices).shape)
    if shape != expected:
        wanted, got = (" × ".join(map(str, each)) for each in (expected, shape))
        raise UserError(
            f"{name} ({group}), of the package {plugins.origin(group, name)}: its output for two "
            f"clips is {got}; expected {wanted}"
        )
    params = sum(each.numel() for each in module.parameters())
    # PyTorch counts a multiply-add as two operations, the paper as one.
    return PackageCost(counter.get_total_flops() // 2 // 2, params)
