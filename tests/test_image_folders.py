"""Videos that are folders of images, and the data sets that are distributed so."""

import json
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from commands import run_mar
from PIL import Image

from mar.config.input_settings import DataConfig
from mar.data.annotations import class_names, fingerprint, read_split
from mar.data.cache_index import Packing
from mar.data.frame_cache import open_video, pack
from mar.data.sampling import Reader
from mar.data.validation import check_data
from mar.data.video.sequential_reader import BrokenVideo
from mar.errors import UserError


def image(file: Path, level: int, size: int = 24) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((size, size, 3), level, np.uint8)).save(file)


def stating(file: Path, size: int) -> None:
    """Write a PNG whose header states a size that it does not have."""
    content = bytearray(file.read_bytes())
    content[16:24] = struct.pack(">II", size, size)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    file.write_bytes(content)


@pytest.fixture
def data(tmp_path: Path) -> DataConfig:
    """Two splits of two folders with twelve images each, whose levels count the frames."""
    for video in range(4):
        for frame in range(12):
            image(
                tmp_path / "videos" / f"{video}" / f"img_{frame + 1}.png", 20 * video + 10 * frame
            )
    (tmp_path / "train.txt").write_text("0 0\n1 1\n")
    (tmp_path / "val.txt").write_text("2 0\n3 1\n")
    return DataConfig(root=str(tmp_path), videos="videos", num_classes=2)


def test_frame_n_is_the_image_with_the_nth_number(data: DataConfig) -> None:
    """``img_10.png`` comes after ``img_9.png``, and hidden files are no frames."""
    folder = Path(data.root) / "videos" / "1"
    (folder / "._img_1.png").write_bytes(b"not an image")
    (folder / "notes.txt").write_text("not an image either")
    with Reader(folder) as reader:
        assert len(reader) == 12
        assert reader.fps is None
        assert reader.decoder == "images"
        frames = reader.frames([0, 9, 11, 9])
    assert frames.shape == (4, 24, 24, 3)
    assert frames[:, 0, 0, 0].tolist() == [20, 110, 130, 110]


def test_the_frame_cache_has_the_same_frames(data: DataConfig, tmp_path: Path) -> None:
    cached = data.model_copy(update={"cache": str(tmp_path / "cache")})
    pack(data, tmp_path / "cache", Packing("raw", None), 1, lambda *_: None)
    video = read_split(cached, "train")[1]
    with open_video(cached, video) as packed, open_video(data, video) as plain:
        assert len(packed) == len(plain)
        np.testing.assert_array_equal(packed.frames(range(12)), plain.frames(range(12)))


def test_a_cache_of_images_of_different_sizes_says_so(data: DataConfig, tmp_path: Path) -> None:
    """Also where the odd one is far from the first: frames are packed some at a time."""
    folder = Path(data.root) / "videos" / "0"
    for frame in range(12, 90):
        image(folder / f"img_{frame + 1}.png", 5, 24 if frame < 80 else 30)
    pack(data, tmp_path / "cache", Packing("raw", None), 1, lambda *_: None)
    cached = data.model_copy(update={"cache": str(tmp_path / "cache")})
    with pytest.raises(BrokenVideo, match="30 × 30 pixels, where another image has 24 × 24"):
        open_video(cached, read_split(cached, "train")[0])


def test_other_images_are_other_data(data: DataConfig) -> None:
    before = fingerprint(data)
    image(Path(data.root) / "videos" / "0" / "img_13.png", 7)
    assert fingerprint(data) != before


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda folder: (folder / "img_3.png").write_bytes(b"no"), r"img_3\.png: not an image"),
        (lambda folder: os.truncate(folder / "img_3.png", 50), r"img_3\.png: "),
        (
            lambda folder: image(folder / "img_3.png", 0, 30),
            r"30 × 30 pixels, where another image has 24 × 24|24 × 24 pixels, where",
        ),
        (
            lambda folder: [each.unlink() for each in folder.iterdir()],
            r"a folder without images",
        ),
        (lambda folder: stating(folder / "img_3.png", 10_000), r"img_3\.png: 10000 × 10000 pixels"),
        (lambda folder: stating(folder / "img_3.png", 30_000), r"img_3\.png: .*pixels"),
    ],
    ids=["no image", "cut off", "another size", "empty", "too large", "far too large"],
)
def test_a_folder_that_cannot_be_read_is_a_broken_video(
    data: DataConfig, spoil: object, reason: str
) -> None:
    folder = Path(data.root) / "videos" / "0"
    assert callable(spoil)
    spoil(folder)
    with pytest.raises(BrokenVideo, match=reason), Reader(folder) as reader:
        reader.frames(range(12))


