import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing as multiprocessing
from PIL import Image
from safetensors.torch import load_file
from sklearn.metrics import confusion_matrix
from trainings import CPU, assert_same_weights, train, weights

from mar import RESULT_DIR
from mar.atomic_dir import read_atomic_dir
from mar.augmentation.augment import mix
from mar.config.input_settings import AugmentConfig
from mar.config.overrides import build
from mar.config.schema import TrainingConfig
from mar.errors import Failure, UserError
from mar.evaluation.evaluator import Predictions
from mar.model.mar import MAR
from mar.training import checkpoint
from mar.training.checkpoint import Progress, latest
from mar.training.loop import fit
from mar.training.reports import EpochReport, TrainingCallbacks, TrainingSignal
from mar.training.retention import RetentionPolicy, prune
from mar.training.step import RuntimeConfig
from mar.weights.export import write_model
from mar.weights.pretrained import model_settings
from mar.weights.reading import Weights, read_weights
from orchestration.cli.app import main

Settings = Callable[..., TrainingConfig]


AUGMENTED = {
    "augment.randaugment": "rand-m9-mstd0.5-inc1",
    "augment.erasing": 0.5,
    "augment.flip": True,
    "augment.flip_swaps": [[0, 1]],
}


class Stopped(Exception):
    pass


def stop_after(settings: TrainingConfig, folder: Path, epochs: int, **runtime: Any) -> None:
    def report(report: EpochReport) -> None:
        if report.epoch == epochs:
            raise Stopped

    with pytest.raises(Stopped):
        callbacks = TrainingCallbacks(report=report, log=lambda _: None)
        fit(settings, folder, RuntimeConfig(CPU, **runtime), callbacks)


def test_two_runs_are_bitwise_equal(tiny: Settings, tmp_path: Path) -> None:
    one, other = (train(tiny(), tmp_path / name) for name in ("one", "other"))
    assert one == other
    assert_same_weights(tmp_path / "one", tmp_path / "other")


def test_a_stopped_run_goes_on_and_equals_one_that_was_not(tiny: Settings, tmp_path: Path) -> None:
    undisturbed = train(tiny(), tmp_path / "undisturbed")
    stop_after(tiny(), tmp_path / "stopped", epochs=2)
    resumed = train(tiny(), tmp_path / "stopped")
    assert resumed == undisturbed, "the epochs before the stop are reported again"
    assert_same_weights(tmp_path / "undisturbed", tmp_path / "stopped")


KILLED = """
import os, signal, sys, torch
from pathlib import Path
from mar.config.overrides import build
from mar.training import checkpoint
from mar.training.loop import fit
from mar.training.reports import TrainingCallbacks
from mar.training.step import RuntimeConfig
import json
torch.set_num_threads(1)
save = checkpoint.save
def save_then_die(folder, settings, state, *rest):
    save(folder, settings, state, *rest)
    if state.progress.step == 3:
        os.kill(os.getpid(), signal.SIGKILL)
checkpoint.save = save_then_die
fit(build(json.loads(sys.argv[1])), Path(sys.argv[2]),
    RuntimeConfig(torch.device("cpu"), checkpoint_every_steps=1), TrainingCallbacks())
"""


def test_a_run_killed_in_the_middle_of_an_epoch_goes_on_with_the_next_step(
    tiny: Settings, tmp_path: Path
) -> None:
    settings = tiny(AUGMENTED)
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, settings.model_dump_json(), str(tmp_path / "killed")],
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL
    newest = latest(tmp_path / "killed", settings, print)
    assert newest
    assert newest.progress.step == 3, (
        "two steps an epoch: killed after the first step of the second"
    )
    assert newest.progress.sums[3] == 8, "the clips of the half epoch"
    assert train(settings, tmp_path / "killed", checkpoint_every_steps=1) == train(
        settings, tmp_path / "undisturbed"
    )
    assert_same_weights(tmp_path / "undisturbed", tmp_path / "killed")


