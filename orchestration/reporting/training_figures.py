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
"""Most curves in one picture."""
_CURVES = {
    "val/top1": "Top-1 (%), one view",
    "val/reconstruction_loss": "L_r, validation",
    "train/loss": "Loss",
}
"""Metrics of the learning curves, with their titles. The first that any training has is shown."""


@dataclass(frozen=True)
class Confusion:
    """A model's confusion matrix."""

    title: str
    names: Sequence[str]
    counts: np.ndarray
    """Numbers of videos, by true class (rows) and predicted class (columns)."""

    def frame(self) -> pd.DataFrame:
        """Return the counts as a table, which is stored beside the picture."""
        return pd.DataFrame(
            self.counts, index=pd.Index(self.names, name="class"), columns=list(self.names)
        )


def curves_info(results: StudyResults) -> FigureInfo | None:
    """Return the learning curve of each row, the mean over its seeds.

    None if no finished training has one.
    """
    study = results.study
    found = results.runs
    histories: dict[str, list[dict[str, dict[int, float]]]] = {}
    for trial in study.trials:
        # A run that was only tested has no epochs.
        if trial.key in found and found[trial.key].was_trained:
            file = results.file(found[trial.key], "history.csv")
            if file is not None:
                histories.setdefault(trial.row, []).append(_history(file))
    present = {name for each in histories.values() for history in each for name in history}
    shown = next((name for name in _CURVES if name in present), None)
    if shown is None:
        return None
    series = [
        _curve(row, [each[shown] for each in several if shown in each])
        for row, several in histories.items()
    ]
    # A row whose seeds do not all have the metric may have no epoch in common.
    series = [each for each in series if each.x]
    title = f"{study.file.title}: learning curves"
    # A study may have hundreds of rows: their curves could not be distinguished.
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
    """Return the confusion matrix of the row with the best top-1 (its first finished seed).

    A row that is a mean over folds has the sum over its folds. None if no predictions can be read.
    """
    study = results.study
    found = results.runs
    # A row without a value is below every accuracy.
    best = max(results.rows, key=lambda row: row.cells["top1"].mean or -1.0, default=None)
    if best is None or best.cells["top1"].mean is None:
        return None
    trials = [trial for trial in study.trials if trial.row == best.label and trial.key in found]
    shown = trials[0].name
    axis = study.file.table.mean_over
    if axis is None:
        trials = trials[:1]
    else:
        shown = f"{best.label}, all of {axis}"
    names = _class_names(trials[0])
    counts = np.zeros((len(names), len(names)), dtype=int)
    for trial in trials:
        predictions = results.file(found[trial.key], "predictions.csv")
        if predictions is None:
            return None
        for line in _read(predictions):
            counts[int(line["label"]), int(line["class_1"])] += 1
    return Confusion(f"{study.file.title}: {shown}", names, counts)


def _class_names(trial: Trial) -> list[str]:
    """Return the names of the classes, or their numbers if the data is not on this machine."""
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
    # A cell is empty if the metric was not measured in the epoch.
    return {
        name: {epoch: float(value) for epoch, value in zip(epochs, values, strict=True) if value}
        for name, values in columns.items()
    }


def _read(file: Path) -> list[dict[str, str]]:
    """Return the lines of a csv file, by column."""
    # File names on Linux may be no UTF-8: surrogateescape keeps their bytes.
    return list(
        csv.DictReader(file.read_text(encoding="utf-8", errors="surrogateescape").splitlines())
    )


def _curve(name: str, seeds: Sequence[dict[int, float]]) -> Series:
    """Return the mean over seeds at each epoch that all of them have."""
    # A mean over fewer seeds would make a jump in the curve.
    if seeds:
        epochs = sorted(set.intersection(*(set(each) for each in seeds)))
    else:
        epochs = []
    means = [sum(each[epoch] for each in seeds) / len(seeds) for epoch in epochs]
    return Series(
        name, [f"epoch {each}" for each in epochs], epochs, means, [0.0] * len(epochs), is_line=True
    )
