import logging
from collections.abc import Callable
from math import prod
from typing import Any

import pytest
import torch
from fvcore.nn import FlopCountAnalysis

from mar.config.overrides import build, merge
from mar.config.schema import TrainingConfig
from mar.model import layers
from mar.model.flops import cost
from mar.model.mar import MAR
from mar.weights.onnx_export import Inference


@pytest.mark.parametrize(
    "overrides",
    [
        {"encoder.size": "base"},
        {"mask.ratio": 0.0},
        {"classifier.kind": "linear", "mask.ratio": 0.75},
        {"classifier.kind": "linear", "classifier.norm": "pooled"},
        {"classifier.kind": "mlp", "classifier.depth": 3},
        {"classifier.mask_tokens": True, "classifier.positions": True},
        {"clip.size": 112, "mask.cell": [7, 7], "classifier.width": 384, "classifier.depth": 3},
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::torch.jit.TracerWarning")
def test_a_counter_that_is_not_ours_counts_the_same(
    overrides: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """fvcore sees matrix products and norms.

    Attention is made explicit for it, and our embedding skips what is hidden.
    """
    settings = build(
        merge(
            merge({}, {"clip.frames": 8, "encoder.size": "small", "reconstruction.weight": 0.0}),
            overrides,
        )
    )
    model = Inference(MAR(settings), settings).eval()
    monkeypatch.setattr(layers, "attention", layers.explicit_attention)
    clip, figures = settings.clip, cost(settings)
    logging.getLogger("fvcore").setLevel(logging.ERROR)
    counted = FlopCountAnalysis(model, torch.rand(1, 3, clip.frames, clip.size, clip.size)).total()
    hidden = figures.tokens - figures.visible_tokens
    embedding_of_hidden = (
        hidden * 3 * prod(settings.encoder.tubelet) * settings.encoder.dimensions[0]
    )
    assert counted + embedding_of_hidden == round(figures.gflops * 1e9)


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"mask.ratio": 0.0},
        {"reconstruction.weight": 0.0},
        {"classifier.kind": "linear"},
        {"classifier.kind": "linear", "classifier.norm": "pooled", "reconstruction.weight": 0.0},
        {"classifier.kind": "mlp", "classifier.depth": 3},
        {"classifier.kind": "attentive", "classifier.depth": 1},
        {"classifier.kind": "attentive", "classifier.depth": 3},
        {"classifier.mask_tokens": True},
        {"recipe.objective": "reconstruction"},
    ],
)
def test_parameters_are_counted_as_the_model_has_them(
    tiny: Callable[..., TrainingConfig], overrides: dict[str, Any]
) -> None:
    settings = tiny(overrides)
    model = MAR(settings)
    everything = sum(parameter.numel() for parameter in model.parameters())
    decoder = (
        sum(parameter.numel() for parameter in model.decoder.parameters()) if model.decoder else 0
    )
    figures = cost(settings)
    assert round(figures.train_params_m * 1e6) == everything
    assert round(figures.params_m * 1e6) == everything - decoder


def test_testing_with_another_ratio_costs_what_that_ratio_costs() -> None:
    assert cost(build({"evaluation": {"mask": {"ratio": 0.75}}})).gflops == pytest.approx(
        40.95, abs=0.01
    )
