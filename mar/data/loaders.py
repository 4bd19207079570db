"""Loads batches of a data set, decoded in this process or in loader processes."""

from __future__ import annotations

import os
import shutil
import traceback
from collections.abc import Generator, Iterable, Iterator, Sized
from contextlib import nullcontext
from itertools import islice
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from mar.config.schema import TrainingConfig
from mar.data.annotations import Video
from mar.data.dataset import (
    VIDEOS_PER_PIECE,
    Batch,
    Sample,
    TrainingClips,
    TrainingOrder,
    bytes_per_clip,
)
from mar.data.process_pool import end_with_parent, forkserver
from mar.data.token_cache import TokenCache, TrainingTokens, bytes_per_view
from mar.errors import Failure, UserError

_BATCHES_AHEAD = 2
"""Batches that each loader process prepares ahead."""
# PyTorch sends tensors between processes through files in this folder; containers often limit it.
_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108


def collate(samples: list[Sample]) -> Batch:
    """Stack the clips, and list the videos that could not be decoded.

    Raises:
        Failure: in a loader process, the batch does not fit into shared memory (``shm``).
    """
    clips, labels, videos, broken = zip(*samples, strict=True)
    good = [each is None for each in broken]
    reasons = tuple(each for each in broken if each is not None)
    stacked = torch.empty(len(clips), *clips[0].shape, dtype=clips[0].dtype)
    batch = Batch(stacked, torch.tensor(labels), torch.tensor(videos), torch.tensor(good), reasons)
    # PyTorch itself would move the batch to shared memory while it sends it. There an error is only
    # printed, and the trainer would wait for the batch for ever.
    if get_worker_info() is not None:
        try:
            for tensor in (batch.clips, batch.labels, batch.videos, batch.good):
                tensor.share_memory_()
        except RuntimeError as error:
            raise _shared_memory_full(
                f"a batch of {_mb(stacked.nbytes)} does not fit: {error}"
            ) from None
    # Last, so that the pixels are copied once, straight into shared memory.
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
    """Return a loader that decodes in this process, or in ``processes`` loader processes.

    With ``is_kept`` these stay alive between passes over the data; otherwise they end after each.

    Raises:
        Failure: the batches in flight do not fit into shared memory (kind ``shm``). During a pass,
            kind ``worker_lost``: a loader process was lost in the middle of a batch. If it is lost
            between two batches, PyTorch raises a RuntimeError.
    """
    if processes:
        _check_shared_memory(processes, bytes_per_batch, batches)
    loading: DataLoader[Any] = DataLoader(
        _Batches(dataset),
        batch_sampler=batches,  # pyright: ignore[reportArgumentType]
        num_workers=processes,
        collate_fn=_as_it_is,
        # Only from pinned memory can a copy to the GPU run beside its computations.
        pin_memory=device.type == "cuda",
        multiprocessing_context=forkserver() if processes else None,
        persistent_workers=is_kept and processes > 0,
        prefetch_factor=_BATCHES_AHEAD if processes else None,
        worker_init_fn=_begin_loader_process,
    )
    return _Loading(loading)


def _begin_loader_process(number: int) -> None:
    """Make this loader process end with the trainer, and when it cannot send a batch."""
    end_with_parent()
    # multiprocessing only prints an error of sending, and the trainer would wait for the batch for
    # ever; but it notices within seconds that a loader process has ended.
    queue: Any = Queue
    queue._on_queue_feeder_error = staticmethod(_end_over_lost_batch)


def _end_over_lost_batch(error: BaseException, batch: object) -> None:
    traceback.print_exception(error)
    os._exit(1)


def _check_shared_memory(processes: int, bytes_per_batch: int, batches: Iterable[Any]) -> None:
    """Check that all batches in flight from loader processes fit into shared memory.

    Raises:
        Failure: they do not.
    """
    if not _SHARED_MEMORY.is_dir():  # not Linux
        return
    # One more: the batch that the trainer uses.
    at_once = processes * _BATCHES_AHEAD + 1
    if isinstance(batches, Sized):
        at_once = min(at_once, len(batches))
    free = shutil.disk_usage(_SHARED_MEMORY).free
    if at_once * bytes_per_batch > free:
        raise _shared_memory_full(
            f"{_mb(free)} are free, {processes} loader processes need about "
            f"{_mb(at_once * bytes_per_batch)}"
        )


