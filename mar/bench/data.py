"""Benchmarks of the work around a step: loader, frame cache, augmentation, checkpoints."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from itertools import cycle, islice
from pathlib import Path

import torch

from mar.augmentation.augment import augmented, draw_step, mix
from mar.bench.machine import Machine, synchronise
from mar.bench.steps import Case, random_batch, train_state_of
from mar.bench.tables import Table, spread
from mar.config.input_settings import DataConfig
from mar.config.overrides import build, merge
from mar.config.schema import TrainingConfig
from mar.data.annotations import Video
from mar.data.cache_index import Packing
from mar.data.dataset import Batch, TrainingClips, TrainingOrder
from mar.data.frame_cache import pack
from mar.data.loaders import training_batches
from mar.distributed import worker_rank
from mar.errors import UserError
from mar.rng import Stream, rng
from mar.training.allocator import keep_freed_memory
from mar.training.checkpoint import Progress, Saver, State, save
from mar.training.retention import RetentionPolicy
from mar.training.step import TrainState, train_step

_CLIPS_PER_ROUND = 48
"""Clips that the loader reads for one measurement of its rate."""
_CLIP_BYTES = 16 * 224 * 224 * 3.0
"""A clip of 16 frames of 224 × 224 pixels in uint8."""
_CLIP_RATES = (10, 100, 622, 1243)
"""Clips/s that a device may need; the last two are an H200's, which the table's note explains."""
_MAX_VIDEOS = 24
"""Videos of a given folder that are read."""
_RANDAUGMENT = "rand-m7-n4-mstd0.5-inc1"
"""The paper's RandAugment (Table I)."""
_WARM_UP_STEPS = 3
"""Steps of each kind before the timed ones."""


def loader_table(machine: Machine, rounds: int, videos: Path | None, command: str) -> Table:
    """Time the loader on one core, from video files and from both frame caches.

    The table also gives the number of cores that a device of some speed needs.
    """
    with tempfile.TemporaryDirectory() as name:
        data = _dataset(Path(name), videos)
        sources = _clip_sources(data, Path(name))
        rates: dict[str, list[float]] = {source: [] for source in sources}
        # Sources alternate, so a period in which the machine is slow affects all of them.
        for _ in range(rounds + 1):
            for source, settings in sources.items():
                rates[source].append(_in_one_thread(partial(_read_rate, settings)))
    rows: list[tuple[str, ...]] = []
    for source, measured in rates.items():
        # The first round warms up.
        timed = measured[1:]
        rate = statistics.median(timed)
        bandwidth = 100 * (_CLIP_BYTES * rate / 1e9 / machine.copy_gb_s)
        cores = [f"{wanted / rate:.1f}" for wanted in _CLIP_RATES]
        rows.append((source, spread(timed, 0), f"{bandwidth:.1f}", *cores))
    core_columns = [f"cores for {wanted} clips/s" for wanted in _CLIP_RATES]
    columns = ("clips from", "clips/s a core", "bandwidth %", *core_columns)
    note = (
        "Clips of 16 frames, cropped and resized to 224², as the training gets them (uint8). "
        f"{_describe(videos)} 622 and 1,243 clips/s: ViT-B at ρ = 50 % at 40 % and 80 % of an "
        "H200's data-sheet arithmetic. The loader is limited by its core, which decodes, crops and "
        "resizes; of the memory's bandwidth it uses the share given (the clips, written once)."
    )
    return Table("Loader", command, columns, rows, (note,))


