"""``data.cache: auto``: packed once before training, with the videos' own pixels, or refused."""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from commands import here
from conftest import TINY_STUDY, tiny_tree
from filelock import FileLock
from trainings import assert_same_weights

from mar.config.input_settings import DataConfig
from mar.config.schema import TrainingConfig
from mar.data import auto_cache
from mar.data.annotations import fingerprint, read_split
from mar.data.auto_cache import ensure_packed, plan_cache
from mar.data.cache_index import cache_folder
from mar.data.frame_cache import open_video
from mar.data.sampling import Reader
from mar.errors import Failure, UserError

AUTO = "data.cache=auto"


@pytest.fixture
def data(videos: Path, tmp_path: Path) -> DataConfig:
    """A copy of the tiny data set, which a test may change."""
    shutil.copytree(videos, tmp_path / "data")
    return DataConfig.model_validate(tiny_tree(tmp_path / "data")["data"] | {"cache": "auto"})


@pytest.fixture
def workdir(data: DataConfig, tmp_path: Path) -> Path:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tiny_tree(Path(data.root))))
    (tmp_path / "tiny.yaml").write_text(TINY_STUDY)
    return tmp_path


def ensure(data: DataConfig, folder: Path) -> list[int]:
    """Pack, and return how many videos were done at each report."""
    done: list[int] = []
    ensure_packed(data, folder, 1, lambda count, _: done.append(count), lambda: None)
    return done


def test_a_study_gives_the_same_numbers_from_it_and_packs_once(workdir: Path) -> None:
    plain = here(workdir, "run", "tiny.yaml", "--backend", "local", "--store", "plain")
    assert "packing frames" not in plain
    output = here(workdir, "run", "tiny.yaml", AUTO, "--backend", "local", "--store", "cached")
    assert output.count("packing frames: 24 of 24 videos, about 0.00 GiB, in") == 1
    for folder in (workdir / "plain" / "trials").iterdir():
        assert_same_weights(folder, workdir / "cached" / "trials" / folder.name)
        one, other = (
            json.loads((root / folder.name / "result" / "metrics.json").read_text())
            for root in (workdir / "plain" / "trials", workdir / "cached" / "trials")
        )
        same = [name for name in one if not name.startswith(("time/", "throughput/"))]
        assert {name: one[name] for name in same} == {name: other[name] for name in same}
    again = here(
        workdir, "run", "tiny.yaml", AUTO, "seed=1", "--backend", "local", "--store", "cached"
    )
    assert "2 to train" in again and "packing frames" not in again


def test_a_finished_run_answers_with_and_without_it(workdir: Path) -> None:
    here(workdir, "run", "tiny.yaml", "--backend", "local")
    assert "2 trials: 2 finished, 0 to train" in here(workdir, "plan", "tiny.yaml", AUTO)


def test_a_plan_says_what_will_be_packed_and_where(workdir: Path) -> None:
    plan = here(workdir, "plan", "tiny.yaml", AUTO)
    assert "frames to pack before the first epoch: 24 of 24 videos" in plan
    assert str(workdir / "mar_store" / "frames") in plan
    assert not (workdir / "mar_store").exists(), "a plan writes nothing"


def test_the_estimate_is_near_the_size_that_is_written(data: DataConfig, tmp_path: Path) -> None:
    folder = cache_folder(data, tmp_path / "frames")
    estimated = plan_cache(data, folder).missing_bytes
    ensure(data, folder)
    written = sum(file.stat().st_size for file in folder.glob("*.bin"))
    assert estimated == pytest.approx(written, rel=0.02)


def test_its_frames_are_the_videos_own(data: DataConfig, tmp_path: Path) -> None:
    folder = cache_folder(data, tmp_path / "frames")
    ensure(data, folder)
    cached = data.model_copy(update={"cache": str(folder)})
    for video in read_split(data, "train"):
        with Reader(video.path) as reader, open_video(cached, video) as packed:
            numbers = range(len(reader))
            assert np.array_equal(packed.frames(numbers), reader.frames(numbers))
    assert fingerprint(cached) == fingerprint(data.model_copy(update={"cache": None}))


