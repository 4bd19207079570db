"""Figures of a study beside its table: learning curves, confusions, Pareto front, pages."""

import csv
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import tiny_tree
from sklearn.metrics import confusion_matrix
from study_runs import STUDY, Run, runs

from mar.errors import Failure, UserError
from orchestration.reporting import training_figures
from orchestration.reporting.drawing.matplotlib_figures import draw
from orchestration.reporting.drawing.plotly_figures import write_figure
from orchestration.reporting.figures import FigureInfo, Series, figure_info
from orchestration.reporting.study_report import write_report
from orchestration.reporting.study_results import StudyResults
from orchestration.reporting.training_figures import confusion, curves_info
from orchestration.studies.diff import Neighbours
from orchestration.studies.loader import read_study
from orchestration.studies.trial import Study


@pytest.fixture
def study(tmp_path: Path, videos: Path) -> Study:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tiny_tree(videos)))
    (tmp_path / "study.yaml").write_text(STUDY.replace("chance: true", "chance: true, front: true"))
    return read_study(str(tmp_path / "study.yaml"))


@pytest.fixture
def results(tmp_path: Path, study: Study) -> Path:
    """A folder with each trial's history and predictions.

    The model is right of the first ``right`` videos.
    """
    draws = np.random.default_rng(0)
    for workdir, trial in enumerate(study.trials):
        folder = tmp_path / f"run{workdir}"
        folder.mkdir()
        lines = [
            f"{epoch},{2.0 / epoch},{10.0 * epoch + workdir if epoch % 2 else ''}"
            for epoch in (1, 2, 3)
        ]
        (folder / "history.csv").write_text("\n".join(["epoch,train/loss,val/top1", *lines]))
        labels = draws.integers(trial.settings.data.num_classes, size=(20, 2))
        lines = [f"{number}.mp4,{label},{taken}" for number, (label, taken) in enumerate(labels)]
        (folder / "predictions.csv").write_text("\n".join(["video,label,class_1", *lines]))
    return tmp_path


def finished(study: Study, *top1: float) -> list[Run]:
    found = runs(study, *top1)
    for workdir, run in enumerate(found):
        run.run_id = f"run{workdir}"
    return found


def test_learning_curves_are_the_mean_over_seeds_of_what_was_validated(
    study: Study, results: Path
) -> None:
    info = curves_info(
        StudyResults.match(
            study,
            finished(study, 70.0, 71.0, 69.0, 69.5),
            lambda run, name: results / run.run_id / name,
        )
    )
    assert info and info.y_title == "Top-1 (%), one view"
    assert [(each.name, each.x, each.y) for each in info.series] == [
        ("50 %", [1, 3], [10.5, 30.5]),
        ("75 %", [1, 3], [12.5, 32.5]),
    ]


def test_of_many_rows_the_best_curves_are_drawn(
    study: Study, results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_figures, "_MOST_CURVES", 1)
    info = curves_info(
        StudyResults.match(
            study,
            finished(study, 70.0, 71.0, 69.0, 69.5),
            lambda run, name: results / run.run_id / name,
        )
    )
    assert info and [each.name for each in info.series] == ["75 %"]
    assert info.title.endswith("learning curves of the best 1 rows of 2")


def test_a_result_without_a_history_has_no_curve_and_breaks_no_report(
    study: Study, tmp_path: Path
) -> None:
    def nowhere(run: Run, name: str) -> Path:
        raise Failure("it is in neither place")

    records = finished(study, 70.0, 71.0, 69.0, 69.5)
    assert curves_info(StudyResults.match(study, records, nowhere)) is None
    assert confusion(StudyResults.match(study, records, nowhere)) is None
    write_report(StudyResults.match(study, records, nowhere), tmp_path / "report")
    assert not (tmp_path / "report" / "curves.png").exists()


def test_the_confusion_is_the_best_rows_and_counts_as_scikit_learn_does(
    study: Study, results: Path
) -> None:
    found = confusion(
        StudyResults.match(
            study,
            finished(study, 60.0, 61.0, 69.0, 69.5),
            lambda run, name: results / run.run_id / name,
        )
    )
    assert found and found.title.endswith("75 % (seed 0)")
    lines = list(csv.DictReader((results / "run2" / "predictions.csv").open()))
    labels, taken = [int(line["label"]) for line in lines], [int(line["class_1"]) for line in lines]
    assert (found.counts == confusion_matrix(labels, taken, labels=range(len(found.names)))).all()