def fed_table(case: Case, rounds: int, videos: Path | None, command: str) -> Table:
    """Time the step on random data on the device, and fed by one loader process, in turn.

    Measured for two small models, whose steps need many clips a second, and for the case's own.
    """
    small = replace(case, size="tiny", pixels=64)
    medium = replace(case, size="small", pixels=128)
    if case.device == "cpu":
        keep_freed_memory()
        small = replace(small, clips=16)
        medium = replace(medium, clips=8)
    # Data sets and caches are made anew for each model, and removed before the next.
    rows: list[tuple[str, ...]] = []
    for sized in (small, medium, case):
        with tempfile.TemporaryDirectory() as name:
            sources = _clip_sources(_dataset(Path(name), videos), Path(name))
            random_s, fed_s, alone = _time_fed(sized, sources["frame cache, raw"], rounds)
        # Each ratio compares two steps that ran one after the other.
        ratios = [fed / random for fed, random in zip(fed_s, random_s, strict=True)]
        row = (
            f"ViT-{sized.size}, {sized.pixels}²",
            spread([sized.clips / seconds for seconds in random_s], 1),
            spread([sized.clips / seconds for seconds in fed_s], 1),
            spread(ratios, 3),
            f"{alone:.0f}",
        )
        rows.append(row)
    columns = (
        "model",
        "clips/s, random data",
        "clips/s, fed from the cache",
        "time fed / random",
        "the loader alone, clips/s",
    )
    threads = torch.get_num_threads()
    note = (
        "One loader process reads the raw frame cache while the step runs. On the CPU the step has "
        f"{max(threads - 1, 1)} of {threads} threads in both columns, the loader has the other. "
        "The loader does not slow a step that needs fewer clips/s than the loader gives."
    )
    return Table("Fed", command, columns, rows, (note,))


def augmentation_table(case: Case, machine: Machine, rounds: int, command: str) -> Table:
    """Time the augmentation of a batch of uint8 clips on the device, before the model sees it."""
    device = torch.device(case.device)
    kinds = _augmentations()
    batch = random_batch(case, device)
    times: dict[str, list[float]] = {name: [] for name in kinds}
    for number in range(3 * rounds + 1):
        for name, augment in kinds.items():
            settings = _override(case.settings, {"augment": augment})
            # The number is the step, so every repetition draws anew.
            times[name].append(_seconds(partial(_augment, batch, settings, number), device))
    # Read uint8 once, a byte a value; write float32 once, four bytes a value.
    float_bytes = 4.0 * batch.clips.numel()
    least_bytes = (0.25 + 1) * float_bytes
    rows: list[tuple[str, ...]] = []
    for name, measured in times.items():
        # The first repetition warms up.
        timed = measured[1:]
        seconds = statistics.median(timed)
        bandwidth = 100 * least_bytes / seconds / machine.copy_gb_s / 1e9
        row = (
            name,
            spread([1e3 * each / case.clips for each in timed]),
            f"{case.clips / seconds:.0f}",
            f"{bandwidth:.0f}",
        )
        rows.append(row)
    columns = ("augmentation", "ms a clip", "clips/s", "of the memory's bandwidth %")
    note = (
        "Bandwidth: of reading uint8 once and writing float32 once, the least that every "
        "augmentation needs."
    )
    return Table("Augmentation on the device", command, columns, rows, (note,))


def _augmentations() -> dict[str, dict[str, object]]:
    """Return the settings of ``augment`` to time, by name: nothing, each operation, all of them."""
    nothing: dict[str, object] = {
        "flip": False,
        "mixup": 0.0,
        "cutmix": 0.0,
        "erasing": 0.0,
        "randaugment": None,
    }
    table_i: dict[str, object] = {
        "flip": True,
        "mixup": 0.8,
        "cutmix": 1.0,
        "erasing": 0.25,
        "randaugment": _RANDAUGMENT,
    }
    return {
        "pixels from uint8": nothing,
        "flip": nothing | {"flip": True},
        "mixup, cutmix": nothing | {"mixup": 0.8, "cutmix": 1.0},
        "random erasing": nothing | {"erasing": 0.25},
        f"RandAugment {_RANDAUGMENT}": nothing | {"randaugment": _RANDAUGMENT},
        "all of Table I": table_i,
    }