def test_a_changed_video_is_packed_again_and_no_other(data: DataConfig, tmp_path: Path) -> None:
    folder = cache_folder(data, tmp_path / "frames")
    assert ensure(data, folder)[-1] == 24
    assert ensure(data, folder) == [], "nothing is left to pack"
    first, second, *_ = read_split(data, "train")
    first.path.write_bytes(second.path.read_bytes() + b"\0")
    assert plan_cache(data, folder).num_missing == 1
    ensure(data, folder)
    cached = data.model_copy(update={"cache": str(folder)})
    with Reader(second.path) as reader, open_video(cached, first) as packed:
        assert np.array_equal(packed.frames([0, 3]), reader.frames([0, 3]))


@pytest.mark.parametrize("command", ["run", "plan"])
def test_what_does_not_fit_on_the_disk_is_refused_before_anything_is_written(
    workdir: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    usage = shutil.disk_usage(workdir)
    monkeypatch.setattr(auto_cache.shutil, "disk_usage", lambda _: usage._replace(free=2**10))
    if command == "plan":
        assert "frames to pack" in here(workdir, "plan", "tiny.yaml", AUTO)
        return
    output = here(workdir, "run", "tiny.yaml", AUTO, "--backend", "local", code=2)
    assert "data.cache: auto needs about 0.0 GiB for the frames of 24 videos" in output
    assert "set data.cache=null" in output and "mar data pack" in output
    assert not (workdir / "mar_store" / "frames").exists()
    assert not list((workdir / "mar_store").glob("trials/*"))


def test_two_processes_pack_once(data: DataConfig, tmp_path: Path) -> None:
    folder = cache_folder(data, tmp_path / "frames")
    code = (
        "import sys; from pathlib import Path\n"
        "from mar.config.input_settings import DataConfig\n"
        "from mar.data.auto_cache import ensure_packed\n"
        "data = DataConfig.model_validate_json(sys.argv[1])\n"
        "done = []\n"
        "ensure_packed(data, Path(sys.argv[2]), 1, lambda n, _: done.append(n), lambda: None)\n"
        "print(len(done))\n"
    )
    both = [
        subprocess.Popen(
            [sys.executable, "-c", code, data.model_dump_json(), str(folder)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    reports = sorted(int(process.communicate(timeout=120)[0]) for process in both)
    assert reports[0] == 0 and reports[1] > 0, "one packed, the other waited and found it packed"
    assert len(list(folder.glob("*.bin"))) == 1


def test_a_wait_for_another_process_may_be_ended(data: DataConfig, tmp_path: Path) -> None:
    folder = cache_folder(data, tmp_path / "frames")
    folder.parent.mkdir()

    def give_up() -> None:
        raise UserError("stopped")

    with FileLock(folder.with_name(f"{folder.name}.lock")):
        began = time.monotonic()
        with pytest.raises(UserError, match="stopped"):
            ensure_packed(data, folder, 1, lambda *_: None, give_up)
    assert time.monotonic() - began < 30


def test_a_worker_on_another_node_packs_for_itself(
    tiny: Callable[..., TrainingConfig], tmp_path: Path
) -> None:
    from orchestration.config import LaunchConfig
    from orchestration.studies.trial import Trial
    from orchestration.worker.spec import build_trial_spec
    from orchestration.worker.trial_runner import train

    settings = tiny({"data.cache": "auto", "recipe.epochs": 1, "recipe.warmup_epochs": 0})
    launch = LaunchConfig(store=tmp_path / "store", study="tiny")
    spec = build_trial_spec(Trial({"ρ": "50 %"}, settings, ""), launch, 0)
    assert spec.frames is not None and spec.settings["data"]["cache"] == str(spec.frames)
    assert train(spec.to_json(), lambda _: None) is None
    assert list(spec.frames.glob("*.bin"))


def test_a_damaged_header_does_not_spoil_the_estimate(data: DataConfig, tmp_path: Path) -> None:
    folder = cache_folder(data, tmp_path / "frames")
    sound = plan_cache(data, folder).missing_bytes
    first, second, *_ = read_split(data, "train")
    content = first.path.read_bytes()
    at = content.index(b"stts") + 12  # after version, flags and the number of entries
    first.path.write_bytes(content[:at] + b"\x7f\xff\xff\xff" + content[at + 4 :])
    second.path.write_bytes(second.path.read_bytes().replace(b"avc1", b"zzzz"))  # unknown codec
    assert plan_cache(data, folder).missing_bytes == pytest.approx(sound, rel=0.02)


def test_a_store_that_cannot_be_written_is_a_failure(data: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(Failure, match=r"cannot be written.*choose another --store"):
        ensure(data, cache_folder(data, tmp_path / "file" / "frames"))