def assert_near(ours: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    """Weights that differ by the order of sums alone.

    Softmax does not change with a key's bias. Its gradient is rounding, which AdamW makes as large
    as any other: these values are left out.
    """
    assert ours.keys() == wanted.keys()
    for name, tensor in wanted.items():
        pairs = [(ours[name], tensor)]
        if name.endswith("attn.qkv.bias"):
            pairs = list(zip(ours[name].chunk(3), tensor.chunk(3), strict=True))
            del pairs[1]
        for one, other in pairs:
            torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-3)


BEYOND: dict[str, Any] = {
    "mask": {"strategy": "motion", "ratio": [0.5, 0.75]},
    "reconstruction.tokens": 0.5,
    "evaluation.mask.per_video": True,
    "evaluation.merge": 2,
}
"""What is beyond the paper, all at once: a mask that sees the clip, two ratios, and the others."""


@pytest.mark.parametrize("more", [{}, BEYOND], ids=["paper", "beyond"])
def test_accumulated_gradients_give_the_same_training(
    tiny: Settings, tmp_path: Path, more: dict[str, Any]
) -> None:
    quiet = {"encoder.drop_path": 0.0, "classifier.dropout": 0.0, "augment.cutmix": 0.0}
    settings = tiny({**quiet, **AUGMENTED, **more})
    train(settings, tmp_path / "whole")
    train(settings, tmp_path / "parts", max_microbatch_clips=2)
    assert_near(weights(tmp_path / "parts"), weights(tmp_path / "whole"))


def _work(rank: int, world: int, settings: str, folder: str, port: int) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world)
    train(build(json.loads(settings)), Path(folder))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(("more", "port"), [({}, 29511), (BEYOND, 29513)], ids=["paper", "beyond"])
def test_two_workers_train_what_one_does(
    tiny: Settings, tmp_path: Path, more: dict[str, Any], port: int
) -> None:
    quiet = {"encoder.drop_path": 0.0, "classifier.dropout": 0.0, "recipe.epochs": 2}
    settings = tiny({**quiet, **AUGMENTED, **more})
    alone = train(settings, tmp_path / "one")
    arguments = (2, settings.model_dump_json(), str(tmp_path / "two"), port)
    multiprocessing.spawn(_work, args=arguments, nprocs=2)  # pyright: ignore[reportPrivateImportUsage]
    assert_near(weights(tmp_path / "two"), weights(tmp_path / "one"))
    metrics = json.loads((tmp_path / "two" / RESULT_DIR / "metrics.json").read_text())
    assert metrics["train/loss"] == pytest.approx(alone[-1][1]["train/loss"], rel=1e-4)
    assert metrics["test/num_videos"] == 8


@pytest.mark.parametrize("repeat", ["clips", "frames"])
def test_two_workers_train_what_one_does_with_repeated_sampling_too(
    repeat: str, tiny: Settings, tmp_path: Path
) -> None:
    quiet = {"encoder.drop_path": 0.0, "classifier.dropout": 0.0, "recipe.epochs": 1}
    settings = tiny({**quiet, **AUGMENTED, "augment.repeats": 2, "augment.repeat": repeat})
    reports = train(settings, tmp_path / "one")
    arguments = (2, settings.model_dump_json(), str(tmp_path / "two"), 29512)
    multiprocessing.spawn(_work, args=arguments, nprocs=2)  # pyright: ignore[reportPrivateImportUsage]
    metrics = json.loads((tmp_path / "two" / RESULT_DIR / "metrics.json").read_text())
    assert metrics["train/loss"] == pytest.approx(reports[-1][1]["train/loss"], rel=1e-4)
    assert_near(weights(tmp_path / "two"), weights(tmp_path / "one"))


def test_other_processes_decode_the_same_clips(tiny: Settings, tmp_path: Path) -> None:
    settings = tiny({"recipe.epochs": 1})
    assert train(settings, tmp_path / "here") == train(
        settings, tmp_path / "there", loader_processes=1
    )


