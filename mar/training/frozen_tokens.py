"""Computes the tokens of a frozen encoder once, for all trainings that classify them.

The folder's name is a hash of everything that the tokens depend on: weights, clips, mask, views and
data. So trials that differ in the classifier, the rates or the seed alone share it, and a
changed data set gets another.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from mar import distributed
from mar.config.schema import TrainingConfig
from mar.data.annotations import Video, fingerprint
from mar.data.token_cache import TokenCache, bytes_per_view
from mar.errors import UserError
from mar.evaluation.features import write_features
from mar.model.mar import MAR
from mar.training.reports import TrainingCallbacks
from mar.training.step import RuntimeConfig
from mar.weights import hub

_FREE_SHARE = 0.9
"""Share of the free disk that the tokens may take: checkpoints and results need the rest."""
_POLL_S = 1.0
_OF_THE_TOKENS = {
    "encoder": None,
    "clip": None,
    "mask": None,
    "evaluation": ("clips", "crops", "segment_frames", "crop_from", "mask"),
    "classifier": ("norm",),
}
"""Branches of the settings that tokens depend on: all of a branch, or some of it."""
_NOT_OF_THE_ENCODER = ("weights", "train", "cached", "drop_path")


@dataclass(frozen=True)
class FrozenTokens:
    """The tokens of both splits."""

    train: TokenCache
    val: TokenCache


def cache_tokens(
    settings: TrainingConfig,
    train: list[Video],
    val: list[Video],
    model: MAR,
    folder: Path,
    runtime: RuntimeConfig,
    callbacks: TrainingCallbacks,
) -> FrozenTokens:
    """Return the tokens of both splits; computes those that are missing.

    Args:
        settings: Of the training.
        train: The training split.
        val: The evaluation split.
        model: With its encoder's weights, on the device.
        folder: The trial's folder, for tokens without ``runtime.tokens_root``.
        runtime: Where and how.
        callbacks: Get a heartbeat for every batch, and a line for the log.

    Raises:
        UserError: they would not fit on the disk.
        Failure: no video could be decoded, or the disk refuses.
    """
    root = (runtime.tokens_root or folder / "tokens") / tokens_name(settings)
    splits = {"train": train, "val": val}
    with _hold(root, callbacks):
        _refuse_if_too_large(settings, splits, root)
        for split, videos in splits.items():
            began = time.monotonic()
            is_new = not (root / split).is_dir()
            write_features(
                model,
                settings,
                videos,
                root / split,
                {"split": split},
                per_token=True,
                is_half=True,
                loader_processes=runtime.loader_processes,
                alive=callbacks.heartbeat,
            )
            if is_new:
                seconds = time.monotonic() - began
                callbacks.log(f"tokens of {len(videos):,} {split} videos cached in {seconds:.0f} s")
    # The encoder has been in evaluation; the classifier is to train.
    model.train()
    return FrozenTokens(TokenCache(root / "train"), TokenCache(root / "val"))


def tokens_name(settings: TrainingConfig) -> str:
    """Return the name of the folder with a training's tokens."""
    chosen: dict[str, object] = {}
    values = settings.model_dump(mode="json")
    for branch, names in _OF_THE_TOKENS.items():
        part = values[branch]
        chosen[branch] = part if names is None else {name: part[name] for name in names}
    encoder = {
        name: value for name, value in values["encoder"].items() if name not in _NOT_OF_THE_ENCODER
    }
    # A random encoder follows from the seed.
    source = f"seed {settings.seed}"
    if settings.encoder.weights:
        source = hub.fingerprint(settings.encoder.weights)
    chosen |= {"encoder": encoder, "weights": source, "data": fingerprint(settings.data)}
    return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()[:16]


def _refuse_if_too_large(
    settings: TrainingConfig, splits: dict[str, list[Video]], root: Path
) -> None:
    views = settings.evaluation.clips * settings.evaluation.crops
    needed = 0
    for split, videos in splits.items():
        if not (root / split).is_dir():
            needed += len(videos) * views * bytes_per_view(settings)
    free = shutil.disk_usage(root.parent).free
    if needed > _FREE_SHARE * free:
        raise UserError(
            f"encoder.cached: the tokens of {sum(map(len, splits.values())):,} videos, {views} "
            f"views each, need {needed / 2**30:,.1f} GiB, and {root.parent} has "
            f"{free / 2**30:,.1f} GiB free; set fewer evaluation.clips and evaluation.crops, or "
            "encoder.cached=false"
        )


@contextmanager
def _hold(root: Path, callbacks: TrainingCallbacks) -> Generator[None]:
    """Hold the lock of the folder in the first worker; the others wait for it.

    Another trial that computes the same tokens has it meanwhile.
    """
    root.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(root.with_name(f"{root.name}.lock"))
    if distributed.worker_rank().rank == 0:
        while True:
            try:
                lock.acquire(timeout=_POLL_S)
                break
            except Timeout:
                callbacks.heartbeat()
    distributed.broadcast_from_rank0(lambda: None)
    try:
        yield
    finally:
        lock.release()
