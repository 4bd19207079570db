import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import tiny_tree
from safetensors.torch import save_file

from mar.config.overrides import flatten
from mar.config.schema import TrainingConfig
from mar.errors import UserError
from orchestration.installation import packaged
from orchestration.studies.identity import identity, training_identity
from orchestration.studies.loader import fetch_weights, read_study
from orchestration.studies.plan import plan_text, plan_trials
from orchestration.studies.recipe import absolute_paths, read_recipe
from orchestration.studies.yaml_document import FAMILY_FILE, find

STUDY = """\
title: "A study"
recipe: recipe.yaml
seeds: [0, 1]
fixed: {recipe.epochs: 2}
axes:
  ρ:
    50 %: {mask.ratio: 0.5}
    75 %: {mask.ratio: 0.75}
  λ:
    0.0: {reconstruction.weight: 0.0}
    0.1: {reconstruction.weight: 0.1}
paper:
  top1: {50 % / 0.1: 70.97}
"""


@pytest.fixture
def write(tmp_path: Path, videos: Path) -> Callable[[str], str]:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tiny_tree(videos)))

    def study(text: str) -> str:
        (tmp_path / "study.yaml").write_text(text)
        return str(tmp_path / "study.yaml")

    return study


def test_trials_come_in_the_order_of_the_file_last_axis_fastest_then_seeds(
    write: Callable[[str], str],
) -> None:
    study = read_study(write(STUDY))
    assert [trial.name for trial in study.trials][:5] == [
        "50 % / 0.0 (seed 0)",
        "50 % / 0.0 (seed 1)",
        "50 % / 0.1 (seed 0)",
        "50 % / 0.1 (seed 1)",
        "75 % / 0.0 (seed 0)",
    ]
    assert len({trial.key for trial in study.trials}) == 8
    assert study.name == "study"


def test_the_later_word_wins_recipe_fixed_axes_command_line(write: Callable[[str], str]) -> None:
    file = write(STUDY)
    assert {trial.settings.recipe.epochs for trial in read_study(file).trials} == {2}
    chosen = read_study(file, ["mask.ratio=0.25", "seed=7", "recipe.epochs=5"]).trials
    assert {(t.settings.mask.ratio, t.settings.seed, t.settings.recipe.epochs) for t in chosen} == {
        (0.25, 7, 5)
    }
    assert len(chosen) == 4


def test_another_recipe_can_be_put_under_a_study(write: Callable[[str], str]) -> None:
    trials = read_study(write(STUDY), ["recipe=quickstart"]).trials
    assert trials[0].settings.encoder.width == 64
    assert trials[0].settings.recipe.epochs == 2


def test_labels_are_what_is_written_and_may_hold_anything(write: Callable[[str], str]) -> None:
    study = read_study(
        write(
            STUDY.replace("0.0: {", "off: {")
            .replace("    0.1: {", "    w / o: {")
            .replace("0.1: 70", "w / o: 70")
        )
    )
    assert [trial.labels["λ"] for trial in study.trials][::2] == ["off", "w / o", "off", "w / o"]
    assert len(read_study(str(study_file(write)), only=["λ=0.0", "λ=0.1", "ρ=50 %"]).trials) == 4


def study_file(write: Callable[[str], str]) -> str:
    return write(STUDY)


def test_a_missing_data_set_is_absent_and_a_faulty_one_is_named(
    write: Callable[[str], str], tmp_path: Path
) -> None:
    assert read_study(write(STUDY), ["data.root=nowhere"]).trials[0].fingerprint == "absent"
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.txt").write_bytes(b"caf\xe9.mp4 0\n")
    arguments = [
        f"data.root={tmp_path / 'data'}",
        "data.format=list",
        "data.train=train.txt",
        "data.val=train.txt",
    ]
    with pytest.raises(UserError, match=r"train\.txt:1: .* is not UTF-8 text"):
        read_study(write(STUDY), arguments)


