"""What makes a result a model for MLflow: ``mlflow.pyfunc.load_model`` classifies videos with it.

Nothing is pickled: MLflow's file names this module as the loader, and the loader reads the result's
safetensors and settings.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from mar.safe_input import read_json
from mar.weights.checkpoint_settings import CLASSES

if TYPE_CHECKING:
    import pandas as pd

    from mar.inference import Model

_PACKAGES = ("mar-on-ray", "torch", "timm", "numpy", "safetensors", "pandas")
"""What loading and predicting needs; a result's versions are written beside it."""


def class_names(result: Path) -> list[str] | None:
    """Return the classes' names of a result, by number; None: it has no classifier.

    Classes without names have their numbers.
    """
    try:
        names: list[str] = read_json(result / CLASSES)["classes"]
        if names:
            return names
        settings: Any = yaml.safe_load((result / "settings.yaml").read_text(encoding="utf-8"))
        return [str(label) for label in range(settings["data"]["num_classes"])]
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return None


def write_mlflow_model(folder: Path, classes: Sequence[str]) -> None:
    """Write ``MLmodel`` and what it names, to lie beside a result's files.

    The input is a column of video files or of arrays of frames (uint8, T × H × W × 3); the output
    has a row for each: the most probable class, its probability, and the probability of each class.
    """
    # MLflow's modules for models load for a second: only a finished trial needs them.
    from mlflow.models import Model as MlflowModel
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, Schema
    from mlflow.types.schema import AnyType

    outputs: list[Any] = [
        ColSpec(DataType.string, "class"),
        ColSpec(DataType.double, "probability"),
    ]
    outputs += [ColSpec(DataType.double, name) for name in classes]
    model = MlflowModel(
        signature=ModelSignature(inputs=Schema([ColSpec(AnyType())]), outputs=Schema(outputs)),
        metadata={"classes": list(classes)},
    )
    model.add_flavor(
        "python_function",
        loader_module=__name__,
        data=".",
        env={"virtualenv": "python_env.yaml"},
    )
    folder.mkdir(parents=True, exist_ok=True)
    model.save(str(folder / "MLmodel"))
    lines = [f"{name}=={metadata.version(name)}\n" for name in _PACKAGES]
    (folder / "requirements.txt").write_text("".join(lines), encoding="utf-8")
    environment = {
        "python": platform.python_version(),
        "dependencies": ["-r requirements.txt"],
    }
    text = yaml.safe_dump(environment, sort_keys=False)
    (folder / "python_env.yaml").write_text(text, encoding="utf-8")


def _load_pyfunc(path: str) -> _Classifier:  # pyright: ignore[reportUnusedFunction]
    """Return what ``mlflow.pyfunc.load_model`` wraps; MLflow calls this by its name."""
    from mar.inference import load_model

    return _Classifier(load_model(path))


class _Classifier:
    """A model with MLflow's interface."""

    def __init__(self, model: Model) -> None:
        self.model = model

    def predict(self, model_input: Any, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """Return a row for each video: class, probability, and the probability of each class."""
        import pandas as pd

        rows: list[dict[str, Any]] = []
        for video in _videos(model_input):
            probabilities = self.model.probabilities(video)
            best = int(probabilities.argmax())
            shares = {
                self.model.class_name(label): share
                for label, share in enumerate(probabilities.tolist())
            }
            row = {"class": self.model.class_name(best), "probability": float(probabilities[best])}
            rows.append({**row, **shares})
        return pd.DataFrame(rows)


def _videos(given: Any) -> list[Any]:
    """Return the videos of an input: a column of a DataFrame, a list, or one video."""
    import pandas as pd

    if isinstance(given, pd.DataFrame):
        return given.iloc[:, 0].tolist()
    if isinstance(given, str | Path):
        return [given]
    return list(given)
