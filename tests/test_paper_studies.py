"""The paper's tables and figures as studies: what they list, share, print.

Trials that are tested and not trained.
"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from conftest import tiny_tree

from mar.config.schema import TrainingConfig
from mar.errors import UserError
from mar.model.decoder import reconstruction_target
from mar.model.encoder import patchify, take, unpatchify
from mar.model.mar import MAR
from mar.model.masking import evaluation_mask
from mar.model.pixels import to_pixels
from mar.visualization.reconstructions import rebuilt
from orchestration.config import LaunchConfig
from orchestration.execution.study_runner import run_studies
from orchestration.reporting.site import write_site
from orchestration.reporting.study_results import StudyResults
from orchestration.reporting.table_formats import to_latex, to_markdown
from orchestration.reporting.tables import table_info
from orchestration.studies.budget import Budget, Order, in_order, uses
from orchestration.studies.devices import device
from orchestration.studies.loader import paper_studies, read_study
from orchestration.studies.plan import Planned, plan_text, plan_trials
from orchestration.tracking.store import Store
from orchestration.tracking.tags import TRAINED_BY

Settings = Callable[..., TrainingConfig]
ALL = [Path(file).stem for file in paper_studies()]


def test_every_table_and_figure_of_the_paper_is_there() -> None:
    numbers = ["2", "3a", "3b", "3c", "4", "5", "6", "7", "8", "9a", "9b", "10", "11", "12", "13"]
    tables = [name.split("_")[0] for name in ALL if name.startswith("table")]
    assert tables == [f"table{number}" for number in numbers]
    assert [name.split("_")[0] for name in ALL if name.startswith("figure")] == [
        f"figure{n}" for n in (1, 3, 4, 5, 6, 7)
    ]


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(
    "recipe", [[], ["recipe=released"], ["recipe=recipes/toy.yaml", "encoder.weights=null"]]
)
def test_a_study_of_the_paper_reads_on_each_family_of_recipes_and_prints(
    name: str, recipe: list[str]
) -> None:
    study = read_study(name, recipe)
    assert study.trials
    info = table_info(StudyResults.match(study, []))
    assert study.file.title in to_markdown(info)
    assert "\\toprule" in to_latex(info)
    for column, printed in study.file.paper.items():
        assert column in (*study.file.table.columns, study.file.figure.x, *study.file.figure.y)
        assert set(printed) <= {trial.row for trial in study.trials}


def test_the_papers_numbers_are_those_of_its_costs() -> None:
    """What the two files say of GFLOPs is ours within the paper's rounding."""
    study = read_study("table6_bridging_design")
    for row in table_info(StudyResults.match(study, [])).rows:
        cell = row.cells["gflops"]
        assert cell.mean == pytest.approx(cell.paper, abs=0.015)


def test_equal_settings_are_one_training_across_all_studies() -> None:
    planned = Planned()
    lines = [
        line for name in ALL for line in plan_trials(read_study(name), [], device("v100"), planned)
    ]
    states = [line.state for line in lines]
    assert {state: states.count(state) for state in ("new", "test", "same")} == {
        "new": 70,
        "test": 15,
        "same": 43,
    }
    same = {
        line.trial.name: line.of
        for line in lines
        if line.study == "table9a_loss_weight" and line.state == "same"
    }
    assert same == {"0.1 (seed 0)": "table2_mask_sampling: 50 % / Cell / Running (seed 0)"}
    assert all(
        line.state == "test"
        for line in lines
        if line.study == "table3b_starting_states" and line.trial.row != "ABCD"
    )
    text = plan_text(lines, device("v100"))
    assert "128 trials: 0 finished, 70 to train, 15 to test only, 43 the same as another" in text
    default = next(line for line in lines if line.trial.row == "50 % / Cell / Running")
    assert default.device_hours == pytest.approx(5.9 * 32, rel=0.01), (
        "the profile is made of the paper's own hours"
    )
    with pytest.raises(UserError, match="no such profile"):
        device("tpu")


