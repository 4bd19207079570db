import csv
import io
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import tiny_tree
from safetensors.torch import save_file
from scipy import stats
from study_runs import STUDY, Run, runs

from mar.data.annotations import read_split
from mar.errors import Failure, UserError
from mar.evaluation.correctness import CORRECTNESS, write_correctness
from mar.model.flops import cost
from orchestration.reporting.drawing.matplotlib_figures import draw
from orchestration.reporting.figures import figure_info
from orchestration.reporting.paired_tests import (
    Comparison,
    Correctness,
    compare,
    holm_corrected,
    mcnemar,
)
from orchestration.reporting.rows import Cell
from orchestration.reporting.significance import claims, read_correctness
from orchestration.reporting.study_report import findings, write_report
from orchestration.reporting.study_results import StudyResults
from orchestration.reporting.table_formats import (
    FORMATS,
    cell_text,
    latex_escaped,
    to_latex,
    to_markdown,
)
from orchestration.reporting.tables import table_info
from orchestration.studies.loader import read_study
from orchestration.studies.matching import match
from orchestration.studies.plan import Planned, plan_json, plan_text, plan_trials
from orchestration.studies.trial import Study

CLAIMS = """\
claims:
  Less hidden is better: [50 % > 75 %]
  More hidden is better: [75 % > 50 %]
table: {columns: [top1], reference: 50 %}"""


def no_result(run: Run, name: str) -> Path:
    raise Failure(f"{name} of {run.run_id}: there is no result folder")


@pytest.fixture
def study(tmp_path: Path, videos: Path) -> Study:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tiny_tree(videos)))
    (tmp_path / "study.yaml").write_text(STUDY)
    return read_study(str(tmp_path / "study.yaml"))


def test_a_cell_has_the_mean_and_the_t_interval_of_its_seeds(study: Study) -> None:
    cell = StudyResults.match(study, runs(study, 70.0, 71.0, 69.0, 69.0)).rows[0].cells["top1"]
    low, high = stats.t.interval(0.95, 1, loc=70.5, scale=stats.sem([70.0, 71.0]))
    assert (cell.status, cell.mean) == ("complete", 70.5)
    assert cell.half_width == pytest.approx((high - low) / 2)


def test_missing_and_partial_cells_are_visible_as_such(study: Study) -> None:
    found = StudyResults.match(study, runs(study, 70.0)).rows
    assert [row.cells["top1"].status for row in found] == ["partial", "missing"]
    text = to_markdown(table_info(StudyResults.match(study, runs(study, 70.0))))
    assert "70.00 (1 of 2)" in text
    assert "1 of 4 trials are finished" in text
    assert cell_text(Cell("missing"), 2, 2) == "–"


def test_a_run_that_failed_or_has_other_settings_fills_no_cell(study: Study) -> None:
    failed = [Run(trial.identity, {"test/top1": 1.0}, status="FAILED") for trial in study.trials]
    assert match(study.trials, failed) == {}
    assert match(study.trials, [Run("{}", {"test/top1": 1.0}), Run("", {})]) == {}


def test_a_run_from_before_a_setting_existed_still_counts(study: Study) -> None:
    before = json.loads(study.trials[0].identity)
    del before["mask"]["temporal"]
    assert list(match(study.trials, [Run(json.dumps(before), {})])) == [study.trials[0].key]


def test_the_paper_stands_beside_ours_and_is_never_mixed_with_it(study: Study) -> None:
    text = to_markdown(table_info(StudyResults.match(study, runs(study, 70.0, 71.0, 69.0, 69.5))))
    header, _, first, second = text.splitlines()[2:6]
    assert [cell.strip() for cell in header.split("|")[1:4]] == ["ρ", "Top-1 (%)", "paper"]
    assert first.split("|")[3].strip() == "–"
    assert second.split("|")[3].strip() == "69.46"
    assert "70.50 [70.00, 71.00]" in first, "of two seeds the range"
    assert "**" not in first, "two seeds do not tell the two rows apart"
    assert "Each row is the mean over n = 2 trainings; beside it: [least, greatest]." in text
    apart = to_markdown(table_info(StudyResults.match(study, runs(study, 70.0, 70.1, 60.0, 60.1))))
    assert "**70.05 [70.00, 70.10]**" in apart


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_shows_every_row(study: Study, form: str) -> None:
    text = FORMATS[form](table_info(StudyResults.match(study, runs(study, 70.0, 71.0, 69.0, 69.5))))
    assert "70.5" in text
    assert ("75 \\%" if form == "tex" else "75 %") in text