class _Batches(Dataset[Any]):
    """The batches of a dataset; a batch that fails is replaced by its error.

    PyTorch would raise the error again from its text alone, and lose the failure's kind.
    """

    def __init__(self, dataset: Dataset[Sample]) -> None:
        self.dataset = dataset

    def __getitems__(self, keys: list[Any]) -> Batch | Failure | UserError:
        try:
            return collate([self.dataset[key] for key in keys])
        except (Failure, UserError) as error:
            return error


def _as_it_is(batch: Any) -> Any:
    """Return a batch unchanged: ``_Batches`` has collated it already."""
    return batch


class _Loading:
    """A loader that raises the errors of loader processes, with their kinds.

    It also raises a Failure if a process is lost while it sends a batch.
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
            # Linux allots shared memory on the first write, and sends SIGBUS if none is left.
            if "Bus error" in str(error):
                raise _shared_memory_full(str(error)) from error
            # A process that is killed while it sends leaves a pipe that ends early. It may be
            # PyTorch's thread for pinned memory that reads it.
            is_cut_off = not isinstance(error, RuntimeError) or str(error).startswith(
                "Pin memory thread exited"
            )
            # "Caught EOFError in DataLoader worker ...": our code raised it, and would do so again.
            is_ours = str(error).startswith("Caught ")
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
    tokens: TokenCache | None = None,
) -> Generator[Batch]:
    """Yield this worker's share of the batch of each step, on the device.

    A share is loaded in pieces, so that all loader processes work on the first share and none holds
    more than a few megabytes ahead. On a GPU the pieces are copied while the previous step runs.
    With ``tokens``, clips are those of a frozen encoder.
    """
    num_clips = min(VIDEOS_PER_PIECE, settings.videos_per_batch) * settings.augment.repeats
    if tokens is None:
        dataset = TrainingClips(settings, videos)
        size = num_clips * bytes_per_clip(settings)
    else:
        dataset = TrainingTokens(settings, videos, tokens)
        size = num_clips * bytes_per_view(settings)
    pieces = loader(dataset, _Pieces(order), processes, device, size)
    # A stream of its own: on the default stream a copy would wait for the step before it.
    if device.type == "cuda":
        copy_stream = torch.cuda.Stream(device)
    else:
        copy_stream = None
    loaded = iter(pieces)
    while step := list(islice(loaded, order.pieces_per_step)):
        with torch.cuda.stream(copy_stream) if copy_stream else nullcontext():
            clips = _joined([piece.clips for piece in step], device)
            labels = _joined([piece.labels for piece in step], device)
            video_indices = _joined([piece.videos for piece in step], device)
            good = _joined([piece.good for piece in step], device)
        if copy_stream:
            torch.cuda.current_stream(device).wait_stream(copy_stream)
            # Without record_stream(), the allocator could reuse their memory too early.
            for column in (clips, labels, video_indices, good):
                column.record_stream(torch.cuda.current_stream(device))
        yield Batch(
            clips,
            labels,
            video_indices,
            good,
            tuple(reason for piece in step for reason in piece.broken),
        )


def _joined(parts: list[Tensor], device: torch.device) -> Tensor:
    """Copy tensors to the device, without waiting for the copies, and concatenate them there."""
    return torch.cat([part.to(device, non_blocking=True) for part in parts])


class _Pieces:
    """The steps of an order, each cut into pieces of at most ``VIDEOS_PER_PIECE`` videos."""

    def __init__(self, order: TrainingOrder) -> None:
        self.order = order

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for keys in self.order:
            for first in range(0, len(keys), VIDEOS_PER_PIECE):
                yield keys[first : first + VIDEOS_PER_PIECE]
