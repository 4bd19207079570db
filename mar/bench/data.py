"""What feeds a step and what follows it: loader, frame cache, augmentation, checkpoints."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path

import torch

from mar.augmentation.augment import augmented, draw_step, mix
from mar.bench.machine import Machine, synchronise
from mar.bench.steps import Case, random_batch, train_state_of
from mar.bench.tables import Table, spread
from mar.config.overrides import build, merge
from mar.config.schema import DataConfig, TrainingConfig
from mar.data.annotations import Video
from mar.data.cache_index import Packing
from mar.data.dataset import Batch, TrainingClips, TrainingOrder, training_batches
from mar.distributed import worker_rank
from mar.errors import UserError
from mar.rng import Stream, rng
from mar.training.allocator import keep_freed_memory
from mar.training.checkpoint import Progress, Saver, State, save
from mar.training.retention import RetentionPolicy
from mar.training.step import train_step

_CLIPS_PER_ROUND = 48
_CLIP_BYTES = 16 * 224 * 224 * 3.0
_RANDAUGMENT = "rand-m7-n4-mstd0.5-inc1"
"""The paper's (Table I)."""


def loader_table(machine: Machine, rounds: int, videos: Path | None, command: str) -> Table:
    """Time the loader on one core: from video files, and from both frame caches.

    What a device of some speed needs of it.
    """
    with tempfile.TemporaryDirectory() as name:
        data = _data(Path(name), videos)
        kinds = _kinds(data, Path(name))
        rates: dict[str, list[float]] = {kind: [] for kind in kinds}
        for _ in range(rounds + 1):
            for kind, settings in kinds.items():
                rates[kind].append(_in_one_thread(lambda settings=settings: _loaded(settings)))
    rows: list[tuple[str, ...]] = []
    for kind, all_of in rates.items():
        rate = statistics.median(all_of[1:])
        written = _CLIP_BYTES * rate / 1e9 / machine.copy_gb_s
        cores = [f"{wanted / rate:.1f}" for wanted in (10, 100, 622, 1243)]
        rows.append((kind, spread(all_of[1:], 0), f"{100 * written:.1f}", *cores))
    columns = (
        "clips from",
        "clips/s a core",
        "bandwidth %",
        *(f"cores for {rate} clips/s" for rate in (10, 100, 622, 1243)),
    )
    note = (
        "Clips of 16 frames, cropped and resized to 224², as the trainer gets them (uint8). "
        f"{_said(videos)} 622 and 1,243 "
        "clips/s: ViT-B at ρ = 50 % at 40 % and 80 % of an H200's data-sheet arithmetic. A "
        "loader's roofline is its core: "
        "decoding, cropping and resizing; of the memory's bandwidth it takes the share given (the "
        "clips, written once)."
    )
    return Table("Loader", command, columns, rows, (note,))


def fed_table(case: Case, rounds: int, videos: Path | None, command: str) -> Table:
    """Time the step on random data on the device, and fed by one loader process, in turn."""
    small, medium = replace(case, size="tiny", pixels=64), replace(case, size="small", pixels=128)
    if case.device == "cpu":
        keep_freed_memory()
        small, medium = replace(small, clips=16), replace(medium, clips=8)
    rows: list[tuple[str, ...]] = []
    for sized in (small, medium, case):
        with tempfile.TemporaryDirectory() as name:
            kinds = _kinds(_data(Path(name), videos), Path(name))
            random, fed, alone = _fed(sized, kinds["frame cache, raw"], rounds)
        ratios = [one / other for one, other in zip(fed, random, strict=True)]
        row = (
            f"ViT-{sized.size}, {sized.pixels}²",
            *(spread([sized.clips / each for each in times], 1) for times in (random, fed)),
        )
        rows.append((*row, spread(ratios, 3), f"{alone:.0f}"))
    columns = (
        "model",
        "clips/s, random data",
        "clips/s, fed from the cache",
        "time fed / random",
        "the loader alone, clips/s",
    )
    threads = torch.get_num_threads()
    note = (
        "One loader process reads the raw frame cache beside the step. On the CPU the step has "
        f"{max(threads - 1, 1)} of "
        f"{threads} threads in both columns, the loader the other. A step is not slowed while it "
        "wants less than the loader gives."
    )
    return Table("Fed", command, columns, rows, (note,))


