"""``mar data check``: reads a data set as a training would, and reports what is wrong with it."""

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

from mar.config.input_settings import ClipConfig, DataConfig
from mar.data import process_pool
from mar.data.annotation_files import Row, Split
from mar.data.annotations import Video, class_names, fingerprint, videos_of
from mar.data.cache_index import packing_of
from mar.data.decoders import check as check_decoder
from mar.data.frame_cache import is_packed, is_unchanged, open_video
from mar.data.sampling import Reader, frames_wanted, training_frames
from mar.data.video.paths import is_file, is_video
from mar.data.video.seeking import key_frames
from mar.data.video.sequential_reader import BrokenVideo, Frames, iter_frames, pixels_of
from mar.safe_text import cell, printable

KINDS = ("ok", "missing", "unreadable", "short", "refused", "duplicate", "wrong", "stale")
"""The states of a video. ``short``: it has fewer frames than a clip takes, so some are repeated; it
can be trained on, and this is no fault. ``wrong``: a decoder that seeks returns other frames than a
player shows."""
_SEEKS = 24
"""Frames of a video that are requested one by one, so that the decoder seeks to each."""
_THUMBNAIL = 16
"""Height and width, pixels: enough to distinguish one frame of a video from another."""
_CLEARLY_NEARER = 0.8
"""A frame counts as another one if its difference from that one is less than this share of its
difference from the right one."""
_SPLITS: tuple[Split, ...] = ("train", "val")


@dataclass(frozen=True)
class Finding:
    """One video whose state is not ``ok``."""

    split: Split
    video: str
    kind: str
    message: str


class _Listed(NamedTuple):
    """A video, and the split that lists it."""

    split: Split
    video: Video


