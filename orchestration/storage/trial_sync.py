"""Copies a trial's files and the frame cache to and from an object store."""

from __future__ import annotations

import tempfile
from pathlib import Path

from filelock import FileLock

from mar import MANIFEST, RESULT_DIR
from mar.safe_input import below
from mar.training.retention import RetentionPolicy
from orchestration.storage.object_store import ObjectStore
from orchestration.storage.trial_dir import TrialDir


def fetch_trial_dir(store: ObjectStore, key: str, trial_dir: TrialDir) -> None:
    """Download what a launch reads of a trial that another node trained: result, logs, small files.

    Checkpoints are not downloaded.
    """
    store.download_dir(f"trials/{key}/{RESULT_DIR}", trial_dir.result)
    for name in store.names(f"trials/{key}"):
        if name.endswith((".txt", ".json")):
            store.download(f"trials/{key}/{name}", below(trial_dir.root, name))
    # Logs grow, so those that are on this disk already may be incomplete.
    logs = trial_dir.worker_logs
    store.download_missing(f"trials/{key}/{logs.name}", logs)


def prune_remote_checkpoints(store: ObjectStore, key: str, policy: RetentionPolicy) -> None:
    """Remove a finished training's checkpoints from the object store, except those to keep."""
    # Incomplete checkpoints, which an interrupted upload left, are removed with the others.
    complete = {name for name in store.complete_dirs(f"trials/{key}") if name.startswith("step_")}
    # The policy reads the manifests of checkpoints on a disk: download those, without the weights.
    with tempfile.TemporaryDirectory() as scratch:
        for name in complete:
            manifest = below(Path(scratch), name) / MANIFEST
            store.download(f"trials/{key}/{name}/{MANIFEST}", manifest)
        checkpoints = sorted(Path(scratch).glob("step_*"))
        kept = {path.name for path in policy.after_training(checkpoints)}
    for name in store.names(f"trials/{key}"):
        if name.startswith("step_") and name not in kept:
            store.remove(f"trials/{key}/{name}")


def push_cache(store: ObjectStore, folder: Path) -> int:
    """Upload the files of a frame cache that the object store lacks; return their number."""
    return store.upload_missing(folder, "")


def fetch_cache(store: ObjectStore, folder: Path) -> int:
    """Download the missing files of a frame cache to this node; return their number."""
    # Under the lock the first worker of the node downloads, and the others find nothing missing.
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.fetching")):
        return store.download_missing("", folder)