def test_latex_is_escaped_and_uses_booktabs(study: Study) -> None:
    text = to_latex(table_info(StudyResults.match(study, [])))
    assert "\\caption{Mask ratio \\& 100 \\%" in text
    assert "\\toprule" in text
    assert "\\label{tab:study}" in text
    assert latex_escaped("a_b × ρ \\ 5 %") == "a\\_b $\\times$ $\\rho$ \\textbackslash{} 5 \\%"


@pytest.mark.parametrize(
    ("text", "printed"),
    [
        ("α → ω", "$\\alpha$ $\\to$ $\\omega$"),
        ("λ < Λ", "$\\lambda$ $<$ $\\Lambda$"),
        ("a|b", "a$|$b"),
    ],
)
def test_latex_has_every_letter_and_sign(text: str, printed: str) -> None:
    assert latex_escaped(text) == printed


def test_a_first_cell_in_brackets_is_no_length_to_latex(tmp_path: Path, videos: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tiny_tree(videos)))
    text = (
        'title: "Cells."\nrecipe: recipe.yaml\naxes:\n  cell:\n    "[2, 2]": {mask.cell: [2, '
        '2]}\n    "[4, 4]": {mask.cell: [4, 4]}\n'
    )
    (tmp_path / "cells.yaml").write_text(text)
    printed = to_latex(table_info(StudyResults.match(read_study(str(tmp_path / "cells.yaml")), [])))
    assert "\n{}[2, 2] &" in printed and ".." not in printed


def test_csv_is_unrounded_and_json_says_the_same(study: Study) -> None:
    info = table_info(StudyResults.match(study, runs(study, 70.123456, 71.0)))
    table = list(csv.DictReader(io.StringIO(FORMATS["csv"](info))))
    assert float(table[0]["mean"]) == pytest.approx((70.123456 + 71.0) / 2)
    assert json.loads(FORMATS["json"](info))["cells"][0]["values"] == [70.123456, 71.0]


def test_the_figure_shows_what_is_there_and_names_what_is_not(study: Study, tmp_path: Path) -> None:
    info = figure_info(StudyResults.match(study, runs(study, 70.0, 71.0)))
    assert info.series[0].y == [70.5]
    assert info.series[0].labels == ["50 %"]
    assert (info.missing, info.chance) == (["75 %"], 50.0)
    draw(info, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_a_partial_row_is_named_in_the_figure(study: Study) -> None:
    assert figure_info(StudyResults.match(study, runs(study, 70.0))).partial == ["50 %"]


def test_videos_that_were_not_counted_are_told_below_the_table(study: Study) -> None:
    (run,) = runs(study, 70.0)
    run.metrics |= {"test/num_broken": 3.0, "test/num_videos": 5.0}
    assert "50 %: over 5 videos; 3 more could not be decoded." in to_markdown(
        table_info(StudyResults.match(study, [run]))
    )


def test_a_table_needs_no_videos(study: Study, tmp_path: Path) -> None:
    finished = runs(study, 70.0, 71.0, 69.0, 69.0)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("motion-verbs", "moved-away"))
    elsewhere = read_study(str(tmp_path / "study.yaml"))
    assert [row.finished for row in StudyResults.match(elsewhere, finished).rows] == [2, 2]


