"""Figures that every study has: learning curves, and the confusion matrix of its best model."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from mar.data.annotations import class_names
from mar.errors import UserError
from orchestration.reporting.figures import FigureInfo, Series
from orchestration.reporting.study_results import StudyResults
from orchestration.studies.trial import Trial

_MOST_CURVES = 20
"""In one picture."""
_CURVES = {
    "val/top1": "Top-1 (%), one view",
    "val/reconstruction_loss": "L_r, validation",
    "train/loss": "Loss",
}
"""Shown is the first that any training has."""


@dataclass(frozen=True)
class Confusion:
    """Which classes a model takes for which."""

    title: str
    names: Sequence[str]
    counts: np.ndarray
    """Videos, by class (rows) and by what they were taken for (columns)."""

    def frame(self) -> pd.DataFrame:
        """Return the counts, to travel with the picture."""
        return pd.DataFrame(
            self.counts, index=pd.Index(self.names, name="class"), columns=list(self.names)
        )


def curves_info(results: StudyResults) -> FigureInfo | None:
    """Return the learning curve of each row, the mean over its seeds.

    None: no finished training has one.
    """
    study = results.study
    found = results.runs
    histories: dict[str, list[dict[str, dict[int, float]]]] = {}
    for trial in study.trials:
        if trial.key in found and found[trial.key].has_model:
            file = results.file(found[trial.key], "history.csv")
            if file is not None:
                histories.setdefault(trial.row, []).append(_history(file))
    there = {name for each in histories.values() for history in each for name in history}
    shown = next((name for name in _CURVES if name in there), None)
    if shown is None:
        return None
    series = [
        _curve(row, [each[shown] for each in several if shown in each])
        for row, several in histories.items()
    ]
    series = [each for each in series if each.x]
    title = f"{study.file.title}: learning curves"
    if len(series) > _MOST_CURVES:
        title = f"{title} of the best {_MOST_CURVES} rows of {len(series)}"
        series = sorted(series, key=lambda each: each.y[-1], reverse=shown == "val/top1")[
            :_MOST_CURVES
        ]
    return FigureInfo(
        title,
        "curves",
        "epoch",
        _CURVES[shown],
        series,
        None,
        [each.name for each in series],
        [],
        [],
    )


def confusion(results: StudyResults) -> Confusion | None:
    """Return the confusion matrix of the row with the best top-1 (its first seed).

    None: no predictions are there.
    """
    study = results.study
    found = results.runs
    best = max(results.rows, key=lambda row: row.cells["top1"].mean or -1.0, default=None)
    if best is None or best.cells["top1"].mean is None:
        return None
    trial = next(trial for trial in study.trials if trial.row == best.label and trial.key in found)
    predictions = results.file(found[trial.key], "predictions.csv")
    if predictions is None:
        return None
    lines = _read(predictions)
    names = _class_names(trial)
    counts = np.zeros((len(names), len(names)), dtype=int)
    for line in lines:
        counts[int(line["label"]), int(line["class_1"])] += 1
    return Confusion(f"{study.file.title}: {trial.name}", names, counts)


def _class_names(trial: Trial) -> list[str]:
    """Return the classes' names; their numbers, where the data is not at hand."""
    try:
        return class_names(trial.settings.data)
    except UserError:
        return [str(number) for number in range(trial.settings.data.num_classes)]


def _history(file: Path) -> dict[str, dict[int, float]]:
    """Return each metric's value by epoch, from a result's ``history.csv``."""
    text = file.read_text(encoding="utf-8")
    names, *lines = csv.reader(text.splitlines())
    epochs = [int(line[names.index("epoch")]) for line in lines]
    columns = {
        name: [line[column] for line in lines]
        for column, name in enumerate(names)
        if name in _CURVES
    }
    return {
        name: {epoch: float(value) for epoch, value in zip(epochs, values, strict=True) if value}
        for name, values in columns.items()
    }


def _read(file: Path) -> list[dict[str, str]]:
    return list(
        csv.DictReader(file.read_text(encoding="utf-8", errors="surrogateescape").splitlines())
    )


def _curve(name: str, seeds: Sequence[dict[int, float]]) -> Series:
    """Return the mean over seeds at each epoch that all of them have."""
    if seeds:
        epochs = sorted(set.intersection(*(set(each) for each in seeds)))
    else:
        epochs = []
    means = [sum(each[epoch] for each in seeds) / len(seeds) for epoch in epochs]
    return Series(
        name, [f"epoch {each}" for each in epochs], epochs, means, [0.0] * len(epochs), is_line=True
    )
