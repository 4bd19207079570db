"""What a finished training leaves: its result folder."""

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
from mar.evaluation.evaluator import Predictions, Reconstruction, write_predictions
from mar.model.mar import MAR
from mar.visualization.charts import draw_confusion, draw_curves
from mar.visualization.reconstructions import draw_reconstructions
from mar.weights.pretrained import CLASSES


@dataclass(frozen=True)
class FinishedTraining:
    """A training that is over."""

    settings: TrainingConfig
    folder: Path
    model: MAR
    history: list[dict[str, float]]
    """Metrics of each epoch."""
    trained_in: Path | None = None
    """The result folder it was read from; none: it was trained here."""


def write_result(
    trained: FinishedTraining,
    val: list[Video],
    predictions: Predictions | Reconstruction,
    metrics: dict[str, float],
    on_write_error: Callable[[Failure], bool],
) -> None:
    """Write the result folder of a training or a test, as a whole or not at all."""
    settings = trained.settings.model_dump(mode="json")
    text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
    broken = "".join(f"{reason}\n" for reason in predictions.broken)
    writers: dict[str, Callable[[Path], None]] = {
        "settings.yaml": lambda file: write_text(file, text),
        "metrics.json": lambda file: write_text(file, json.dumps(metrics, indent=1)),
        "broken_videos.txt": lambda file: write_text(file, broken),
    }
    if trained.trained_in:
        writers["trained_by.txt"] = lambda file: write_text(file, f"{trained.trained_in}\n")
    else:
        writers["model.safetensors"] = lambda file: save_file(trained.model.state_dict(), file)
        writers["history.csv"] = lambda file: _write_history(trained.history, file)
        writers["curves.png"] = lambda file: draw_curves(trained.history, file)
    if isinstance(predictions, Predictions):
        names = class_names(trained.settings.data)
        writers[CLASSES] = lambda file: write_text(
            file, json.dumps({"classes": names}, ensure_ascii=False, indent=1)
        )
        writers["predictions.csv"] = lambda file: write_predictions(predictions, val, file)
        right = (predictions.probabilities.argmax(dim=1) == predictions.labels).numpy()
        tested = [val[index].name for index in predictions.videos.tolist()]
        writers[CORRECTNESS] = lambda file: write_correctness(right, tested, file)
        writers["confusion.png"] = lambda file: draw_confusion(
            predictions.confusion().numpy(), names, file
        )
    if trained.settings.redraws_in_testing:
        shown = [
            video
            for video in val
            if not any(str(video.path) in reason for reason in predictions.broken)
        ][:_SHOWN]
        writers["reconstructions.png"] = lambda file: draw_reconstructions(
            trained.settings, trained.model, shown, file
        )
    files: Writers = writers
    metadata = {"settings": settings, "metrics": metrics}
    write_atomic_dir(trained.folder / RESULT_DIR, files, metadata, try_again=on_write_error)


def _write_history(history: list[dict[str, float]], file: Path) -> None:
    """Write one row an epoch."""
    names = list(dict.fromkeys(name for epoch in history for name in epoch))
    with file.open("w", newline="", encoding="utf-8") as output:
        writer = csv.DictWriter(output, ["epoch", *names])
        writer.writeheader()
        writer.writerows(
            {"epoch": number, **epoch} for number, epoch in enumerate(history, start=1)
        )


_SHOWN = 3
"""Videos whose reconstructions are drawn."""