def test_a_report_leaves_what_else_is_in_the_folder(study: Study, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("chapter 1")
    write_report(StudyResults.match(study, [], no_result), tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "chapter 1"


def test_a_finished_study_without_top1_in_its_table_still_reports_it(
    study: Study, tmp_path: Path
) -> None:
    text = STUDY.replace("columns: [top1, gflops]", "columns: [gflops]").replace(
        "y: [top1]", "y: [params]"
    )
    (tmp_path / "study.yaml").write_text(text)
    assert findings(
        StudyResults.match(read_study(str(tmp_path / "study.yaml")), runs(study, 70.0, 70.0))
    )[0].startswith("Best: 50 %")


def test_the_report_is_complete(study: Study, tmp_path: Path) -> None:
    write_report(
        StudyResults.match(study, runs(study, 70.0, 71.0, 69.0, 69.5), no_result),
        tmp_path / "report",
    )
    names = {path.name for path in (tmp_path / "report").iterdir()}
    assert {f"table.{form}" for form in FORMATS} | {
        "figure.png",
        "figure.pdf",
        "report.html",
        "report.md",
    } <= names
    assert findings(StudyResults.match(study, runs(study, 70.0, 71.0)))[0].startswith(
        "Best: 50 %, 70.50 % top-1"
    )
    assert findings(StudyResults.match(study, [])) == ["No trial is finished yet."]


def test_a_plan_says_what_is_there_and_what_the_rest_will_take(study: Study) -> None:
    lines = plan_trials(study, runs(study, 70.0))
    assert [line.state for line in lines] == ["have", "new", "new", "new"]
    assert lines[0].num_clips == 16 * 3
    # At the finished trial's rate: its clips, then the views of one validation each epoch and of
    # the test.
    settings = study.trials[1].settings
    views = 3 // settings.evaluation.every_epochs
    views += settings.evaluation.clips * settings.evaluation.crops
    views *= len(read_split(settings.data, "val"))
    figures = cost(settings)
    seconds = (48 + views * figures.gflops / figures.train_gflops) / 50
    assert lines[1].device_hours == pytest.approx(seconds / 3600)
    assert json.loads(plan_json(lines))[0]["run_id"] == "run"
    assert "4 trials: 1 finished, 3 to train" in plan_text(lines)


def test_a_plan_without_a_finished_trial_guesses_no_hours(study: Study) -> None:
    assert plan_trials(study, [])[0].device_hours is None


def test_an_equal_trial_is_planned_once(study: Study, tmp_path: Path) -> None:
    (tmp_path / "study.yaml").write_text(STUDY.replace("0.75}", "0.5}"))
    lines = plan_trials(read_study(str(tmp_path / "study.yaml")), [])
    assert [line.state for line in lines] == ["new", "new", "same", "same"]


def test_a_thousand_trials_are_planned_without_torch_or_ray(tmp_path: Path, videos: Path) -> None:
    import subprocess
    import sys

    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tiny_tree(videos)))
    text = STUDY.replace("seeds: [0, 1]", f"seeds: {list(range(500))}")
    (tmp_path / "study.yaml").write_text(text)
    program = (
        "import sys; from orchestration.studies.plan import plan_trials; from "
        "orchestration.studies.loader import read_study;"
        "assert len(plan_trials(read_study(sys.argv[1]), [])) == 1000;"
        "assert not {'torch', 'ray', 'mlflow', 'scipy', 'pandas'} & sys.modules.keys(), 'heavy'"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "study.yaml")], check=True)


def test_without_the_weights_at_hand_their_name_decides(study: Study, tmp_path: Path) -> None:
    for name, value in (("a", 0.0), ("b", 1.0)):
        save_file(
            {"encoder.embed.weight": torch.full((1, 1), value)}, tmp_path / f"{name}.safetensors"
        )
    names = [str(tmp_path / f"{name}.safetensors") for name in "ab"]
    file = str(tmp_path / f"{study.name}.yaml")
    trained = [read_study(file, [f"encoder.weights={name}"]).trials[0] for name in names]
    records = [
        Run(trial.identity, {"test/top1": 1.0}, weights=name, run_id=name)
        for trial, name in zip(trained, names, strict=True)
    ]
    for name in names:
        Path(name).unlink()
    for name in names:
        trials = read_study(file, [f"encoder.weights={name}"]).trials[:1]
        assert [record.run_id for record in match(trials, records).values()] == [name]


# Statistics


def test_mcnemar_is_the_exact_test_of_the_discordant_videos() -> None:
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(10, 2) == pytest.approx(2 * stats.binom.cdf(2, 12, 0.5))


def answers(*correct: float) -> Correctness:
    return Correctness.of({f"{number}.mp4": bool(value) for number, value in enumerate(correct)})


def test_two_rows_are_compared_over_the_same_videos() -> None:
    draws = np.random.default_rng(0)
    other = draws.random(2000) < 0.6
    one = other ^ (draws.random(2000) < 0.1)
    gap = compare([answers(*one)], [answers(*other)])
    assert gap
    assert gap.difference == pytest.approx(100 * (one.mean() - other.mean()))
    reference = stats.bootstrap(
        (one.astype(float) - other,), np.mean, n_resamples=4000, method="percentile", rng=1
    )
    low, high = reference.confidence_interval
    assert (gap.low, gap.high) == (
        pytest.approx(100 * low, abs=0.15),
        pytest.approx(100 * high, abs=0.15),
    )
    discordant = int((one & ~other).sum()), int((other & ~one).sum())
    assert gap.p == pytest.approx(stats.binomtest(discordant[0], sum(discordant)).pvalue)
    assert compare([answers(1)], [Correctness.of({"another.mp4": True})]) is None