def test_recipe_settings_can_be_given_as_a_branch(write: Callable[[str], str]) -> None:
    assert read_study(write(STUDY), ["recipe={epochs: 9}"]).trials[0].settings.recipe.epochs == 9


def test_only_keeps_the_named_trials(write: Callable[[str], str]) -> None:
    trials = read_study(write(STUDY), only=["ρ=75 %", "λ=0.1"]).trials
    assert [trial.name for trial in trials] == ["75 % / 0.1 (seed 0)", "75 % / 0.1 (seed 1)"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "mask.ratio: 0.75",
            "mask.ration: 0.75",
            "study.yaml:8: ρ = 75 %: mask.ration: no such setting; did you mean",
        ),
        (
            "mask.ratio: 0.75",
            "mask.ratio: 1.5",
            "study.yaml:8: ρ = 75 %: mask.ratio: must be less than 1, not 1.5",
        ),
        (
            "recipe.epochs: 2",
            "recipe.epochs: two",
            "study.yaml:4: recipe.epochs: must be a valid integer",
        ),
        (
            "50 % / 0.1: 70.97",
            "60 % / 0.1: 70.97",
            "study.yaml:13: paper.top1: no trial is labelled '60 % / 0.1'",
        ),
        (
            "recipe: recipe.yaml",
            "recipe: absent.yaml",
            "study.yaml:2: recipe: no recipe 'absent.yaml'",
        ),
        (
            "mask.ratio: 0.75",
            "mask.cell: [3, 3]",
            "study.yaml:8: ρ = 75 %: mask.cell: [3, 3] does not divide the 4 x 4",
        ),
        (
            "paper:",
            "table: {columns: [top_1]}\npaper:",
            "study.yaml:12: table: no metric 'top_1' (there are: top1, ",
        ),
        ("top1: {50 %", "topp1: {50 %", "study.yaml:12: paper: no metric 'topp1'"),
        (
            "paper:",
            "figure: {kind: points}\npaper:",
            "study.yaml:12: figure: kind 'points' needs x",
        ),
        (
            "paper:",
            "figure: {x: gflops, y: [top1]}\npaper:",
            "study.yaml:12: figure: x needs kind: points, not bars",
        ),
        ("seeds: [0, 1]", "seeds: [0, 0]", "study.yaml:3: seeds: each seed may be listed once"),
        ("seeds: [0, 1]", "seeds: []", "no trial in it"),
        ("fixed: {recipe.epochs: 2}", "fixed: {seed: 2}", "the seed is set by 'seeds: [0, 1, …]'"),
        ("seeds: [0, 1]", "sedes: [0, 1]", "study.yaml:3: sedes: "),
        ("seeds: [0, 1]", "seeds: [0, -1]", "study.yaml:3: seeds.1: "),
        ("    75 %: {", "    50 %: {", "study.yaml:8: axes.ρ.50 % is written twice"),
        ("  ρ:", "  ρ: [", "study.yaml:8: not valid YAML"),
    ],
)
def test_a_faulty_study_is_named_with_file_line_and_setting(
    write: Callable[[str], str], old: str, new: str, message: str
) -> None:
    with pytest.raises(UserError) as caught:
        read_study(write(STUDY.replace(old, new)))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "only", "message"),
    [
        (["mask.ration=0.5"], [], "mask.ration: no such setting; did you mean mask.ratio?"),
        (["mask.ratio"], [], "'mask.ratio': expected path=value"),
        (["recipe=nowhere"], [], "no recipe 'nowhere'"),
        ([], ["ρ=60 %"], "--filter ρ=60 %: the axis ρ has no label '60 %' (it has: 50 %, 75 %)"),
        (
            [],
            ["rho=50 %"],
            "--filter rho=50 %: expected axis=label with an axis of the study (ρ, λ)",
        ),
    ],
)
def test_a_faulty_command_line_is_named(
    write: Callable[[str], str], overrides: list[str], only: list[str], message: str
) -> None:
    with pytest.raises(UserError) as caught:
        read_study(write(STUDY), overrides, only)
    assert message in str(caught.value)


