import json
import os
import random
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY_VERBS
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from timm.data.random_erasing import RandomErasing
from torch.utils.data import Dataset

from mar.augmentation.augment import draw_erased, erase, flip, mix, soft_labels, swapped
from mar.config.input_settings import AugmentConfig, ClipConfig, DataConfig
from mar.config.schema import TrainingConfig
from mar.data.annotations import class_names, fingerprint, read_split
from mar.data.crops import random_box, test_boxes
from mar.data.dataset import (
    EvaluationClips,
    Sample,
    TrainingClips,
    TrainingOrder,
    one_after_another,
)
from mar.data.decoders import decode_with, write_video
from mar.data.loaders import collate, loader
from mar.data.motion_verbs import FRAMES_PER_S, PHOTOS, VERBS, MotionVerbs, make
from mar.data.sampling import Reader, evaluation_frames, training_frames
from mar.data.video.sequential_reader import BrokenVideo, SequentialReader
from mar.distributed import WorkerRank
from mar.errors import Failure, UserError
from mar.model.pixels import IMAGENET_MEAN, IMAGENET_STD

Settings = Callable[..., TrainingConfig]


def list_data(root: Path, text: str, num_classes: int = 2) -> DataConfig:
    (root / "train.txt").write_text(text)
    return DataConfig(root=str(root), num_classes=num_classes)


# The demo data


def test_the_demo_data_are_h264_files_in_something_somethings_format(videos: Path) -> None:
    import av

    items = json.loads((videos / "train.json").read_text())
    assert json.loads((videos / "labels.json").read_text()) == {
        "Moving something to the right": "0",
        "Moving something to the left": "1",
    }
    assert items[0].keys() == {"id", "label", "template", "placeholders"}
    with av.open(str(videos / "videos" / f"{items[0]['id']}.mp4")) as container:
        assert container.streams.video[0].codec_context.name == "h264"
        assert sum(1 for _ in container.decode(video=0)) == 8


def test_the_same_seed_makes_the_same_files_and_another_seed_others(
    videos: Path, tmp_path: Path
) -> None:
    make(tmp_path / "same", TINY_VERBS)
    make(tmp_path / "other", MotionVerbs(**{**vars(TINY_VERBS), "seed": 1}))
    clips = [
        sorted((folder / "videos").iterdir())
        for folder in (videos, tmp_path / "same", tmp_path / "other")
    ]
    assert [file.read_bytes() for file in clips[0]] == [file.read_bytes() for file in clips[1]]
    assert all(a.read_bytes() != b.read_bytes() for a, b in zip(clips[0], clips[2], strict=True))


def test_several_processes_make_the_same_videos(tmp_path: Path) -> None:
    options = MotionVerbs(frames=4, classes=2, train=6, validation=2)
    said: list[tuple[int, int]] = []
    make(tmp_path / "one", options)
    make(tmp_path / "several", options, lambda *counts: said.append(counts), processes=2)
    assert said[-1] == (8, 8)
    files = sorted(path for path in (tmp_path / "one").rglob("*") if path.is_file())
    assert len(files) == 8 + 4
    for file in files:
        other = tmp_path / "several" / file.relative_to(tmp_path / "one")
        assert other.read_bytes() == file.read_bytes(), file.name


def test_without_motion_the_videos_are_pictures(tmp_path: Path) -> None:
    make(tmp_path / "set", MotionVerbs(frames=4, train=4, validation=2, motion=0.0))
    for file in (tmp_path / "set" / "videos").iterdir():
        frames = decode_with("pyav", file).astype(float)
        # The encoder may change a level or two between equal frames.
        assert np.abs(frames - frames[0]).max() < 12
    with pytest.raises(UserError, match="motion: must be from 0"):
        MotionVerbs(motion=1.5)


def test_training_and_validation_share_no_photo() -> None:
    assert not set(PHOTOS["train"]) & set(PHOTOS["validation"])


