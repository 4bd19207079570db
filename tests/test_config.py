import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mar.config.overrides import SETTING_PATHS, SettingError, build, flatten, merge
from mar.config.schema import TrainingConfig
from orchestration.studies.identity import identity, with_defaults_filled


@pytest.mark.parametrize("tree", [[], "mask", None])
def test_settings_are_a_mapping(tree: Any) -> None:
    with pytest.raises(SettingError, match="settings must be a mapping"):
        build(tree)


def test_an_unknown_setting_names_its_nearest_neighbour() -> None:
    with pytest.raises(
        SettingError, match=r"mask\.ration: no such setting; did you mean mask\.ratio\?"
    ):
        build({"mask": {"ration": 0.5}})


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("mask.ratio", 1.0, "mask.ratio: must be less than 1, not 1.0"),
        ("mask.strategy", "cells", "mask.strategy: must be 'cell', 'random'"),
        ("mask.strategy", "tube", "mask: a tube mask cannot run: set motion: standard"),
        ("mask.cell", [3, 3], "mask.cell: [3, 3] does not divide the 14 x 14 token grid"),
        (
            "encoder.tubelet",
            [3, 16, 16],
            "encoder.tubelet: [3, 16, 16] does not divide a clip of [16, 224, 224]",
        ),
        ("encoder.width", 96, "encoder: size 'base' fixes width"),
        ("classifier.heads", 7, "classifier: width 512 is not divisible by 7 heads"),
        ("classifier", {"kind": "mlp", "depth": 1}, "classifier: an MLP has at least two layers"),
        ("recipe.epochs", 0, "recipe.epochs: must be greater than 0, not 0"),
        ("data.num_classes", "many", "data.num_classes: must be a valid integer"),
    ],
)
def test_a_bad_value_names_its_path_and_the_rule_it_breaks(
    path: str, value: object, message: str
) -> None:
    with pytest.raises(SettingError) as caught:
        build(merge({}, {path: value}))
    assert message in str(caught.value)


def test_the_papers_defaults_are_the_defaults() -> None:
    settings = TrainingConfig()
    assert settings.grid == (8, 14, 14)
    assert (settings.mask.strategy, settings.mask.ratio, settings.mask.cell) == (
        "cell",
        0.5,
        (2, 2),
    )
    assert (
        settings.classifier.width,
        settings.classifier.depth,
        settings.reconstruction.weight,
    ) == (512, 2, 0.1)


def test_nothing_can_be_changed_after_construction() -> None:
    with pytest.raises(ValueError, match="frozen"):
        TrainingConfig().mask.ratio = 0.75  # pyright: ignore[reportAttributeAccessIssue]


def test_every_setting_is_explained() -> None:
    def unexplained(model: type, prefix: str = "") -> list[str]:
        missing: list[str] = []
        for name, field in model.model_fields.items():  # type: ignore[attr-defined]
            if hasattr(field.annotation, "model_fields"):
                missing += unexplained(field.annotation, f"{prefix}{name}.")
            elif not field.description:
                missing.append(f"{prefix}{name}")
        return missing

    assert unexplained(TrainingConfig) == []


@given(
    st.sampled_from(
        [
            path
            for path in SETTING_PATHS
            if path in flatten(TrainingConfig().model_dump(mode="json"))
        ]
    )
)
def test_writing_out_a_default_changes_nothing(path: str) -> None:
    default = flatten(TrainingConfig().model_dump(mode="json"))[path]
    assert build(merge({}, {path: default})) == TrainingConfig()


def test_settings_survive_json() -> None:
    settings = build({"mask": {"ratio": 0.75, "cell": [7, 2]}})
    assert build(json.loads(settings.model_dump_json())) == settings


def test_the_place_of_the_data_is_not_part_of_a_trials_identity_and_its_content_is() -> None:
    here, there = (
        build({"data": {"root": "/here"}}),
        build({"data": {"root": "/there", "train": "a.txt"}}),
    )
    assert identity(here, "content") == identity(there, "content")
    assert identity(here, "content") != identity(here, "other content")


def test_a_setting_added_later_and_left_at_its_default_makes_no_difference() -> None:
    now = identity(TrainingConfig(), "content")
    before = json.loads(now)
    del before["mask"]["spatial"]
    assert with_defaults_filled(json.dumps(before)) == now
    before["mask"]["ratio"] = 0.25
    assert with_defaults_filled(json.dumps(before)) != now


def test_a_mask_that_rounds_to_everything_is_refused_and_to_nothing_reconstructs_nothing() -> None:
    frame = {"mask.strategy": "frame", "mask.motion": "standard"}
    with pytest.raises(SettingError, match=r"mask\.ratio: 0\.95 leaves no token of 1568 visible"):
        build(merge({}, {**frame, "mask.ratio": 0.95}))
    with pytest.raises(SettingError, match=r"evaluation\.mask\.ratio: 0\.95 leaves no token"):
        build(merge({}, {**frame, "evaluation.mask.ratio": 0.95}))
    assert not build(merge({}, {**frame, "mask.ratio": 0.05})).reconstructs