def test_the_result_is_complete_and_says_what_it_is(tiny: Settings, tmp_path: Path) -> None:
    settings = tiny(
        {"evaluation.shuffled_frames": True, "evaluation.clips": 2, "evaluation.crops": 3}
    )
    final = train(settings, tmp_path)[-1][1]
    manifest = read_atomic_dir(tmp_path / RESULT_DIR)
    assert build(manifest["settings"]) == settings
    rows = (tmp_path / RESULT_DIR / "predictions.csv").read_text().splitlines()
    assert rows[0] == "video,label,probability_of_label,class_1,probability_1,class_2,probability_2"
    correct = [row.split(",")[1] == row.split(",")[3] for row in rows[1:]]
    assert final["test/top1"] == pytest.approx(100 * sum(correct) / 8)
    assert 0 <= final["test/top1_shuffled_frames"] <= 100
    for picture in ("confusion.png", "curves.png"):
        with Image.open(tmp_path / RESULT_DIR / picture) as opened:
            assert min(opened.size) > 200


def test_a_confusion_matrix_is_scikit_learns() -> None:
    generator = torch.Generator().manual_seed(0)
    labels, probabilities = (
        torch.randint(5, (60,), generator=generator),
        torch.rand(60, 5, generator=generator),
    )
    counts = Predictions(torch.arange(60), labels, probabilities, ()).confusion()
    assert (
        counts.tolist()
        == confusion_matrix(labels, probabilities.argmax(dim=1), labels=range(5)).tolist()
    )


