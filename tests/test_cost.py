from collections.abc import Callable
from typing import Any

import pytest

from mar.config import ExperimentConfig
from mar.cost import cost
from mar.model import MAR
from mar.settings import build, merge

LINEAR = {"classifier.kind": "linear"}
PAPER_GFLOPS: list[tuple[dict[str, Any], float]] = [
    ({"mask.ratio": 0.0}, 196.03),
    ({"mask.ratio": 0.25}, 138.04),
    ({}, 86.35),
    ({"mask.ratio": 0.75}, 40.95),
    (LINEAR, 79.84),
    ({"classifier.kind": "mlp"}, 80.15),
    *[
        ({"classifier.width": 256, "classifier.depth": d}, g)
        for d, g in ((1, 80.93), (2, 81.86), (4, 83.73), (8, 87.46))
    ],
    *[({"classifier.width": 384, "classifier.depth": d}, g) for d, g in ((1, 81.93), (2, 83.80), (4, 87.52))],
    *[({"classifier.width": 512, "classifier.depth": d}, g) for d, g in ((1, 83.25), (2, 86.35), (4, 92.55))],
    *[({"classifier.width": 640, "classifier.depth": d}, g) for d, g in ((1, 84.87), (2, 89.52), (4, 98.81))],
    ({"classifier.mask_tokens": True, "classifier.positions": True}, 95.06),
    ({"classifier.positions": True}, 86.35),
]


@pytest.mark.parametrize(("overrides", "printed"), PAPER_GFLOPS)
def test_the_papers_gflops_come_out(overrides: dict[str, Any], printed: float) -> None:
    assert cost(build(merge({}, overrides))).gflops == pytest.approx(printed, abs=0.01)


@pytest.mark.parametrize(
    ("overrides", "printed"),
    [
        ({"encoder.size": "large", "data.num_classes": 400}, 276),
        ({"encoder.size": "large", "data.num_classes": 400, "mask.ratio": 0.75}, 131),
        ({**LINEAR, "mask.ratio": 0.0, "data.num_classes": 400}, 180),
        ({**LINEAR, "mask.ratio": 0.0, "encoder.size": "large", "data.num_classes": 400}, 597),
    ],
)
def test_the_papers_whole_gflops_come_out(overrides: dict[str, Any], printed: float) -> None:
    assert round(cost(build(merge({}, overrides))).gflops) == printed


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"mask.ratio": 0.0},
        {"reconstruction.weight": 0.0},
        {"classifier.kind": "linear"},
        {"classifier.kind": "mlp", "classifier.depth": 3},
        {"classifier.mask_tokens": True},
    ],
)
def test_parameters_are_counted_as_the_model_has_them(
    tiny: Callable[..., ExperimentConfig], overrides: dict[str, Any]
) -> None:
    settings = tiny(overrides)
    model = MAR(settings)
    everything = sum(parameter.numel() for parameter in model.parameters())
    decoder = sum(parameter.numel() for parameter in model.decoder.parameters()) if model.decoder else 0
    figures = cost(settings)
    assert round(figures.train_params_m * 1e6) == everything
    assert round(figures.params_m * 1e6) == everything - decoder


def test_testing_with_another_ratio_costs_what_that_ratio_costs() -> None:
    assert cost(build({"evaluation": {"mask": {"ratio": 0.75}}})).gflops == pytest.approx(40.95, abs=0.01)