def checkpoint_table(case: Case, rounds: int, command: str) -> Table:
    """Time how long the step waits for a checkpoint.

    The ways are: written in a thread beside the training, written while the step waits, and
    ``torch.save`` as peers use it.
    """
    device = torch.device(case.device)
    train_state = train_state_of(case)
    # AdamW has no moments to save before its first step; one clip is enough for them.
    batch = random_batch(replace(case, clips=1), device)
    train_step(train_state, batch)
    waited: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        beside = folder / "beside"
        with Saver(beside, case.settings, RetentionPolicy(last=1)) as saver:
            ways = _saving_ways(case, train_state, saver, folder)
            for number in range(rounds + 2):
                for way, work in ways.items():
                    seconds = _seconds(partial(work, number), device)
                    waited.setdefault(way, []).append(seconds)
            size_gib = (folder / "peer.pt").stat().st_size / 2**30
    rows: list[tuple[str, ...]] = []
    for way, measured in waited.items():
        # The first two rounds warm up.
        timed = measured[2:]
        rows.append((way, spread(timed, 3), f"{size_gib / statistics.median(timed):.2f}"))
    note = f"{size_gib:.2f} GiB: weights and AdamW's moments of ViT-{case.size} with both branches."
    return Table("Checkpoint", command, ("checkpoint", "the step waits, s", "GiB/s"), rows, (note,))


def _saving_ways(
    case: Case, train_state: TrainState, saver: Saver, folder: Path
) -> dict[str, Callable[[int], object]]:
    """Return the ways of saving to time, by name; each is called with the step's number."""
    model = train_state.model
    optimizer = train_state.optimizer
    weights = model.state_dict()
    moments = optimizer.state_dict()
    content = {"model": weights, "optimizer": moments}

    def save_and_wait(step: int) -> None:
        state = State(weights, moments, Progress(step=step))
        save(folder / "placed", case.settings, state, RetentionPolicy(last=1))

    # The order counts: ``wait`` measures the rest of the save that was begun before it.
    return {
        "beside the training (ours)": lambda step: saver.save(
            model, optimizer, Progress(step=step)
        ),
        "the same, until it is on the disk": lambda _: saver.wait(),
        "in its place": save_and_wait,
        "torch.save, unsealed, not synced": lambda _: torch.save(content, folder / "peer.pt"),
    }


def _augment(batch: Batch, settings: TrainingConfig, step: int) -> object:
    """Augment a batch as a training step does."""
    drawn = draw_step(settings, step)
    pixels, labels = augmented(batch.clips.flatten(0, 1), batch.labels, drawn, settings)
    mixing = rng(settings.seed, Stream.MIX, step)
    return mix(pixels, labels, settings.augment, mixing, batch.good)


