"""Annotations as the benchmarks are distributed, and ``mar data check``."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mar.config.input_settings import ClipConfig, DataConfig
from mar.data.annotation_files import Annotations, Split
from mar.data.annotation_formats import read_annotations
from mar.data.annotations import class_names, fingerprint, read_split
from mar.data.cache_index import Packing, load_index
from mar.data.frame_cache import pack
from mar.data.validation import check_data, report_text
from mar.data.video.sequential_reader import BrokenVideo, iter_frames
from mar.errors import UserError
from orchestration.cli.app import main

ARROW = "Pulling [something] from left to right"


def put(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def write(root: Path, name: str, text: str) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_bytes(text.encode())


def labelled(data: DataConfig, split: Any = "train") -> list[tuple[str, int]]:
    return [(video.name, video.label) for video in read_split(data, split)]


@pytest.mark.parametrize(
    "layout",
    [
        [
            "-3B32lodo2M_000059_000069.mp4",
            "_dbcJuKJQNs_000040_000050.mp4",
            "0zVQ_hjvFQM_000001_000011.mkv",
        ],
        ["-3B32lodo2M.mp4", "_dbcJuKJQNs.mp4", "0zVQ_hjvFQM.mp4"],
        [
            "train/abseiling/-3B32lodo2M_000059_000069.mp4",
            "train/air drumming/_dbcJuKJQNs_000040_000050.webm",
            "val/zumba/0zVQ_hjvFQM_000001_000011.mp4",
        ],
    ],
    ids=["id and seconds", "id alone", "folders"],
)
@pytest.mark.parametrize("has_cc", [True, False])
def test_kinetics_is_read_in_both_naming_schemes_with_and_without_is_cc(
    tmp_path: Path, layout: list[str], has_cc: bool
) -> None:
    put(tmp_path / "videos", *layout)
    head, end = ("label,youtube_id,time_start,time_end,split", "")
    head, end = (head + ",is_cc", ",0") if has_cc else (head, end)
    rows = f'abseiling,-3B32lodo2M,59,69,train{end}\n"air drumming",_dbcJuKJQNs,40,50,train{end}\n'
    write(tmp_path, "train.csv", f"{head}\n{rows}")
    write(tmp_path, "val.csv", f"{head}\nzumba,0zVQ_hjvFQM,1,11,validate{end}\n")
    data = DataConfig(format="kinetics", root=str(tmp_path), videos="videos", num_classes=3)
    assert labelled(data) == [(layout[0], 0), (layout[1], 1)]
    assert labelled(data, "val") == [(layout[2], 2)]
    assert class_names(data) == ["abseiling", "air drumming", "zumba"]


def test_kinetics_videos_that_are_not_there_are_named_or_left_out(tmp_path: Path) -> None:
    put(tmp_path / "videos", "aaaaaaaaaaa_000001_000011.mp4")
    for split in ("train", "val"):
        rows = "juggling,aaaaaaaaaaa,1,11\nknitting,bbbbbbbbbbb,2,12\n"
        write(tmp_path, f"{split}.csv", f"label,youtube_id,time_start,time_end\n{rows}")
    data = DataConfig(format="kinetics", root=str(tmp_path), videos="videos", num_classes=2)
    assert labelled(data)[1] == ("bbbbbbbbbbb_000002_000012.mp4", 1)
    assert labelled(data.model_copy(update={"missing": "skip"})) == [
        ("aaaaaaaaaaa_000001_000011.mp4", 0)
    ]
    shutil.rmtree(tmp_path / "videos")
    (tmp_path / "videos").mkdir()
    with pytest.raises(UserError, match=r"data\.train: none of its 2 videos exists"):
        read_split(data.model_copy(update={"missing": "skip"}), "train")


@pytest.mark.parametrize("files", ["something-something-v2-{}.json", "labels/{}.json"])
def test_something_something_is_read_in_both_layouts_with_labels_as_strings(
    tmp_path: Path, files: str
) -> None:
    put(tmp_path / "videos", "1.webm", "2.mp4")
    items = [{"id": "1", "label": "pulling a pen", "template": ARROW, "placeholders": ["a pen"]}]
    write(
        tmp_path,
        files.format("labels"),
        json.dumps({ARROW.replace("[", "").replace("]", ""): "1", "Other": "0"}),
    )
    write(tmp_path, files.format("train"), json.dumps(items))
    write(tmp_path, files.format("validation"), json.dumps([{**items[0], "id": "2"}]))
    data = DataConfig(format="ssv2", root=str(tmp_path), videos="videos", num_classes=2)
    assert labelled(data) == [("1.webm", 1)]
    assert labelled(data, "val") == [("2.mp4", 1)]
    assert class_names(data) == ["Other", "Pulling something from left to right"]


def test_the_releases_lists_with_label_numbers_need_no_labels_file(tmp_path: Path) -> None:
    put(tmp_path / "videos", "1.mp4")
    write(tmp_path, "train.json", json.dumps([{"id": "1", "template": ARROW, "label_idx": 86}]))
    data = DataConfig(format="ssv2", root=str(tmp_path), videos="videos", train="train.json")
    assert labelled(data) == [("1.mp4", 86)]


def ucf101(root: Path) -> DataConfig:
    put(
        root / "videos",
        "ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi",
        "HandstandPushups/v_HandStandPushups_g01_c01.avi",
        "HandstandPushups/v_HandStandPushups_g08_c01.mp4",
    )
    write(root, "ucfTrainTestlist/classInd.txt", "1 ApplyEyeMakeup\r\n2 HandstandPushups\r\n")
    train = (
        "ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi "
        "1\r\nHandstandPushups/v_HandstandPushups_g08_c01.avi 2\r\n"
    )
    write(root, "ucfTrainTestlist/trainlist01.txt", train)
    write(
        root,
        "ucfTrainTestlist/testlist01.txt",
        "HandstandPushups/v_HandStandPushups_g01_c01.avi\r\n",
    )
    return DataConfig(format="ucf101", root=str(root), videos="videos", num_classes=2)


def test_ucf101_is_read_with_crlf_and_its_handstand_pushups(tmp_path: Path) -> None:
    data = ucf101(tmp_path)
    assert labelled(data) == [
        ("ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi", 0),
        ("HandstandPushups/v_HandStandPushups_g08_c01.mp4", 1),
    ]
    assert labelled(data, "val") == [("HandstandPushups/v_HandStandPushups_g01_c01.avi", 1)]
    with pytest.raises(UserError, match=r"data\.train: no annotation file .*trainlist02\.txt or"):
        read_split(data.model_copy(update={"split": 2}), "train")
    write(
        tmp_path,
        "ucfTrainTestlist/trainlist01.txt",
        "ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi 2\n",
    )
    with pytest.raises(
        UserError, match=r"trainlist01\.txt:1: has class 2, but .* has 1 for ApplyEyeMakeup"
    ):
        read_split(data, "train")


def test_hmdb51_takes_1_for_training_2_for_testing_and_leaves_0(tmp_path: Path) -> None:
    put(
        tmp_path / "videos",
        "brush_hair/April_09_brush_hair_u_nm_np1_ba_goo_0.avi",
        "wave/a#b_wave.avi",
        "wave/c_wave.avi",
    )
    folder = "testTrainMulti_7030_splits"
    write(
        tmp_path,
        f"{folder}/brush_hair_test_split1.txt",
        "April_09_brush_hair_u_nm_np1_ba_goo_0.avi 1 \n",
    )
    write(tmp_path, f"{folder}/wave_test_split1.txt", "a#b_wave.avi 2 \nc_wave.avi 0 \n")
    write(tmp_path, f"{folder}/wave_test_split2.txt", "c_wave.avi 1 \n")
    data = DataConfig(format="hmdb51", root=str(tmp_path), videos="videos", num_classes=2)
    assert labelled(data) == [("brush_hair/April_09_brush_hair_u_nm_np1_ba_goo_0.avi", 0)]
    assert labelled(data, "val") == [("wave/a#b_wave.avi", 1)]
    assert class_names(data) == ["brush_hair", "wave"]
    write(tmp_path, f"{folder}/wave_test_split1.txt", "a#b_wave.avi two\n")
    with pytest.raises(UserError, match=r"wave_test_split1\.txt:1: expected a video and 0, 1 or 2"):
        read_split(data, "train")


def test_a_folder_for_each_class_is_enough(tmp_path: Path) -> None:
    put(tmp_path, "train/run/a.mp4", "train/jump/b c.avi", "val/run/d.mp4", "val/run/notes.txt")
    data = DataConfig(format="folders", root=str(tmp_path), num_classes=2)
    assert labelled(data) == [("train/jump/b c.avi", 0), ("train/run/a.mp4", 1)]
    assert labelled(data, "val") == [("val/run/d.mp4", 1)]


def test_a_file_of_another_format_is_said(tmp_path: Path) -> None:
    put(tmp_path / "videos", "a.mp4")
    write(tmp_path, "train.csv", "videos/a.mp4 0\n")
    write(tmp_path, "val.csv", "videos/a.mp4 0\n")
    with pytest.raises(UserError, match=r"train\.csv:1: expected the columns label, youtube_id"):
        read_split(DataConfig(format="kinetics", root=str(tmp_path), videos="videos"), "train")
    with pytest.raises(UserError, match=r"data\.videos: no folder"):
        read_split(
            DataConfig(format="ssv2", root=str(tmp_path), videos="none", train="train.csv"), "train"
        )
    with pytest.raises(UserError, match=r"data\.labels: no annotation file .*classInd\.txt"):
        read_split(DataConfig(format="ucf101", root=str(tmp_path), videos="videos"), "train")


# mar data check


@pytest.fixture
def odd(videos: Path, tmp_path: Path) -> DataConfig:
    """Two good videos and one of each fault."""
    good = sorted((videos / "videos").iterdir())
    folder = tmp_path / "videos"
    folder.mkdir()
    for name, source in (("a.mp4", good[0]), ("b.mp4", good[1]), ("copy of a.mp4", good[0])):
        shutil.copy(source, folder / name)
    (folder / "broken.mp4").write_text("<html>404</html>")
    write(tmp_path, "train.txt", "a.mp4 0\nbroken.mp4 0\ngone.mp4 1\nb.mp4 7\n../b.mp4 1\n")
    write(tmp_path, "val.txt", "b.mp4 1\ncopy of a.mp4 0\na.mp4 0\n")
    return DataConfig(root=str(tmp_path), videos="videos", num_classes=2)


CLIP = ClipConfig(frames=8, size=16)


def test_a_check_finds_each_kind_of_fault(odd: DataConfig) -> None:
    output: list[tuple[int, int]] = []
    report = check_data(odd, CLIP, 2, lambda done, total: output.append((done, total)))
    assert {(each.split, each.video, each.kind) for each in report.findings} == {
        ("train", "broken.mp4", "unreadable"),
        ("train", "gone.mp4", "missing"),
        ("train", "b.mp4", "refused"),
        ("train", "../b.mp4", "refused"),
        ("val", "copy of a.mp4", "duplicate"),
        ("val", "a.mp4", "duplicate"),
    }
    assert report.counts["train"] == {
        "ok": 1,
        "missing": 1,
        "unreadable": 1,
        "short": 0,
        "refused": 2,
        "duplicate": 0,
        "wrong": 0,
        "stale": 0,
    }
    assert report.per_class == {"train": {"0": 1, "1": 0}, "val": {"0": 2, "1": 1}}
    assert not report.is_sound
    assert report.fingerprint is None
    assert output[-1] == (6, 6)
    assert "none of 1" in report_text(report)


def test_a_short_video_is_said_but_is_no_fault_and_the_fingerprint_is_the_trials(
    videos: Path,
) -> None:
    data = DataConfig(
        format="ssv2", root=str(videos), videos="videos", train="train.json", val="validation.json",
        labels="labels.json", num_classes=2,
    )  # fmt: skip
    report = check_data(data, ClipConfig(frames=16, size=16), 1, lambda *_: None)
    assert report.is_sound
    assert report.counts["val"]["short"] == 8
    assert report.findings[0].message == "8 frames, a clip takes 16"
    assert report.fingerprint == fingerprint(data)


def test_a_check_reads_a_packed_video_from_the_frame_cache_when_its_file_is_gone(
    odd: DataConfig, tmp_path: Path
) -> None:
    write(tmp_path, "train.txt", "a.mp4 0\n")
    write(tmp_path, "val.txt", "b.mp4 1\n")
    cached = odd.model_copy(update={"cache": str(tmp_path / "cache")})
    pack(odd, tmp_path / "cache", Packing("raw", 32), 1, lambda *_: None)
    shutil.rmtree(tmp_path / "videos")
    (tmp_path / "videos").mkdir()
    load_index.cache_clear()
    report = check_data(cached, CLIP, 1, lambda *_: None)
    assert report.is_sound, report.findings
    write(tmp_path, "val.txt", "b.mp4 1\nnew.mp4 1\n")
    (tmp_path / "videos" / "new.mp4").write_text("not packed")
    (finding,) = check_data(cached, CLIP, 1, lambda *_: None).findings
    assert "not in the frame cache" in finding.message


def test_a_name_that_no_file_can_have_is_a_missing_video(odd: DataConfig, tmp_path: Path) -> None:
    long = "x" * 300 + ".mp4"
    write(tmp_path, "train.txt", f"a.mp4 0\n{long} 0\n")
    write(tmp_path, "val.txt", "b.mp4 1\n")
    (finding,) = check_data(odd, CLIP, 1, lambda *_: None).findings
    assert finding.kind == "missing"
    with pytest.raises(BrokenVideo):
        next(iter_frames(tmp_path / long))


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[[DataConfig], str]:
    def file(data: DataConfig) -> str:
        write(
            tmp_path,
            "recipe.yaml",
            f"data: {data.model_dump_json()}\nclip: {{frames: 8, size: 64}}\n",
        )
        return str(tmp_path / "recipe.yaml")

    return file


def test_the_command_ends_with_1_when_something_is_wrong_and_lists_it(
    odd: DataConfig,
    recipe: Callable[[DataConfig], str],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def run(*arguments: str) -> Any:
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
            patch.setattr("sys.argv", ["mar", "data", "check", *arguments])
            main()
        return ended.value.code or 0

    assert (
        run(
            recipe(odd),
            "encoder.tubelet=[2,16,16]",
            "--processes",
            "1",
            "-o",
            str(tmp_path / "all.csv"),
        )
        == 1
    )
    out = capfd.readouterr().out
    assert "broken.mp4: not a video that can be decoded" in out
    assert len((tmp_path / "all.csv").read_text().splitlines()) == 7
    sound = odd.model_copy(update={"train": "good.txt", "val": "other.txt"})
    write(tmp_path, "good.txt", "a.mp4 0\n")
    write(tmp_path, "other.txt", "b.mp4 1\n")
    assert run(recipe(sound), "--json", "--processes", "1") == 0
    assert json.loads(capfd.readouterr().out)["counts"]["train"]["ok"] == 1
    write(tmp_path, "good.txt", "a.mp4 zero\n")
    assert run(recipe(sound), "--processes", "1") == 2


def test_a_list_is_read_once_in_a_process_and_again_when_it_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "train.txt").write_text("a.mp4 0\n")
    data, reads = DataConfig(root=str(tmp_path), num_classes=2), list[str]()

    def counted(data: DataConfig, split: Split) -> Annotations:
        reads.append(split)
        return read_annotations(data, split)

    monkeypatch.setattr("mar.data.annotations.read_annotations", counted)
    first = read_split(data, "train")
    first.clear()  # the list is the caller's own
    assert [video.name for video in read_split(data, "train")] == ["a.mp4"]
    assert reads == ["train"]
    (tmp_path / "train.txt").write_text("a.mp4 0\nb.mp4 1\n")
    assert [video.label for video in read_split(data, "train")] == [0, 1]


def test_a_video_beside_another_of_its_name_in_a_folder_is_not_chosen_in_silence(
    tmp_path: Path,
) -> None:
    put(tmp_path / "videos", "1.mp4", "backup/1.mp4")
    entry = [{"id": "1", "template": ARROW, "placeholders": ["a"]}]
    for split in ("train", "validation"):
        write(tmp_path, f"{split}.json", json.dumps(entry))
    write(tmp_path, "labels.json", json.dumps({ARROW.replace("[something]", "something"): "0"}))
    data = DataConfig(
        format="ssv2",
        root=str(tmp_path),
        videos="videos",
        train="train.json",
        val="validation.json",
        labels="labels.json",
        num_classes=1,
    )
    with pytest.raises(UserError, match=r"several files below .* match 1:"):
        read_split(data, "train")