def test_data_check_reads_folders(data: DataConfig, tiny: object) -> None:
    assert callable(tiny)
    clip = tiny({}).clip
    image(Path(data.root) / "videos" / "3" / "img_1.png", 0, 30)
    report = check_data(data, clip, 1, lambda *_: None)
    (finding,) = [each for each in report.findings if each.kind == "unreadable"]
    assert finding.video == "3"


def jester(root: Path) -> DataConfig:
    (root / "jester-v1-labels.csv").write_text("Swiping Left\nDrumming Fingers\n")
    (root / "jester-v1-train.csv").write_text("34870;Drumming Fingers\n56557;Swiping Left\n")
    (root / "jester-v1-validation.csv").write_text("9223;Swiping Left\n")
    return DataConfig(format="jester", root=str(root), videos="20bn-jester-v1", num_classes=2)


@pytest.mark.parametrize("ending", ["", ".webm"], ids=["images", "files"])
def test_jester_is_folders_of_images_or_files(tmp_path: Path, ending: str) -> None:
    for video in ("34870", "56557", "9223"):
        path = tmp_path / "20bn-jester-v1" / f"{video}{ending}"
        if ending:
            path.parent.mkdir(exist_ok=True)
            path.touch()
        else:
            image(path / "00001.jpg", 3)
    data = jester(tmp_path)
    found = [(each.name, each.label) for each in read_split(data, "train")]
    assert found == [(f"34870{ending}", 1), (f"56557{ending}", 0)]
    assert class_names(data) == ["Swiping Left", "Drumming Fingers"]


def test_a_line_of_jester_that_is_not_understood_is_named(tmp_path: Path) -> None:
    image(tmp_path / "20bn-jester-v1" / "9223" / "00001.jpg", 3)
    data = jester(tmp_path)
    (tmp_path / "jester-v1-train.csv").write_text("34870;Drumming Fingers\n1;Waving\n")
    with pytest.raises(UserError, match=r"train\.csv:2: the class 'Waving' is not in .*labels"):
        read_split(data, "train")
    (tmp_path / "jester-v1-train.csv").write_text("34870,Drumming Fingers\n")
    with pytest.raises(UserError, match=r"train\.csv:1: expected '34870;Drumming Fingers'"):
        read_split(data, "train")


def test_diving48_has_numbered_classes_of_four_words(tmp_path: Path) -> None:
    (tmp_path / "rgb").mkdir()
    for name in ("lbRhXO-PWXE_00000", "zYHstCxnAPA_00361"):
        (tmp_path / "rgb" / f"{name}.mp4").touch()
    item = {"vid_name": "zYHstCxnAPA_00361", "label": 1, "start_frame": 0, "end_frame": 84}
    (tmp_path / "Diving48_V2_train.json").write_text(json.dumps([item]))
    (tmp_path / "Diving48_V2_test.json").write_text(
        json.dumps([{**item, "vid_name": "lbRhXO-PWXE_00000", "label": 0}])
    )
    vocabulary = [["Back", "15som", "05Twis", "FREE"], ["Back", "15som", "15Twis", "FREE"]]
    (tmp_path / "Diving48_vocab.json").write_text(json.dumps(vocabulary))
    data = DataConfig(format="diving48", root=str(tmp_path), videos="rgb", num_classes=2)
    (video,) = read_split(data, "train")
    assert (video.name, video.label) == ("zYHstCxnAPA_00361.mp4", 1)
    assert class_names(data) == ["Back 15som 05Twis FREE", "Back 15som 15Twis FREE"]
    (tmp_path / "Diving48_V2_train.json").write_text(json.dumps([{"vid_name": "a"}]))
    with pytest.raises(UserError, match=r"train\.json: item 1: expected an object with 'vid_name'"):
        read_split(data, "train")


def test_a_folder_of_images_is_predicted_as_one_video(tmp_path: Path) -> None:
    for frame in range(20):
        image(tmp_path / "clip" / f"{frame:05}.jpg", 12 * frame, 40)
    printed, _ = run_mar(tmp_path, "predict", "mini", "clip", "--json")
    (predicted,) = json.loads(printed)["predictions"]
    assert predicted["video"].endswith("clip")
