"""``mar data check``: read a data set as training would, and say what is wrong with it."""

from __future__ import annotations

import csv
import hashlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from mar.config.schema import ClipConfig, DataConfig
from mar.data import process_pool as others
from mar.data.annotation_files import Row, Split
from mar.data.annotations import Video, class_names, fingerprint, videos_of
from mar.data.cache_index import packing_of
from mar.data.decoders import check as check_decoder
from mar.data.sampling import Reader, frames_wanted, training_frames
from mar.data.seeking import key_frames
from mar.data.sequential_reader import BrokenVideo, Frames, iter_frames, pixels_of
from mar.safe_text import cell, printable

KINDS = ("ok", "missing", "unreadable", "short", "refused", "duplicate", "wrong")
"""What a video can be. ``short``: fewer frames than a clip takes, so that some repeat; it trains,
and is no fault. ``wrong``: the decoder that jumps gives other frames than a player shows."""
_JUMPS = 24
"""Frames of a video that are asked for one by one, each after a jump."""
_THUMBNAIL = 16
"""Pixels of a side: enough to tell one frame of a video from another."""
_CLEARLY_NEARER = 0.8
"""A frame is taken for another one where it differs from that one by less than this share of what
it should be."""
_SPLITS: tuple[Split, ...] = ("train", "val")


@dataclass(frozen=True)
class Finding:
    """One video that is not simply in order."""

    split: Split
    video: str
    kind: str
    message: str


class _Listed(NamedTuple):
    split: Split
    video: Video


@dataclass(frozen=True)
class DataReport:
    """What a check found."""

    counts: dict[Split, dict[str, int]]
    """Split -> kind -> videos."""
    findings: list[Finding]
    per_class: dict[Split, dict[str, int]]
    """Split -> class -> videos that can be read."""
    fingerprint: str | None
    """What stands for the data in a trial's identity; none where the annotations cannot be used as
    they are."""
    faults: tuple[str, ...]
    """The kinds that the settings do not put up with (``data.missing``, ``data.broken``)."""

    @property
    def is_sound(self) -> bool:
        """Whether training would meet no fault."""
        return not any(
            count
            for counts in self.counts.values()
            for kind, count in counts.items()
            if kind in self.faults
        )


def check_data(
    data: DataConfig, clip: ClipConfig, processes: int, progress: Callable[[int, int], None]
) -> DataReport:
    """Open every video of both splits and decode one clip of it.

    ``progress`` is told (done, of how many).

    Raises:
        UserError: the annotation files cannot be read, or the decoder does not work here.
    """
    check_decoder(data.decoder)
    if data.cache:
        packing_of(Path(data.cache))
    findings: list[Finding] = []
    videos: dict[Split, list[Video]] = {}
    for split in _SPLITS:

        def refuse(row: Row, reason: str, split: Split = split) -> None:
            findings.append(Finding(split, row.name, "refused", f"{row.location}: {reason}"))

        videos[split] = list(videos_of(data, split, refuse))
    everything = [_Listed(split, video) for split in _SPLITS for video in videos[split]]
    findings += _listed_twice(everything)
    good: set[tuple[str, str]] = set()
    looked = others.each(
        partial(_look, clip, data.decoder), [video for _, video in everything], processes, _crashed
    )
    for done, ((split, video), (kind, message)) in enumerate(
        zip(everything, looked, strict=True), start=1
    ):
        progress(done, len(everything))
        if kind != "ok":
            findings.append(Finding(split, video.name, kind, message))
        if kind in ("ok", "short"):
            good.add((split, video.name))
    findings += _same_content(
        [each for each in everything if (each.split, each.video.name) in good]
    )
    return _report(data, videos, findings, good)


def _report(
    data: DataConfig,
    videos: dict[Split, list[Video]],
    findings: list[Finding],
    good: set[tuple[str, str]],
) -> DataReport:
    names = class_names(data)
    counts: dict[Split, dict[str, int]] = {}
    per_class: dict[Split, dict[str, int]] = {}
    for split, members in videos.items():
        found = Counter(finding.kind for finding in findings if finding.split == split)
        faulty = {finding.video for finding in findings if finding.split == split}
        counts[split] = {
            "ok": sum(video.name not in faulty for video in members),
            **{k: found[k] for k in KINDS[1:]},
        }
        labels = Counter(video.label for video in members if (split, video.name) in good)
        per_class[split] = {names[label]: labels[label] for label in range(data.num_classes)}
    is_readable = not any(finding.kind == "refused" for finding in findings)
    has_videos = all(videos.values()) and (
        data.missing == "error" or all(sum(c.values()) for c in per_class.values())
    )
    faults = ("refused", "duplicate", "wrong", *(["missing"] * (data.missing == "error")))
    faults += ("unreadable",) * (data.broken == "error")
    return DataReport(
        counts,
        findings,
        per_class,
        fingerprint(data) if is_readable and has_videos else None,
        faults,
    )


