"""Clips for training and testing: what is drawn for each, loaders, and broken videos.

Every draw follows from (seed, epoch, video), never from a state that is carried along. So the clips
do not depend on how many workers and loader processes there are, and a resumed epoch goes on with
the same ones.
"""

from __future__ import annotations

import math
import os
import shutil
import traceback
from collections.abc import Generator, Iterable, Iterator, Sized
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int, UInt8
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from mar.augmentation.randaugment import draw_operations, rand_augment
from mar.config.randaugment_policy import RandAugmentPolicy
from mar.config.schema import AugmentConfig, TrainingConfig
from mar.data.annotations import Video
from mar.data.decoders import BrokenVideo, Frames
from mar.data.frame_cache import open_video
from mar.data.process_pool import end_with_parent, forkserver
from mar.data.sampling import evaluation_frames, training_frames
from mar.distributed import WorkerRank
from mar.errors import Failure, UserError
from mar.rng import Stream
from mar.rng import rng as stream

_BATCHES_AHEAD = 2
"""Of each loader process, on their way or waiting."""
_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108
VIDEOS_PER_PIECE = 8
"""Of a batch: what a loader process decodes at a time."""
Box = tuple[int, int, int, int]
"""Top, left, height and width, pixels."""


@dataclass(frozen=True)
class Batch:
    """Clips of uint8 pixels and their labels.

    A broken video has black ones, in its place, and is not ``good``.
    """

    clips: UInt8[Tensor, "B *views T H W C"]
    labels: Int[Tensor, " B"]
    videos: Int[Tensor, " B"]
    """Each clip's place in the split."""
    good: Bool[Tensor, " B"]
    """Whether the video could be decoded."""
    broken: tuple[BrokenVideo, ...] = ()


class Sample(NamedTuple):
    """What a video gives: a stack of clips, its label, its place in the split.

    And why the clips are black.
    """

    clips: UInt8[Tensor, "views T H W C"]
    label: int
    video: int
    broken: BrokenVideo | None = None


class TrainingClips(Dataset[Sample]):
    """A video's random clips, ``augment.repeats`` × T × H × W × C; indexed by (video, epoch)."""

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
        times = repeats if settings.augment.repeat == "clips" else 1
        try:
            with open_video(settings.data, video) as reader:
                numbers = [
                    training_frames(settings.clip, len(reader), reader.fps, rng).tolist()
                    for _ in range(times)
                ]
                frames = np.split(
                    reader.frames([number for clip in numbers for number in clip]), times
                )
        except BrokenVideo as broken:
            return Sample(_black(repeats, settings), video.label, index, broken)
        height, width = frames[0].shape[1:3]
        boxes = [random_box(height, width, settings, rng) for _ in range(repeats)]
        clips: list[Tensor] = []
        for each, box in enumerate(boxes):
            whole = frames[each % times]
            if settings.augment.randaugment and settings.augment.randaugment_before_crop:
                whole = _rand_augmented(
                    whole,
                    settings.augment,
                    stream(settings.seed, Stream.RANDAUGMENT_BEFORE_CROP, epoch, index, each),
                )
            clips.append(crop_and_resize(whole, box, size, settings.clip.antialias))
        return Sample(torch.stack(clips), video.label, index)


class EvaluationClips(Dataset[Sample]):
    """All views of a video as one stack of clips: ``views`` × T × H × W × C; indexed by video."""

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
        if self.shuffled:
            order = stream(0, Stream.FRAME_SHUFFLE, index).permutation(settings.clip.frames)
        else:
            order = slice(None)
        try:
            with open_video(settings.data, video) as reader:
                how = settings.evaluation.segment_frames
                wanted = evaluation_frames(settings.clip, len(reader), reader.fps, self.clips, how)
                numbers = [number for indices in wanted for number in indices[order].tolist()]
                clips = np.split(
                    reader.frames(numbers), len(wanted)
                )  # one call: a long file is gone through once
        except BrokenVideo as broken:
            return Sample(_black(self.clips * self.crops, settings), video.label, index, broken)
        size = settings.clip.size
        antialias = settings.clip.antialias
        if settings.evaluation.crop_from == "resized":
            clips = [resize_short_side(frames, size, antialias) for frames in clips]
        boxes = test_boxes(
            clips[0].shape[1], clips[0].shape[2], self.crops, settings.evaluation.crop_from
        )
        views = [crop_and_resize(frames, box, size, antialias) for frames in clips for box in boxes]
        return Sample(torch.stack(views), video.label, index)


