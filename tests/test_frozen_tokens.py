"""Classifiers on the cached tokens of a frozen encoder."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from trainings import CPU, assert_same_weights, train, weights

from mar import RESULT_DIR
from mar.config.canonical import canonical
from mar.config.overrides import SettingError, build
from mar.config.schema import TrainingConfig
from mar.data.annotations import read_split
from mar.data.token_cache import TokenCache, bytes_per_view, view_shape
from mar.errors import Failure, Stopped, UserError
from mar.evaluation.evaluator import Evaluator
from mar.model.flops import cost
from mar.model.mar import MAR
from mar.training import frozen_tokens
from mar.training.frozen_tokens import tokens_name
from mar.training.reports import TrainingSignal
from orchestration.studies.identity import identity, training_identity

Tiny = Callable[..., TrainingConfig]
CACHED: dict[str, Any] = {
    "encoder.train": "none",
    "encoder.cached": True,
    "reconstruction.weight": 0.0,
    "evaluation.clips": 2,
}


@pytest.mark.parametrize(
    "classifier",
    [
        {"classifier.kind": "linear"},
        {"classifier.kind": "attentive"},
        {"classifier.positions": True, "classifier.mask_tokens": True},
    ],
    ids=["linear", "attentive", "bridging with mask tokens"],
)
def test_the_accuracy_on_cached_tokens_is_that_of_the_whole_model(
    classifier: dict[str, Any], tiny: Tiny, tmp_path: Path
) -> None:
    settings = tiny({**CACHED, **classifier})
    train(settings, tmp_path)
    model = MAR(settings)
    model.load_state_dict(load_file(tmp_path / RESULT_DIR / "model.safetensors"))
    val = read_split(settings.data, "val")
    whole = Evaluator(settings, val, CPU, clips=2)(model)
    cached = TokenCache(tmp_path / "tokens" / tokens_name(settings) / "val")
    of_tokens = Evaluator(settings, val, CPU, clips=2, tokens=cached)(model)
    torch.testing.assert_close(of_tokens.probabilities, whole.probabilities, rtol=0, atol=2e-3)


def test_the_classifier_alone_changes_and_learns(tiny: Tiny, tmp_path: Path) -> None:
    settings = tiny({**CACHED, "recipe.epochs": 20, "recipe.base_lr": 0.1})
    reports = train(settings, tmp_path)
    assert reports[19][1]["train/loss"] < 0.8 * reports[0][1]["train/loss"]
    torch.manual_seed(settings.seed)
    before = MAR(settings).state_dict()
    for name, tensor in weights(tmp_path).items():
        if name.startswith("encoder."):
            assert torch.equal(tensor, before[name]), name


def test_trials_of_other_classifiers_and_rates_share_the_tokens(tiny: Tiny, tmp_path: Path) -> None:
    root = tmp_path / "tokens"
    said: list[str] = []
    train(tiny(CACHED), tmp_path / "one", {"log": said.append}, tokens_root=root)
    files = {file: file.stat().st_mtime_ns for file in root.rglob("*.safetensors")}
    assert len(files) == 2
    assert [line for line in said if "videos cached" in line] and not said.clear()
    for number, other in enumerate(
        [{"recipe.base_lr": 1.0}, {"classifier.kind": "linear"}, {"recipe.weight_decay": 0.0}]
    ):
        settings = tiny({**CACHED, **other})
        train(settings, tmp_path / str(number), {"log": said.append}, tokens_root=root)
    assert {file: file.stat().st_mtime_ns for file in root.rglob("*.safetensors")} == files
    assert not [line for line in said if "videos cached" in line]


def test_tokens_of_other_encoders_clips_and_data_are_others(
    tiny: Tiny, videos: Path, tmp_path: Path
) -> None:
    names = {
        tokens_name(tiny({**CACHED, **changes}))
        for changes in (
            {},
            {"encoder.depth": 2},
            {"clip.frames": 4},
            {"mask.ratio": 0.75},
            {"evaluation.crops": 3},
            {"evaluation.mask.start": 1},
            # A random encoder follows from the seed.
            {"seed": 1},
        )
    }
    assert len(names) == 7
    copy = tmp_path / "videos"
    shutil.copytree(videos, copy)
    other = next((copy / "videos").iterdir())
    other.write_bytes(other.read_bytes() + b" ")
    assert tokens_name(tiny({**CACHED, "data.root": str(copy)})) not in names
    same = {"classifier.dropout": 0.0, "recipe.epochs": 9, "augment.smoothing": 0.0}
    assert tokens_name(tiny({**CACHED, **same})) in names


def test_a_stopped_training_resumes_bit_for_bit(tiny: Tiny, tmp_path: Path) -> None:
    settings = tiny(CACHED)
    straight = train(settings, tmp_path / "straight")
    steps = 0

    def stop(_: int, *__: Any) -> TrainingSignal:
        nonlocal steps
        steps += 1
        return TrainingSignal.STOP if steps == 3 else TrainingSignal.CONTINUE

    with pytest.raises(Stopped):
        train(settings, tmp_path / "stopped", {"on_step": stop})
    resumed = train(settings, tmp_path / "stopped")
    assert resumed[-1] == straight[-1]
    assert_same_weights(tmp_path / "straight", tmp_path / "stopped")


def test_a_broken_video_has_no_tokens_and_is_counted(
    tiny: Tiny, videos: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "data"
    shutil.copytree(videos, copy)
    settings = tiny({**CACHED, "data.root": str(copy), "data.broken": "skip"})
    for split in ("train", "val"):
        read_split(settings.data, split)[0].path.write_bytes(b"not a video")
    reports = train(settings, tmp_path)
    assert reports[-1][1]["test/num_broken"] == 1
    assert reports[-1][1]["test/num_videos"] == 7


def test_tokens_that_do_not_fit_on_the_disk_are_refused(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = tiny({**CACHED, "recipe.epochs": 1})
    assert bytes_per_view(settings) == 2 * view_shape(settings)[0] * 16
    monkeypatch.setattr(frozen_tokens, "_FREE_SHARE", 1e-12)
    with pytest.raises(
        UserError, match=r"tokens of 24 videos, 2 views each, need .* GiB more, and"
    ):
        train(settings, tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder.train": "all"}, "set train: none"),
        ({"reconstruction.weight": 0.1}, r"reconstruction\.weight: does not go with"),
        ({"mask.strategy": "motion"}, r"mask\.strategy: does not go with"),
        ({"evaluation.mask.ratio": 0.0}, r"mask\.ratio: does not go with"),
        ({"augment.repeats": 2}, r"augment\.repeats: does not go with"),
        ({"evaluation.merge": 2}, r"evaluation\.merge: does not go with"),
    ],
)
def test_settings_that_cached_tokens_cannot_follow_are_refused(
    changes: dict[str, Any], message: str, tiny: Tiny
) -> None:
    with pytest.raises(SettingError, match=message):
        tiny({**CACHED, **changes})


def test_the_views_that_it_trains_on_make_another_training(tiny: Tiny) -> None:
    """Of other trainings the test's views are tested, and no more."""

    def trainings(*changes: dict[str, Any]) -> int:
        return len({training_identity(identity(tiny(each), "data")) for each in changes})

    assert trainings(CACHED, {**CACHED, "evaluation.clips": 3}) == 2
    assert trainings(CACHED, {**CACHED, "evaluation.mask.start": 1}) == 2
    assert trainings(CACHED, {**CACHED, "evaluation.shuffled_frames": True}) == 1
    assert trainings({}, {"evaluation.clips": 3}) == 1


