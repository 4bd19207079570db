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
    """A video's random clips, ``augment.repeats`` × T × H × W × C; indexed by (video, epoch)."""

    def __init__(self, settings: ExperimentConfig, videos: list[Video]) -> None:
        self.settings, self.videos = settings, videos

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        index, epoch = key
        video, settings = self.videos[index], self.settings
        rng, repeats = draw(settings.seed, 1, epoch, index), settings.augment.repeats
        times = repeats if settings.augment.repeat == "clips" else 1
        try:
            with open_video(settings.data, video) as reader:
                numbers = [training_frames(settings.clip, len(reader), reader.fps, rng).tolist() for _ in range(times)]
                frames = np.split(reader.frames([number for clip in numbers for number in clip]), times)
        except BrokenVideo as broken:
            return broken
        height, width = frames[0].shape[1:3]
        boxes = [random_box(height, width, settings, rng) for _ in range(repeats)]
        clips = [crop_and_resize(frames[each % times], box, settings.clip.size) for each, box in enumerate(boxes)]
        return torch.stack(clips), video.label, index


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
                how = settings.evaluation.segment_frames
                wanted = evaluation_frames(settings.clip, len(reader), reader.fps, self.clips, how)
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


def one_after_another(batch: Batch) -> Batch:
    """Return a training batch's clips as one row: the first of all videos, then the second.

    Neighbours, which mixup and cutmix mix, are so clips of different videos.
    """
    repeats = batch.clips.shape[1]
    clips = batch.clips.transpose(0, 1).flatten(0, 1)
    return Batch(clips, batch.labels.repeat(repeats), batch.videos.repeat(repeats), batch.broken)


@dataclass(frozen=True)
class Share:
    """Which part of a batch or split is this worker's: the ``rank``-th of ``world`` contiguous parts."""

    rank: int = 0
    world: int = 1

    def of(self, count: int) -> range:
        """Return this worker's places among ``count``; parts start at even places, so that pairs stay together."""
        edge = [2 * (part * count // (2 * self.world)) for part in range(self.world)] + [count]
        return range(edge[self.rank], edge[self.rank + 1])


def places(settings: ExperimentConfig, share: Share) -> list[int]:
    """Return where a worker's clips stand in the whole batch, in the order of :func:`one_after_another`."""
    num_videos = settings.videos_per_batch
    return [each * num_videos + video for each in range(settings.augment.repeats) for video in share.of(num_videos)]


class TrainingOrder:
    """The (video, epoch) keys of this worker for each step from ``first_step`` on; iterate once.

    Each epoch is a new permutation of the split; its last, incomplete batch is dropped.
    """

    def __init__(self, settings: ExperimentConfig, num_videos: int, share: Share, first_step: int = 0) -> None:
        self.settings, self.num_videos, self.share, self.first_step = settings, num_videos, share, first_step
        self.steps_per_epoch = num_videos // settings.videos_per_batch

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        part, size = self.share.of(self.settings.videos_per_batch), self.settings.videos_per_batch
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