def test_a_fault_in_the_recipe_is_named_there(write: Callable[[str], str], tmp_path: Path) -> None:
    file = write(STUDY)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("num_classes: 2", "num_classes: 0"))
    with pytest.raises(
        UserError, match=r"recipe\.yaml:\d+: data\.num_classes: must be greater than 0"
    ):
        read_study(file)


def test_an_unknown_study_is_answered_with_those_there_are() -> None:
    with pytest.raises(UserError, match=r"no study 'quickstrat'.*quickstart"):
        find("quickstrat", "study")


def test_equal_settings_are_one_training_wherever_they_stand(
    write: Callable[[str], str], tmp_path: Path
) -> None:
    here = read_study(write(STUDY), only=["ρ=50 %", "λ=0.1"]).trials[0]
    other = STUDY.replace("ρ:", "ratio:").replace(
        "50 %: {mask.ratio: 0.5}", "half: {mask.ratio: 0.5, mask.cell: [2, 2]}"
    )
    there = read_study(
        write(other.replace("50 % / 0.1", "half / 0.1")), only=["ratio=half", "λ=0.1"]
    ).trials[0]
    assert here.key == there.key


@pytest.mark.parametrize(
    "file", sorted(packaged("search_spaces").glob("[!s]*.yaml")), ids=lambda file: file.stem
)
def test_every_shipped_study_is_sound(file: Path) -> None:
    assert read_study(str(file)).trials


@pytest.mark.parametrize(
    "file",
    sorted(
        file
        for file in packaged("search_spaces").glob("recipes/**/*.yaml")
        if file.name != FAMILY_FILE
    ),
    ids=lambda file: file.stem,
)
def test_every_shipped_recipe_is_sound_and_explained(file: Path) -> None:
    assert flatten(read_recipe(str(file)).model_dump())
    assert file.read_text().startswith("# ")


def test_a_trial_is_told_by_the_content_of_its_weights_not_by_their_place(
    write: Callable[[str], str], tmp_path: Path
) -> None:
    for name, value in (("one", 0.0), ("same", 0.0), ("other", 1.0)):
        save_file(
            {"encoder.embed.weight": torch.full((1, 1), value)}, tmp_path / f"{name}.safetensors"
        )

    def key(weights: Path | str) -> str:
        return read_study(write(STUDY), [f"encoder.weights={weights}"]).trials[0].key

    assert key(tmp_path / "one.safetensors") == key(tmp_path / "same.safetensors")
    assert key(tmp_path / "one.safetensors") != key(tmp_path / "other.safetensors")
    assert key(tmp_path / "one.safetensors") != read_study(write(STUDY)).trials[0].key
    assert key("none.safetensors") != key("nobody.safetensors")


def test_weights_that_are_not_there_are_said_before_anything_runs(
    write: Callable[[str], str],
) -> None:
    study = read_study(write(STUDY), ["encoder.weights=none.pth"])
    lines = plan_trials(study, [])
    assert "the weights are not here yet: none.pth" in plan_text(lines)
    with pytest.raises(
        UserError, match=r"encoder\.weights: none\.pth: no such file or folder of weights"
    ):
        fetch_weights(study)


