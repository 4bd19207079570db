"""One training with several mask ratios."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import run_mar
from study_runs import write_studies

from mar.augmentation.augment import draw_step
from mar.config.overrides import SettingError, build, merge
from mar.config.schema import TrainingConfig
from mar.model.flops import cost
from mar.model.mar import num_hidden_of
from orchestration.studies.identity import identity, training_identity

STUDY = """\
title: One model, several ratios
recipe: recipe.yaml
fixed: {mask.ratio: [0.5, 0.25, 0.75]}
axes:
  tested at:
    25 %: {evaluation.mask.ratio: 0.25}
    50 %: {evaluation.mask.ratio: 0.5}
    75 %: {evaluation.mask.ratio: 0.75}
table: {columns: [top1, gflops]}
"""


def test_each_step_has_one_of_them_and_all_its_clips_the_same(
    tiny: Callable[..., TrainingConfig],
) -> None:
    settings = tiny({"mask.ratio": [0.5, 0.25, 0.75]})
    counts: list[int] = []
    for step in range(60):
        hidden = draw_step(settings, step).hidden
        each = {int(clip.sum()) for clip in hidden}
        assert len(each) == 1
        counts.append(num_hidden_of(hidden))
    assert {*counts} == {16, 32, 48}
    assert min(counts.count(count) for count in (16, 32, 48)) > 8
    assert settings.test_ratio == 0.5, "the first is that of testing"


def test_one_ratio_draws_what_it_always_drew(tiny: Callable[..., TrainingConfig]) -> None:
    one, listed = tiny({"mask.ratio": 0.5}), tiny({"mask.ratio": [0.5]})
    assert identity(one, "data") == identity(listed, "data")
    assert one == listed
    assert one == tiny({"mask.ratio": [0.5, 0.5]})


def test_a_value_replaces_a_list_also_where_all_settings_are_written_out() -> None:
    several = build({"mask": {"ratio": [0.5, 0.25]}})
    one = build(merge(several.model_dump(mode="json"), {"mask.ratio": 0.75}))
    assert cost(one) == cost(build({"mask": {"ratio": 0.75}}))
    assert build(several.model_dump(mode="json")) == several


def test_it_costs_the_mean_and_is_another_training() -> None:
    three = build({"mask": {"ratio": [0.5, 0.25, 0.75]}})
    alone = [cost(build({"mask": {"ratio": ratio}})).train_gflops for ratio in (0.5, 0.25, 0.75)]
    assert cost(three).train_gflops == pytest.approx(sum(alone) / 3)
    assert cost(three).gflops == cost(build({"mask": {"ratio": 0.5}})).gflops
    lines = [identity(each, "data") for each in (three, build({"mask": {"ratio": 0.5}}))]
    assert training_identity(lines[0]) != training_identity(lines[1])


@pytest.mark.parametrize(
    ("ratio", "message"),
    [
        ([], "the list is empty"),
        ([0.5, 1.0], r"mask\.ratio: each of a list must be at least 0 and less than 1, not 1\.0"),
        ([0.5, "a"], r"less than 1, not 'a'"),
        ("a", r"mask\.ratio: must be a valid number"),
        ([0.5, 0.0], "has one that hides nothing"),
    ],
)
def test_a_list_that_cannot_be_trained_is_refused(ratio: object, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        build({"mask": {"ratio": ratio}})
    assert build({"mask": {"ratio": [0.5, 0.0]}, "reconstruction": {"weight": 0.0}}).mask.hides


def planned(folder: Path) -> list[str]:
    printed, _ = run_mar(folder, "plan", "study.yaml", "--json")
    return [line["state"] for line in json.loads(printed)]


def test_one_training_gives_the_whole_curve(tmp_path: Path, videos: Path) -> None:
    write_studies(tmp_path, videos, {"study.yaml": STUDY})
    states = [
        line["state"] for line in json.loads(run_mar(tmp_path, "plan", "study.yaml", "--json")[0])
    ]
    assert states == ["new", "test", "test"]
    table, _ = run_mar(tmp_path, "run", "study.yaml", "--backend", "local")
    assert "–" not in table.split("|", 1)[1]
    states = [
        line["state"] for line in json.loads(run_mar(tmp_path, "plan", "study.yaml", "--json")[0])
    ]
    assert states == ["have"] * 3
