"""Clips for training and testing, their random draws, and the order of a training's videos.

Every draw follows from (seed, epoch, video), never from the state of a generator. So the clips do
not depend on the number of workers and loader processes, and a resumed epoch has the same ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Bool, Float16, Int, UInt8
from torch import Tensor
from torch.utils.data import Dataset

from mar.augmentation.randaugment import draw_operations, rand_augment
from mar.config.input_settings import AugmentConfig
from mar.config.randaugment_policy import RandAugmentPolicy
from mar.config.schema import TrainingConfig
from mar.data.annotations import Video
from mar.data.crops import crop_and_resize, random_box, resize_short_side, test_boxes
from mar.data.frame_cache import open_video
from mar.data.sampling import evaluation_frames, training_frames
from mar.data.video.sequential_reader import BrokenVideo, Frames
from mar.distributed import WorkerRank
from mar.errors import UserError
from mar.rng import Stream
from mar.rng import rng as stream

VIDEOS_PER_PIECE = 8
"""The videos of a batch that a loader process decodes at a time."""


@dataclass(frozen=True)
class Batch:
    """Clips of uint8 pixels and their labels; or the tokens of a frozen encoder in their place.

    A broken video is not ``good`` and has black clips, so that the shapes stay the same.
    """

    clips: UInt8[Tensor, "B *views T H W C"] | Float16[Tensor, "B *views K D"]
    labels: Int[Tensor, " B"]
    videos: Int[Tensor, " B"]
    """Each clip's video, as its index in the split."""
    good: Bool[Tensor, " B"]
    """Whether the video could be decoded."""
    broken: tuple[BrokenVideo, ...] = ()


class Sample(NamedTuple):
    """The clips of one video, its label, its index in the split, and why the clips are black."""

    clips: UInt8[Tensor, "views T H W C"] | Float16[Tensor, "views K D"]
    label: int
    video: int
    broken: BrokenVideo | None = None


# The tests check the types of calls at run time.
@runtime_checkable
class FrameSource(Protocol):
    """A video whose frames can be read by their numbers."""

    @property
    def fps(self) -> float | None:
        """Frames per second; None: unknown."""
        ...

    def __len__(self) -> int: ...

    def frames(self, indices: Sequence[int]) -> Frames:
        """Return the frames with these numbers, ``[len(indices), H, W, 3]``."""
        ...


class TrainingClips(Dataset[Sample]):
    """A video's random clips, ``augment.repeats`` × T × H × W × C; the key is (video, epoch)."""

    def __init__(self, settings: TrainingConfig, videos: list[Video]) -> None:
        self.settings = settings
        self.videos = videos

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        index, epoch = key
        video = self.videos[index]
        settings = self.settings
        rng = stream(settings.seed, Stream.CLIP, epoch, index)
        repeats = settings.augment.repeats
        size = settings.clip.size
        # "clips": every repeat has frames of its own. Otherwise all repeats crop the same frames.
        times = repeats if settings.augment.repeat == "clips" else 1
        try:
            with open_video(settings.data, video) as reader:
                numbers = [
                    training_frames(settings.clip, len(reader), reader.fps, rng).tolist()
                    for _ in range(times)
                ]
                # One request for all clips, so that a file is decoded from its front only once.
                frames = np.split(
                    reader.frames([number for clip in numbers for number in clip]), times
                )
        except BrokenVideo as broken:
            return Sample(_black(repeats, settings), video.label, index, broken)
        height, width = frames[0].shape[1:3]
        # The order of the draws from ``rng`` is part of every result: first frames, then boxes.
        boxes = [random_box(height, width, settings, rng) for _ in range(repeats)]
        clips: list[Tensor] = []
        for each, box in enumerate(boxes):
            whole = frames[each % times]
            # RandAugment after the crop runs on the device instead (mar.augmentation).
            if settings.augment.randaugment and settings.augment.randaugment_before_crop:
                whole = _rand_augmented(
                    whole,
                    settings.augment,
                    stream(settings.seed, Stream.RANDAUGMENT_BEFORE_CROP, epoch, index, each),
                )
            clips.append(crop_and_resize(whole, box, size, settings.clip.antialias))
        return Sample(torch.stack(clips), video.label, index)


class EvaluationClips(Dataset[Sample]):
    """All views of a video, stacked: ``views`` × T × H × W × C; the key is the video's index."""

    def __init__(
        self,
        settings: TrainingConfig,
        videos: list[Video],
        clips: int,
        crops: int,
        shuffled: bool,
    ) -> None:
        self.settings = settings
        self.videos = videos
        self.clips = clips
        self.crops = crops
        self.shuffled = shuffled

    def __getitem__(self, index: int) -> Sample:
        video = self.videos[index]
        settings = self.settings
        # Seed 0, not the trial's: all trials are tested with the same order of frames.
        if self.shuffled:
            order = stream(0, Stream.FRAME_SHUFFLE, index).permutation(settings.clip.frames)
        else:
            order = slice(None)
        try:
            with open_video(settings.data, video) as reader:
                views = evaluation_views(settings, reader, self.clips, self.crops, order)
        except BrokenVideo as broken:
            return Sample(_black(self.clips * self.crops, settings), video.label, index, broken)
        return Sample(views, video.label, index)


