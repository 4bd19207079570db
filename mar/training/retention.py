"""Which checkpoints of a training stay on the disk.

Imports no torch: a launch is configured without it.
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
    """A policy; a checkpoint that it does not name goes when a newer one is whole."""

    last: int = 2
    """The newest ones: more than one, in case it is damaged. They go when the result is safe."""
    best: bool = False
    """The epoch with the best validation accuracy (in pre-training, the least loss)."""
    every_epochs: int | None = None
    """Each so many epochs' end."""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return the policy that ``last=1,best,every=10`` stands for.

        What is not said is the default.

        Raises:
            ValueError: not in the notation.
        """
        parts = [each.strip().partition("=") for each in text.split(",")]
        given = {name: value for name, _, value in parts}
        counts = {
            name: int(value) for name, value in given.items() if value.isdecimal() and int(value)
        }
        if (
            given.keys() - counts.keys() - {"best"}
            or counts.keys() - {"last", "every"}
            or given.get("best")
        ):
            raise ValueError(_EXPECTED)
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
        """Return those of a training's checkpoints, the newest last, that stay while it goes on."""
        return {*there[-self.last :], *self.after_training(there)}

    def after_training(self, there: list[Path]) -> set[Path]:
        """Return those that stay when the training is over."""
        if not self.best and not self.every_epochs:
            return set()
        ends = {path: history for path in there if (history := _epochs(path))}
        every = self.every_epochs
        kept = {path for path, history in ends.items() if every and len(history) % every == 0}
        ranked = sorted(ends, key=lambda path: (_merit(ends[path][-1]), path.name))
        return kept | {*(ranked[-1:] if self.best else [])}


def prune(folder: Path, keep: RetentionPolicy) -> None:
    """Remove the checkpoints of a training whose result is safe, but for those to be kept."""
    there = sorted(folder.glob("step_*"))
    for old in {*there, *folder.glob(".step_*.unfinished")} - keep.after_training(there):
        shutil.rmtree(old, ignore_errors=True)


def _epochs(path: Path) -> list[Mapping[str, float]]:
    """Return the metrics of each epoch that ended with this checkpoint or before.

    None in the middle of one.
    """
    with suppress(OSError, ValueError, KeyError, TypeError):  # damaged
        progress: dict[str, Any] = read_json(path / MANIFEST)["progress"]
        return [] if any(progress["sums"]) else progress["history"]
    return []


def _merit(metrics: Mapping[str, float]) -> float:
    return metrics.get(
        "val/top1", -metrics.get("val/reconstruction_loss", metrics.get("train/loss", 0.0))
    )
