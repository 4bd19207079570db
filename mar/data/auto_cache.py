"""The frame cache of ``data.cache: auto``: packed once, for all trials of a node.

Its frames are the videos' own pixels, not scaled and not compressed: training from it equals
training from the videos, bit for bit. So it is part of no trial's identity. It is larger than one
of ``mar data pack``, which scales and compresses; what does not fit on the disk is refused before
anything is written.
"""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from mar.config.input_settings import DataConfig
from mar.data.annotations import Video, read_split
from mar.data.cache_index import SETTINGS, Index, Packing, load_index
from mar.data.video.header import stated_frame_bytes
from mar.errors import Failure, UserError

EXACT = Packing("raw", short_side=None)
"""How the frames are kept: as the decoder gives them."""
_PROBED_VIDEOS = 64
"""Videos whose headers are read to estimate the size; the others are assumed to be alike."""
_MOST_TIMES_MEDIAN = 100
"""A video that states more than so many times the median size is left out of the estimate."""
_FREE_SHARE = 0.9
"""Share of the free disk that a cache may take: checkpoints and results need the rest."""
_POLL_S = 1.0
"""How often a wait for another process that packs is checked."""


@dataclass(frozen=True)
class CachePlan:
    """What is to be packed."""

    folder: Path
    num_videos: int
    """Of both splits."""
    num_missing: int
    """Not packed yet, or changed since."""
    missing_bytes: int
    """Estimated size of those."""
    free_bytes: int
    """Free on the disk of the folder."""

    @property
    def text(self) -> str:
        """One line for a user."""
        return (
            f"{self.num_missing:,} of {self.num_videos:,} videos, "
            f"about {self.missing_bytes / 2**30:.2f} GiB, in {self.folder}"
        )


def plan_cache(data: DataConfig, folder: Path) -> CachePlan:
    """Return what is not packed yet, and how large it will be.

    Raises:
        UserError: the annotations or the cache cannot be read.
    """
    videos = _videos(data, folder)
    missing = videos
    if (folder / SETTINGS).is_file():
        index = Index(folder)
        missing = [video for video in videos if not index.is_fresh(video)]
    # The folder does not exist before the first packing, and disk_usage() needs one that does.
    free = shutil.disk_usage(_existing_parent(folder)).free
    return CachePlan(folder, len(videos), len(missing), _estimated_bytes(missing), free)


def ensure_packed(
    data: DataConfig,
    folder: Path,
    processes: int,
    progress: Callable[[int, int], None],
    on_wait: Callable[[], None],
) -> None:
    """Pack what is missing; wait while another process packs it.

    ``progress`` is called with the number of finished videos and the total, ``on_wait`` each second
    of a wait: it may raise an error to end the wait.

    Raises:
        UserError: the annotations or the cache cannot be read, or the cache does not fit on the
            disk.
        Failure: the folder cannot be written.
    """
    # A complete cache is only read, so the usual case needs no lock.
    if not _is_complete(data, folder):
        with _hold(folder, on_wait):
            # Another process may have packed it meanwhile.
            load_index.cache_clear()
            plan = plan_cache(data, folder)
            if plan.num_missing:
                refuse_if_too_large(plan)
                # Loads PyTorch, which a plan does not need.
                from mar.data.frame_cache import pack

                pack(data, folder, EXACT, processes, progress)
    # A process that trained before has an index without the new videos.
    load_index.cache_clear()


@contextmanager
def _hold(folder: Path, on_wait: Callable[[], None]) -> Generator[None]:
    """Hold the lock of a cache; calls ``on_wait`` while another process has it.

    Raises:
        Failure: the folder cannot be written.
    """
    # pack() has a lock of its own, but it does not wait: a second process would get an error.
    lock = FileLock(folder.with_name(f"{folder.name}.lock"))
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        while True:
            # With a short timeout, so that on_wait() is called, which may end the wait.
            try:
                lock.acquire(timeout=_POLL_S)
                break
            except Timeout:
                on_wait()
    except OSError as error:
        raise Failure(
            f"{folder.parent} cannot be written: {error.strerror or error}; choose another --store"
        ) from None
    try:
        yield
    finally:
        lock.release()


def refuse_if_too_large(plan: CachePlan) -> None:
    """Raise a UserError if the cache would not fit on the disk."""
    if plan.missing_bytes <= _FREE_SHARE * plan.free_bytes:
        return
    raise UserError(
        f"data.cache: auto needs about {plan.missing_bytes / 2**30:,.1f} GiB for the frames of "
        f"{plan.num_missing:,} videos, and {plan.folder.parent} has "
        f"{plan.free_bytes / 2**30:,.1f} GiB free; set data.cache=null to decode the videos in "
        "each epoch, or pack them scaled and compressed: mar data pack RECIPE DIR"
    )


def _is_complete(data: DataConfig, folder: Path) -> bool:
    if not (folder / SETTINGS).is_file():
        return False
    index = Index(folder)
    return all(index.is_fresh(video) for video in _videos(data, folder))


def _videos(data: DataConfig, folder: Path) -> list[Video]:
    """Return the videos of both splits, each once.

    Videos in the cache need no file on this disk: the cache may have been made elsewhere.
    """
    cache = None
    if (folder / SETTINGS).is_file():
        cache = str(folder)
    data = data.model_copy(update={"cache": cache})
    found = {video.name: video for split in ("train", "val") for video in read_split(data, split)}
    return list(found.values())


def _estimated_bytes(videos: list[Video]) -> int:
    """Return the size of the videos' frames, from the headers of some of them."""
    # Spread over the list: its first videos may all be of one class or one source.
    every = max(1, len(videos) // _PROBED_VIDEOS)
    stated = [stated_frame_bytes(video.path) for video in videos[::every]]
    # A broken video needs no space; it is reported when it is packed or trained on.
    sizes = [size for size in stated if size is not None]
    if not sizes:
        return 0
    # One damaged header may state two thousand million frames.
    plausible = [size for size in sizes if size <= _MOST_TIMES_MEDIAN * statistics.median(sizes)]
    return round(sum(plausible) / len(plausible) * len(videos))


def _existing_parent(folder: Path) -> Path:
    """Return the nearest folder that exists: its disk is the one that is written to."""
    while not folder.exists():
        folder = folder.parent
    return folder
