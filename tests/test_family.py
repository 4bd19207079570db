"""Families of recipes: ``recipe=FOLDER`` puts a study on the recipes of another size."""

from collections.abc import Callable
from pathlib import Path

import pytest

from mar.errors import UserError
from orchestration.studies.loader import paper_studies, read_study
from orchestration.studies.trial import Study


@pytest.fixture
def study(tmp_path: Path) -> Callable[[str], Study]:
    """Read a study of two cell sizes on a family with the given ``family.yaml``."""
    (tmp_path / "small").mkdir()
    (tmp_path / "base.yaml").write_text("encoder: {size: tiny}\nclip: {size: 224}\n")
    (tmp_path / "small" / "base.yaml").write_text("encoder: {size: tiny}\nclip: {size: 96}\n")
    (tmp_path / "study.yaml").write_text(
        "title: Cells\nrecipe: base.yaml\nnotes: [Own note.]\n"
        "axes: {r × q: {14 × 14: {mask.cell: [14, 14]}, 2 × 2: {mask.cell: [2, 2]}}}\n"
    )

    def read(family: str, *overrides: str) -> Study:
        (tmp_path / "small" / "family.yaml").write_text(family)
        return read_study(
            str(tmp_path / "study.yaml"), [f"recipe={tmp_path / 'small'}", *overrides]
        )

    return read


CELL = "stand_ins: [{setting: mask.cell, paper: [14, 14], here: [6, 6]}]\n"


def test_a_familys_recipes_replace_those_of_the_same_name_and_its_values_stand_for_the_papers(
    study: Callable[..., Study],
) -> None:
    read = study(CELL)
    assert [trial.settings.mask.cell for trial in read.trials] == [(6, 6), (2, 2)]
    assert {trial.settings.clip.size for trial in read.trials} == {96}
    assert read.file.notes == (
        "Own note.",
        "mask.cell: 6 × 6 stands for the paper's 14 × 14.",
    )


def test_a_value_that_no_row_has_leaves_no_note(study: Callable[..., Study]) -> None:
    other = "stand_ins: [{setting: classifier.width, paper: 512, here: 64}]\nnotes: [Small.]\n"
    assert study(other, "mask.cell=[2, 2]").file.notes == ("Own note.", "Small.")


def test_a_family_sets_the_seeds_and_the_command_line_wins_over_it(
    study: Callable[..., Study],
) -> None:
    assert len(study(CELL + "seeds: [0, 1, 2]").trials) == 6
    assert [trial.settings.seed for trial in study(CELL + "seeds: [0, 1]", "seed=5").trials] == [
        5,
        5,
    ]
    changed = study(CELL, "axes.r × q.14 × 14.mask.cell=[3, 3]")
    assert changed.trials[0].settings.mask.cell == (3, 3)


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("stand_ins: [{setting: mask.cel, paper: 1, here: 2}]", r"family.yaml:1: .*'mask.cel'"),
        ("stand_in: []", r"family.yaml:1: .*stand_in"),
    ],
)
def test_a_mistake_in_a_family_names_its_line(
    study: Callable[..., Study], family: str, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        study(family)


def test_a_folder_without_recipes_is_no_family_though_it_has_the_name_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mini").mkdir()
    (tmp_path / "nothing").mkdir()
    monkeypatch.chdir(tmp_path)
    settings = read_study("table7_bridging_input", ["recipe=mini"]).trials[0].settings
    assert settings.clip.size == 36
    with pytest.raises(UserError, match="nothing is a folder"):
        read_study("table7_bridging_input", ["recipe=nothing"])


def test_every_study_of_the_paper_exists_at_minis_size_with_as_many_rows() -> None:
    for file in paper_studies():
        mini = read_study(file, ["recipe=mini"])
        ours = read_study(file)
        assert mini.file.seeds == (0, 1, 2)
        assert {trial.row for trial in mini.trials} == {trial.row for trial in ours.trials}
        # No two rows of a study become one training by standing for different values.
        keys = {trial.key for trial in mini.trials}
        assert len(keys) == 3 * len({trial.key for trial in ours.trials}), file