def augmentation_table(case: Case, machine: Machine, rounds: int, command: str) -> Table:
    """Time what is done to a batch of uint8 clips on the device before the model sees it."""
    device = torch.device(case.device)
    nothing = {"flip": False, "mixup": 0.0, "cutmix": 0.0, "erasing": 0.0, "randaugment": None}
    kinds: dict[str, dict[str, object]] = {
        "pixels from uint8": {},
        "flip": {"flip": True},
        "mixup, cutmix": {"mixup": 0.8, "cutmix": 1.0},
        "random erasing": {"erasing": 0.25},
        f"RandAugment {_RANDAUGMENT}": {"randaugment": _RANDAUGMENT},
        "all of Table I": {
            "flip": True,
            "mixup": 0.8,
            "cutmix": 1.0,
            "erasing": 0.25,
            "randaugment": _RANDAUGMENT,
        },
    }
    batch = random_batch(case, device)
    times: dict[str, list[float]] = {name: [] for name in kinds}
    for number in range(3 * rounds + 1):
        for name, switched in kinds.items():
            settings = _with(case.settings, {"augment": nothing | switched})
            times[name].append(
                _seconds(
                    lambda settings=settings, number=number: _augment(batch, settings, number),
                    device,
                )
            )
    pixels = 4.0 * batch.clips.numel()
    rows: list[tuple[str, ...]] = []
    for name, each in times.items():
        seconds = statistics.median(each[1:])
        least = (0.25 + 1) * pixels  # read uint8, write float32
        share_of = 100 * least / seconds / machine.copy_gb_s / 1e9
        rows.append(
            (
                name,
                spread([1e3 * one / case.clips for one in each[1:]]),
                f"{case.clips / seconds:.0f}",
                f"{share_of:.0f}",
            )
        )
    columns = ("augmentation", "ms a clip", "clips/s", "of the memory's bandwidth %")
    note = (
        "Bandwidth: of reading uint8 once and writing float32 once, the least that any of them "
        "needs."
    )
    return Table("Augmentation on the device", command, columns, rows, (note,))


def checkpoint_table(case: Case, rounds: int, command: str) -> Table:
    """Time how long the step waits for a checkpoint.

    Written beside the training, written while it waits, and with ``torch.save`` as the peers do.
    """
    learner = train_state_of(case)
    batch = random_batch(replace(case, clips=1), torch.device(case.device))
    train_step(learner, batch)
    model, optimizer, device = learner.model, learner.optimizer, torch.device(case.device)
    waited: dict[str, list[float]] = {}
    with (
        tempfile.TemporaryDirectory() as name,
        Saver(Path(name) / "beside", case.settings, RetentionPolicy(last=1)) as saver,
    ):
        folder = Path(name)
        state = State(model.state_dict(), optimizer.state_dict(), Progress(step=1))
        content = {"model": state.model, "optimizer": state.optimizer}
        ways: dict[str, Callable[[int], object]] = {
            "beside the training (ours)": lambda step: saver.save(
                model, optimizer, Progress(step=step)
            ),
            "the same, until it is on the disk": lambda _: saver.wait(),
            "in its place": lambda step: save(
                folder / "placed",
                case.settings,
                State(state.model, state.optimizer, Progress(step=step)),
                RetentionPolicy(last=1),
            ),
            "torch.save, unsealed, not synced": lambda _: torch.save(content, folder / "peer.pt"),
        }
        for number in range(rounds + 2):
            for way, work in ways.items():
                waited.setdefault(way, []).append(
                    _seconds(lambda work=work, number=number: work(number), device)
                )
        size_gib = (folder / "peer.pt").stat().st_size / 2**30
    rows = [
        (way, spread(each[2:], 3), f"{size_gib / statistics.median(each[2:]):.2f}")
        for way, each in waited.items()
    ]
    note = f"{size_gib:.2f} GiB: weights and AdamW's moments of ViT-{case.size} with both branches."
    return Table("Checkpoint", command, ("checkpoint", "the step waits, s", "GiB/s"), rows, (note,))


def _augment(batch: Batch, settings: TrainingConfig, step: int) -> object:
    drawn = draw_step(settings, step)
    pixels, labels = augmented(batch.clips.flatten(0, 1), batch.labels, drawn, settings)
    return mix(pixels, labels, settings.augment, rng(settings.seed, Stream.MIX, step), batch.good)


