"""The lock that lets one launch run a study, and the requests that it stop."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Generator
from contextlib import contextmanager

import filelock

from mar.errors import Failure, UserError
from orchestration.config import LaunchConfig
from orchestration.storage.object_store import open_object_store
from orchestration.studies.trial import Study

_PROBE_S = 1.0
"""Seconds that a launch waits for the lock: ``mar status`` holds it for a moment to see whether the
study runs."""


@contextmanager
def study_lock(study: Study, launch: LaunchConfig) -> Generator[None]:
    """Hold the study's lock: two launches at once would train the same trials.

    A trial that two studies share has a lock of its own besides, which its worker holds.

    Raises:
        UserError: another launch holds it; the message names the process and its start.
        Failure: the store cannot be written.
    """
    folder = launch.store.resolve() / "locks"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Failure(
            f"the store {launch.store} cannot be written: {error}; choose another with --store"
        ) from None
    lock = filelock.FileLock(folder / f"{study.name}.lock")
    holder_file = folder / f"{study.name}.txt"
    try:
        held = lock.acquire(timeout=_PROBE_S, poll_interval=0.02)
    except filelock.Timeout:
        holder = "unknown process"
        if holder_file.is_file():
            holder = holder_file.read_text(encoding="utf-8")
        raise UserError(
            f"the study {study.name} is being run already ({holder}); wait for it, or stop that "
            "process"
        ) from None
    with held:
        # A request that an earlier launch left must not stop this one.
        clear_stop_request(launch)
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        holder = f"process {os.getpid()} on {platform.node()}, since {since}"
        # A lock does not record who holds it: messages and ``mar status`` read this file.
        holder_file.write_text(holder, encoding="utf-8")
        yield
        clear_stop_request(launch)


def request_stop(launch: LaunchConfig) -> None:
    """Ask a study's workers to save and stop, on all machines; its launch then ends."""
    object_store = launch.worker.object_store
    try:
        if object_store:
            open_object_store(object_store).touch(f"locks/{launch.stop_file.name}")
    # The file on this disk is written even if the object store does not answer: the workers that
    # share the disk then stop.
    finally:
        launch.stop_file.parent.mkdir(parents=True, exist_ok=True)
        launch.stop_file.touch()


def clear_stop_request(launch: LaunchConfig) -> None:
    """Withdraw a stop request."""
    launch.stop_file.unlink(missing_ok=True)
    object_store = launch.worker.object_store
    if object_store:
        open_object_store(object_store).remove(f"locks/{launch.stop_file.name}")