def test_an_object_moves_right_in_the_first_class_and_left_in_the_second(tmp_path: Path) -> None:
    make(tmp_path / "set", MotionVerbs(size=32, frames=8, classes=2, train=12, validation=2))
    for item in json.loads((tmp_path / "set" / "train.json").read_text()):
        frames = decode_with("pyav", tmp_path / "set" / "videos" / f"{item['id']}.mp4").astype(
            float
        )
        changed = np.abs(frames - np.median(frames, axis=0)).mean(axis=(1, 3))
        centre = (changed * np.arange(32)).sum(axis=1) / changed.sum(axis=1)
        slope = np.polyfit(range(8), centre, 1)[0]
        assert (slope > 0) == (item["template"] == VERBS[0])


def test_making_a_set_again_keeps_it_and_never_overwrites_something_else(
    videos: Path, tmp_path: Path
) -> None:
    assert not make(videos, TINY_VERBS)
    with pytest.raises(UserError, match="holds something else"):
        make(videos, MotionVerbs())
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(UserError, match="holds something else"):
        make(tmp_path / "mine", TINY_VERBS)
    with pytest.raises(UserError, match="classes: must be even"):
        MotionVerbs(classes=3)


# Annotations


def test_a_list_file_is_read_with_commas_spaces_and_a_path_with_spaces(tmp_path: Path) -> None:
    data = list_data(tmp_path, "a.mp4 0\nclips/b c.mp4  1\n\nd.mp4,1\n")
    assert [(video.name, video.label) for video in read_split(data, "train")] == [
        ("a.mp4", 0),
        ("clips/b c.mp4", 1),
        ("d.mp4", 1),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("b.mp4", "train.txt:2: expected a path and a class number"),
        ("b.mp4 one", "train.txt:2: expected a path and a class number"),
        ("b.mp4 2", r"train.txt:2: class 2 is outside 0 … 1 (data.num_classes)"),
        ("../b.mp4 1", "train.txt:2: ../b.mp4 leaves the video folder"),
        ("/etc/passwd 1", "train.txt:2: /etc/passwd leaves the video folder"),
    ],
)
def test_a_bad_line_is_named_with_file_and_number(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        read_split(list_data(tmp_path, f"a.mp4 0\n{line}\n"), "train")
    assert message in str(caught.value)


def test_a_link_in_the_data_root_is_followed_and_a_path_that_climbs_out_of_it_is_not(
    tmp_path: Path,
) -> None:
    (tmp_path / "root" / "deep").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "root" / "out").symlink_to(tmp_path / "elsewhere")
    (video,) = read_split(list_data(tmp_path / "root", "out/a.mp4 0\n"), "train")
    assert video.path == tmp_path / "root" / "out" / "a.mp4"
    (video,) = read_split(list_data(tmp_path / "root", "out/../a.mp4 0\n"), "train")
    assert video.path == tmp_path / "root" / "a.mp4", "not the folder above the link's target"
    for name in ("../a.mp4", "deep/../../a.mp4", "..", "/etc/passwd", "."):
        with pytest.raises(UserError, match="leaves the video folder"):
            read_split(list_data(tmp_path / "root", f"{name} 0\n"), "train")


def test_a_video_has_one_name_however_a_list_writes_it(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "root")
    data = list_data(tmp_path / "root", "a/b.mp4 0\n")
    (tmp_path / "root" / "val.txt").write_text("a/b.mp4 0\n")
    expected = fingerprint(data)
    absolute = tmp_path / "root" / "a" / "b.mp4"
    for name in ("./a/b.mp4", "a//b.mp4", "c/../a/b.mp4", str(absolute)):
        (tmp_path / "root" / "train.txt").write_text(f"{name} 0\n")
        assert fingerprint(data) == expected
    through_link = data.model_copy(update={"root": str(tmp_path / "link")})
    assert fingerprint(through_link) == expected, "absolute paths below what the root links to"


def test_a_list_reads_quoted_paths_whatever_parts_path_and_class(tmp_path: Path) -> None:
    lines = [
        '"air drumming/a.mp4" 0',
        '"air drumming/b.mp4",1',
        '"c ""x"".mp4";"1"',
        "d e.mp4\t1",
        "f.mp4|0",
        "g, h.mp4 , 1",
        "i.mp4;0",
    ]
    data = list_data(tmp_path, "\n".join(lines))
    names = [
        "air drumming/a.mp4",
        "air drumming/b.mp4",
        'c "x".mp4',
        "d e.mp4",
        "f.mp4",
        "g, h.mp4",
        "i.mp4",
    ]
    assert [(video.name, video.label) for video in read_split(data, "train")] == list(
        zip(names, [0, 1, 1, 1, 0, 1, 0], strict=True)
    )