def report_text(report: DataReport, num_named: int = 10) -> str:
    """Return the report as text: counts, first findings, classes and fingerprint."""
    lines = [f"{'':<7}" + "".join(f"{kind:>12}" for kind in KINDS)]
    lines += [
        f"{split:<7}" + "".join(f"{counts[kind]:>12}" for kind in KINDS)
        for split, counts in report.counts.items()
    ]
    named = [
        f"{each.kind:<11}{each.split}  {each.video}: {each.message}"
        for each in report.findings[:num_named]
    ]
    more = len(report.findings) - len(named)
    lines += (
        ["", *named, *([f"… and {more} more (-o FILE.csv has them all)"] if more > 0 else [])]
        if named
        else []
    )
    lines.append("")
    for split, classes in report.per_class.items():
        sizes = sorted(classes.values())
        empty = [name for name, count in classes.items() if not count]
        spread = (
            f"{sizes[0]} to {sizes[-1]} videos each, {sizes[len(sizes) // 2]} in the middle one"
        )
        if empty:
            nothing = f"; none of {', '.join(empty[:5])}{' …' if len(empty) > 5 else ''}"
        else:
            nothing = ""
        lines.append(f"{split:<7}{len(sizes)} classes, {spread}{nothing}")
    shown_fingerprint = report.fingerprint or "none: the annotations cannot be used as they are"
    return printable("\n".join([*lines, f"fingerprint {shown_fingerprint}"]))


def write_findings(report: DataReport, file: Path) -> None:
    """Write every finding as a row of a csv file."""
    with file.open("w", newline="", encoding="utf-8", errors="surrogateescape") as output:
        writer = csv.writer(output)
        writer.writerow(["split", "video", "kind", "words"])
        writer.writerows(
            [each.split, cell(each.video), each.kind, cell(each.message)]
            for each in report.findings
        )


def _look(clip: ClipConfig, decoder: str, video: Video) -> tuple[str, str]:
    """Return the kind of one video, and words about it."""
    if not video.path.is_file():
        return "missing", "no such file"
    try:
        with Reader(video.path, decoder) as reader:
            length = len(reader)
            reader.frames(
                training_frames(clip, length, reader.fps, np.random.default_rng(0)).tolist()
            )
            wanted = frames_wanted(clip, reader.fps)
            fault = _disagreement(reader)
            if fault:
                return "wrong", f"{fault}; set data.decoder to pyav"
    except BrokenVideo as broken:
        return "unreadable", broken.reason
    if length < wanted:
        return ("short", f"{length} frames, a clip takes {wanted}")
    return ("ok", "")


def _disagreement(reader: Reader) -> str:
    """Compare frames that a decoder jumps to with all frames, decoded from the front.

    Say where they differ.
    """
    name = reader.decoder
    if name == "pyav":
        return ""
    shown = np.stack([_thumbnail(pixels_of(frame)) for frame in iter_frames(reader.path)])
    if len(reader) != len(shown):
        return f"{name} finds {len(reader)} frames where {len(shown)} are shown"
    for number in _jumps(reader.path, len(shown)):
        differences = np.abs(shown - _thumbnail(reader.frames([number])[0])).mean(axis=(1, 2, 3))
        nearest = int(differences.argmin())
        if differences[nearest] < _CLEARLY_NEARER * differences[number] - 0.5:
            return f"{name} gives frame {nearest} where frame {number} was asked for"
    return ""


def _jumps(path: Path, num_frames: int) -> list[int]:
    """Return frames to ask for, beside key frames first: there a decoder that jumps goes wrong.

    They are in no order: a decoder that is asked for neighbours goes on from the last one, and is
    right.
    """
    rng = np.random.default_rng(0)
    keys = key_frames(path)
    chosen = rng.permutation(keys)[: _JUMPS // 3].tolist()
    beside = [number for key in chosen for number in (key - 1, key + 1) if 0 <= number < num_frames]
    others = rng.permutation(num_frames)[:_JUMPS].tolist()
    return rng.permutation([*beside, *others][:_JUMPS]).tolist()


def _thumbnail(frame: Frames) -> npt.NDArray[np.int16]:
    height, width = frame.shape[:2]
    rows = np.linspace(0, height - 1, min(height, _THUMBNAIL)).astype(int)
    columns = np.linspace(0, width - 1, min(width, _THUMBNAIL)).astype(int)
    return frame[rows][:, columns].astype(np.int16)


def _crashed(video: Video) -> tuple[str, str]:
    return "unreadable", "its decoder ended the process: remove it"


def _listed_twice(videos: list[_Listed]) -> list[Finding]:
    first: dict[str, Split] = {}
    twice: list[Finding] = []
    for split, video in videos:
        if video.name in first:
            twice.append(
                Finding(split, video.name, "duplicate", f"listed in {first[video.name]} already")
            )
        first.setdefault(video.name, split)
    return twice


def _same_content(videos: list[_Listed]) -> list[Finding]:
    """Find files of other names and the same bytes; only files of one size are read."""
    unique: dict[str, _Listed] = {}
    for each in videos:
        unique.setdefault(each.video.name, each)
    by_size: dict[int, list[_Listed]] = {}
    for each in unique.values():
        by_size.setdefault(each.video.path.stat().st_size, []).append(each)
    first: dict[str, tuple[Split, str]] = {}
    same: list[Finding] = []
    alike = [group for group in by_size.values() if len(group) > 1]
    for split, video in chain.from_iterable(alike):
        with video.path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest in first:
            other = first[digest]
            same.append(
                Finding(
                    split, video.name, "duplicate", f"the same bytes as {other[1]} ({other[0]})"
                )
            )
        first.setdefault(digest, (split, video.name))
    return same
