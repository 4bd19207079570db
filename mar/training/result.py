"""Writes the result folder of a finished training."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import yaml
from safetensors.torch import save_file

from mar import RESULT_DIR
from mar.atomic_dir import Writers, write_atomic_dir, write_text
from mar.config.schema import TrainingConfig
from mar.data.annotations import Video, class_names
from mar.errors import Failure
from mar.evaluation.correctness import CORRECTNESS, write_correctness
from mar.evaluation.evaluator import (
    Predictions,
    Reconstruction,
    write_class_accuracies,
    write_predictions,
)
from mar.model.mar import MAR
from mar.visualization.charts import draw_confusion, draw_curves
from mar.visualization.reconstructions import draw_reconstructions
from mar.weights.checkpoint_settings import CLASSES

_SHOWN = 3
"""Number of videos whose reconstructions are drawn."""


@dataclass(frozen=True)
class FinishedTraining:
    """A training that has finished, with its model."""

    settings: TrainingConfig
    folder: Path
    model: MAR
    history: list[dict[str, float]]
    """Metrics of each epoch."""
    trained_in: Path | None = None
    """The result folder from which the model was read; none: it was trained in ``folder``."""


def write_result(
    trained: FinishedTraining,
    val: list[Video],
    predictions: Predictions | Reconstruction,
    metrics: dict[str, float],
    on_write_error: Callable[[Failure], bool],
) -> None:
    """Write the result folder of a training or of a test, completely or not at all.

    Raises:
        Failure: the disk refuses, and ``on_write_error`` does not ask for another try.
    """
    settings = trained.settings.model_dump(mode="json")
    text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
    broken = "".join(f"{reason}\n" for reason in predictions.broken)
    writers: dict[str, Callable[[Path], None]] = {
        "settings.yaml": lambda file: write_text(file, text),
        "metrics.json": lambda file: write_text(file, json.dumps(metrics, indent=1)),
        "broken_videos.txt": lambda file: write_text(file, broken),
    }
    # A test reuses the model of another trial: it names that folder and does not copy the model.
    if trained.trained_in:
        writers["trained_by.txt"] = lambda file: write_text(file, f"{trained.trained_in}\n")
    else:
        writers["model.safetensors"] = lambda file: save_file(trained.model.state_dict(), file)
        writers["history.csv"] = lambda file: _write_history(trained.history, file)
        writers["curves.png"] = lambda file: draw_curves(trained.history, file)
    # Pre-training has no classes, hence no predictions.
    if isinstance(predictions, Predictions):
        writers |= _prediction_writers(trained.settings, val, predictions)
    # A broken video has no pixels to draw.
    if trained.settings.redraws_in_testing:
        shown = _decodable(val, predictions.broken)[:_SHOWN]
        writers["reconstructions.png"] = lambda file: draw_reconstructions(
            trained.settings, trained.model, shown, file
        )
    files: Writers = writers
    metadata = {"settings": settings, "metrics": metrics}
    write_atomic_dir(trained.folder / RESULT_DIR, files, metadata, try_again=on_write_error)


def _prediction_writers(
    settings: TrainingConfig, val: list[Video], predictions: Predictions
) -> dict[str, Callable[[Path], None]]:
    """Return what writes the files about predicted classes, by file name."""
    names = class_names(settings.data)
    classes = json.dumps({"classes": names}, ensure_ascii=False, indent=1)
    # One flag for each video: paired tests over many runs read these alone (docs/log.md).
    correct = (predictions.probabilities.argmax(dim=1) == predictions.labels).numpy()
    tested = [val[index].name for index in predictions.videos.tolist()]
    return {
        CLASSES: lambda file: write_text(file, classes),
        "predictions.csv": lambda file: write_predictions(predictions, val, file),
        CORRECTNESS: lambda file: write_correctness(correct, tested, file),
        "classes.csv": lambda file: write_class_accuracies(predictions, names, file),
        "confusion.png": lambda file: draw_confusion(predictions.confusion().numpy(), names, file),
    }


def _decodable(videos: list[Video], broken: tuple[str, ...]) -> list[Video]:
    """Return the videos that no reason in ``broken`` names."""
    return [video for video in videos if not any(str(video.path) in reason for reason in broken)]


def _write_history(history: list[dict[str, float]], file: Path) -> None:
    """Write the metrics of each epoch, one row an epoch."""
    # Epochs may have different metrics: validation is not due in every epoch.
    names = list(dict.fromkeys(name for epoch in history for name in epoch))
    with file.open("w", newline="", encoding="utf-8") as output:
        writer = csv.DictWriter(output, ["epoch", *names])
        writer.writeheader()
        for number, metrics in enumerate(history, start=1):
            writer.writerow({"epoch": number, **metrics})
