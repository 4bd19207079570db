"""Trainings that are prolonged: the schedule's stable part is shared by all lengths."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import run_mar
from conftest import tiny_tree
from safetensors.torch import load_file
from trainings import assert_same_weights, train

from mar.config.canonical import canonical
from mar.config.overrides import SettingError, build
from mar.config.schedule import stable_epochs
from mar.config.schema import RecipeConfig, TrainingConfig
from mar.training.optim import learning_rate, peak_lr
from orchestration.execution.scheduling import rounds
from orchestration.studies.identity import identity, stable_identity
from orchestration.studies.plan import Planned, continued_epochs
from orchestration.studies.trial import Trial

Tiny = Callable[..., TrainingConfig]
STABLE: dict[str, Any] = {"recipe.schedule": "warmup_stable_decay", "recipe.decay_share": 0.4}


def test_the_rate_rises_stays_and_falls_to_the_least() -> None:
    recipe = RecipeConfig(
        epochs=10, warmup_epochs=2, schedule="warmup_stable_decay", decay_share=0.4
    )
    peak = peak_lr(recipe)
    assert stable_epochs(recipe) == 6
    assert learning_rate(recipe, 0.0) == recipe.warmup_lr
    assert learning_rate(recipe, 1.0) == pytest.approx((recipe.warmup_lr + peak) / 2)
    assert [learning_rate(recipe, epoch) for epoch in (2.0, 3.5, 6.0)] == [peak] * 3
    assert learning_rate(recipe, 8.0) == pytest.approx((peak + recipe.min_lr) / 2)
    assert learning_rate(recipe, 10.0) == pytest.approx(recipe.min_lr)


def test_a_training_after_a_shorter_one_equals_one_in_one_go_bit_for_bit(
    tiny: Tiny, tmp_path: Path
) -> None:
    whole = tiny({**STABLE, "recipe.epochs": 10})
    straight = train(whole, tmp_path / "straight")
    said: list[str] = []
    shared = tmp_path / "stable"
    for epochs in (4, 7):
        train(tiny({**STABLE, "recipe.epochs": epochs}), tmp_path / str(epochs), stable_dir=shared)
    prolonged = train(whole, tmp_path / "long", {"log": said.append}, stable_dir=shared)
    assert "continues a shorter training after its epoch 4" in said
    assert prolonged == straight
    assert_same_weights(tmp_path / "long", tmp_path / "straight")
    # Of each length, the end of its stable part.
    assert len(list(shared.glob("step_*"))) == 3


def test_a_shorter_training_begins_with_what_it_has_of_a_longer_ones(
    tiny: Tiny, tmp_path: Path
) -> None:
    shared = tmp_path / "stable"
    train(tiny({**STABLE, "recipe.epochs": 10}), tmp_path / "long", stable_dir=shared)
    said: list[str] = []
    settings = tiny({**STABLE, "recipe.epochs": 5})
    train(settings, tmp_path / "short", {"log": said.append}, stable_dir=shared)
    assert not [line for line in said if "continues" in line], "6 epochs are too many for it"
    straight = train(settings, tmp_path / "straight")
    assert straight[-1][1]["train/loss"]
    assert_same_weights(tmp_path / "short", tmp_path / "straight")


def test_a_damaged_shared_checkpoint_costs_time_and_no_result(tiny: Tiny, tmp_path: Path) -> None:
    shared = tmp_path / "stable"
    train(tiny({**STABLE, "recipe.epochs": 4}), tmp_path / "short", stable_dir=shared)
    (checkpoint,) = shared.glob("step_*")
    (checkpoint / "model.safetensors").write_bytes(b"damaged")
    settings = tiny({**STABLE, "recipe.epochs": 6})
    train(settings, tmp_path / "long", stable_dir=shared)
    train(settings, tmp_path / "straight")
    assert_same_weights(tmp_path / "long", tmp_path / "straight")


def test_only_lengths_of_one_training_share(tiny: Tiny) -> None:
    def shared(**changes: Any) -> str | None:
        return stable_identity(identity(tiny({**STABLE, **changes}), "data"))

    assert shared() == shared(**{"recipe.epochs": 9, "recipe.decay_share": 0.1})
    assert shared() != shared(**{"recipe.base_lr": 0.1})
    assert shared() != shared(**{"seed": 1})
    assert shared() != shared(**{"evaluation.every_epochs": 2})
    assert shared(**{"recipe.schedule": "cosine"}) is None


def test_lengths_follow_each_other_and_other_trials_wait_for_none(tiny: Tiny) -> None:
    def trial(**changes: Any) -> Trial:
        settings = tiny(changes)
        return Trial({"axis": str(changes)}, settings, "")

    long, short, other, plain = (
        trial(**{**STABLE, "recipe.epochs": 8}),
        trial(**{**STABLE, "recipe.epochs": 4}),
        trial(**{**STABLE, "seed": 1}),
        trial(),
    )
    assert rounds([long, plain, short, other]) == [[plain, short, other], [long]]
    assert rounds([plain]) == [[plain]]
    assert rounds([]) == []
    study = [long, short]
    assert [continued_epochs(each, study, Planned()) for each in study] == [2, 0]
    # Two with stable parts of 5 epochs: the one that runs first trains them, the other its decay.
    equal = [
        trial(**{**STABLE, "recipe.epochs": 8}),
        trial(**{**STABLE, "recipe.epochs": 10, "recipe.decay_share": 0.5}),
    ]
    assert [stable_epochs(each.settings.recipe) for each in equal] == [5, 5]
    assert [continued_epochs(each, equal, Planned()) for each in equal] == [0, 5]
    assert rounds(equal) == [[equal[0]], [equal[1]]]


STUDY = """\
title: Lengths
recipe: recipe.yaml
axes: {epochs: {4: {recipe.epochs: 4}, 8: {recipe.epochs: 8}}}
table: {columns: [top1]}
"""


@pytest.mark.parametrize("schedule", ["warmup_stable_decay", "cosine"])
def test_the_command_says_what_is_continued_or_why_not(
    schedule: str, videos: Path, tmp_path: Path
) -> None:
    tree = tiny_tree(videos)
    tree["recipe"] |= {"schedule": schedule}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree))
    (tmp_path / "lengths.yaml").write_text(STUDY)
    options = ["--backend", "local", "--store", "store"]
    run_mar(tmp_path, "run", "lengths.yaml", *options)
    planned, _ = run_mar(tmp_path, "plan", "recipe.yaml", "recipe.epochs=12", "--store", "store")
    # Sixteen videos an epoch; of the stable schedule six epochs are trained already.
    clips = 192 if schedule == "cosine" else 96
    assert re.search(rf"^new .* {clips} ", planned, re.MULTILINE), planned
    printed, _ = run_mar(tmp_path, "run", "recipe.yaml", "recipe.epochs=12", *options)
    stable = tmp_path / "store" / "stable"
    if schedule == "cosine":
        assert "cannot continue the finished training of 8 epochs: a cosine's rate" in printed
        assert not stable.exists()
        return
    assert "continues after epoch 6 of a shorter training" in printed
    names = sorted(path.name for path in stable.glob("*/step_*"))
    # Two steps an epoch: the stable parts of 4, 8 and 12 epochs.
    assert names == ["step_00000006", "step_00000012", "step_00000020"]
    for checkpoint in stable.glob("*/step_*"):
        assert load_file(checkpoint / "model.safetensors")


def test_settings_of_the_other_schedule_make_no_other_trial(tiny: Tiny) -> None:
    assert canonical(tiny({"recipe.decay_share": 0.5})) == canonical(tiny())
    stable = tiny(STABLE)
    assert canonical(tiny({**STABLE, "recipe.cosine_from": "start"})) == canonical(stable)


def test_a_warm_up_that_is_longer_than_the_stable_part_is_refused() -> None:
    with pytest.raises(SettingError, match=r"5 of 6 epochs, of which the last 3 are the decay"):
        build({"recipe": {"schedule": "warmup_stable_decay", "epochs": 6, "decay_share": 0.5}})