def _fed(
    case: Case, settings: TrainingConfig, rounds: int
) -> tuple[list[float], list[float], float]:
    """Return the seconds of each step on random data and fed, and the loader's own clips/s."""
    device = torch.device(case.device)
    settings = _with(
        case.settings, {"data": settings.data.model_dump(), "recipe": {"batch_size": case.clips}}
    )
    learner, random = train_state_of(case), random_batch(case, device)
    videos = [Video(*each) for each in _listed(settings.data)]
    batches = training_batches(
        settings, videos, TrainingOrder(settings, len(videos), worker_rank()), 1, device
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(max(threads - 1, 1) if device.type == "cpu" else threads)
    times: tuple[list[float], list[float]] = ([], [])
    try:
        for number in range(rounds * case.steps + 3):
            pair = (
                _seconds(lambda: train_step(learner, random), device),
                _seconds(lambda: train_step(learner, next(batches)), device),
            )
            if number >= 3:
                times[0].append(pair[0])
                times[1].append(pair[1])
        list(islice(batches, 4))
        started = time.perf_counter()
        list(islice(batches, count := max(_CLIPS_PER_ROUND // case.clips, 4)))
        return *times, count * case.clips / (time.perf_counter() - started)
    finally:
        torch.set_num_threads(threads)


def _kinds(data: DataConfig, scratch: Path) -> dict[str, TrainingConfig]:
    """Return settings for each source of clips; packs the caches."""
    from mar.data.frame_cache import pack

    settings = _with(TrainingConfig(), {"data": data.model_dump()})
    kinds = {"video files": settings}
    for name, packing in {"JPEG": Packing("jpeg"), "raw": Packing("raw")}.items():
        pack(data, scratch / name, packing, os.cpu_count() or 1, lambda done, total: None)
        kinds[f"frame cache, {name}"] = _with(settings, {"data": {"cache": str(scratch / name)}})
    return kinds


def _loaded(settings: TrainingConfig) -> float:
    """Return clips a second that this process reads."""
    videos = [Video(*each) for each in _listed(settings.data)]
    clips = TrainingClips(settings, videos)
    chosen: Iterable[int] = islice(cycle(range(len(videos))), _CLIPS_PER_ROUND)
    started = time.perf_counter()
    for number, video in enumerate(chosen):
        assert clips[video, number].broken is None
    return _CLIPS_PER_ROUND / (time.perf_counter() - started)


def _in_one_thread(work: Callable[[], float]) -> float:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return work()
    finally:
        torch.set_num_threads(threads)


def _data(scratch: Path, videos: Path | None) -> DataConfig:
    """Return a data set of the given videos, or of some that are made.

    Raises:
        UserError: there are no videos in the folder.
    """
    root = videos or _films(scratch / "films")
    files = sorted(
        file for file in root.rglob("*") if file.suffix in (".mp4", ".avi", ".webm", ".mkv")
    )[:24]
    if not files:
        raise UserError(f"{root}: no video (.mp4, .avi, .webm, .mkv) in it")
    listed = scratch / "train.txt"
    listed.write_text("".join(f"{file.relative_to(root)} 0\n" for file in files), encoding="utf-8")
    return DataConfig(root=str(root), train=str(listed), val=str(listed), num_classes=1)


def _films(folder: Path) -> Path:
    from mar.data.motion_verbs import MotionVerbs, make

    make(folder, MotionVerbs(size=256, frames=48, classes=2, train=16, validation=8))
    return folder


def _with(settings: TrainingConfig, overrides: Mapping[str, object]) -> TrainingConfig:
    return build(merge(settings.model_dump(mode="json"), overrides))


def _listed(data: DataConfig) -> list[tuple[str, Path, int]]:
    lines = Path(str(data.train)).read_text(encoding="utf-8").splitlines()
    names = [line.rsplit(" ", 1)[0] for line in lines]
    return [(name, Path(str(data.root)) / name, 0) for name in names]


def _said(videos: Path | None) -> str:
    return (
        f"Videos of {videos.name}."
        if videos
        else "Videos that are made: H.264, 256 × 256, 48 frames."
    )


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    synchronise(device)
    started = time.perf_counter()
    work()
    synchronise(device)
    return time.perf_counter() - started