def test_the_pareto_front_has_only_rows_that_no_other_beats(study: Study) -> None:
    worse_and_dearer = figure_info(
        StudyResults.match(study, runs(study, 60.0, 60.0, 69.0, 69.0))
    ).series[-1]
    dearer_but_better = figure_info(
        StudyResults.match(study, runs(study, 70.0, 70.0, 69.0, 69.0))
    ).series[-1]
    assert (worse_and_dearer.name, worse_and_dearer.labels) == ("Pareto front", ["75 %"])
    assert dearer_but_better.labels == ["75 %", "50 %"]


@pytest.mark.parametrize(("costs", "is_log"), [([0.02, 86.0], True), ([41.0, 180.0], False)])
def test_costs_that_are_far_apart_have_a_logarithmic_axis(costs: list[float], is_log: bool) -> None:
    series = Series("ours", ["a", "b"], costs, [70.0, 71.0], [0.0, 0.0])
    info = FigureInfo("t", "points", "GFLOPs", "top-1", [series], None, ["a", "b"], [], [])
    assert info.has_log_x == is_log
    assert not replace(info, kind="curves").has_log_x
    # Rows that have no cost stand side by side, from 0 on.
    rows = replace(series, x=[0.0, 40.0])
    assert not replace(info, series=[rows]).has_log_x


def test_points_that_are_joined_have_their_series_names_alone(tmp_path: Path) -> None:
    points = Series("random", ["75 %", "50 %"], [2.0, 1.0], [60.0, 50.0], [1.0, 2.0])
    info = FigureInfo("Lines", "points", "GFLOPs", "Top-1 (%)", [points], None, [], [], [])
    for has_lines in (False, True):
        draw(replace(info, has_lines=has_lines), tmp_path / f"{has_lines}.svg")
    labelled = (tmp_path / "False.svg").read_text()
    joined = (tmp_path / "True.svg").read_text()
    assert "<!-- 75 % -->" in labelled and "<!-- 75 % -->" not in joined
    # From the left to the right, whatever the rows' order.
    line = re.search(
        r'<g id="line2d_\d+">\s*<path d="M ([\d.]+) [\d.]+ \s*L ([\d.]+) [\d.]+ \s*" '
        r"clip-path",
        joined,
    )
    assert line and float(line[1]) < float(line[2])


def test_an_html_figure_needs_nothing_else_and_shows_labels_as_text(
    study: Study, tmp_path: Path
) -> None:
    renamed = study.file.model_copy(update={"title": "<script>alert(1)</script>"})
    write_figure(
        StudyResults.match(
            Study(study.name, renamed, study.trials), runs(study, 70.0, 71.0), pytest.fail
        ),
        tmp_path / "figure.html",
    )
    page = (tmp_path / "figure.html").read_text()
    assert "Plotly.newPlot" in page and "<script>alert" not in page
    assert '<script src="' not in page and "<link" not in page
    with pytest.raises(UserError, match=r"cannot draw a \.docx file"):
        write_figure(StudyResults.match(study, [], pytest.fail), tmp_path / "figure.docx")


def test_a_report_has_every_figure_as_vector_picture_and_numbers(
    study: Study, results: Path, tmp_path: Path
) -> None:
    records = finished(study, 70.0, 71.0, 69.0, 69.5)
    write_report(
        StudyResults.match(study, records, lambda run, name: results / run.run_id / name),
        tmp_path / "report",
    )
    for name in ("figure", "curves", "confusion"):
        assert (tmp_path / "report" / f"{name}.pdf").read_bytes().startswith(b"%PDF")
        assert (tmp_path / "report" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert len((tmp_path / "report" / f"{name}.csv").read_text().splitlines()) > 2
    assert (tmp_path / "report" / "report.html").read_text().count("Plotly.newPlot(") >= 3


def test_what_keeps_a_trial_from_being_an_old_run_is_named(study: Study) -> None:
    wanted = study.trials[2]
    found = Neighbours(finished(study, 70.0, 71.0)).nearest(wanted)
    assert found and found[0] == "run0"
    assert [(each.setting, each.first, each.second) for each in found[1]] == [
        ("mask.ratio", "0.5", "0.75")
    ]
    assert Neighbours([]).nearest(wanted) is None