def test_a_damaged_checkpoint_is_passed_over_aloud(tiny: Settings, tmp_path: Path) -> None:
    undisturbed = train(tiny(), tmp_path / "undisturbed")
    stop_after(tiny(), tmp_path / "damaged", epochs=2)
    newest = sorted((tmp_path / "damaged").glob("step_*"))[-1]
    content = bytearray((newest / "training.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (newest / "training.pt").write_bytes(content)
    said: list[str] = []
    assert train(tiny(), tmp_path / "damaged", callbacks={"log": said.append}) == undisturbed
    assert "training.pt changed after it was written" in said[0]


def test_a_checkpoint_of_other_settings_is_not_used(tiny: Settings, tmp_path: Path) -> None:
    train(tiny(), tmp_path)
    said: list[str] = []
    assert latest(tmp_path, tiny({"recipe.base_lr": 0.01}), said.append) is None
    assert "other settings" in said[0]


def test_moved_data_does_not_make_a_checkpoint_stale(
    tiny: Settings, videos: Path, tmp_path: Path
) -> None:
    undisturbed = train(tiny(), tmp_path / "undisturbed")
    stop_after(tiny(), tmp_path / "moved", epochs=2)
    (tmp_path / "elsewhere").symlink_to(videos)
    said: list[str] = []
    assert (
        train(
            tiny({"data.root": str(tmp_path / "elsewhere")}),
            tmp_path / "moved",
            callbacks={"log": said.append},
        )
        == undisturbed
    )
    assert said == []


def test_new_checkpoints_replace_newer_ones_that_cannot_be_used(
    tiny: Settings, tmp_path: Path
) -> None:
    train(tiny(), tmp_path)
    for stale in tmp_path.glob("step_*"):
        (stale / "model.safetensors").write_bytes(b"bits have flipped")
    shutil.rmtree(tmp_path / RESULT_DIR)
    stop_after(tiny(), tmp_path, epochs=1)
    assert [path.name for path in tmp_path.glob("step_*")] == ["step_00000002"]
    found = latest(tmp_path, tiny(), print)
    assert found
    assert found.progress.step == 2


def test_a_disk_that_refuses_leaves_the_earlier_checkpoint_and_says_what_to_do(
    tiny: Settings, tmp_path: Path
) -> None:
    stop_after(tiny(), tmp_path, epochs=1)
    before = sorted(path.name for path in tmp_path.iterdir())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(Failure, match="Earlier checkpoints are kept: make room"):
            train(tiny(), tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert train(tiny(), tmp_path)[-1][0] == 3


def kept(settings: TrainingConfig, folder: Path, keep: RetentionPolicy) -> list[int]:
    train(settings, folder, keep=keep)
    return sorted(int(path.name.removeprefix("step_")) for path in folder.glob("step_*"))


def test_checkpoints_are_kept_by_the_policy(tiny: Settings, tmp_path: Path) -> None:
    settings = tiny({"recipe.epochs": 6})
    history = dict(train(settings, tmp_path / "all", keep=RetentionPolicy(last=99)))
    assert kept(settings, tmp_path / "one", RetentionPolicy(last=1)) == [12], "two steps an epoch"
    assert kept(settings, tmp_path / "every", RetentionPolicy(last=2, every_epochs=2)) == [
        4,
        8,
        10,
        12,
    ]
    best = max(range(1, 7), key=lambda epoch: (history[epoch]["val/top1"], epoch))
    assert kept(settings, tmp_path / "best", RetentionPolicy(last=1, best=True)) == sorted(
        {2 * best, 12}
    )
    prune(tmp_path / "every", RetentionPolicy(every_epochs=3))
    assert sorted(path.name for path in (tmp_path / "every").glob("step_*")) == ["step_00000012"]
    prune(tmp_path / "best", RetentionPolicy())
    assert not list((tmp_path / "best").glob("step_*"))


def test_a_checkpoint_is_written_beside_the_training_and_holds_the_step_it_was_asked_at(
    tiny: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on, steps = threading.Event(), list[int]()
    written = checkpoint.save

    def late(*arguments: Any) -> Path:
        assert go_on.wait(60)
        return written(*arguments)

    def step(done: int, of: int) -> TrainingSignal:
        steps.append(done)
        if done == 2:  # an epoch's end: its checkpoint is asked for next, and cannot be written yet
            assert not list((tmp_path / "beside").glob("step_*"))
        if done == 3:
            assert not list((tmp_path / "beside").glob("step_*")), "the training went on meanwhile"
            go_on.set()
        return TrainingSignal.CONTINUE

    monkeypatch.setattr(checkpoint, "save", late)
    train(tiny(), tmp_path / "beside", callbacks={"on_step": step}, keep=RetentionPolicy(last=99))
    assert steps == [1, 2, 3, 4, 5, 6]
    monkeypatch.setattr(checkpoint, "save", written)
    shutil.rmtree(tmp_path / "beside" / "step_00000006")
    shutil.rmtree(tmp_path / "beside" / "step_00000004")
    train(tiny(), tmp_path / "undisturbed")
    train(tiny(), tmp_path / "beside")
    assert_same_weights(tmp_path / "undisturbed", tmp_path / "beside")


@pytest.fixture
def half_broken(videos: Path, tmp_path: Path) -> Path:
    shutil.copytree(videos, tmp_path / "data")
    for identifier in ("1000003", "2000005"):
        (tmp_path / "data" / "videos" / f"{identifier}.mp4").write_text("<html>gone</html>")
    return tmp_path / "data"


def test_a_broken_training_video_stops_the_training_and_is_named(
    tiny: Settings, half_broken: Path, tmp_path: Path
) -> None:
    with pytest.raises(Failure, match=r"1000003\.mp4: not a video .*data\.broken: skip"):
        train(tiny({"data.root": str(half_broken)}), tmp_path / "trial")


def test_broken_videos_can_be_left_out_and_are_counted(
    tiny: Settings, half_broken: Path, tmp_path: Path
) -> None:
    final = train(tiny({"data.root": str(half_broken), "data.broken": "skip"}), tmp_path / "trial")[
        -1
    ][1]
    assert (final["train/num_broken"], final["test/num_broken"], final["test/num_videos"]) == (
        1,
        1,
        7,
    )
    assert "2000005.mp4" in (tmp_path / "trial" / RESULT_DIR / "broken_videos.txt").read_text()


@pytest.fixture
def mostly_broken(videos: Path, tmp_path: Path) -> Path:
    """Of sixteen training videos every second is broken: many a worker's share has no good one."""
    shutil.copytree(videos, tmp_path / "data")
    for identifier in range(1000000, 1000016, 2):
        (tmp_path / "data" / "videos" / f"{identifier}.mp4").write_text("gone")
    return tmp_path / "data"


def test_a_batch_without_one_good_video_counts_nothing_and_training_goes_on(
    tiny: Settings, mostly_broken: Path, tmp_path: Path
) -> None:
    settings = tiny(
        {
            "data.root": str(mostly_broken),
            "data.broken": "skip",
            "recipe.batch_size": 2,
            "recipe.epochs": 6,
        }
    )
    final = train(settings, tmp_path / "trial")[-1][1]
    assert final["train/num_broken"] == 8
    assert np.isfinite(final["train/loss"])


def test_a_broken_videos_neighbour_is_not_mixed_with_it_and_keeps_its_place(tiny: Settings) -> None:
    pixels, labels = torch.rand(4, 3, 8, 16, 16), torch.eye(4)
    for seed in range(4):
        mixed, targets = mix(
            pixels,
            labels,
            AugmentConfig(),
            np.random.default_rng(seed),
            torch.tensor([True, False, True, True]),
        )
        assert torch.equal(targets[0], labels[0]) and torch.allclose(mixed[0], pixels[0])
        assert not torch.equal(targets[2], labels[2])


def test_a_batch_larger_than_the_split_is_refused(tiny: Settings, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"recipe\.batch_size: 32 is more than the 16 training videos"
    ):
        train(tiny({"recipe.batch_size": 32}), tmp_path)


def test_a_loss_that_is_not_finite_stops_the_training(tiny: Settings, tmp_path: Path) -> None:
    with pytest.raises(
        Failure, match=r"the gradient is not finite at or before step 2 .* recipe\.base_lr=1e\+30"
    ):
        train(tiny({"recipe.base_lr": 1e30, "recipe.warmup_epochs": 0}), tmp_path)
    assert not list((tmp_path / "beside").glob("step_*"))


def test_bfloat16_trains_too(tiny: Settings, tmp_path: Path) -> None:
    assert (
        train(tiny({"recipe.precision": "bf16", "recipe.epochs": 1}), tmp_path)[-1][1]["train/loss"]
        > 0
    )


@pytest.fixture
def pretrained(tiny: Settings, tmp_path: Path) -> Path:
    """Weights of another training, as a checkpoint that VideoMAE's code might have written."""
    torch.manual_seed(7)
    folder = tmp_path / "weights"
    weights = Weights("a test", "mar", MAR(tiny()).state_dict(), {}, {})
    write_model(folder, weights, tiny())
    return folder


def test_training_starts_from_pretrained_weights_and_says_so(
    tiny: Settings, pretrained: Path, tmp_path: Path
) -> None:
    said: list[str] = []
    chosen = tiny({"encoder.weights": str(pretrained), "recipe.epochs": 1, "recipe.base_lr": 1e-9})
    train(chosen, tmp_path / "run", callbacks={"log": said.append})
    there, trained = load_file(pretrained / "model.safetensors"), weights(tmp_path / "run")
    for name in there:
        is_kept = torch.allclose(trained[name], there[name], atol=1e-5)
        assert (
            is_kept == name.startswith(("encoder.", "decoder.")) or "norm" in name or "bias" in name
        ), name
    assert len(said) == 1
    assert "encoder: 16 tensors" in said[0]
    assert "at random" in said[0]


def test_a_resumed_training_does_not_start_from_its_pretrained_weights_again(
    tiny: Settings, pretrained: Path, tmp_path: Path
) -> None:
    chosen = tiny({"encoder.weights": str(pretrained)})
    undisturbed = train(chosen, tmp_path / "undisturbed")
    stop_after(chosen, tmp_path / "stopped", epochs=2)
    said: list[str] = []
    moved = pretrained.rename(tmp_path / "moved")
    elsewhere = tiny({"encoder.weights": str(moved)})
    assert train(elsewhere, tmp_path / "stopped", callbacks={"log": said.append}) == undisturbed
    assert said == []


def test_a_trials_result_is_tested_and_used_from_the_command_line(
    tiny: Settings, videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    final = train(tiny({"recipe.epochs": 1}), tmp_path / "run")[-1][1]
    result = str(tmp_path / "run" / RESULT_DIR)

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
            patch.setattr("sys.argv", ["mar", *arguments])
            main()
        printed = capsys.readouterr()
        return int(ended.value.code or 0), printed.out, printed.err

    code, out, _ = run("evaluate", result, "--json", "-o", str(tmp_path / "predictions.csv"))
    assert (code, json.loads(out)["test/top1"]) == (0, pytest.approx(final["test/top1"]))
    same = (tmp_path / "run" / RESULT_DIR / "predictions.csv").read_text()
    assert (tmp_path / "predictions.csv").read_text() == same
    _, out, _ = run("evaluate", result, "evaluation.mask.ratio=0.75", "evaluation.crops=3")
    assert "of 8 videos (1 clips × 3 crops, 75% hidden)" in out
    clip = sorted((videos / "videos").iterdir())[0]
    (tmp_path / "names.txt").write_text("right\nleft\n")
    code, out, _ = run("predict", result, str(clip), "--labels", str(tmp_path / "names.txt"))
    assert (
        code,
        re.fullmatch(rf"{clip}: (right|left) \d+\.\d%, (right|left) \d+\.\d%\n", out) is not None,
    ) == (
        0,
        True,
    )
    (tmp_path / "no.mp4").write_text("no video")
    code, out, complaint = run("predict", result, str(clip), str(tmp_path / "no.mp4"))
    assert (code, "1 could not be decoded" in complaint, str(clip) in out) == (1, True, True)
    pretrained_only = tiny({**PRETRAINING, "recipe.epochs": 1})
    train(pretrained_only, tmp_path / "pre")
    code, _, complaint = run("evaluate", str(tmp_path / "pre" / RESULT_DIR))
    assert (code, "has no classifier" in complaint) == (2, True)


def test_the_result_of_a_trial_is_a_model_to_start_from(tiny: Settings, tmp_path: Path) -> None:
    train(tiny(), tmp_path / "first")
    result = tmp_path / "first" / RESULT_DIR
    assert model_settings(read_weights(str(result))) == tiny()
    reports = train(tiny({"encoder.weights": str(result), "recipe.epochs": 1}), tmp_path / "second")
    assert reports


PRETRAINING = {
    "recipe.objective": "reconstruction",
    "mask.strategy": "tube",
    "mask.motion": "standard",
    "mask.ratio": 0.75,
}


def test_pretraining_reconstructs_alone_and_its_result_is_fine_tuned(
    tiny: Settings, tmp_path: Path
) -> None:
    reports = train(
        tiny({**PRETRAINING, "recipe.epochs": 6, "recipe.base_lr": 0.05}), tmp_path / "first"
    )
    losses = [metrics["train/reconstruction_loss"] for _, metrics in reports[:-1]]
    assert losses[-1] < losses[0]
    final = reports[-1][1]
    assert final["test/reconstruction_loss"] > 0
    assert not any("top1" in name or "classification" in name for name in final)
    result = tmp_path / "first" / RESULT_DIR
    assert not any(
        name.startswith("classifier.") for name in load_file(result / "model.safetensors")
    )
    assert not (result / "predictions.csv").exists()
    said: list[str] = []
    train(
        tiny({"encoder.weights": str(result), "recipe.epochs": 1}),
        tmp_path / "second",
        callbacks={"log": said.append},
    )
    assert "at random  classifier.…" in said[0]
    assert "decoder: 18 tensors" in said[0]


def test_pretraining_does_not_look_at_labels(tiny: Settings, tmp_path: Path) -> None:
    settings = tiny({**PRETRAINING, "recipe.epochs": 1})
    swapped = tiny({**PRETRAINING, "recipe.epochs": 1, "augment.smoothing": 0.9})
    assert train(settings, tmp_path / "one") == train(swapped, tmp_path / "other")
    with pytest.raises(UserError, match=r"recipe\.objective: 'reconstruction' needs mask\.ratio"):
        tiny({"recipe.objective": "reconstruction", "mask.ratio": 0.0})


def test_progress_survives_json() -> None:
    progress = Progress(step=3, sums=[1.0] * 5, history=[{"train/loss": 0.5}])
    assert Progress(**json.loads(json.dumps(vars(progress)))) == progress