def bytes_per_clip(settings: TrainingConfig) -> int:
    """Return the size of one view's pixels."""
    return settings.clip.frames * settings.clip.size**2 * 3


def _black(views: int, settings: TrainingConfig) -> UInt8[Tensor, "views T H W C"]:
    size = settings.clip.size
    return torch.zeros(views, settings.clip.frames, size, size, 3, dtype=torch.uint8)


def random_box(height: int, width: int, settings: TrainingConfig, rng: np.random.Generator) -> Box:
    """Draw a random-resized crop, with ten attempts.

    Its area and the logarithm of its aspect ratio are uniform.
    """
    augment = settings.augment
    low, high = np.log(augment.crop_aspect)
    for _ in range(10):
        area = height * width * rng.uniform(*augment.crop_scale)
        aspect = np.exp(rng.uniform(low, high))
        w = round(float(np.sqrt(area * aspect)))
        h = round(float(np.sqrt(area / aspect)))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    return _largest_box(height, width, augment.crop_aspect)


def _largest_box(height: int, width: int, aspects: tuple[float, float]) -> Box:
    """Return the largest box in the centre whose aspect ratio is within the limits."""
    w = min(width, round(height * aspects[1]))
    h = min(height, round(width / aspects[0]))
    return (height - h) // 2, (width - w) // 2, h, w


def test_boxes(height: int, width: int, crops: int, crop_from: str = "frame") -> list[Box]:
    """Return the centre square, or three squares along the long side: both ends and the centre.

    From a ``frame`` the centre's corner is rounded to the nearest pixel, from a ``resized`` one
    down, as the release has it.
    """
    side = min(height, width)
    shares = (0.5,) if crops == 1 else (0.0, 0.5, 1.0)
    whole = math.floor if crop_from == "resized" else round
    return [
        (whole((height - side) * worker_rank), whole((width - side) * worker_rank), side, side)
        for worker_rank in shares
    ]


test_boxes.__test__ = False  # pyright: ignore[reportFunctionMemberAccess]


def crop_and_resize(
    frames: Frames, box: Box, size: int, antialias: bool = True
) -> UInt8[Tensor, "T size size C"]:
    """Cut ``box`` from every frame and resize it to ``size`` × ``size`` (bilinear), in uint8."""
    top, left, height, width = box
    cut = torch.from_numpy(np.ascontiguousarray(frames[:, top : top + height, left : left + width]))
    if (height, width) == (size, size):
        return cut
    return _resized(cut, (size, size), antialias).contiguous()


def resize_short_side(frames: Frames, size: int, antialias: bool) -> Frames:
    """Resize frames so that the short side has ``size`` pixels.

    The long side keeps the aspect ratio, rounded down.
    """
    height, width = frames.shape[1:3]
    short = min(height, width)
    if height == short:
        new = (size, int(width / short * size))
    else:
        new = (int(height / short * size), size)
    return _resized(torch.from_numpy(np.ascontiguousarray(frames)), new, antialias).numpy()


def _resized(
    frames: UInt8[Tensor, "T H W C"], size: tuple[int, int], antialias: bool
) -> UInt8[Tensor, "T h w C"]:
    """Resize by PyTorch's bilinear interpolation.

    Without antialiasing in floats, rounded at the end.
    """
    channels_first = frames.permute(0, 3, 1, 2)
    if antialias:
        resized = F.interpolate(channels_first, size=size, mode="bilinear", antialias=True)
    else:
        resized = (
            F.interpolate(channels_first.float(), size=size, mode="bilinear")
            .round()
            .to(torch.uint8)
        )
    return resized.permute(0, 2, 3, 1)


def _rand_augmented(frames: Frames, config: AugmentConfig, rng: np.random.Generator) -> Frames:
    """Apply a clip's RandAugment to its whole frames."""
    assert config.randaugment
    operations = draw_operations(RandAugmentPolicy.parse(config.randaugment), 1, rng)
    pixels = torch.from_numpy(np.ascontiguousarray(frames)).permute(3, 0, 1, 2)[None].float() / 255
    done = rand_augment(pixels, operations, config.randaugment_interpolation)
    return (done[0] * 255).round().to(torch.uint8).permute(1, 2, 3, 0).numpy()


def one_after_another(batch: Batch) -> Batch:
    """Return a training batch's clips as one row: the first of all videos, then the second.

    Neighbours, which mixup and cutmix mix, are so clips of different videos.
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

    In the order of :func:`one_after_another`.
    """
    num_videos = settings.videos_per_batch
    return [
        each * num_videos + video
        for each in range(settings.augment.repeats)
        for video in worker_rank.of(num_videos)
    ]