@dataclass(frozen=True)
class DataReport:
    """The result of a check."""

    counts: dict[Split, dict[str, int]]
    """Split -> kind -> number of videos."""
    findings: list[Finding]
    per_class: dict[Split, dict[str, int]]
    """Split -> class -> number of videos that can be read."""
    fingerprint: str | None
    """The hash of the data in a trial's identity; None where the annotations cannot be used."""
    faults: tuple[str, ...]
    """The kinds that the settings (``data.missing``, ``data.broken``) do not allow."""

    @property
    def is_sound(self) -> bool:
        """Whether the data have no fault that would end a training."""
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

    ``progress`` is called with the number of finished videos and the total.

    Raises:
        UserError: the annotation files cannot be read, or the decoder does not work here.
    """
    check_decoder(data.decoder)
    # Only for its error: a cache folder without settings is reported before anything is decoded.
    if data.cache_folder:
        packing_of(Path(data.cache_folder))
    findings: list[Finding] = []
    videos: dict[Split, list[Video]] = {}
    for split in _SPLITS:
        # A training stops at the first row that it cannot use; a check lists them all. The default
        # argument binds the split of this round of the loop.
        def refuse(row: Row, reason: str, split: Split = split) -> None:
            findings.append(Finding(split, row.name, "refused", f"{row.location}: {reason}"))

        videos[split] = list(videos_of(data, split, refuse))
    everything = [_Listed(split, video) for split in _SPLITS for video in videos[split]]
    findings += _listed_twice(everything)
    good: set[tuple[str, str]] = set()
    # In other processes: a decoder may end its process over a damaged file.
    checked = process_pool.each(
        partial(_check_video, data, clip),
        [video for _, video in everything],
        processes,
        _crashed,
    )
    for done, ((split, video), (kind, message)) in enumerate(
        zip(everything, checked, strict=True), start=1
    ):
        progress(done, len(everything))
        if kind != "ok":
            findings.append(Finding(split, video.name, kind, message))
        if kind in ("ok", "short"):
            good.add((split, video.name))
    # Only readable files: others, such as empty ones, are alike without being copies.
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
    """Count the findings, and decide which of them are faults under the settings."""
    names = class_names(data)
    counts: dict[Split, dict[str, int]] = {}
    per_class: dict[Split, dict[str, int]] = {}
    for split, members in videos.items():
        # A video may have several findings, such as short and duplicate, but is ok only with none.
        found = Counter(finding.kind for finding in findings if finding.split == split)
        faulty = {finding.video for finding in findings if finding.split == split}
        counts[split] = {
            "ok": sum(video.name not in faulty for video in members),
            **{k: found[k] for k in KINDS[1:]},
        }
        labels = Counter(video.label for video in members if (split, video.name) in good)
        per_class[split] = {names[label]: labels[label] for label in range(data.num_classes)}
    # fingerprint() reads the splits as a training does, and would raise an error in these cases.
    is_readable = not any(finding.kind == "refused" for finding in findings)
    has_videos = all(videos.values()) and (
        data.missing == "error" or all(sum(c.values()) for c in per_class.values())
    )
    faults: tuple[str, ...] = ("refused", "duplicate", "wrong", "stale")
    if data.missing == "error":
        faults += ("missing",)
    if data.broken == "error":
        faults += ("unreadable",)
    return DataReport(
        counts,
        findings,
        per_class,
        fingerprint(data) if is_readable and has_videos else None,
        faults,
    )


def report_text(report: DataReport, num_named: int = 10) -> str:
    """Return the report as text: counts, the first findings, classes and the fingerprint."""
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
    if named:
        lines += ["", *named]
        if more > 0:
            lines.append(f"… and {more} more (-o FILE.csv has them all)")
    lines.append("")
    for split, classes in report.per_class.items():
        # The spread of class sizes and empty classes show a wrong list or labels file at a glance.
        sizes = sorted(classes.values())
        empty = [name for name, count in classes.items() if not count]
        spread = f"{sizes[0]} videos each"
        if sizes[0] != sizes[-1]:
            middle = sizes[len(sizes) // 2]
            spread = f"{sizes[0]} to {sizes[-1]} videos each, {middle} in the middle one"
        line = f"{split:<7}{len(sizes)} classes, {spread}"
        if empty:
            line += f"; none of {', '.join(empty[:5])}"
        if len(empty) > 5:
            line += " …"
        lines.append(line)
    shown_fingerprint = report.fingerprint or "none: the annotations cannot be used as they are"
    return printable("\n".join([*lines, f"fingerprint {shown_fingerprint}"]))


def write_findings(report: DataReport, file: Path) -> None:
    """Write every finding as a row of a csv file."""
    # surrogateescape: names of files may not be UTF-8.
    with file.open("w", newline="", encoding="utf-8", errors="surrogateescape") as output:
        writer = csv.writer(output)
        writer.writerow(["split", "video", "kind", "words"])
        # cell(): a spreadsheet would run a file name that begins like a formula.
        writer.writerows(
            [each.split, cell(each.video), each.kind, cell(each.message)]
            for each in report.findings
        )


def _check_video(data: DataConfig, clip: ClipConfig, video: Video) -> tuple[str, str]:
    """Return the kind of one video, and a message about it."""
    # A training reads a packed video from the frame cache: its file may be gone.
    if not is_video(video.path) and not is_packed(data, video):
        return "missing", "no such file"
    if not is_unchanged(data, video):
        return "stale", "not in the frame cache as it is now: run mar data pack again"
    try:
        with open_video(data, video) as reader:
            length = len(reader)
            # Decoded and dropped: this raises BrokenVideo where a training would fail.
            reader.frames(
                training_frames(clip, length, reader.fps, np.random.default_rng(0)).tolist()
            )
            wanted = frames_wanted(clip, reader.fps)
            # The frame cache numbers its frames itself; nothing seeks in it.
            if isinstance(reader, Reader):
                fault = _disagreement(reader)
                if fault:
                    return "wrong", f"{fault}; set data.decoder to pyav"
    except BrokenVideo as broken:
        return "unreadable", broken.reason
    # A file that changes or disappears while it is read.
    except (OSError, ValueError) as error:
        return "unreadable", str(error)
    if length < wanted:
        return ("short", f"{length} frames, a clip takes {wanted}")
    return ("ok", "")


def _disagreement(reader: Reader) -> str:
    """Compare frames that a decoder seeks to with all frames, decoded from the front.

    Returns where they differ, or an empty string.
    """
    name = reader.decoder
    # Images have nothing to seek in.
    if name in ("pyav", "images"):
        return ""
    # Thumbnails, so that all frames of a long video fit into memory.
    shown = np.stack([_thumbnail(pixels_of(frame)) for frame in iter_frames(reader.path)])
    if len(reader) != len(shown):
        return f"{name} finds {len(reader)} frames where {len(shown)} are shown"
    for number in _frames_to_seek(reader.path, len(shown)):
        differences = np.abs(shown - _thumbnail(reader.frames([number])[0])).mean(axis=(1, 2, 3))
        nearest = int(differences.argmin())
        # Neighbouring frames may be almost equal, so the other one must be nearer by a clear share
        # and by half a grey level besides.
        if differences[nearest] < _CLEARLY_NEARER * differences[number] - 0.5:
            return f"{name} gives frame {nearest} where frame {number} was asked for"
    return ""


def _frames_to_seek(path: Path, num_frames: int) -> list[int]:
    """Return the frame numbers to request; those next to key frames are preferred.

    A decoder that seeks is most often wrong there. The order is random: for neighbouring frames in
    order, a decoder just continues, without seeking, and is right.
    """
    # A fixed seed: a check of the same data finds the same faults.
    rng = np.random.default_rng(0)
    keys = key_frames(path)
    # Two neighbours each, so at most two thirds of the requests are next to key frames.
    chosen = rng.permutation(keys)[: _SEEKS // 3].tolist()
    beside = [number for key in chosen for number in (key - 1, key + 1) if 0 <= number < num_frames]
    others = rng.permutation(num_frames)[:_SEEKS].tolist()
    return rng.permutation([*beside, *others][:_SEEKS]).tolist()


def _thumbnail(frame: Frames) -> npt.NDArray[np.int16]:
    """Return a grid of at most 16 × 16 pixels of a frame, signed so that it can be subtracted."""
    height, width = frame.shape[:2]
    rows = np.linspace(0, height - 1, min(height, _THUMBNAIL)).astype(int)
    columns = np.linspace(0, width - 1, min(width, _THUMBNAIL)).astype(int)
    return frame[rows][:, columns].astype(np.int16)


def _crashed(video: Video) -> tuple[str, str]:
    """Return the kind and message of a video whose decoder ended its process."""
    return "unreadable", "its decoder ended the process: remove it"


def _listed_twice(videos: list[_Listed]) -> list[Finding]:
    """Find videos that are listed twice, in one split or in both."""
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
    """Find files with different names and the same bytes.

    Only files whose size occurs several times are read.
    """
    # A name that is listed twice is a finding already, so each name is looked at once.
    unique: dict[str, _Listed] = {}
    for each in videos:
        unique.setdefault(each.video.name, each)
    by_size: dict[int, list[_Listed]] = {}
    for each in unique.values():
        # Only the frame cache may have it.
        if not is_file(each.video.path):
            continue
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
