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

from mar import RESULTS_VERSION, distributed, plugins
from mar.config.canonical import canonical
from mar.config.mask_settings import MASK_STRATEGIES
from mar.config.schema import TrainingConfig
from mar.data.annotations import Video, fingerprint
from mar.data.token_cache import TokenCache, bytes_per_view
from mar.errors import UserError
from mar.evaluation.features import FeatureOptions, write_features
from mar.model.mar import MAR
from mar.training.reports import TrainingCallbacks
from mar.training.step import RuntimeConfig
from mar.weights import hub

_FREE_SHARE = 0.9
"""Share of the free disk that the tokens may take: checkpoints and results need the rest."""
_POLL_S = 1.0
_OF_THE_TOKENS = {
    "data": ("decoder",),
    "encoder": None,
    "clip": None,
    "mask": None,
    "evaluation": ("clips", "crops", "segment_frames", "crop_from", "mask"),
    "classifier": ("norm",),
    # bfloat16 gives other values.
    "recipe": ("precision",),
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
        callbacks: Get a sign of life for every batch, and a line for the log.

    Raises:
        UserError: they would not fit on the disk.
        Failure: a video could not be decoded (``data.broken``), or the disk refuses.
        Stopped: the study was stopped; what is computed is kept.
    """
    root = (runtime.tokens_root or folder / "tokens") / tokens_name(settings)
    splits = {"train": train, "val": val}
    with _hold(root, callbacks):
        refusal = distributed.broadcast_from_rank0(lambda: _refusal(settings, splits, root))
        if refusal:
            raise UserError(refusal)
        for split, videos in splits.items():
            began = time.monotonic()
            is_new = not (root / split).is_dir()
            write_features(
                model,
                settings,
                videos,
                root / split,
                {"split": split},
                FeatureOptions(
                    per_token=True,
                    is_cache=True,
                    # A broken test video is counted; one of training stops it, unless it may be
                    # left out.
                    may_be_broken=split == "val" or settings.data.broken == "skip",
                    loader_processes=runtime.loader_processes,
                ),
                alive=callbacks.while_preparing,
            )
            if is_new:
                seconds = time.monotonic() - began
                callbacks.log(f"tokens of {len(videos):,} {split} videos cached in {seconds:.0f} s")
    # The encoder has been in evaluation; the classifier is to train.
    model.train()
    return FrozenTokens(TokenCache(root / "train"), TokenCache(root / "val"))


def tokens_name(settings: TrainingConfig) -> str:
    """Return the name of the folder with a training's tokens."""
    settings = canonical(settings)
    chosen: dict[str, object] = {"results": RESULTS_VERSION}
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
    # What another package computes may change with its version.
    packages: list[str] = []
    if settings.encoder.is_of_package:
        packages.append(plugins.origin(plugins.ENCODERS, settings.encoder.size))
    if settings.mask.strategy not in MASK_STRATEGIES:
        packages.append(plugins.origin(plugins.MASKS, settings.mask.strategy))
    chosen |= {"encoder": encoder, "weights": source, "packages": packages}
    chosen["videos"] = fingerprint(settings.data)
    return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()[:16]


def _refusal(settings: TrainingConfig, splits: dict[str, list[Video]], root: Path) -> str | None:
    """Return why the tokens would not fit on the disk; None if they do."""
    views = settings.evaluation.clips * settings.evaluation.crops
    needed = 0
    for split, videos in splits.items():
        present = sum(file.stat().st_size for file in (root / split).glob("*.safetensors"))
        needed += max(0, len(videos) * views * bytes_per_view(settings) - present)
    free = shutil.disk_usage(root.parent).free
    if needed <= _FREE_SHARE * free:
        return None
    return (
        f"encoder.cached: the tokens of {sum(map(len, splits.values())):,} videos, {views} views "
        f"each, need {needed / 2**30:,.1f} GiB more, and {root.parent} has {free / 2**30:,.1f} GiB "
        "free; set fewer evaluation.clips and evaluation.crops, or encoder.cached=false"
    )


@contextmanager
def _hold(root: Path, callbacks: TrainingCallbacks) -> Generator[None]:
    """Hold the lock of the folder in the first worker, for all of them.

    Another trial that computes the same tokens may have it meanwhile.
    """
    root.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(root.with_name(f"{root.name}.lock"))

    def is_held() -> bool:
        try:
            lock.acquire(timeout=_POLL_S)
        except Timeout:
            return False
        return True

    # All workers ask together: one that only waited would give no sign of life.
    while not distributed.broadcast_from_rank0(is_held):
        callbacks.while_preparing()
    try:
        yield
    finally:
        lock.release()