def test_a_broken_training_video_stops_the_training_before_anything_is_kept(
    tiny: Tiny, videos: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "data"
    shutil.copytree(videos, copy)
    settings = tiny({**CACHED, "data.root": str(copy)})
    broken = read_split(settings.data, "train")[3].path
    whole = broken.read_bytes()
    broken.write_bytes(b"not a video")
    with pytest.raises(Failure, match=rf"{broken.name}.*set data\.broken: skip"):
        train(settings, tmp_path / "trial", tokens_root=tmp_path / "tokens")
    assert not list((tmp_path / "tokens").rglob("*.safetensors"))
    broken.write_bytes(whole)
    train(settings, tmp_path / "trial", tokens_root=tmp_path / "tokens")


def test_a_stop_is_heeded_while_tokens_are_computed(tiny: Tiny, tmp_path: Path) -> None:
    def stop() -> None:
        raise Stopped("stopped")

    with pytest.raises(Stopped):
        train(tiny(CACHED), tmp_path, {"while_preparing": stop})


def test_settings_without_effect_make_no_other_trial(tiny: Tiny) -> None:
    plain = tiny(CACHED)
    for changes in (
        {"encoder.drop_path": 0.5},
        {"recipe.layer_decay": 0.5},
        {"mask.temporal": "fixed"},
        {"clip.round_frames": True},
    ):
        assert canonical(tiny({**CACHED, **changes})) == canonical(plain), changes
        assert tokens_name(tiny({**CACHED, **changes})) == tokens_name(plain), changes
    assert canonical(tiny({**CACHED, "augment.mixup": 0.1})) == canonical(plain)
    assert canonical(tiny({**CACHED, "augment.smoothing": 0.2})) != canonical(plain)


def test_the_encoder_costs_nothing_in_training() -> None:
    frozen: dict[str, Any] = {"encoder": {"train": "none"}, "reconstruction": {"weight": 0.0}}
    cached = build({**frozen, "encoder": {"train": "none", "cached": True}})
    assert cost(cached).train_gflops < 0.2 * cost(build(frozen)).train_gflops
    assert cost(cached).gflops == cost(build(frozen)).gflops