def test_a_windows_path_gets_a_hint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train\.txt:1: .*backslashes; write / between folders"):
        read_split(list_data(tmp_path, "up\\a.mp4 0\n"), "train")


def test_a_list_has_class_names_where_data_labels_gives_them(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("air drumming\nzumba\n")
    (tmp_path / "val.txt").write_text("a.mp4 0\n")
    data = list_data(tmp_path, "a.mp4 0\n").model_copy(update={"labels": "names.txt"})
    assert class_names(data) == ["air drumming", "zumba"]


def test_a_file_name_that_is_not_utf_8_is_read_and_fingerprinted(
    tmp_path: Path, videos: Path
) -> None:
    source = next((videos / "videos").iterdir())
    for split in (b"train", b"val"):
        folder = os.fsencode(tmp_path) + b"/" + split + b"/up"
        Path(os.fsdecode(folder)).mkdir(parents=True)
        shutil.copy(source, folder + b"/caf\xe9.mp4")
    data = DataConfig(format="folders", root=str(tmp_path), num_classes=1)
    (video,) = read_split(data, "train")
    assert len(fingerprint(data)) == 16
    with Reader(video.path) as reader:
        assert len(reader.frames([0, 1])) == 2
    (tmp_path / "list.txt").write_bytes(b"train/up/caf\xe9.mp4 0\n")
    listed = DataConfig(root=str(tmp_path), train="list.txt", val="list.txt", num_classes=1)
    assert read_split(listed, "train")[0].path == video.path


def test_what_a_file_system_hides_is_no_class_and_no_video(
    tmp_path: Path, videos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = next((videos / "videos").iterdir())
    for split in ("train", "val"):
        for name in ("up", "down", ".ipynb_checkpoints", "@eaDir", "notes", "up/.thumbs"):
            (tmp_path / split / name).mkdir(parents=True)
        shutil.copy(source, tmp_path / split / "up" / "a.mp4")
        shutil.copy(source, tmp_path / split / "up" / ".thumbs" / "a.mp4")
        shutil.copy(source, tmp_path / split / ".ipynb_checkpoints" / "a.mp4")
        (tmp_path / split / "up" / "._a.mp4").write_bytes(b"AppleDouble")
    shutil.copy(source, tmp_path / "train" / "down" / "b.mp4")
    data = DataConfig(format="folders", root=str(tmp_path), num_classes=2)
    assert class_names(data) == ["down", "up"]
    assert [video.name for video in read_split(data, "train")] == [
        "train/down/b.mp4",
        "train/up/a.mp4",
    ]
    assert capsys.readouterr().err.count("notes: not used as classes") == 1


@pytest.mark.parametrize("links", ["files", "classes", "splits"])
def test_a_folder_data_set_may_be_made_of_links(tmp_path: Path, videos: Path, links: str) -> None:
    source = next((videos / "videos").iterdir())
    real, linked = tmp_path / "real", tmp_path / "linked"
    linked.mkdir()
    for split in ("train", "val"):
        for name in ("down", "up"):
            (real / split / name).mkdir(parents=True)
            shutil.copy(source, real / split / name / "a.mp4")
            if links != "splits":
                (linked / split).mkdir(exist_ok=True)
            if links == "classes":
                (linked / split / name).symlink_to(real / split / name)
            if links == "files":
                (linked / split / name).mkdir()
                (linked / split / name / "a.mp4").symlink_to(real / split / name / "a.mp4")
        if links == "splits":
            (linked / split).symlink_to(real / split)
    data = DataConfig(format="folders", root=str(linked), num_classes=2)
    assert fingerprint(data) == fingerprint(data.model_copy(update={"root": str(real)}))


def test_an_empty_or_missing_data_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.root: the folder .* is empty"):
        read_split(DataConfig(root=str(tmp_path)), "train")
    with pytest.raises(UserError, match=r"data\.root: the folder .*absent does not exist"):
        read_split(DataConfig(root=str(tmp_path / "absent")), "train")


def test_something_somethings_files_are_read_and_their_faults_named(
    tiny: Settings, videos: Path, tmp_path: Path
) -> None:
    data = tiny().data
    assert [video.label for video in read_split(data, "train")[:4]] == [0, 1, 0, 1]
    copy = tmp_path / "copy"
    shutil.copytree(videos, copy)
    moved = data.model_copy(update={"root": str(copy)})
    (copy / "train.json").write_text('[{"id": "1", "template": "Eating [something]"}]')
    with pytest.raises(UserError, match=r"item 1: the class 'Eating something' is not in"):
        read_split(moved, "train")
    (copy / "train.json").write_text('[{"id": "1"\n]')
    with pytest.raises(UserError, match=r"train\.json:2: not valid JSON"):
        read_split(moved, "train")


def test_the_fingerprint_follows_the_content_not_the_place(
    tiny: Settings, videos: Path, tmp_path: Path
) -> None:
    data = tiny().data
    shutil.copytree(videos, tmp_path / "copy")
    copied = data.model_copy(update={"root": str(tmp_path / "copy")})
    assert fingerprint(copied) == fingerprint(data)
    first = next((tmp_path / "copy" / "videos").iterdir())
    first.write_bytes(first.read_bytes() + b"x")
    assert fingerprint(copied) != fingerprint(data)


# Decoding


def test_both_decoders_give_the_same_frames(videos: Path) -> None:
    file = next((videos / "videos").iterdir())
    np.testing.assert_array_equal(decode_with("decord", file), decode_with("pyav", file))
    with Reader(file) as reader:
        np.testing.assert_array_equal(
            reader.frames([5, 0, 5]), decode_with("pyav", file)[[5, 0, 5]]
        )


@pytest.mark.parametrize(
    "content", [b"", b"<html>404 not found</html>", b"version https://git-lfs.github.com/spec/v1\n"]
)
def test_a_file_that_is_no_video_is_named(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "clip.mp4"
    file.write_bytes(content)
    with pytest.raises(BrokenVideo, match=r"clip\.mp4: not a video that can be decoded"):
        Reader(file)


def test_a_missing_video_is_named(tmp_path: Path) -> None:
    with pytest.raises(BrokenVideo, match="no such file"):
        Reader(tmp_path / "absent.mp4")


def test_a_video_of_one_frame_fills_a_clip(tmp_path: Path) -> None:
    write_video(tmp_path / "one.mp4", np.full((1, 16, 16, 3), 100, np.uint8))
    for sampling in ("segments", "dense"):
        clip = ClipConfig.model_validate({"frames": 8, "sampling": sampling})
        with Reader(tmp_path / "one.mp4") as reader:
            assert reader.frames(
                evaluation_frames(clip, len(reader), None, 2)[1].tolist()
            ).shape == (8, 16, 16, 3)


@given(
    num_frames=st.integers(1, 300),
    sampling=st.sampled_from(["segments", "dense"]),
    stride=st.integers(1, 8),
    num_clips=st.integers(1, 5),
    seed=st.integers(0, 100),
)
def test_sampled_frames_exist_and_are_in_order(
    num_frames: int, sampling: str, stride: int, num_clips: int, seed: int
) -> None:
    clip = ClipConfig.model_validate({"sampling": sampling, "stride": stride})
    drawn = [training_frames(clip, num_frames, None, np.random.default_rng(seed))]
    for indices in drawn + evaluation_frames(clip, num_frames, None, num_clips):
        assert len(indices) == 16
        assert 0 <= indices.min() <= indices.max() < num_frames
        assert (np.diff(indices) >= 0).all()


REAL = Path(
    os.environ.get("MAR_REAL_DATA", Path(__file__).parent.parent.parent / "shared" / "data")
)


@pytest.mark.real_data
@pytest.mark.skipif(
    not (REAL / "ut_interaction").is_dir(), reason=f"no ut_interaction below {REAL}"
)
def test_real_avi_files_give_the_same_frames_each_time_and_the_decoders_order() -> None:
    for file in sorted((REAL / "ut_interaction" / "videos").rglob("*.avi"))[::40]:
        whole = decode_with("pyav", file)
        for _ in range(3):
            with Reader(file) as reader:
                indices = [0, len(reader) // 2, len(reader) - 1]
                np.testing.assert_array_equal(reader.frames(indices), whole[indices])


# Clips


def test_a_clip_depends_on_its_seed_epoch_and_video_alone(tiny: Settings) -> None:
    settings = tiny()
    clips = TrainingClips(settings, read_split(settings.data, "train"))
    again = TrainingClips(settings, read_split(settings.data, "train"))
    _ = clips[3, 0]
    assert torch.equal(clips[5, 1][0], again[5, 1][0])  # type: ignore[index]
    assert not torch.equal(clips[5, 1][0], clips[5, 2][0])  # type: ignore[index]


def test_three_crops_lie_at_both_ends_and_the_centre_of_the_long_side() -> None:
    assert test_boxes(100, 160, 3) == [(0, 0, 100, 100), (0, 30, 100, 100), (0, 60, 100, 100)]
    assert test_boxes(160, 100, 1) == [(30, 0, 100, 100)]


def test_test_views_are_clips_times_crops_and_shuffling_keeps_the_frames(tiny: Settings) -> None:
    settings = tiny()
    videos = read_split(settings.data, "val")
    views = EvaluationClips(settings, videos, 2, 3, shuffled=False)[0][0]  # type: ignore[index]
    assert views.shape == (6, 8, 16, 16, 3)
    ordered = EvaluationClips(settings, videos, 1, 1, shuffled=False)[0][0][0]  # type: ignore[index]
    shuffled = EvaluationClips(settings, videos, 1, 1, shuffled=True)[0][0][0]  # type: ignore[index]
    assert not torch.equal(ordered, shuffled)
    assert sorted(frame.sum().item() for frame in ordered) == sorted(
        frame.sum().item() for frame in shuffled
    )


def test_a_crop_of_a_row_of_pixels_has_a_pixel() -> None:
    settings = TrainingConfig.model_validate({"augment": {"crop_aspect": [0.1, 0.2]}})
    top, left, h, w = random_box(1, 50, settings, np.random.default_rng(0))
    assert (top, h, w) == (0, 1, 1) and 0 <= left < 50


@given(st.integers(1, 400), st.integers(1, 400), st.integers(0, 1000))
def test_a_random_crop_lies_in_the_frame(height: int, width: int, seed: int) -> None:
    top, left, h, w = random_box(height, width, TrainingConfig(), np.random.default_rng(seed))
    assert top >= 0 and left >= 0 and h > 0 and w > 0
    assert top + h <= height and left + w <= width


@given(num_videos=st.integers(8, 60), world=st.integers(1, 4), first_step=st.integers(0, 10))
def test_every_epoch_sees_each_video_at_most_once_and_workers_share_a_batch(
    num_videos: int, world: int, first_step: int
) -> None:
    settings = TrainingConfig.model_validate({"recipe": {"epochs": 3, "batch_size": 8}})
    whole = list(TrainingOrder(settings, [0] * num_videos, WorkerRank()))
    shares = [
        list(TrainingOrder(settings, [0] * num_videos, WorkerRank(rank, world)))
        for rank in range(world)
    ]
    assert [sum(parts, []) for parts in zip(*shares, strict=True)] == whole
    assert all(len(part) % 2 == 0 for worker_rank in shares for part in worker_rank)
    per_epoch = num_videos // 8
    for epoch in range(3):
        keys = sum(whole[epoch * per_epoch : (epoch + 1) * per_epoch], [])
        assert len(set(keys)) == per_epoch * 8
        assert {key[1] for key in keys} == {epoch}
    assert (
        list(TrainingOrder(settings, [0] * num_videos, WorkerRank(), first_step))
        == whole[first_step:]
    )


# Augmentation


def test_smoothed_labels_are_timms() -> None:
    from timm.data.mixup import mixup_target

    labels = torch.tensor([0, 3, 1])
    torch.testing.assert_close(
        soft_labels(labels, 5, 0.1), mixup_target(labels, 5, lam=1.0, smoothing=0.1)
    )


@pytest.mark.parametrize("mixing", [{"mixup": 0.8, "cutmix": 0.0}, {"mixup": 0.0, "cutmix": 1.0}])
def test_mixing_takes_of_the_neighbours_label_what_it_takes_of_its_pixels(
    mixing: dict[str, float],
) -> None:
    config = AugmentConfig.model_validate(mixing)
    pixels = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0]).view(5, 1, 1, 1, 1).expand(5, 3, 4, 16, 16)
    labels = soft_labels(torch.arange(5), 5, 0.0)
    for seed in range(20):
        mixed, mixed_labels = mix(pixels, labels, config, np.random.default_rng(seed))
        torch.testing.assert_close(
            mixed.mean(dim=(1, 2, 3, 4)), mixed_labels @ torch.arange(5.0), atol=1e-4, rtol=1e-4
        )
        torch.testing.assert_close(mixed_labels.sum(dim=1), torch.ones(5))
        assert torch.equal(mixed[4], pixels[4]), "a clip without a neighbour stays as it is"
        assert torch.equal(mixed[:, :, 0], mixed[:, :, 3]), "the same box in every frame"


def test_mixing_switched_off_changes_nothing_and_flipping_mirrors_whole_clips() -> None:
    pixels, labels = torch.rand(2, 3, 4, 8, 8), soft_labels(torch.tensor([0, 1]), 2, 0.0)
    off = AugmentConfig(mixup=0.0, cutmix=0.0)
    assert mix(pixels, labels, off, np.random.default_rng(0))[0] is pixels
    flipped = flip(pixels, torch.tensor([True, False]))
    assert torch.equal(flipped[0], pixels[0].flip(-1))
    assert torch.equal(flipped[1], pixels[1])


def test_erased_boxes_are_the_same_in_all_frames_and_hold_normal_noise() -> None:
    config = AugmentConfig(erasing=1.0)
    boxes = draw_erased(config, 8, 64, np.random.default_rng(0))
    pixels = torch.full((8, 3, 4, 64, 64), 0.5)
    changed = erase(pixels, boxes) != pixels
    for clip, box in enumerate(boxes):
        assert box is not None
        inside = torch.zeros(64, 64, dtype=torch.bool)
        inside[box.top : box.top + box.height, box.left : box.left + box.width] = True
        assert torch.equal(changed[clip], inside.expand(3, 4, -1, -1))
    noise = torch.cat(
        [erase(pixels, boxes)[clip][changed[clip]].view(3, -1) for clip in range(8)], dim=1
    )
    mean, std = torch.tensor(IMAGENET_MEAN)[:, None], torch.tensor(IMAGENET_STD)[:, None]
    normal = (noise - mean) / std
    assert normal.mean().abs() < 0.02
    assert normal.std() == pytest.approx(1, abs=0.02)
    frames = erase(pixels, boxes)[0]
    assert not torch.equal(frames[:, 0], frames[:, 1])


def test_erased_boxes_are_drawn_as_timm_draws_them() -> None:
    ours = [
        box
        for box in draw_erased(AugmentConfig(erasing=0.25), 12000, 224, np.random.default_rng(0))
        if box
    ]
    assert len(ours) == pytest.approx(3000, rel=0.05)
    random.seed(0)
    areas, ratios = [], []
    reference = RandomErasing(probability=1.0, mode="const", max_area=1 / 3, device="cpu")
    for _ in range(800):
        rows, columns = (reference(torch.ones(1, 224, 224))[0] == 0).nonzero().T
        height, width = int(rows.max() - rows.min()) + 1, int(columns.max() - columns.min()) + 1
        areas.append(height * width)
        ratios.append(height / width)
    assert stats.ks_2samp([box.height * box.width for box in ours], areas).pvalue > 1e-3
    assert stats.ks_2samp([box.height / box.width for box in ours], ratios).pvalue > 1e-3


def test_a_mirrored_clip_trades_left_for_right() -> None:
    labels, mirrored = torch.tensor([86, 87, 3, 86]), torch.tensor([True, True, True, False])
    assert swapped(labels, mirrored, ((86, 87), (93, 94))).tolist() == [87, 86, 3, 86]


def test_swaps_of_a_class_that_is_not_there_or_stands_twice_are_refused(tiny: Settings) -> None:
    for pairs in ([[0, 2]], [[0, 1], [1, 0]]):
        with pytest.raises(
            UserError, match=r"augment\.flip_swaps: each of the 2 classes may be in one pair only"
        ):
            tiny({"augment.flip_swaps": pairs})
    with pytest.raises(UserError, match=r"augment\.randaugment: expected timm's notation"):
        tiny({"augment.randaugment": "rand"})


def test_repeats_are_other_frames_or_the_same_frames_cropped_anew(
    tiny: Settings, videos: Path
) -> None:
    whole = {
        "augment.crop_scale": [1.0, 1.0],
        "augment.crop_aspect": [1.0, 1.0],
        "clip.frames": 4,
        "augment.repeats": 2,
    }
    whole["clip.sampling"], whole["clip.stride"] = "dense", 1
    for repeat, are_equal in (("frames", True), ("clips", False)):
        settings = tiny({**whole, "augment.repeat": repeat})
        split = read_split(settings.data, "train")
        pairs = [TrainingClips(settings, split)[(index, 0)][0] for index in range(len(split))]
        assert all(pair.shape == (2, 4, 16, 16, 3) for pair in pairs)
        assert all(torch.equal(pair[0], pair[1]) for pair in pairs) == are_equal
    settings = tiny({"augment.repeats": 2})
    assert TrainingOrder(settings, [0] * 16, WorkerRank()).steps_per_epoch == 4
    batch = one_after_another(
        collate([TrainingClips(settings, split)[(index, 0)] for index in (0, 1, 2, 3)])
    )
    assert batch.videos.tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    with pytest.raises(UserError, match=r"recipe\.batch_size: 6 is not an even number of videos"):
        tiny({"augment.repeats": 2, "recipe.batch_size": 6})


@given(
    num_frames=st.integers(1, 400),
    fps=st.sampled_from([12.0, 25.0, 29.97, 30.0, 60.0]),
    num_clips=st.integers(1, 7),
    seed=st.integers(0, 99),
)
def test_frames_are_converted_to_one_rate_as_the_release_does(
    num_frames: int, fps: float, num_clips: int, seed: int
) -> None:
    clip = ClipConfig(frames=16, sampling="dense", stride=4, fps=30.0)
    span = 16 * 4 * fps / 30
    room = max(num_frames - span, 0)

    def released(start: float) -> list[int]:
        return (
            np.clip(np.linspace(start, start + span - 1, 16), 0, num_frames - 1)
            .astype(int)
            .tolist()
        )

    tested = evaluation_frames(clip, num_frames, fps, num_clips)
    starts = (
        [each * np.floor(room / (num_clips - 1)) for each in range(num_clips)]
        if num_clips > 1
        else [room / 2]
    )
    assert [clip_.tolist() for clip_ in tested] == [released(start) for start in starts]
    drawn = training_frames(clip, num_frames, fps, np.random.default_rng(seed))
    assert drawn.tolist() == released(np.random.default_rng(seed).uniform(0, room))


@given(num_frames=st.integers(1, 300))
def test_the_releases_two_test_clips_of_segments_are_their_ends(num_frames: int) -> None:
    first, last = evaluation_frames(ClipConfig(), num_frames, None, 2, "ends")
    edges = np.linspace(0, num_frames, 17).round().clip(0, num_frames - 1).astype(int).tolist()
    assert (first.tolist(), last.tolist()) == (edges[:-1], edges[1:])


def test_a_file_says_its_frame_rate(tmp_path: Path) -> None:
    frames = np.zeros((6, 32, 32, 3), dtype=np.uint8)
    write_video(tmp_path / "a.mp4", frames)
    with Reader(tmp_path / "a.mp4") as reader:
        assert reader.fps == FRAMES_PER_S
        assert len(list(reader)) == 6


def test_decord_is_given_the_time_it_takes_to_decode_a_real_size_of_video(tmp_path: Path) -> None:
    """With too few retries it fails before decoding anything, and PyAV takes over, slowly."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 240, 320, 3), dtype=np.uint8)
    write_video(tmp_path / "a.mp4", noise)
    for _ in range(10):
        with Reader(tmp_path / "a.mp4", "decord") as reader:
            reader.frames(range(0, 64, 4))
            assert reader.decoder == "decord"


class _Broken(Dataset[Any]):
    def __getitem__(self, key: Any) -> Any:
        raise EOFError("this file ends early")


def test_a_file_that_ends_early_is_no_lost_loader_process() -> None:
    with pytest.raises(EOFError, match="this file ends early"):
        list(loader(_Broken(), [[0]], 1, torch.device("cpu"), 1))


def test_a_batch_that_ends_early_is_a_lost_loader_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(*_: object) -> Any:
        raise EOFError  # what a pipe gives whose other end was killed

    monkeypatch.setattr("torch.utils.data.dataloader._SingleProcessDataLoaderIter._next_data", lost)
    with pytest.raises(Failure, match="a loader process was lost") as raised:
        list(loader(_Broken(), [[0]], 0, torch.device("cpu"), 1))
    assert raised.value.kind == "worker_lost"


class _Failing(Dataset[Any]):
    def __getitem__(self, key: Any) -> Any:
        raise Failure("the cache is damaged", "damaged")


class _Unsendable(Dataset[Any]):
    def __getitem__(self, key: Any) -> Any:
        return Sample(torch.zeros(1, 1, 2, 2, 3, dtype=torch.uint8), 0, 0, lambda: 0)  # pyright: ignore[reportArgumentType]


def test_what_a_loader_process_fails_at_is_the_same_error_in_the_trainer() -> None:
    with pytest.raises(Failure, match=r"^the cache is damaged$") as raised:
        list(loader(_Failing(), [[0]], 1, torch.device("cpu"), 1))
    assert raised.value.kind == "damaged"


class _Large(Dataset[Any]):
    def __getitem__(self, key: Any) -> Any:
        resource.setrlimit(
            resource.RLIMIT_FSIZE, (1000, 1000)
        )  # a file of shared memory may be no larger
        return Sample(torch.zeros(1, 1, 64, 64, 3, dtype=torch.uint8), 0, 0)


def test_a_batch_that_does_not_fit_into_shared_memory_is_an_error_with_its_remedy() -> None:
    with pytest.raises(
        Failure, match=r"/dev/shm, through which .* a batch of 0 MB does not fit"
    ) as raised:
        list(loader(_Large(), [[0]], 1, torch.device("cpu"), 1))
    assert raised.value.kind == "shm"


def test_a_batch_that_cannot_be_sent_is_an_error_and_not_a_wait() -> None:
    with pytest.raises(RuntimeError, match="exited unexpectedly"):
        list(loader(_Unsendable(), [[0]], 1, torch.device("cpu"), 1))


def test_shared_memory_is_looked_at_before_loader_processes_start() -> None:
    with pytest.raises(Failure, match="free, 2 loader processes need about 5,000,000 MB") as raised:
        loader(_Failing(), [[number] for number in range(9)], 2, torch.device("cpu"), 10**12)
    assert raised.value.kind == "shm"
    loader(_Failing(), [], 2, torch.device("cpu"), 10**12)


def test_balanced_sampling_shows_every_class_equally_often(tiny: Settings) -> None:
    labels = [0] * 90 + [1] * 10
    settings = tiny(
        {"recipe.class_sampling": "balanced", "recipe.batch_size": 10, "recipe.epochs": 40}
    )
    steps = list(TrainingOrder(settings, labels, WorkerRank()))
    assert len(steps) == 40 * 10, "an epoch has as many videos as with natural sampling"
    rare = sum(labels[video] for keys in steps for video, _ in keys) / (40 * 100)
    # Four standard deviations of 4,000 draws at one half.
    assert abs(rare - 0.5) < 0.032
    assert steps == list(TrainingOrder(settings, labels, WorkerRank()))
    parts = [list(TrainingOrder(settings, labels, WorkerRank(rank, 2))) for rank in range(2)]
    assert [sorted(one + other) for one, other in zip(*parts, strict=True)] == [
        sorted(keys) for keys in steps
    ]


def test_a_long_video_that_is_replaced_by_a_shorter_one_is_broken_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # No frame is kept, as in a video of gigabytes.
    monkeypatch.setattr("mar.data.video.sequential_reader._KEPT_BYTES", 0)
    frames = np.zeros((20, 32, 32, 3), np.uint8)
    write_video(tmp_path / "long.mp4", frames)
    reader = SequentialReader.of(tmp_path / "long.mp4")
    write_video(tmp_path / "long.mp4", frames[:5])
    assert len(reader.frames([0, 4])) == 2
    with pytest.raises(BrokenVideo, match="it lost frames while it was read"):
        reader.frames([0, 12])
