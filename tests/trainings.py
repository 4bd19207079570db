"""Trains a tiny model in this process, and compares what comes out."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from mar import RESULT_DIR
from mar.config.schema import TrainingConfig
from mar.training.loop import fit
from mar.training.reports import EpochReport, TrainingCallbacks
from mar.training.step import RuntimeConfig

CPU = torch.device("cpu")


CLOCKS = ("time/", "throughput/")


def train(
    settings: TrainingConfig,
    folder: Path,
    callbacks: dict[str, Any] | None = None,
    **runtime: Any,
) -> list[tuple[int, dict[str, float]]]:
    """Train and return what was reported, without what a clock measured."""
    reports: list[tuple[int, dict[str, float]]] = []

    def report(report: EpochReport) -> None:
        metrics = {
            name: value for name, value in report.metrics.items() if not name.startswith(CLOCKS)
        }
        reports.append((report.epoch, metrics))

    quiet = {"log": lambda _: None, **(callbacks or {})}
    fit(settings, folder, RuntimeConfig(CPU, **runtime), TrainingCallbacks(report=report, **quiet))
    return reports


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / RESULT_DIR / "model.safetensors")


def assert_same_weights(one: Path, other: Path) -> None:
    for name, tensor in weights(one).items():
        assert torch.equal(tensor, weights(other)[name]), name
