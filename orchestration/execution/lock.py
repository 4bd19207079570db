"""Which launch runs a study, and the wish that it stop."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Generator
from contextlib import contextmanager

import filelock

from mar.errors import Failure, UserError
from orchestration.config import LaunchConfig
from orchestration.storage.object_store import remote
from orchestration.studies.trial import Study

_LOOKED_AT_S = 1.0
"""Who asks whether a study runs (``mar status``) holds its lock for a moment."""


@contextmanager
def study_lock(study: Study, launch: LaunchConfig) -> Generator[None]:
    """Hold the study's lock: two launches at once would train the same trials.

    A trial that another study is training at this moment is refused by its worker (``worker._alone_in``).

    Raises:
        UserError: another launch holds it; says which process, since when.
        Failure: the store cannot be written.
    """
    folder = launch.store.resolve() / "locks"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Failure(
            f"the store {launch.store} cannot be written: {error}; choose another with --store"
        ) from None
    lock, note = filelock.FileLock(folder / f"{study.name}.lock"), folder / f"{study.name}.txt"
    try:
        held = lock.acquire(timeout=_LOOKED_AT_S, poll_interval=0.02)
    except filelock.Timeout:
        holder = note.read_text(encoding="utf-8") if note.is_file() else "unknown process"
        message = f"the study {study.name} is being run already ({holder}); wait for it, or stop that process"
        raise UserError(message) from None
    with held:
        clear_stop_request(launch)  # of an earlier launch
        holder = f"process {os.getpid()} on {platform.node()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}"
        note.write_text(holder, encoding="utf-8")
        yield
        clear_stop_request(launch)


def request_stop(launch: LaunchConfig) -> None:
    """Ask a study's workers to save and stop, wherever they are; its driver then ends."""
    try:
        if launch.remote:
            remote(launch.remote).touch(f"locks/{launch.stop_file.name}")
    finally:
        launch.stop_file.parent.mkdir(parents=True, exist_ok=True)
        launch.stop_file.touch()


def clear_stop_request(launch: LaunchConfig) -> None:
    """Take the wish back."""
    launch.stop_file.unlink(missing_ok=True)
    if launch.remote:
        remote(launch.remote).remove(f"locks/{launch.stop_file.name}")
