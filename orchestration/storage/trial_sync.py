"""A trial's files and the frame cache, to and from an object store."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from filelock import FileLock

from mar import MANIFEST, RESULT
from mar.safe_input import below
from mar.training.retention import Keep
from orchestration.storage.object_store import Remote


def collect(place: Remote, key: str, folder: Path) -> None:
    """Bring a trial's result and what it left to be read, but no checkpoint, to its folder here."""
    place.pull_sealed(f"trials/{key}/{RESULT}", folder / RESULT)
    for name in place.names(f"trials/{key}"):
        if "." in name:
            place.pull(f"trials/{key}/{name}", below(folder, name))
    place.pull_missing(f"trials/{key}/logs", folder / "logs")


def clear_copies(place: Remote, key: str, keep: Keep) -> None:
    """Remove a finished trial's checkpoints there, but for those that are kept."""
    whole = {name for name in place.sealed(f"trials/{key}") if name.startswith("step_")}
    with TemporaryDirectory() as folder:
        for name in whole:
            place.pull(f"trials/{key}/{name}/{MANIFEST}", below(Path(folder), name) / MANIFEST)
        kept = {path.name for path in keep.for_good(sorted(Path(folder).glob("step_*")))}
    for name in place.names(f"trials/{key}"):
        if name.startswith("step_") and name not in kept:
            place.remove(f"trials/{key}/{name}")


def push_cache(place: Remote, folder: Path) -> int:
    """Copy a frame cache's files that are not there; returns how many."""
    return place.push_missing(folder, "")


def fetch_cache(place: Remote, folder: Path) -> int:
    """Bring a frame cache to this node, once for all that train on it; returns how many files were missing."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.fetching")):
        return place.pull_missing("", folder)