def test_seeds_that_disagree_widen_the_interval() -> None:
    base, better = answers(*[1] * 50 + [0] * 50), answers(*[1] * 70 + [0] * 30)
    steady, unsteady = (
        compare([better, better], [base, base]),
        compare([better, base, better], [base, better, base]),
    )
    assert steady and unsteady
    assert unsteady.high - unsteady.low > steady.high - steady.low
    assert steady.is_significant and not unsteady.is_significant


def test_rows_that_test_the_same_trainings_are_compared_training_by_training() -> None:
    """Trainings that differ by much, and a test that is a little better for each of them."""
    rng = np.random.default_rng(0)
    ease = rng.standard_normal(2000)
    names = [f"{number}.mp4" for number in range(2000)]

    def tested(level: float, bonus: float, training: str) -> Correctness:
        right = ease + level + bonus > 0
        return replace(Correctness.of(dict(zip(names, right, strict=True))), training=training)

    levels = {"a": -0.5, "b": 0.0, "c": 0.5}
    plain = [tested(level, 0.0, name) for name, level in levels.items()]
    better = [tested(level, 0.1, name) for name, level in levels.items()]
    found = compare(better, plain)
    apart = compare(better, [replace(each, training="") for each in plain])
    assert found and apart
    assert found.difference == apart.difference > 2
    assert found.is_significant and not apart.is_significant
    assert found.high - found.low < (apart.high - apart.low) / 5


def test_many_rows_need_stronger_evidence() -> None:
    def gap(p: float) -> Comparison:
        return Comparison(1.0, 0.0, 2.0, p, 100)

    found = holm_corrected({"a": gap(0.01), "b": gap(0.02), "c": gap(0.04), "d": None})
    assert [each.p if each else None for each in found.values()] == [
        pytest.approx(0.03),
        pytest.approx(0.04),
        pytest.approx(0.04),
        None,
    ]


def test_a_claim_is_supported_contradicted_or_left_open(study: Study, tmp_path: Path) -> None:
    text = STUDY.replace("seeds: [0, 1]", "seeds: [0]").replace(
        "table: {columns: [top1, gflops]}", CLAIMS
    )
    (tmp_path / "study.yaml").write_text(text)
    study = read_study(str(tmp_path / "study.yaml"))
    correct = {"50 %": 90, "75 %": 50}
    records = [
        Run(
            trial.identity,
            {"test/top1": float(correct[trial.row])},
            run_id=trial.row.removesuffix(" %"),
        )
        for trial in study.trials
    ]

    def file_of(run: Run, name: str) -> Path:
        if name != "predictions.csv":
            raise Failure(f"this result has no {name}")
        lines = [
            f"{video}.mp4,0,{int(video >= correct[f'{run.run_id} %'])}" for video in range(100)
        ]
        file = tmp_path / f"{run.run_id}.csv"
        file.write_text("\n".join(["video,label,class_1", *lines]))
        return file

    judged = {
        claim.text: claim.verdict for claim in claims(StudyResults.match(study, records, file_of))
    }
    assert judged == {
        "Less hidden is better": "supported in one training",
        "More hidden is better": "contradicted in one training",
    }
    assert claims(StudyResults.match(study, records[:1], file_of))[0].verdict == "missing"
    text = to_markdown(table_info(StudyResults.match(study, records, file_of)))
    assert "-40.00 [" in text and "to 50 %" in text
    correct["75 %"] = 89
    assert [claim.verdict for claim in claims(StudyResults.match(study, records, file_of))] == [
        "open in one training"
    ] * 2
    assert "≈" in to_markdown(table_info(StudyResults.match(study, records, file_of)))


