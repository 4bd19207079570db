"""Clips for training and testing: what is drawn for each, loaders, and what to do with a broken video.

Every draw follows from (seed, epoch, video), never from a state that is carried along. So the clips do not
depend on how many workers and loader processes there are, and a resumed epoch goes on with the same ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Int, UInt8
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mar.annotations import Video
from mar.config import ExperimentConfig
from mar.frame_cache import open_video
from mar.video import BrokenVideo, Frames, evaluation_frames, training_frames

Box = tuple[int, int, int, int]
"""Top, left, height and width, pixels."""


def draw(seed: int, *stream: int) -> np.random.Generator:
    """Return the random numbers of one purpose: ``stream`` says which (epoch, video, …)."""
    return np.random.default_rng([seed, *stream])


@dataclass(frozen=True)
class Batch:
    """Clips of uint8 pixels, their labels, and the videos that gave none."""

    clips: UInt8[Tensor, "B *views T H W C"]
    labels: Int[Tensor, " B"]
    videos: Int[Tensor, " B"]
    """Each clip's place in the split."""
    broken: tuple[BrokenVideo, ...] = ()


Sample = tuple[Tensor, int, int] | BrokenVideo


class TrainingClips(Dataset[Sample]):
    """One random clip of a video; indexed by (video, epoch)."""

    def __init__(self, settings: ExperimentConfig, videos: list[Video]) -> None:
        self.settings, self.videos = settings, videos

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        index, epoch = key
        video, settings = self.videos[index], self.settings
        rng = draw(settings.seed, 1, epoch, index)
        try:
            with open_video(settings.data, video) as reader:
                frames = reader.frames(training_frames(settings.clip, len(reader), rng).tolist())
        except BrokenVideo as broken:
            return broken
        box = random_box(frames.shape[1], frames.shape[2], settings, rng)
        return crop_and_resize(frames, box, settings.clip.size), video.label, index


class EvaluationClips(Dataset[Sample]):
    """All views of a video as one stack of clips: ``views`` × T × H × W × C; indexed by video."""

    def __init__(self, settings: ExperimentConfig, videos: list[Video], clips: int, crops: int, shuffled: bool) -> None:
        self.settings, self.videos = settings, videos
        self.clips, self.crops, self.shuffled = clips, crops, shuffled

    def __getitem__(self, index: int) -> Sample:
        video, settings = self.videos[index], self.settings
        order = draw(0, 2, index).permutation(settings.clip.frames) if self.shuffled else slice(None)
        try:
            with open_video(settings.data, video) as reader:
                wanted = evaluation_frames(settings.clip, len(reader), self.clips)
                numbers = [number for indices in wanted for number in indices[order].tolist()]
                clips = np.split(reader.frames(numbers), len(wanted))  # one call: a long file is gone through once
        except BrokenVideo as broken:
            return broken
        size = settings.clip.size
        boxes = test_boxes(clips[0].shape[1], clips[0].shape[2], self.crops)
        views = [crop_and_resize(frames, box, size) for frames in clips for box in boxes]
        return torch.stack(views), video.label, index


def random_box(height: int, width: int, settings: ExperimentConfig, rng: np.random.Generator) -> Box:
    """Draw a random-resized crop: area and aspect ratio uniform (the latter in its logarithm), ten tries."""
    augment = settings.augment
    low, high = np.log(augment.crop_aspect)
    for _ in range(10):
        area = height * width * rng.uniform(*augment.crop_scale)
        aspect = np.exp(rng.uniform(low, high))
        w, h = round(float(np.sqrt(area * aspect))), round(float(np.sqrt(area / aspect)))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    return test_boxes(height, width, 1)[0]


def test_boxes(height: int, width: int, crops: int) -> list[Box]:
    """Return the centre square, or three squares along the long side: both ends and the centre."""
    side = min(height, width)
    shares = (0.5,) if crops == 1 else (0.0, 0.5, 1.0)
    return [(round((height - side) * share), round((width - side) * share), side, side) for share in shares]


test_boxes.__test__ = False  # pyright: ignore[reportFunctionMemberAccess]


def crop_and_resize(frames: Frames, box: Box, size: int) -> UInt8[Tensor, "T size size C"]:
    """Cut ``box`` from every frame and resize it to ``size`` × ``size`` (bilinear, antialiased), in uint8."""
    top, left, height, width = box
    cut = torch.from_numpy(np.ascontiguousarray(frames[:, top : top + height, left : left + width]))
    if (height, width) == (size, size):
        return cut
    resized = F.interpolate(cut.permute(0, 3, 1, 2), size=(size, size), mode="bilinear", antialias=True)
    return resized.permute(0, 2, 3, 1).contiguous()


@dataclass(frozen=True)
class Share:
    """Which part of a batch or split is this worker's: the ``rank``-th of ``world`` contiguous parts."""

    rank: int = 0
    world: int = 1

    def of(self, count: int) -> range:
        """Return this worker's places among ``count``; parts start at even places, so that pairs stay together."""
        edge = [2 * (part * count // (2 * self.world)) for part in range(self.world)] + [count]
        return range(edge[self.rank], edge[self.rank + 1])


class TrainingOrder:
    """The (video, epoch) keys of this worker for each step from ``first_step`` on; iterate once.

    Each epoch is a new permutation of the split; its last, incomplete batch is dropped.
    """

    def __init__(self, settings: ExperimentConfig, num_videos: int, share: Share, first_step: int = 0) -> None:
        self.settings, self.num_videos, self.share, self.first_step = settings, num_videos, share, first_step
        self.steps_per_epoch = num_videos // settings.recipe.batch_size

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        part, size = self.share.of(self.settings.recipe.batch_size), self.settings.recipe.batch_size
        first_epoch, skipped = divmod(self.first_step, self.steps_per_epoch)
        for epoch in range(first_epoch, self.settings.recipe.epochs):
            order = draw(self.settings.seed, 0, epoch).permutation(self.num_videos)
            for step in range(skipped, self.steps_per_epoch):
                yield [(int(order[step * size + place]), epoch) for place in part]
            skipped = 0


def collate(samples: list[Sample]) -> Batch:
    """Stack what could be decoded, and list what could not."""
    good = [sample for sample in samples if not isinstance(sample, BrokenVideo)]
    broken = tuple(sample for sample in samples if isinstance(sample, BrokenVideo))
    if not good:
        empty = torch.empty(0, dtype=torch.int64)
        return Batch(torch.empty(0, 0, 0, 0, 3, dtype=torch.uint8), empty, empty, broken)
    clips, labels, videos = zip(*good, strict=True)
    return Batch(torch.stack(clips), torch.tensor(labels), torch.tensor(videos), broken)


def loader(dataset: Dataset[Sample], batches: Iterable[Any], processes: int, device: torch.device) -> Iterable[Batch]:
    """Return a loader that decodes in this process, or in ``processes`` others that stay alive between passes."""
    loading: DataLoader[Any] = DataLoader(
        dataset,
        batch_sampler=batches,  # pyright: ignore[reportArgumentType]
        num_workers=processes,
        collate_fn=collate,
        pin_memory=device.type == "cuda",
        multiprocessing_context="forkserver" if processes else None,
        persistent_workers=processes > 0,
    )
    return loading