class TrainingOrder:
    """The (video, epoch) keys of this worker for each step from ``first_step`` on; iterate once.

    Each epoch is a new permutation of the split; its last, incomplete batch is dropped.

    Raises:
        UserError: the batch is larger than the split, or too small for so many workers.
    """

    def __init__(
        self,
        settings: TrainingConfig,
        num_videos: int,
        worker_rank: WorkerRank,
        first_step: int = 0,
    ) -> None:
        size = settings.videos_per_batch
        if size > num_videos:
            raise UserError(
                f"recipe.batch_size: {size} is more than the {num_videos} training videos; make "
                "it smaller"
            )
        if size < 2 * worker_rank.world:
            raise UserError(
                f"recipe.batch_size: {size} gives {worker_rank.world} workers less than two "
                "videos each"
            )
        self.settings = settings
        self.num_videos = num_videos
        self.worker_rank = worker_rank
        self.first_step = first_step
        self.steps_per_epoch = num_videos // settings.videos_per_batch
        self.pieces_per_step = -(-len(worker_rank.of(size)) // VIDEOS_PER_PIECE)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        part = self.worker_rank.of(self.settings.videos_per_batch)
        size = self.settings.videos_per_batch
        first_epoch, skipped = divmod(self.first_step, self.steps_per_epoch)
        for epoch in range(first_epoch, self.settings.recipe.epochs):
            order = stream(self.settings.seed, Stream.ORDER, epoch).permutation(self.num_videos)
            for step in range(skipped, self.steps_per_epoch):
                yield [(int(order[step * size + position]), epoch) for position in part]
            skipped = 0


def collate(samples: list[Sample]) -> Batch:
    """Stack the clips, and list the videos that could not be decoded.

    A loader process does it in shared memory.

    PyTorch would move the batch there while it sends it, where an error is printed and the batch is
    lost: the trainer would wait for it for ever.

    Raises:
        Failure: the batch does not fit into shared memory (``shm``).
    """
    clips, labels, videos, broken = zip(*samples, strict=True)
    good = [each is None for each in broken]
    reasons = tuple(each for each in broken if each is not None)
    stacked = torch.empty(len(clips), *clips[0].shape, dtype=torch.uint8)
    batch = Batch(stacked, torch.tensor(labels), torch.tensor(videos), torch.tensor(good), reasons)
    if get_worker_info() is not None:
        try:
            for tensor in (batch.clips, batch.labels, batch.videos, batch.good):
                tensor.share_memory_()
        except RuntimeError as error:
            raise _shared_memory_full(
                f"a batch of {_mb(stacked.nbytes)} does not fit: {error}"
            ) from None
    torch.stack(clips, out=stacked)
    return batch


def _shared_memory_full(reason: str) -> Failure:
    return Failure(
        f"{_SHARED_MEMORY}, through which loader processes send clips, is too small: {reason}",
        "shm",
    )


def _mb(size: int) -> str:
    return f"{size / 1e6:,.0f} MB"


def loader(
    dataset: Dataset[Sample],
    batches: Iterable[Any],
    processes: int,
    device: torch.device,
    bytes_per_batch: int,
    is_kept: bool = False,
) -> Iterable[Batch]:
    """Return a loader that decodes in this process, or in ``processes`` others.

    With ``is_kept`` these stay alive between passes; otherwise they end with each pass.

    Raises:
        Failure: the batches that are on their way at once do not fit into shared memory (``shm``).
            A pass raises one of the kind ``node`` when a process is lost in the middle of a batch;
            when it is lost between two, PyTorch raises a RuntimeError.
    """
    if processes:
        _check_shared_memory(processes, bytes_per_batch, batches)
    loading: DataLoader[Any] = DataLoader(
        _Batches(dataset),
        batch_sampler=batches,  # pyright: ignore[reportArgumentType]
        num_workers=processes,
        collate_fn=_as_it_is,
        pin_memory=device.type == "cuda",
        multiprocessing_context=forkserver() if processes else None,
        persistent_workers=is_kept and processes > 0,
        prefetch_factor=_BATCHES_AHEAD if processes else None,
        worker_init_fn=_begin_loader_process,
    )
    return _Loading(loading)


def _begin_loader_process(number: int) -> None:
    end_with_parent()
    # Whatever else cannot be sent ends the process: the trainer notices that within seconds, a lost
    # batch never.
    Queue._on_queue_feeder_error = staticmethod(_end_over_lost_batch)  # pyright: ignore[reportAttributeAccessIssue]


def _end_over_lost_batch(error: BaseException, batch: object) -> None:
    traceback.print_exception(error)
    os._exit(1)


def _check_shared_memory(processes: int, bytes_per_batch: int, batches: Iterable[Any]) -> None:
    """Check that all batches in flight from loader processes fit into shared memory.

    Raises:
        Failure: it does not.
    """
    if not _SHARED_MEMORY.is_dir():  # not Linux
        return
    at_once = processes * _BATCHES_AHEAD + 1  # one is being used
    if isinstance(batches, Sized):
        at_once = min(at_once, len(batches))
    free = shutil.disk_usage(_SHARED_MEMORY).free
    if at_once * bytes_per_batch > free:
        raise _shared_memory_full(
            f"{_mb(free)} are free, {processes} loader processes need about "
            f"{_mb(at_once * bytes_per_batch)}"
        )


class _Batches(Dataset[Any]):
    """A dataset's batches.

    Where one fails, its error stands for it: PyTorch would drop the failure's kind on the way.
    """

    def __init__(self, dataset: Dataset[Sample]) -> None:
        self.dataset = dataset

    def __getitems__(self, keys: list[Any]) -> Batch | Failure | UserError:
        try:
            return collate([self.dataset[key] for key in keys])
        except (Failure, UserError) as error:
            return error


def _as_it_is(batch: Any) -> Any:
    return batch


class _Loading:
    """A loader that raises when one of its processes is lost while it sends a batch.

    PyTorch alone would end the batch early.
    """

    def __init__(self, loading: Iterable[Batch | Failure | UserError]) -> None:
        self.loading = loading

    def __iter__(self) -> Iterator[Batch]:
        try:
            for batch in self.loading:
                if not isinstance(batch, Batch):
                    raise batch
                yield batch
        except (Failure, UserError):
            raise
        except (EOFError, ConnectionError, RuntimeError) as error:
            if "Bus error" in str(error):  # a page of shared memory that could not be had
                raise _shared_memory_full(str(error)) from error
            is_cut_off = not isinstance(error, RuntimeError) or str(error).startswith(
                "Pin memory thread exited"
            )
            is_ours = str(error).startswith(
                "Caught "
            )  # raised by our code in such a process: it would come again
            if is_ours or not is_cut_off:
                raise
            raise Failure(
                f"a loader process was lost: {type(error).__name__}", "worker_lost"
            ) from error


def training_batches(
    settings: TrainingConfig,
    videos: list[Video],
    order: TrainingOrder,
    processes: int,
    device: torch.device,
) -> Generator[Batch]:
    """Yield this worker's share of each step, on the device.

    A share is loaded in pieces, so that all processes work on the first one and none holds more
    than a few megabytes ahead. On an accelerator the pieces are copied beside the step that is
    under way.
    """
    size = (
        min(VIDEOS_PER_PIECE, settings.videos_per_batch)
        * settings.augment.repeats
        * bytes_per_clip(settings)
    )
    pieces = loader(TrainingClips(settings, videos), _Pieces(order), processes, device, size)
    if device.type == "cuda":
        beside = torch.cuda.Stream(device)
    else:
        beside = None
    loaded = iter(pieces)
    while step := list(islice(loaded, order.pieces_per_step)):
        with torch.cuda.stream(beside) if beside else nullcontext():
            clips = torch.cat([piece.clips.to(device, non_blocking=True) for piece in step])
            labels, batch_indices, good = (
                torch.cat([column.to(device, non_blocking=True) for column in columns])
                for columns in zip(
                    *((piece.labels, piece.videos, piece.good) for piece in step), strict=True
                )
            )
        if beside:
            torch.cuda.current_stream(device).wait_stream(beside)
            for column in (clips, labels, batch_indices, good):
                column.record_stream(torch.cuda.current_stream(device))
        yield Batch(
            clips,
            labels,
            batch_indices,
            good,
            tuple(reason for piece in step for reason in piece.broken),
        )


class _Pieces:
    """An order's steps, each cut into pieces of a few videos."""

    def __init__(self, order: TrainingOrder) -> None:
        self.order = order

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for keys in self.order:
            for first in range(0, len(keys), VIDEOS_PER_PIECE):
                yield keys[first : first + VIDEOS_PER_PIECE]
