"""Runs of a small study, made up, as MLflow would return them."""

from dataclasses import dataclass, field
from pathlib import Path

import yaml
from conftest import tiny_tree

from orchestration.studies.trial import Study

STUDY = """\
title: "Mask ratio & 100 %"
recipe: recipe.yaml
seeds: [0, 1]
axes:
  ρ:
    50 %: {mask.ratio: 0.5}
    75 %: {mask.ratio: 0.75}
paper:
  top1: {75 %: 69.46}
table: {columns: [top1, gflops]}
figure: {kind: points, x: gflops, y: [top1], chance: true}
"""


def write_studies(folder: Path, videos: Path, studies: dict[str, str]) -> None:
    """Write study files into a folder, and the tiny recipe that they share."""
    tree = tiny_tree(videos)
    tree["recipe"]["epochs"] = 2
    (folder / "recipe.yaml").write_text(yaml.safe_dump(tree))
    for name, text in studies.items():
        (folder / name).write_text(text)


@dataclass
class Run:
    identity: str
    metrics: dict[str, float]
    status: str = "FINISHED"
    weights: str | None = None
    run_id: str = field(default="run")
    has_model: bool = True
    was_trained: bool = True


def runs(study: Study, *top1: float) -> list[Run]:
    values = zip(study.trials, top1, strict=False)
    return [
        Run(trial.identity, {"test/top1": value, "throughput/clips_per_s": 50.0})
        for trial, value in values
    ]