def _time_fed(
    case: Case, settings: TrainingConfig, rounds: int
) -> tuple[list[float], list[float], float]:
    """Time a model's steps on random data and fed by a loader process.

    Returns:
        The seconds of each step on random data, those of each fed step, and the clips/s of the
        loader alone.
    """
    device = torch.device(case.device)
    settings = _override(
        case.settings, {"data": settings.data.model_dump(), "recipe": {"batch_size": case.clips}}
    )
    train_state = train_state_of(case)
    random_data = random_batch(case, device)
    videos = _videos(settings.data)
    order = TrainingOrder(settings, [video.label for video in videos], worker_rank())
    batches = training_batches(settings, videos, order, 1, device)
    threads = torch.get_num_threads()
    step_threads = threads
    if device.type == "cpu":
        # The loader process decodes on the thread that is left.
        step_threads = max(threads - 1, 1)
    torch.set_num_threads(step_threads)
    random_s: list[float] = []
    fed_s: list[float] = []
    try:
        for number in range(rounds * case.steps + _WARM_UP_STEPS):
            on_random = _seconds(lambda: train_step(train_state, random_data), device)
            fed = _seconds(lambda: train_step(train_state, next(batches)), device)
            if number >= _WARM_UP_STEPS:
                random_s.append(on_random)
                fed_s.append(fed)
        # Use up the batches that were loaded ahead during the steps: they cost no time now.
        list(islice(batches, 4))
        # At least four batches: the time of one alone varies too much.
        count = max(_CLIPS_PER_ROUND // case.clips, 4)
        started = time.perf_counter()
        list(islice(batches, count))
        clips_per_s = count * case.clips / (time.perf_counter() - started)
    finally:
        torch.set_num_threads(threads)
    return random_s, fed_s, clips_per_s


def _clip_sources(data: DataConfig, scratch: Path) -> dict[str, TrainingConfig]:
    """Return settings for each source of clips, by name; packs both frame caches in ``scratch``."""
    # The defaults are the paper's clip and model; only the data is replaced.
    settings = _override(TrainingConfig(), {"data": data.model_dump()})
    sources = {"video files": settings}
    for name, packing in {"JPEG": Packing("jpeg"), "raw": Packing("raw")}.items():
        folder = scratch / name
        pack(data, folder, packing, os.cpu_count() or 1, lambda done, total: None)
        cached = _override(settings, {"data": {"cache": str(folder)}})
        sources[f"frame cache, {name}"] = cached
    return sources


def _read_rate(settings: TrainingConfig) -> float:
    """Return the clips a second that this process reads."""
    videos = _videos(settings.data)
    clips = TrainingClips(settings, videos)
    # Videos are read again, each time with another epoch: another crop and other frames.
    indices: Iterable[int] = islice(cycle(range(len(videos))), _CLIPS_PER_ROUND)
    started = time.perf_counter()
    for epoch, video in enumerate(indices):
        assert clips[video, epoch].broken is None
    return _CLIPS_PER_ROUND / (time.perf_counter() - started)


def _in_one_thread(work: Callable[[], float]) -> float:
    """Call ``work`` while PyTorch has one thread: the loader is measured for one core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return work()
    finally:
        torch.set_num_threads(threads)


def _dataset(scratch: Path, videos: Path | None) -> DataConfig:
    """Return a data set of the videos in a folder, or of generated videos.

    Raises:
        UserError: there are no videos in the folder.
    """
    root = videos or _generate_videos(scratch / "films")
    suffixes = (".mp4", ".avi", ".webm", ".mkv")
    files = sorted(file for file in root.rglob("*") if file.suffix in suffixes)[:_MAX_VIDEOS]
    if not files:
        raise UserError(f"{root}: no videos (.mp4, .avi, .webm, .mkv) in this folder")
    # Only reading is timed, so every video has label 0 and both splits are the same.
    annotations = scratch / "train.txt"
    lines = "".join(f"{file.relative_to(root)} 0\n" for file in files)
    annotations.write_text(lines, encoding="utf-8")
    return DataConfig(root=str(root), train=str(annotations), val=str(annotations), num_classes=1)


def _generate_videos(folder: Path) -> Path:
    """Make 24 small videos of two classes in ``folder``; returns it."""
    from mar.data.motion_verbs import MotionVerbs, make

    make(folder, MotionVerbs(size=256, frames=48, classes=2, train=16, validation=8))
    return folder


def _override(settings: TrainingConfig, overrides: Mapping[str, object]) -> TrainingConfig:
    """Return the settings with some of them replaced."""
    return build(merge(settings.model_dump(mode="json"), overrides))


def _videos(data: DataConfig) -> list[Video]:
    """Return the training videos of a data set made by ``_dataset``."""
    lines = Path(str(data.train)).read_text(encoding="utf-8").splitlines()
    # A name may contain spaces: the label is what follows the last one.
    names = [line.rsplit(" ", 1)[0] for line in lines]
    return [Video(name, Path(str(data.root)) / name, 0) for name in names]


def _describe(videos: Path | None) -> str:
    """Return the sentence of a note that states which videos were read."""
    if videos is None:
        return "Generated videos: H.264, 256 × 256, 48 frames."
    return f"Videos of {videos.name}."


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """Return the time of one call, until the device has done its work."""
    synchronise(device)
    started = time.perf_counter()
    work()
    synchronise(device)
    return time.perf_counter() - started
