"""A trial's files and the frame cache, to and from an object store."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from filelock import FileLock

from mar import MANIFEST, RESULT_DIR
from mar.safe_input import below
from mar.training.retention import RetentionPolicy
from orchestration.storage.object_store import ObjectStore


def fetch_trial_dir(store: ObjectStore, key: str, folder: Path) -> None:
    """Bring a trial's result and what it left to be read, but no checkpoint, to its folder here."""
    store.pull_sealed(f"trials/{key}/{RESULT_DIR}", folder / RESULT_DIR)
    for name in store.names(f"trials/{key}"):
        if "." in name:
            store.pull(f"trials/{key}/{name}", below(folder, name))
    store.pull_missing(f"trials/{key}/logs", folder / "logs")


def prune_remote_checkpoints(store: ObjectStore, key: str, keep: RetentionPolicy) -> None:
    """Remove a finished trial's checkpoints there, but for those that are kept."""
    whole = {name for name in store.sealed(f"trials/{key}") if name.startswith("step_")}
    with TemporaryDirectory() as folder:
        for name in whole:
            store.pull(f"trials/{key}/{name}/{MANIFEST}", below(Path(folder), name) / MANIFEST)
        kept = {path.name for path in keep.after_training(sorted(Path(folder).glob("step_*")))}
    for name in store.names(f"trials/{key}"):
        if name.startswith("step_") and name not in kept:
            store.remove(f"trials/{key}/{name}")


def push_cache(store: ObjectStore, folder: Path) -> int:
    """Copy a frame cache's files that are not there; returns how many."""
    return store.push_missing(folder, "")


def fetch_cache(store: ObjectStore, folder: Path) -> int:
    """Bring a frame cache to this node, once for all that train on it; returns how many files were missing."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.fetching")):
        return store.pull_missing("", folder)