def test_a_finished_run_whose_files_are_lost_is_left_out_and_named(
    study: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = STUDY.replace("table: {columns: [top1, gflops]}", CLAIMS)
    (tmp_path / "study.yaml").write_text(text)
    study = read_study(str(tmp_path / "study.yaml"))

    def file_of(run: Run, name: str) -> Path:
        raise Failure(
            f"{name} of {tmp_path} is lost"
        )  # a text of this test: a note is printed once

    results = StudyResults.match(study, runs(study, 70.0, 71.0, 69.0, 69.5), file_of)
    table, _ = write_report(results, tmp_path / "report")
    assert "70.50" in table, "its metrics are in MLflow"
    assert {claim.verdict for claim in claims(results)} == {"missing"}
    assert f"predictions.csv of {tmp_path} is lost" in capsys.readouterr().err


def test_answers_come_back_from_their_file_and_equal_those_of_the_predictions(
    tmp_path: Path,
) -> None:
    correct, names = (
        np.random.default_rng(0).random(101) < 0.5,
        [f"{number}.mp4" for number in range(101)],
    )
    write_correctness(correct, names, tmp_path / CORRECTNESS)
    lines = [f"{name},0,{int(not each)}" for name, each in zip(names, correct, strict=True)]
    (tmp_path / "predictions.csv").write_text("\n".join(["video,label,class_1", *lines]))
    run = Run("", {})
    stored = read_correctness(run, lambda _, name: tmp_path / name)
    # A damaged file is read from the predictions, as a missing one: cut, or with a byte changed.
    whole = (tmp_path / CORRECTNESS).read_bytes()
    damaged = [whole[:length] for length in range(0, len(whole), 50)]
    damaged += [whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :] for at in range(0, 300, 7)]
    for content in damaged:
        (tmp_path / CORRECTNESS).write_bytes(content)
        found = read_correctness(run, lambda _, name: tmp_path / name)
        assert np.array_equal(found.correct, correct)
    (tmp_path / CORRECTNESS).unlink()
    predicted = read_correctness(run, lambda _, name: tmp_path / name)
    assert np.array_equal(stored.correct, correct) and np.array_equal(predicted.correct, correct)
    assert stored.videos_digest == predicted.videos_digest and stored.names() == names
    other = Correctness.of(
        {name: bool(each) for name, each in zip(reversed(names), reversed(correct), strict=True)}
    )
    gap = compare([stored], [other])  # the same videos in another order
    assert gap and gap.difference == 0 and gap.num_videos == 101


def trainings(
    seeds: Sequence[float], num_videos: int, rng: np.random.Generator
) -> list[Correctness]:
    """Return models that are right on so large a share of the videos, each on its own."""
    return [answers(*(rng.random(num_videos) < share)) for share in seeds]


def test_where_seeds_differ_much_the_test_is_students_over_their_accuracies() -> None:
    rng = np.random.default_rng(0)
    one, other = (
        trainings((0.60, 0.66, 0.70), 20_000, rng),
        trainings((0.50, 0.58, 0.61), 20_000, rng),
    )
    found = compare(one, other)
    assert found
    accuracies = [[each.correct.mean() for each in row] for row in (one, other)]
    assert found.p == pytest.approx(stats.ttest_ind(*accuracies).pvalue, rel=0.15)
    assert found.num_seeds == 3


def test_where_seeds_agree_the_videos_decide() -> None:
    rng = np.random.default_rng(0)
    (one,), (other,) = trainings((0.6,), 4000, rng), trainings((0.5,), 4000, rng)
    found, single = compare([one, one, one], [other, other, other]), compare([one], [other])
    assert found and single
    assert (found.low, found.high) == (
        pytest.approx(single.low, abs=0.05),
        pytest.approx(single.high, abs=0.05),
    )


def test_several_seeds_can_be_told_apart_in_a_table_of_many_rows() -> None:
    rng = np.random.default_rng(0)
    gap = compare(trainings((0.7, 0.7, 0.7), 4000, rng), trainings((0.5, 0.5, 0.5), 4000, rng))
    found = holm_corrected({str(number): gap for number in range(200)})
    assert all(each and each.is_significant for each in found.values())


@pytest.mark.parametrize("seeds", [1, 2, 3, 5])
def test_settings_that_do_not_differ_are_seldom_told_apart(seeds: int) -> None:
    """Few simulations here.

    ``benchmarks/false_positives.py`` has many, at two sizes and more spreads.
    """
    rng = np.random.default_rng(seeds)
    output = 0
    for _ in range(200):
        ease = 0.6 + rng.standard_normal(800)
        rows: list[list[Correctness]] = []
        for _ in range(2):
            setting = ease + 0.3 * rng.standard_normal(800)
            spread = 0.0 if seeds == 1 else 0.02
            scores = [
                setting + spread * rng.standard_normal() + 0.4 * rng.standard_normal(800)
                for _ in range(seeds)
            ]
            rows.append([Correctness(each > 0, "the same videos", list) for each in scores])
        comparison = compare(*rows)
        output += bool(comparison and comparison.is_significant)
    assert output <= 22, "at 6 % 12 of 200 are to be expected, and 22 once in two hundred times"


