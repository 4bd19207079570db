"""The policy that decides which checkpoints of a training stay on the disk.

Imports no torch, because a launch is configured without it.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from mar import MANIFEST
from mar.safe_input import read_json

_EXPECTED = "expected last=N, best, every=N (epochs), as last=1,best,every=10"


@dataclass(frozen=True)
class RetentionPolicy:
    """Which checkpoints stay; the others are removed when a newer one is complete."""

    last: int = 2
    """How many of the newest; more than one, in case the newest is damaged.

    They are removed when the result is safe.
    """
    best: bool = False
    """The epoch with the best validation accuracy (in pre-training, the lowest loss)."""
    every_epochs: int | None = None
    """The end of every so many epochs."""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return the policy written as ``last=1,best,every=10``; what is missing has its default.

        Raises:
            ValueError: the text is not in this notation.
        """
        parts = [each.strip().partition("=") for each in text.split(",")]
        given = {name: value for name, _, value in parts}
        counts: dict[str, int] = {}
        for name, value in given.items():
            # The only name without a number.
            if name == "best" and not value:
                continue
            is_count = value.isdecimal() and int(value) > 0
            if name not in ("last", "every") or not is_count:
                raise ValueError(_EXPECTED)
            counts[name] = int(value)
        return cls(counts.get("last", cls.last), "best" in given, counts.get("every"))

    def __str__(self) -> str:
        """Return the policy in the notation that ``parse`` reads."""
        parts = [f"last={self.last}"]
        if self.best:
            parts.append("best")
        if self.every_epochs:
            parts.append(f"every={self.every_epochs}")
        return ",".join(parts)

    def of(self, there: list[Path]) -> set[Path]:
        """Return which of a training's checkpoints (newest last) stay while it runs."""
        return {*there[-self.last :], *self.after_training(there)}

    def after_training(self, there: list[Path]) -> set[Path]:
        """Return which of a training's checkpoints stay when it has finished."""
        # Without this, every manifest would be read after each save.
        if not self.best and not self.every_epochs:
            return set()
        histories: dict[Path, list[Mapping[str, float]]] = {}
        for path in there:
            history = _epochs(path)
            # Only a checkpoint at the end of an epoch can be the best or the N-th.
            if history:
                histories[path] = history
        kept: set[Path] = set()
        if self.every_epochs:
            for path, history in histories.items():
                if len(history) % self.every_epochs == 0:
                    kept.add(path)
        # Of epochs that are equally good, the newest ranks last and stays.
        ranked = sorted(histories, key=lambda path: (_merit(histories[path][-1]), path.name))
        if self.best:
            kept.update(ranked[-1:])
        return kept


def prune(folder: Path, keep: RetentionPolicy) -> None:
    """Remove the checkpoints of a training whose result is safe, except those to keep."""
    present = sorted(folder.glob("step_*"))
    # Folders that a killed process was writing are removed too.
    unfinished = folder.glob(".step_*.unfinished")
    for old in {*present, *unfinished} - keep.after_training(present):
        shutil.rmtree(old, ignore_errors=True)


def _epochs(path: Path) -> list[Mapping[str, float]]:
    """Return the metrics of each epoch up to the one that ended with this checkpoint.

    The list is empty if the checkpoint was saved in the middle of an epoch.
    """
    # A damaged checkpoint counts as one in the middle of an epoch: it is not worth keeping.
    with suppress(OSError, ValueError, KeyError, TypeError):
        progress: dict[str, Any] = read_json(path / MANIFEST)["progress"]
        # The sums start again at zero when an epoch ends.
        if not any(progress["sums"]):
            return progress["history"]
    return []


def _merit(metrics: Mapping[str, float]) -> float:
    """Return how good an epoch is: its accuracy, or the negative loss if it has no accuracy."""
    if "val/top1" in metrics:
        return metrics["val/top1"]
    # Pre-training has no classes; epochs without validation have the training's loss alone.
    if "val/reconstruction_loss" in metrics:
        return -metrics["val/reconstruction_loss"]
    return -metrics.get("train/loss", 0.0)
