"""Looks at a folder of videos and writes a recipe and lists for it: ``mar init``.

Every value that it guesses is written with its reason, for a person to check.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mar.atomic_dir import write_text
from mar.data.sampling import Reader
from mar.data.video.files import absolute_path, videos_below
from mar.data.video.paths import is_hidden
from mar.data.video.sequential_reader import BrokenVideo
from mar.errors import UserError

_TRAINING = ("train", "training")
_TESTING = ("val", "validation", "test", "testing")
_LOOKED_AT = 40
"""Videos that are opened, spread evenly over the folder: enough for a median."""
_GROUP = re.compile(r"(?<=_g\d\d)_c\d+$")
"""The end of a name as ``v_Archery_g01_c02``: the second clip of recording 1."""
_ONE_IN = 5
"""One video of five of each class is for testing, where the folder has no split of its own."""
_SHORT_S = 6.0
"""A clip of a shorter video is taken from the whole of it, of a longer one from a part."""
_CLIP_S = 2.0
"""How much of a long video a clip spans."""
_FRAMES = 8
_STEPS = 800
"""Optimiser steps that some hundred clips need from ``mini`` (docs/log.md)."""
_BATCH = 32


@dataclass(frozen=True)
class Survey:
    """What a folder of videos has."""

    classes: tuple[str, ...]
    train: tuple[tuple[str, int], ...]
    """Path below the folder, and class number."""
    test: tuple[tuple[str, int], ...]
    divided_by: Literal["folders", "videos", "recordings"]
    """``folders``: the folder has a split of its own. Else every fifth video of a class is for
    testing, or every fifth recording with all clips that are cut from it."""
    seconds: float | None
    """Median length of the videos that were opened; None: no file states a frame rate."""
    fps: float | None
    broken: tuple[str, ...]
    """Those of the opened videos that cannot be decoded."""


def survey(root: Path) -> Survey:
    """Return what a folder has: a folder for each class, perhaps below ``train`` and ``val``.

    Raises:
        UserError: the folder does not exist, or has no class folders with videos.
    """
    if not root.is_dir():
        raise UserError(f"{root}: no such folder")
    below = {each.name: each for each in _folders(root)}
    training = next((below[name] for name in _TRAINING if name in below), None)
    testing = next((below[name] for name in _TESTING if name in below), None)
    if training is not None and testing is not None:
        train = _by_class(training)
        test = _by_class(testing)
        divided_by: Literal["folders", "videos", "recordings"] = "folders"
    else:
        videos = _by_class(root)
        divided_by = "recordings" if _has_recordings(videos) else "videos"
        train, test = _divided(videos, by_recording=divided_by == "recordings")
    classes = tuple(sorted({*train, *test}))
    if len(classes) < 2 or not any(train.values()) or not any(test.values()):
        raise UserError(
            f"{root}: expected a folder for each class, with at least two videos in it "
            f"(found {len(classes)} classes); or the same below train and val"
        )
    listed_train = _listed(train, classes, root)
    listed_test = _listed(test, classes, root)
    paths = [root / path for path, _ in (*listed_train, *listed_test)]
    seconds, fps, broken = _measured(paths)
    return Survey(classes, listed_train, listed_test, divided_by, seconds, fps, broken)


def _folders(root: Path) -> list[Path]:
    return sorted(each for each in root.iterdir() if each.is_dir() and not is_hidden(each.name))


def _by_class(root: Path) -> dict[str, list[Path]]:
    """Return the videos of each class folder; folders without a video are no classes."""
    found = {
        folder.name: [folder / name for name in sorted(videos_below(folder))]
        for folder in _folders(root)
    }
    return {name: videos for name, videos in found.items() if videos}


def _has_recordings(videos: Mapping[str, Sequence[Path]]) -> bool:
    """Whether all names say which recording a clip is cut from, and each class has several."""
    for each in videos.values():
        if not all(_GROUP.search(video.stem) for video in each):
            return False
        if len({_GROUP.sub("", video.stem) for video in each}) < 2:
            return False
    return True


def _divided(
    videos: Mapping[str, Sequence[Path]], by_recording: bool
) -> tuple[dict[str, list[Path]], dict[str, list[Path]]]:
    """Divide each class: every fifth video is for testing, at least one where there are two.

    ``by_recording``: every fifth recording, whose clips stay together.
    """
    train: dict[str, list[Path]] = {}
    test: dict[str, list[Path]] = {}
    for name, each in videos.items():
        groups = {video: str(number) for number, video in enumerate(each)}
        if by_recording:
            groups = {video: _GROUP.sub("", video.stem) for video in each}
        # From the second on, so that a class with two videos has one for each.
        chosen = set(list(dict.fromkeys(groups.values()))[1::_ONE_IN])
        test[name] = [video for video in each if groups[video] in chosen]
        train[name] = [video for video in each if groups[video] not in chosen]
    return train, test


def _listed(
    videos: Mapping[str, Sequence[Path]], classes: Sequence[str], root: Path
) -> tuple[tuple[str, int], ...]:
    return tuple(
        (video.relative_to(root).as_posix(), label)
        for label, name in enumerate(classes)
        for video in videos.get(name, [])
    )


def _measured(paths: Sequence[Path]) -> tuple[float | None, float | None, tuple[str, ...]]:
    """Return the median length and frame rate of some videos, and those that are broken."""
    step = max(1, len(paths) // _LOOKED_AT)
    lengths: list[float] = []
    rates: list[float] = []
    broken: list[str] = []
    for path in paths[::step]:
        try:
            with Reader(path) as reader:
                if reader.fps:
                    rates.append(reader.fps)
                    lengths.append(len(reader) / reader.fps)
        except BrokenVideo as error:
            broken.append(str(error))
    if not rates:
        return None, None, tuple(broken)
    return statistics.median(lengths), statistics.median(rates), tuple(broken)


def recipe_text(root: Path, found: Survey, lists: Path) -> str:
    """Return the recipe for a folder, with the reason of each guess.

    ``lists`` is the folder of ``train.txt``, ``val.txt`` and ``labels.txt``.
    """
    size = _batch_size(len(found.train))
    epochs = max(10, min(200, round(_STEPS * size / len(found.train))))
    steps = epochs * (len(found.train) // size)
    lines = [
        f"# {len(found.classes)} classes, {len(found.train)} training and {len(found.test)} test "
        "videos. Written by mar init: check what it guessed.",
        "data:",
        "  format: list",
        f"  root: {_quoted(str(absolute_path(root)))}",
        f"  train: {_quoted(str(absolute_path(lists / 'train.txt')))}",
        f"  val: {_quoted(str(absolute_path(lists / 'val.txt')))}",
        f"  labels: {_quoted(str(absolute_path(lists / 'labels.txt')))}",
        f"  num_classes: {len(found.classes)}",
        *_split_lines(found),
        *_clip_lines(found),
        "# The model that ships with mar, which knows drawn motion: so few clips are too few to",
        "# learn from scratch. For more videos and a GPU: recipes/paper, and weights of VideoMAE.",
        "encoder:",
        "  size: custom",
        "  width: 64",
        "  depth: 4",
        "  heads: 4",
        "  tubelet: [2, 6, 6]",
        "  weights: mini",
        "mask: {strategy: cell, motion: running, ratio: 0.5, cell: [2, 2]}",
        "classifier: {width: 64, depth: 2, heads: 4}",
        "reconstruction: {weight: 0.1, width: 32, depth: 1, heads: 2}",
        "augment:",
        "  crop_scale: [0.5, 1.0]",
        "  randaugment: rand-m5-n1-mstd0.5-inc1",
        "  flip: true  # if left and right are different classes: flip_swaps, or false",
        "  mixup: 0.2",
        "  cutmix: 0.2",
        "recipe:",
        f"  epochs: {epochs}  # {steps} steps",
        f"  batch_size: {size}",
        "  base_lr: 8.0e-3",
        f"  warmup_epochs: {max(1, epochs // 20)}",
        "  layer_decay: 0.8",
        "  precision: fp32",
        f"evaluation: {{clips: 2, crops: 3, shuffled_frames: true, every_epochs: {epochs}}}",
    ]
    return "\n".join([*lines, ""])


def _split_lines(found: Survey) -> list[str]:
    if found.divided_by == "folders":
        return []
    if found.divided_by == "recordings":
        return ["# One recording of five (the g01 of g01_c02) of each class is for testing."]
    return [
        "# One video of five of each class is for testing. If several are cut from one recording,",
        "# put them on one side in the lists: else the test measures who was seen before.",
    ]


def _clip_lines(found: Survey) -> list[str]:
    if found.seconds is None or found.fps is None or found.seconds < _SHORT_S:
        length = "unknown" if found.seconds is None else f"{found.seconds:.1f} s"
        return [
            f"# Videos of {length} (median): one frame from each of {_FRAMES} equal parts.",
            f"clip: {{frames: {_FRAMES}, size: 36, sampling: segments}}",
        ]
    stride = max(1, round(found.fps * _CLIP_S / _FRAMES))
    return [
        f"# Videos of {found.seconds:.1f} s at {found.fps:.1f} frames a second (medians): a clip "
        f"spans {stride * _FRAMES / found.fps:.1f} s.",
        f"clip: {{frames: {_FRAMES}, size: 36, sampling: dense, stride: {stride}}}",
    ]


def _batch_size(num_videos: int) -> int:
    """Return an even batch size that a split of this size can fill."""
    return max(2, min(_BATCH, num_videos - num_videos % 2))


def _quoted(text: str) -> str:
    """Return a text as YAML and lists have it in double quotes."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def write_recipe(root: Path, folder: Path) -> Survey:
    """Write ``recipe.yaml``, ``train.txt``, ``val.txt`` and ``labels.txt`` for a folder of videos.

    Raises:
        UserError: as :func:`survey`; or one of the files exists already.
    """
    found = survey(root)
    # The recipe last: where it is, its lists are.
    files = {
        "train.txt": _list_text(found.train),
        "val.txt": _list_text(found.test),
        "labels.txt": "".join(f"{name}\n" for name in found.classes),
        "recipe.yaml": recipe_text(root, found, folder),
    }
    for name in files:
        if (folder / name).exists():
            raise UserError(f"{folder / name} exists already: choose another folder (-o)")
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        write_text(folder / name, content)
    return found


def _list_text(videos: Sequence[tuple[str, int]]) -> str:
    # In quotes, doubled inside: a path may have spaces.
    return "".join('"' + path.replace('"', '""') + f'" {label}\n' for path, label in videos)