def test_workers_are_given_the_absolute_path_of_weights(
    write: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_file({"encoder.embed.weight": torch.zeros(1, 1)}, tmp_path / "weights.safetensors")
    trial = read_study(write(STUDY), ["encoder.weights=weights.safetensors"]).trials[0]
    assert absolute_paths(trial.settings).encoder.weights == str(tmp_path / "weights.safetensors")
    named = read_study(write(STUDY), ["encoder.weights=someone/model"]).trials[0]
    assert absolute_paths(named.settings).encoder.weights == "someone/model"


def test_a_recipe_is_a_study_of_one_trial(write: Callable[[str], str], tmp_path: Path) -> None:
    write(STUDY)
    study = read_study(str(tmp_path / "recipe.yaml"), ["mask.ratio=0.25", "seed=3"])
    (trial,) = study.trials
    assert (trial.settings.mask.ratio, trial.settings.seed) == (0.25, 3)
    assert study.name.endswith("_recipe")
    assert study.file.table.columns == ("top1", "top5", "gflops", "time_s")
    assert (
        read_study("recipes/pretrain/quickstart").file.table.columns[0]
        == "test_reconstruction_loss"
    )


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (
            {"classifier.kind": "linear", "classifier.width": 32},
            {"classifier.kind": "linear", "classifier.depth": 2},
        ),
        (
            {"mask.ratio": 0.0, "mask.cell": [4, 4]},
            {"mask.ratio": 0.0, "reconstruction.weight": 0.5},
        ),
        ({"reconstruction.weight": 0.0, "reconstruction.depth": 2}, {"reconstruction.weight": 0.0}),
        ({"mask.strategy": "uniform"}, {"mask.cell": [4, 4]}),
    ],
)
def test_settings_that_do_nothing_make_no_second_training(
    tiny: Callable[..., TrainingConfig], one: dict[str, Any], other: dict[str, Any]
) -> None:
    assert identity(tiny(one), "data") == identity(tiny(other), "data")


@pytest.mark.parametrize("ratio", [0.0, 0.5])
def test_a_run_of_any_earlier_version_may_be_asked_for_its_training(
    tiny: Callable[..., TrainingConfig], ratio: float
) -> None:
    """Its identity lacks the settings that came later; only ρ was there from the start."""
    tree = json.loads(identity(tiny({"mask.ratio": ratio}), "data"))
    for group in tree:
        if isinstance(tree[group], dict) and group != "evaluation":
            for name in {*tree[group]} - {"ratio"}:
                earlier = {**tree, group: {**tree[group]}}
                del earlier[group][name]
                assert training_identity(json.dumps(earlier))


def test_settings_that_do_something_do_make_one(tiny: Callable[..., TrainingConfig]) -> None:
    output = [
        {},
        {"mask.strategy": "uniform", "mask.motion": "standard"},
        {"mask.strategy": "uniform"},
        {"mask.ratio": 0.0},
    ]
    output += [
        {"mask.ratio": 0.0, "classifier.width": 32},
        {"mask.ratio": 0.0, "evaluation.mask.ratio": 0.5},
    ]
    output += [{"mask.ratio": 0.0, "evaluation.mask.ratio": 0.5, "mask.cell": [4, 4]}]
    lines = [identity(tiny(each), "data") for each in output]
    assert len(set(lines)) == len(output)
    assert (
        training_identity(lines[-1]) == training_identity(lines[-2]) == training_identity(lines[3])
    ), "tested otherwise, trained alike"


def test_a_row_or_a_label_with_an_equals_sign_takes_its_own_settings() -> None:
    arguments = [
        "rows.MAR, ρ = 50 % / HMDB51.encoder.weights=/w=1.pth",
        "axes.Method.VideoMAE.recipe.epochs=3",
    ]
    trials = {
        trial.row: trial.settings for trial in read_study("table13_ucf101_hmdb51", arguments).trials
    }
    assert trials["MAR, ρ = 50 % / HMDB51"].encoder.weights == "/w=1.pth"
    assert trials["MAR, ρ = 50 % / UCF101"].encoder.weights is None
    assert [trials[f"VideoMAE / {name}"].recipe.epochs for name in ("UCF101", "HMDB51")] == [3, 3]
    with pytest.raises(UserError, match="the study has no such row"):
        read_study("table13_ucf101_hmdb51", ["rows.MAR.encoder.weights=x"])
    with pytest.raises(UserError, match=r"^mask\.ratio: ") as wrong:
        read_study("table13_ucf101_hmdb51", ["rows.MAR, ρ = 50 % / HMDB51.mask.ratio=3"])
    assert ".yaml" not in str(wrong.value), "the mistake is on the command line"