def test_a_table_says_the_spread_that_was_asked_for(study: Study, tmp_path: Path) -> None:
    for spread, shown in (
        ("interval", "70.50 ± 6.35"),
        ("std", "70.50 ± 0.71"),
        ("range", "70.50 [70.00, 71.00]"),
    ):
        text = STUDY.replace(
            "table: {columns: [top1, gflops]}", f"table: {{columns: [top1], spread: {spread}}}"
        )
        (tmp_path / "study.yaml").write_text(text)
        chosen = read_study(str(tmp_path / "study.yaml"))
        assert shown in to_markdown(
            table_info(StudyResults.match(chosen, runs(chosen, 70.0, 71.0, 69.0, 69.5)))
        )


def test_every_column_of_a_pivot_has_its_own_gains(tmp_path: Path, videos: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tiny_tree(videos)))
    (tmp_path / "study.yaml").write_text(
        "title: Pivot\nrecipe: recipe.yaml\n"
        "axes:\n"
        "  ρ: {50 %: {mask.ratio: 0.5}, 75 %: {mask.ratio: 0.75}}\n"
        "  Test: {a: {evaluation.mask.start: 0}, b: {evaluation.mask.start: 1}}\n"
        "table: {columns: [top1], pivot: Test, delta: {ρ: 50 %}}\n"
    )
    study = read_study(str(tmp_path / "study.yaml"))
    # In the study's order: 50 % / a, 50 % / b, 75 % / a, 75 % / b.
    table = table_info(StudyResults.match(study, runs(study, 70.0, 60.0, 71.0, 58.0)))
    head, _, _, second = to_markdown(table).splitlines()[2:6]
    cells = dict(
        zip(
            [cell.strip() for cell in head.split("|")],
            [cell.strip() for cell in second.split("|")],
            strict=True,
        )
    )
    assert (cells["Δ, a"], cells["Δ, b"]) == ("+1.00", "-2.00")


def test_a_ratio_is_relative_to_the_reference_row(tmp_path: Path, videos: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tiny_tree(videos)))
    file = tmp_path / "study.yaml"
    text = (
        "title: Speed\nrecipe: recipe.yaml\n"
        "axes: {ρ: {0 %: {mask.ratio: 0.0}, 75 %: {mask.ratio: 0.75}}}\n"
        "table: {columns: [clips_per_s_ratio, train_gflops_ratio]REFERENCE}\n"
    )
    file.write_text(text.replace("REFERENCE", ", reference: 0 %"))
    study = read_study(str(file))
    found = [
        Run(trial.identity, {"throughput/clips_per_s": speed})
        for trial, speed in zip(study.trials, (40.0, 100.0), strict=True)
    ]
    rows = StudyResults.match(study, found).rows
    assert [row.cells["clips_per_s_ratio"].mean for row in rows] == [1.0, 2.5]
    whole, part = (cost(trial.settings).train_gflops for trial in study.trials)
    assert rows[1].cells["train_gflops_ratio"].mean == pytest.approx(part / whole)
    # Without the reference row's run there is no ratio.
    rows = StudyResults.match(study, found[1:]).rows
    assert {row.cells["clips_per_s_ratio"].status for row in rows} == {"missing"}
    file.write_text(text.replace("REFERENCE", ""))
    with pytest.raises(UserError, match="clips_per_s_ratio is relative to a row"):
        read_study(str(file))


def test_a_study_without_a_finished_trial_takes_the_speed_of_earlier_studies(study: Study) -> None:
    earlier = Planned()
    plan_trials(study, runs(study, 70.0), earlier=earlier)
    other = replace(study, trials=[*reversed(study.trials)])
    alone, after = (plan_trials(other, [], earlier=each)[0] for each in (None, earlier))
    assert alone.device_hours is None
    assert after.device_hours is not None and after.device_hours > 0


def test_a_study_of_another_seed_takes_the_speed_of_the_stores_runs(study: Study) -> None:
    others = runs(study, 70.0)
    again = [
        replace(trial, settings=trial.settings.model_copy(update={"seed": 7 + trial.settings.seed}))
        for trial in study.trials
    ]
    lines = plan_trials(replace(study, trials=again), others)
    assert [line.state for line in lines] == ["new"] * 4
    here = plan_trials(study, others)
    assert lines[1].device_hours == pytest.approx(here[1].device_hours)
    # A run whose settings mean nothing today is left out.
    others[0].identity = others[0].identity.replace('"strategy": "cell"', '"strategy": "oval"')
    assert plan_trials(replace(study, trials=again), others)[0].device_hours is None
