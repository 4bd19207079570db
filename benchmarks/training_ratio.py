"""How much faster training is with patches hidden, beside how many fewer operations it has.

    python benchmarks/training_ratio.py -o benchmarks/training_ratio_DATE.md

A step is timed as a training takes it: clips from a raw frame cache, loaded in the same process,
augmentation, forward, backward, AdamW; mini's two encoders and ViT-B, one thread. The ratios are
measured in turn, a step each in every round, so that a slow minute is nobody's own.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from mar.config.overrides import build, merge
from mar.config.schema import TrainingConfig
from mar.data.annotations import read_split
from mar.data.cache_index import Packing
from mar.data.dataset import Batch, TrainingOrder
from mar.data.frame_cache import pack
from mar.data.loaders import training_batches
from mar.data.motion_verbs import MotionVerbs, make
from mar.distributed import WorkerRank
from mar.model.flops import cost
from mar.model.mar import MAR
from mar.training.allocator import keep_freed_memory
from mar.training.checkpoint import Progress
from mar.training.optim import build_optimizer
from mar.training.step import RuntimeConfig, TrainState, train_step
from orchestration.studies.recipe import recipe_tree

RATIOS = (0.0, 0.25, 0.5, 0.75)
CPU = torch.device("cpu")
MODELS: dict[str, tuple[str, dict[str, Any], MotionVerbs, int]] = {
    "mini B, 64 × 4": ("mini/ssv2_vit_b", {}, MotionVerbs(size=36, classes=8, train=256), 40),
    "mini L, 128 × 4": ("mini/ssv2_vit_l", {}, MotionVerbs(size=36, classes=8, train=256), 20),
    "ViT-B, 768 × 12": (
        "paper/ssv2_vit_b",
        {"recipe.batch_size": 2, "recipe.precision": "fp32"},
        MotionVerbs(size=224, frames=16, classes=8, train=32),
        3,
    ),
}
"""Name -> recipe, settings that differ from it, its videos, and rounds."""


class Training:
    """A training whose steps are taken one at a time."""

    def __init__(self, settings: TrainingConfig) -> None:
        self.settings = settings
        torch.manual_seed(0)
        model = MAR(settings)
        runtime = RuntimeConfig(CPU)
        optimizer = build_optimizer(model, settings.recipe)
        self.state = TrainState(settings, runtime, model, optimizer, Progress())
        self.batches = self._batches()
        self.seconds: list[float] = []

    def _batches(self) -> Iterator[Batch]:
        videos = read_split(self.settings.data, "train")
        order = TrainingOrder(self.settings, [video.label for video in videos], WorkerRank())
        return training_batches(self.settings, videos, order, 0, CPU)

    def step(self) -> None:
        """Take a step and keep its time, loading included."""
        began = time.perf_counter()
        train_step(self.state, next(self.batches))
        self.state.progress.step += 1
        self.seconds.append(time.perf_counter() - began)

    @property
    def clips_per_s(self) -> float:
        """The median over rounds; the first two steps are not counted."""
        return self.settings.recipe.batch_size / statistics.median(self.seconds[2:])


def measured(name: str, folder: Path) -> list[str]:
    """Return the rows of one model."""
    recipe, changes, verbs, rounds = MODELS[name]
    make(folder, verbs)
    tree = recipe_tree(recipe)
    here = {
        "data.root": str(folder),
        "data.num_classes": 8,
        "data.format": "ssv2",
        "data.videos": "videos",
        "data.train": "train.json",
        "data.val": "validation.json",
        "data.labels": "labels.json",
        "data.cache": None,
        "encoder.weights": None,
        "augment.flip_swaps": [],
        "recipe.epochs": 1000,
    }
    trees = [merge(tree, {**here, **changes, "mask.ratio": ratio}) for ratio in RATIOS]
    cache = folder / "frames"
    pack(build(trees[0]).data, cache, Packing("raw"), 1, lambda *_: None)
    trainings = [Training(build(merge(each, {"data.cache": str(cache)}))) for each in trees]
    for _ in range(rounds + 2):
        for training in trainings:
            training.step()
    standard = trainings[0]
    rows: list[str] = []
    for training in trainings:
        settings = training.settings
        operations = cost(standard.settings).train_gflops / cost(settings).train_gflops
        speed = training.clips_per_s / standard.clips_per_s
        rows.append(
            f"| {name} | {settings.mask.ratio:.0%} | {training.clips_per_s:.2f} | {speed:.2f} | "
            f"{operations:.2f} | {speed / operations:.2f} |"
        )
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    """Measure every model and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("-o", "--output", type=Path)
    output = parser.parse_args().output
    torch.set_num_threads(1)
    keep_freed_memory()
    lines = [
        f"# Speed of training by mask ratio, {datetime.date.today()}",
        "",
        "`python benchmarks/training_ratio.py`: one thread, "
        f"{torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}; clips from a raw "
        "frame cache; each ratio's step in turn, medians. × standard: of training with nothing "
        "hidden. Operations: how many fewer a training step has, reconstruction included.",
        "",
        "| model | ρ | clips/s | × standard | fewer operations, × | share of it |",
        "|:--|--:|--:|--:|--:|--:|",
    ]
    for name in MODELS:
        with tempfile.TemporaryDirectory() as folder:
            lines += measured(name, Path(folder) / "verbs")
    if output:
        output.write_text("\n".join([*lines, ""]), encoding="utf-8")


if __name__ == "__main__":
    main()