@pytest.fixture
def workdir(tmp_path: Path, videos: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tiny_tree(videos)))
    (tmp_path / "other.yaml").write_text(
        yaml.safe_dump({**tiny_tree(videos), "seed": 0, "mask": {"ratio": 0.75}})
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


CROSSED = """\
title: "Crossed"
recipe: recipe.yaml
axes:
  Testing:
    test 25 %: {evaluation.mask.ratio: 0.25}
    test 50 %: {evaluation.mask.ratio: 0.5}
  Training:
    50 %: {}
    75 %: {recipe: other.yaml}
baselines:
  Another method / 50 %: {top1: 12.3}
extra_columns:
  Another method / 50 %: {Backbone: ResNet}
claims:
  Less hidden in testing is better: [test 25 % / 50 % > test 50 % / 50 %]
paper:
  top1: {test 50 % / 50 %: 70.9, test 25 % / 50 %: 71.25}
table: {columns: [top1], pivot: Training}
"""


def test_one_training_is_tested_in_each_way_and_the_default_one_is_trained(workdir: Path) -> None:
    (workdir / "crossed.yaml").write_text(CROSSED)
    launch = LaunchConfig(store=workdir / "store", backend="local")
    study = read_study("crossed.yaml")
    run_studies([study], launch)
    store = Store(launch)
    records = store.trials()
    assert [record.status for record in records] == ["FINISHED"] * 4
    tested = [record for record in records if not record.has_model]
    assert len(tested) == 2
    trained = {record.key: record for record in records if record.has_model}
    for record in tested:
        teacher = trained[record.tags[TRAINED_BY]]
        assert record.metrics["train/loss"] == teacher.metrics["train/loss"]
        assert not (launch.trial_folder(record.key) / "result" / "model.safetensors").exists()
    assert json.loads(teacher.tags["mar.labels"])["Testing"] == "test 50 %", (
        "50 % is nearest to the defaults"
    )

    again = {record.run_id: record.metrics for record in records}
    run_studies([study], launch)
    assert {record.run_id: record.metrics for record in store.trials()} == again, (
        "nothing is trained or tested twice"
    )

    text = to_markdown(table_info(StudyResults.match(study, records, store.file_of)))
    assert "| Testing" in text and "| Backbone" in text
    assert "| Another method † | ResNet" in text
    assert "70.90" in text, "the paper's numbers have as many digits as it prints"
    write_site([study], store, [], workdir / "site.html")
    page = (workdir / "site.html").read_text()
    assert "Less hidden in testing is better" in page and "data:image/png;base64," in page
    assert "2 finished, 2 tested" in page


def test_a_budget_takes_what_fits_in_the_studys_order(workdir: Path) -> None:
    (workdir / "crossed.yaml").write_text(CROSSED)
    study = read_study("crossed.yaml")
    slow = device("slow=1e-3")
    hours = [
        line.device_hours or 0.0 for line in plan_trials(study, [], slow) if line.state == "new"
    ]
    assert len(hours) == 2
    budget = Budget(hours[0] * 1.01, slow)
    chosen = budget.take(study, study.trials, [])
    assert [trial.row for trial in chosen] == ["test 25 % / 50 %", "test 50 % / 50 %"], (
        "testing a model again is free"
    )
    assert budget.hours == pytest.approx(hours[0] * 0.01)


@pytest.mark.parametrize("order", ["file", "cheapest", "shared"])
def test_a_budget_for_a_test_does_not_buy_the_training(order: Order, workdir: Path) -> None:
    """Of the rows with one training any may be the first to run, and then trains."""
    (workdir / "crossed.yaml").write_text(CROSSED)
    study = read_study("crossed.yaml")
    slow = device("slow=1e-3")
    lines = plan_trials(study, [], slow)
    training = min(line.device_hours or 0.0 for line in lines if line.state == "new")
    test = max(line.device_hours or 0.0 for line in lines if line.state == "test")
    budget = Budget((training + test) / 2, slow)
    assert budget.hours > test
    budget.choose([study], [], order)
    assert budget.chosen == frozenset()


def test_a_budget_pays_for_a_training_that_continues_nothing(workdir: Path) -> None:
    text = "title: Lengths\nrecipe: recipe.yaml\nfixed: {recipe.schedule: warmup_stable_decay}\n"
    text += "axes: {E: {100: {recipe.epochs: 100}, 110: {recipe.epochs: 110}}}\n"
    (workdir / "lengths.yaml").write_text(text + "table: {columns: [top1]}\n")
    study = read_study("lengths.yaml")
    slow = device("slow=1e-3")
    short, long = plan_trials(study, [], slow)
    assert short.device_hours and long.device_hours
    assert long.device_hours < 0.5 * short.device_hours, "the plan continues the shorter one"
    budget = Budget(0.9 * short.device_hours, slow)
    assert budget.take(study, study.trials, []) == []
    # And with both in it, it is never over-spent.
    budget = Budget(2.5 * short.device_hours, slow)
    assert len(budget.take(study, study.trials, [])) == 2


def test_trials_run_in_the_files_order_or_what_is_shared_or_cheap_first(workdir: Path) -> None:
    one = "title: One\nrecipe: recipe.yaml\naxes: {A: {dear: {encoder.depth: 4}, both: {}}}\n"
    two = "title: Two\nrecipe: recipe.yaml\naxes: {B: {both: {}, cheap: {mask.ratio: 0.75}}}\n"
    table = "table: {columns: [top1]}\n"
    (workdir / "one.yaml").write_text(one + table)
    (workdir / "two.yaml").write_text(two + table)
    studies = [read_study("one.yaml"), read_study("two.yaml")]
    counts = uses(studies)
    trials = [studies[0].trials[0], *studies[1].trials[::-1]]

    def rows(order: Order) -> list[str]:
        return [trial.row for trial in in_order(trials, order, counts)]

    assert rows("file") == ["dear", "cheap", "both"]
    assert rows("cheapest") == ["cheap", "both", "dear"]
    assert rows("shared") == ["both", "cheap", "dear"]
    # A budget for all but the dearest completes the second study alone.
    slow = device("slow=1e-3")
    hours = {
        line.trial.row: line.device_hours or 0.0
        for study in studies
        for line in plan_trials(study, [], slow)
    }
    budget = Budget(1.01 * (hours["both"] + hours["cheap"]), slow)
    said = budget.choose(studies, [], "shared")
    assert "complete with this budget: two\nincomplete: one (1 of 2); " in said
    assert [trial.row for trial in budget.take(studies[0], studies[0].trials, [])] == ["both"]
    # In the files' order the dearest comes first, and would leave nothing for the others.
    budget = Budget(1.01 * hours["dear"], slow)
    said = budget.choose(studies, [], "file")
    assert "complete with this budget: none\nincomplete: one (1 of 2), two (0 of 2); " in said


def test_a_labels_own_settings_can_be_changed_from_the_command_line(workdir: Path) -> None:
    (workdir / "crossed.yaml").write_text(CROSSED)
    changed = read_study("crossed.yaml", ["axes.Training.75 %.mask.cell=[4, 4]"])
    assert [trial.settings.mask.cell for trial in changed.trials] == [(2, 2), (4, 4)] * 2
    with pytest.raises(UserError, match="the study has no such axis and label"):
        read_study("crossed.yaml", ["axes.Training.80 %.mask.cell=[4, 4]"])


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("pivot: Training", "pivot: Train", "table.pivot: no axis 'Train'"),
        (
            "{Backbone",
            "{a: b}\n  Nobody: {Backbone",
            "extra_columns.Nobody: no trial is labelled 'Nobody'",
        ),
        (
            "test 25 % / 50 % > test 50 % / 50 %",
            "test 25 % / 50 %",
            "expected 'better row > worse row'",
        ),
        ("{top1: 12.3}", "{accuracy: 12.3}", "no metric 'accuracy'"),
    ],
)
def test_a_mistake_in_a_study_is_named(workdir: Path, old: str, new: str, message: str) -> None:
    assert old in CROSSED
    (workdir / "crossed.yaml").write_text(CROSSED.replace(old, new))
    with pytest.raises(UserError) as caught:
        read_study("crossed.yaml")
    assert message in str(caught.value)


@pytest.mark.parametrize("strategy", ["cell", "redundancy"])
@pytest.mark.parametrize("normalize", [True, False])
def test_a_perfect_model_rebuilds_the_original(
    tiny: Settings, normalize: bool, strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = tiny({"reconstruction.normalize_target": normalize, "mask": {"strategy": strategy}})
    pixels = to_pixels(torch.randint(0, 256, (2, 8, 16, 16, 3), dtype=torch.uint8))
    model = MAR(settings)
    hidden = evaluation_mask(settings).expand(2, -1, -1, -1)

    def perfect(pixels: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        tubelets = patchify(pixels, settings.encoder.tubelet)
        return reconstruction_target(take(tubelets, model.indices(hidden, tubelets)[1]), normalize)

    monkeypatch.setattr(model, "reconstruct", perfect)
    masked, whole = rebuilt(settings, model, pixels, hidden)
    torch.testing.assert_close(whole, pixels, atol=1e-4, rtol=0)
    assert ((masked == 0.5).all(dim=1).float().mean() - settings.mask.ratio).abs() < 0.02
    torch.testing.assert_close(
        unpatchify(patchify(pixels, (2, 4, 4)), (4, 4, 4), (2, 4, 4)), pixels
    )
