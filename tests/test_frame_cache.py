"""The frame cache: the same frames as the videos', whole or resumed or said to be stale."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock
from trainings import assert_same_weights, train

from mar.config.input_settings import ClipConfig, DataConfig
from mar.config.schema import TrainingConfig
from mar.data.annotations import fingerprint, read_split
from mar.data.cache_index import Index, Packing
from mar.data.dataset import EvaluationClips, TrainingClips
from mar.data.frame_cache import open_video, pack, verify
from mar.data.sampling import Reader
from mar.data.validation import check_data
from mar.data.video.sequential_reader import BrokenVideo
from mar.errors import UserError
from orchestration.cli.app import main

Settings = Callable[..., TrainingConfig]


def packed(data: DataConfig, folder: Path, packing: Packing | None = None) -> DataConfig:
    pack(data, folder, packing or Packing("raw"), 1, lambda *_: None)
    return data.model_copy(update={"cache": str(folder)})


def test_a_raw_cache_of_small_videos_has_their_very_frames(tiny: Settings, tmp_path: Path) -> None:
    data = tiny().data
    cached = packed(data, tmp_path / "cache")
    for video in [*read_split(data, "train"), *read_split(data, "val")]:
        with Reader(video.path) as reader, open_video(cached, video) as other:
            assert len(other) == len(reader)
            assert np.array_equal(
                other.frames(range(len(reader))), reader.frames(range(len(reader)))
            )
    settings = tiny()
    same = settings.model_copy(update={"data": cached})
    videos = read_split(data, "train")
    for kind in (TrainingClips, lambda *args: EvaluationClips(*args, 2, 3, False)):
        one, other = kind(settings, videos), kind(same, videos)
        key: Any = (3, 1) if kind is TrainingClips else 3
        assert np.array_equal(one[key][0], other[key][0])


def test_a_jpeg_cache_is_near_and_a_smaller_one_is_smaller(tiny: Settings, tmp_path: Path) -> None:
    data = tiny().data
    video = read_split(data, "train")[0]
    with Reader(video.path) as reader:
        frames = reader.frames(range(8)).astype(float)
    with open_video(packed(data, tmp_path / "jpeg", Packing("jpeg", 256, 95)), video) as near:
        assert np.abs(near.frames(range(8)) - frames).mean() < 4
    with open_video(packed(data, tmp_path / "small", Packing("raw", 16)), video) as small:
        assert small.frames([0, 7]).shape == (2, 16, 16, 3)


def test_training_from_the_cache_equals_training_from_the_videos(
    tiny: Settings, tmp_path: Path
) -> None:
    settings = tiny({"recipe.epochs": 1})
    cached = settings.model_copy(update={"data": packed(settings.data, tmp_path / "cache")})
    assert train(settings, tmp_path / "videos") == train(
        cached, tmp_path / "cached", loader_processes=1
    )
    assert_same_weights(tmp_path / "videos", tmp_path / "cached")


@pytest.fixture
def copy(tiny: Settings, videos: Path, tmp_path: Path) -> DataConfig:
    shutil.copytree(videos, tmp_path / "copy")
    return tiny().data.model_copy(update={"root": str(tmp_path / "copy")})


def test_a_changed_or_new_video_makes_the_cache_stale_and_packing_again_mends_it(
    copy: DataConfig, tmp_path: Path
) -> None:
    cached = packed(copy, tmp_path / "cache")
    videos = read_split(copy, "train")
    Index(tmp_path / "cache").check(videos)
    shutil.copy(videos[1].path, videos[0].path)
    with pytest.raises(
        UserError, match=r"1 videos have changed since, the first: .*; run mar data pack again"
    ):
        Index(tmp_path / "cache").check(videos)
    report = check_data(cached, ClipConfig(), 1, lambda *_: None)
    assert [(each.video, each.kind) for each in report.findings if each.kind == "stale"] == [
        (videos[0].name, "stale")
    ]
    assert not report.is_sound
    assert pack(copy, tmp_path / "cache", Packing("raw"), 1, lambda *_: None) == 23
    Index(tmp_path / "cache").check(videos)
    with open_video(cached, videos[0]) as one, Reader(videos[1].path) as other:
        assert np.array_equal(one.frames([0]), other.frames([0]))
        assert len(one) == len(other)


def test_a_video_that_changes_and_changes_back_is_packed_each_time(
    copy: DataConfig, tmp_path: Path
) -> None:
    packed(copy, tmp_path / "cache")
    videos = read_split(copy, "train")
    first = videos[0].path.read_bytes()
    for content in (videos[1].path.read_bytes(), first):
        videos[0].path.write_bytes(content)
        assert pack(copy, tmp_path / "cache", Packing("raw"), 1, lambda *_: None) == 23
        Index(tmp_path / "cache").check(videos)


def test_a_cache_stands_for_videos_that_are_gone(copy: DataConfig, tmp_path: Path) -> None:
    cached = packed(copy.model_copy(update={"missing": "skip"}), tmp_path / "cache")
    cached = cached.model_copy(update={"missing": "skip"})
    videos, identity = read_split(cached, "train"), fingerprint(cached)
    shutil.rmtree(Path(copy.root) / copy.videos)
    assert read_split(cached, "train") == videos
    assert fingerprint(cached) == identity
    with open_video(cached, videos[0]) as video:
        assert video.frames([0, 7]).shape == (2, 32, 32, 3)


def test_a_cut_off_shard_is_said_before_anything_is_trained(
    copy: DataConfig, tmp_path: Path
) -> None:
    packed(copy, tmp_path / "cache")
    file = tmp_path / "cache" / "00000.bin"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(UserError, match=r"00000\.json: damaged; remove it and its \.bin"):
        Index(tmp_path / "cache")


def test_frames_that_cannot_be_decoded_are_a_broken_video(copy: DataConfig, tmp_path: Path) -> None:
    cached = packed(copy, tmp_path / "cache", Packing("jpeg"))
    file = tmp_path / "cache" / "00000.bin"
    file.write_bytes(bytes(2000) + file.read_bytes()[2000:])
    first = min(
        [*read_split(copy, "train"), *read_split(copy, "val")], key=lambda video: video.name
    )
    with (
        open_video(cached, first) as video,
        pytest.raises(BrokenVideo, match=r"00000\.bin is damaged"),
    ):
        video.frames([0])


def test_a_folder_that_is_being_packed_is_not_packed_by_another(
    copy: DataConfig, tmp_path: Path
) -> None:
    packed(copy, tmp_path / "cache")
    with (
        FileLock(tmp_path / "cache" / ".lock"),
        pytest.raises(UserError, match="is being packed by another process"),
    ):
        packed(copy, tmp_path / "cache")


def test_prediction_takes_the_users_file_and_not_one_of_its_name_in_the_cache(
    copy: DataConfig,
    tiny: Settings,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cached = packed(copy, tmp_path / "cache", Packing("raw", 16))
    train(tiny({"recipe.epochs": 1}).model_copy(update={"data": cached}), tmp_path / "trial")
    videos = read_split(copy, "train")
    shutil.copy(videos[1].path, tmp_path / "other.mp4")
    shutil.copy(
        videos[1].path, tmp_path / videos[0].name
    )  # its content is another's than that of the cached one
    monkeypatch.chdir(tmp_path)
    said: list[str] = []
    for name in ("other.mp4", videos[0].name):
        monkeypatch.setattr(
            "sys.argv", ["mar", "predict", str(tmp_path / "trial" / "result"), name]
        )
        with pytest.raises(SystemExit) as ended:
            main()
        assert not ended.value.code
        said.append(capsys.readouterr().out.partition(": ")[2])
    assert said[0] == said[1]


def test_packing_goes_on_where_it_was_stopped(copy: DataConfig, tmp_path: Path) -> None:
    packed(copy, tmp_path / "cache")
    (
        tmp_path / "cache" / "00000.json"
    ).unlink()  # what is written last is not there: the shard is not whole
    assert pack(copy, tmp_path / "cache", Packing("raw"), 1, lambda *_: None) == 0
    assert pack(copy, tmp_path / "cache", Packing("raw"), 1, lambda *_: None) == 24
    with pytest.raises(UserError, match="holds a cache of raw 256"):
        pack(copy, tmp_path / "cache", Packing("jpeg"), 1, lambda *_: None)


def test_a_broken_video_is_broken_in_the_cache_too(copy: DataConfig, tmp_path: Path) -> None:
    video = read_split(copy, "train")[2]
    video.path.write_bytes(b"no video")
    cached = packed(copy, tmp_path / "cache")
    with pytest.raises(BrokenVideo, match="not a video that can be decoded"):
        open_video(cached, video)


def test_a_damaged_shard_is_found(copy: DataConfig, tmp_path: Path) -> None:
    packed(copy, tmp_path / "cache")
    assert verify(tmp_path / "cache", lambda *_: None) == []
    file = tmp_path / "cache" / "00000.bin"
    content = bytearray(file.read_bytes())
    content[100] ^= 1
    file.write_bytes(content)
    assert verify(tmp_path / "cache", lambda *_: None) == ["00000.bin"]
    file.unlink()
    assert verify(tmp_path / "cache", lambda *_: None) == ["00000.bin"]
    file.write_bytes(content)
    (tmp_path / "cache" / "00000.json").write_text("{")
    assert verify(tmp_path / "cache", lambda *_: None) == ["00000.bin"]
    with pytest.raises(
        UserError,
        match=r"00000\.json: damaged; remove it and its .bin, and run mar data pack again",
    ):
        Index(tmp_path / "cache")


def test_how_frames_are_kept_is_part_of_the_datas_fingerprint_where_is_not(
    copy: DataConfig, tmp_path: Path
) -> None:
    one, same = (packed(copy, tmp_path / name) for name in ("one", "same"))
    other = packed(copy, tmp_path / "other", Packing("raw", 16))
    assert fingerprint(one) == fingerprint(same)
    assert len({fingerprint(copy), fingerprint(one), fingerprint(other)}) == 3
    with pytest.raises(UserError, match=r"data\.cache: no frame cache in"):
        fingerprint(copy.model_copy(update={"cache": str(tmp_path / "none")}))


def test_the_command_packs_verifies_and_packs_nothing_twice(
    copy: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "recipe.yaml").write_text(f"data: {copy.model_dump_json()}\n")
    arguments = [
        "mar",
        "data",
        "pack",
        str(tmp_path / "recipe.yaml"),
        str(tmp_path / "cache"),
        "--processes",
        "1",
        "--verify",
    ]
    for before in (0, 24):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
            patch.setattr("sys.argv", arguments)
            main()
        assert not ended.value.code
        out = capsys.readouterr().out
        assert f"24 videos ({before} were there), 192 frames" in out
        assert out.endswith("every shard is unchanged\n")
