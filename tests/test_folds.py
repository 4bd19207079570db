"""Rows that are means over an axis, as the folds of a cross-validation (``table.mean_over``)."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import tiny_tree
from scipy import stats
from study_runs import Run

from mar.errors import UserError
from mar.evaluation.correctness import CORRECTNESS, write_correctness
from orchestration.reporting.paired_tests import compare_over_folds
from orchestration.reporting.significance import claims
from orchestration.reporting.study_results import StudyResults
from orchestration.reporting.table_formats import to_markdown
from orchestration.reporting.tables import table_info
from orchestration.reporting.training_figures import confusion
from orchestration.studies.loader import read_study
from orchestration.studies.trial import Study

FOLDS = 8
STUDY = """\
title: Folds
recipe: recipe.yaml
axes:
  ρ:
    50 %: {mask.ratio: 0.5}
    75 %: {mask.ratio: 0.75}
  Fold:
FOLDS
claims: {Less is better: [50 % > 75 %]}
table: {columns: [top1], mean_over: Fold, reference: 50 %}
"""
VIDEOS = 40
# Shares of right videos, by fold. The folds are of different difficulty; the rows differ by little.
HARD = np.linspace(0.2, 0.8, FOLDS)


@pytest.fixture
def study(tmp_path: Path, videos: Path) -> Study:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tiny_tree(videos)))
    # A setting that makes each fold a trial of its own, as another list of videos would.
    folds = "\n".join(f"    f{n}: {{recipe.clip_grad: {n + 1}.0}}" for n in range(FOLDS))
    (tmp_path / "study.yaml").write_text(STUDY.replace("FOLDS", folds))
    return read_study(str(tmp_path / "study.yaml"))


@pytest.fixture
def results(study: Study, tmp_path: Path) -> Callable[..., StudyResults]:
    """Make up the results of all trials, with each row's count of right videos in each fold."""

    def made(gain: np.ndarray, finished: int = 2 * FOLDS) -> StudyResults:
        runs: list[Run] = []
        for number, trial in enumerate(study.trials[:finished]):
            row, fold = divmod(number, FOLDS)
            share = HARD[fold] - row * gain[fold]
            right = np.arange(VIDEOS) < round(share * VIDEOS)
            folder = tmp_path / str(number)
            folder.mkdir(exist_ok=True)
            names = [f"fold {fold} video {video}.mp4" for video in range(VIDEOS)]
            write_correctness(right, names, folder / CORRECTNESS)
            lines = [f"{name},0,{int(not each)}" for name, each in zip(names, right, strict=True)]
            (folder / "predictions.csv").write_text("\n".join(["video,label,class_1", *lines]))
            top1 = {"test/top1": 100 * float(right.mean())}
            runs.append(Run(trial.identity, top1, run_id=str(number)))
        return StudyResults.match(study, runs, lambda run, name: tmp_path / run.run_id / name)

    return made


def test_a_row_is_the_mean_over_its_folds_with_their_interval(
    results: Callable[..., StudyResults],
) -> None:
    found = results(np.full(FOLDS, 0.1))
    assert [row.labels for row in found.rows] == [("50 %",), ("75 %",)]
    cell = found.rows[0].cells["top1"]
    values = [100 * round(share * VIDEOS) / VIDEOS for share in HARD]
    assert cell.mean == pytest.approx(np.mean(values))
    low, high = stats.t.interval(0.95, FOLDS - 1, loc=np.mean(values), scale=stats.sem(values))
    assert cell.half_width == pytest.approx((high - low) / 2)
    text = to_markdown(table_info(found))
    assert "mean over 8 labels of Fold" in text
    assert "| ρ " in text and "Fold   " not in text


def test_rows_are_compared_fold_by_fold(results: Callable[..., StudyResults]) -> None:
    """The folds differ by 60 points and the rows by 10: only the pairs can tell them apart."""
    rng = np.random.default_rng(0)
    gain = 0.1 + rng.normal(0, 0.02, FOLDS)
    found = results(gain)
    comparison = table_info(found).comparisons["75 %"]
    first, second = (row.cells["top1"].values for row in found.rows)
    gaps = np.subtract(second, first)
    plain = stats.ttest_rel(second, first)
    assert comparison.difference == pytest.approx(gaps.mean())
    assert comparison.is_significant and comparison.num_seeds == FOLDS
    # Folds share training videos: the interval is wider than of independent pairs, by this factor.
    low, high = plain.confidence_interval()
    wider = np.sqrt(1 + FOLDS / (FOLDS - 1))
    assert comparison.high - comparison.low == pytest.approx((high - low) * wider)
    assert comparison.p > plain.pvalue
    (claim,) = claims(found)
    assert claim.verdict == "supported"


def test_folds_that_are_missing_are_counted_and_compare_nothing(
    results: Callable[..., StudyResults],
) -> None:
    found = results(np.full(FOLDS, 0.1), finished=FOLDS + 3)
    text = to_markdown(table_info(found))
    assert "(3 of 8)" in text
    assert "11 of 16 folds (Fold) are finished" in text
    assert not table_info(found).comparisons
    assert compare_over_folds({"a": []}, {"b": []}) is None


def test_the_confusion_matrix_is_the_sum_over_the_folds(
    results: Callable[..., StudyResults],
) -> None:
    counts = confusion(results(np.full(FOLDS, 0.1)))
    assert counts is not None
    assert counts.counts.sum() == FOLDS * VIDEOS
    assert "all of Fold" in counts.title


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("{mean_over: Folds}", "no axis 'Folds'"),
        ("{mean_over: Fold, pivot: Fold}", "no axis 'Fold'"),
    ],
)
def test_a_mean_over_what_is_no_axis_is_refused(
    study: Study, tmp_path: Path, table: str, message: str
) -> None:
    text = (tmp_path / "study.yaml").read_text().split("table:")[0]
    (tmp_path / "study.yaml").write_text(f"{text}table: {table}\n")
    with pytest.raises(UserError, match=message):
        read_study(str(tmp_path / "study.yaml"))
