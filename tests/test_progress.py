from pathlib import Path

import pytest
import yaml
from conftest import tiny_tree
from rich.console import Console

from mar.training.reports import EpochReport
from orchestration.execution.progress import LiveProgress
from orchestration.studies.loader import read_study
from orchestration.studies.trial import Trial

STUDY = """\
title: "A study"
recipe: recipe.yaml
seeds: [0, 1, 2, 3]
axes: {cell: {"[random]": {mask.cell: [2, 2]}}}
"""


@pytest.fixture
def trials(tmp_path: Path, videos: Path) -> list[Trial]:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tiny_tree(videos)))
    (tmp_path / "study.yaml").write_text(STUDY)
    return list(read_study(str(tmp_path / "study.yaml")).trials)


def figures(elapsed_s: float) -> dict[str, float]:
    return {
        "train/loss": 0.5,
        "val/top1": 60.0,
        "throughput/clips_per_s": 100.0,
        "time/elapsed_s": elapsed_s,
    }


def test_the_board_counts_estimates_and_shows_labels_as_they_are(trials: list[Trial]) -> None:
    console = Console(record=True, width=120)
    progress = LiveProgress(trials, num_finished=2, console=console)
    assert progress.summary() == "2 done, 0 running, 4 queued"
    for trial in trials[:2]:
        progress.started(trial)
        progress.epoch(trial, EpochReport(1, figures(10.0)))
    # three epochs of 10 s: 20 s are left of these two, then two more at a time take 30 s
    assert progress.seconds_left() == pytest.approx(50.0, abs=1)
    progress.finished(trials[0], {**figures(30.0), "test/top1": 70.0})
    progress.failed(trials[1], "no [space] left")
    assert progress.counts() == {"done": 3, "running": 0, "queued": 2, "failed": 1}
    console.print(progress.table())
    text = console.export_text()
    assert "[random] (seed 0)" in text
    assert "no [space] left" in text
    assert "70.00" in text


def test_a_resumed_trial_is_not_thought_to_be_faster_than_it_is(trials: list[Trial]) -> None:
    progress = LiveProgress(trials[:1], num_finished=0, console=Console(record=True))
    progress.started(trials[0])
    progress.epoch(trials[0], EpochReport(1, figures(10.0)))
    progress.epoch(trials[0], EpochReport(2, figures(20.0)))
    assert progress.seconds_left() == pytest.approx(10.0, abs=1)