def evaluation_views(
    settings: TrainingConfig,
    source: FrameSource,
    num_clips: int,
    num_crops: int,
    order: npt.NDArray[np.int64] | slice = slice(None),
) -> UInt8[Tensor, "views T H W C"]:
    """Return all views of a video; those of its first test clip come first.

    Args:
        settings: What clips, crops and size are.
        source: The video.
        num_clips: Test clips, spread over the video.
        num_crops: 1 (the centre) or 3 (along the long side) for each clip.
        order: A permutation of each clip's frames; by default as they are.

    Raises:
        BrokenVideo: the video cannot be decoded.
    """
    how = settings.evaluation.segment_frames
    wanted = evaluation_frames(settings.clip, len(source), source.fps, num_clips, how)
    numbers = [number for indices in wanted for number in indices[order].tolist()]
    # One request for all clips, as in training.
    clips = np.split(source.frames(numbers), len(wanted))
    size = settings.clip.size
    antialias = settings.clip.antialias
    crop_from = settings.evaluation.crop_from
    # The released code resizes the whole frame and cuts from it; else the crop is resized.
    if crop_from == "resized":
        clips = [resize_short_side(frames, size, antialias) for frames in clips]
    boxes = test_boxes(clips[0].shape[1], clips[0].shape[2], num_crops, crop_from)
    views = [crop_and_resize(frames, box, size, antialias) for frames in clips for box in boxes]
    return torch.stack(views)


def bytes_per_clip(settings: TrainingConfig) -> int:
    """Return the size in bytes of one view's pixels."""
    return settings.clip.frames * settings.clip.size**2 * 3


def _black(views: int, settings: TrainingConfig) -> UInt8[Tensor, "views T H W C"]:
    size = settings.clip.size
    return torch.zeros(views, settings.clip.frames, size, size, 3, dtype=torch.uint8)


def _rand_augmented(frames: Frames, config: AugmentConfig, rng: np.random.Generator) -> Frames:
    """Apply a clip's RandAugment to its whole frames."""
    assert config.randaugment
    operations = draw_operations(RandAugmentPolicy.parse(config.randaugment), 1, rng)
    # rand_augment() takes floats from 0 to 1, [B, C, T, H, W].
    pixels = torch.from_numpy(np.ascontiguousarray(frames)).permute(3, 0, 1, 2)[None].float() / 255
    done = rand_augment(pixels, operations, config.randaugment_interpolation)
    return (done[0] * 255).round().to(torch.uint8).permute(1, 2, 3, 0).numpy()


def one_after_another(batch: Batch) -> Batch:
    """Return a batch with one dimension of clips: the first clip of every video, then the second.

    Mixup and cutmix mix neighbouring clips, which in this order are of different videos.
    """
    repeats = batch.clips.shape[1]
    clips = batch.clips.transpose(0, 1).flatten(0, 1)
    columns = (
        batch.labels.repeat(repeats),
        batch.videos.repeat(repeats),
        batch.good.repeat(repeats),
    )
    return Batch(clips, *columns, batch.broken)


def batch_indices(settings: TrainingConfig, worker_rank: WorkerRank) -> list[int]:
    """Return the positions of a worker's clips in the whole batch.

    They are in the order of :func:`one_after_another`.
    """
    num_videos = settings.videos_per_batch
    return [
        each * num_videos + video
        for each in range(settings.augment.repeats)
        for video in worker_rank.of(num_videos)
    ]


class TrainingOrder:
    """The (video, epoch) keys of this worker for each step from ``first_step`` on.

    Each epoch is a new permutation of the split; under ``recipe.class_sampling: balanced`` it is as
    many draws from it. The last, incomplete batch is dropped.

    Raises:
        UserError: the batch is larger than the split, or too small for the number of workers.
    """

    def __init__(
        self,
        settings: TrainingConfig,
        labels: Sequence[int],
        worker_rank: WorkerRank,
        first_step: int = 0,
    ) -> None:
        num_videos = len(labels)
        size = settings.videos_per_batch
        if size > num_videos:
            raise UserError(
                f"recipe.batch_size: {size} is more than the {num_videos} training videos; make "
                "it smaller"
            )
        # Mixup and cutmix pair two clips of the same worker, so each worker needs two videos.
        if size < 2 * worker_rank.world:
            raise UserError(
                f"recipe.batch_size: {size} gives {worker_rank.world} workers less than two "
                "videos each"
            )
        self.settings = settings
        self.labels = np.asarray(labels)
        self.worker_rank = worker_rank
        self.first_step = first_step
        self.steps_per_epoch = num_videos // settings.videos_per_batch
        self.pieces_per_step = -(-len(worker_rank.of(size)) // VIDEOS_PER_PIECE)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        part = self.worker_rank.of(self.settings.videos_per_batch)
        size = self.settings.videos_per_batch
        # A resumed training skips the steps that it has done; nothing is decoded for these.
        first_epoch, skipped = divmod(self.first_step, self.steps_per_epoch)
        for epoch in range(first_epoch, self.settings.recipe.epochs):
            order = self._order(epoch)
            for step in range(skipped, self.steps_per_epoch):
                # Every worker draws the same permutation and takes its part of each batch.
                yield [(int(order[step * size + position]), epoch) for position in part]
            skipped = 0

    def _order(self, epoch: int) -> npt.NDArray[np.int64]:
        """Return the videos of an epoch, by their index in the split."""
        rng = stream(self.settings.seed, Stream.ORDER, epoch)
        num_videos = len(self.labels)
        if self.settings.recipe.class_sampling == "natural":
            return rng.permutation(num_videos)
        # A video's probability is the inverse of its class's size, so each class has the same.
        _, classes, counts = np.unique(self.labels, return_inverse=True, return_counts=True)
        shares = 1 / counts[classes]
        return rng.choice(num_videos, num_videos, p=shares / shares.sum())
