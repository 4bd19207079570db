"""A worker's copies of its trial in an object store: checkpoints as they are stored, logs and pulse meanwhile."""

from __future__ import annotations

import shutil
import threading
from contextlib import suppress
from pathlib import Path

from mar import RESULT_DIR
from mar.distributed import broadcast_from_rank0, worker_rank
from mar.errors import Failure
from orchestration.storage.object_store import ObjectStore
from orchestration.storage.trial_dir import FILE, HEARTBEAT, LOG, MICROBATCH
from orchestration.worker.log import file_of

_EVERY_S = 5.0
"""How often a trial's small files are copied, and a wish to stop is looked for."""


class CheckpointSync:
    """A worker's copies of a trial's folder: checkpoints as they are stored, the rest every few seconds and on leaving.

    What the store has goes before what this node's disk has: that may be of a launch long ago.
    """

    def __init__(self, store: ObjectStore, key: str, folder: Path, stop_file: Path) -> None:
        self.store, self.name, self.folder, self.stop_file = (
            store,
            f"trials/{key}",
            folder,
            stop_file,
        )
        self._pushed: dict[str, tuple[int, float]] = {}
        self._known: set[str] = set()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._copy_on, name="copies", daemon=True)

    def __enter__(self) -> CheckpointSync:
        """Forget what this node's disk says of an earlier launch: a wish to stop, a failure, a shorter log."""
        if not self.store.exists(f"locks/{self.stop_file.name}"):
            self.stop_file.unlink(missing_ok=True)
        for file in self._small():
            if (
                not self.store.pull(f"{self.name}/{file.relative_to(self.folder)}", file)
                and file.suffix == ".json"
            ):
                file.unlink(missing_ok=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Copy what was said last."""
        self._over.set()
        self._thread.join()
        with suppress(Failure, OSError):  # nobody fails over a log
            self._copy_small()

    def restore(self) -> list[str]:
        """Have the same checkpoints here, there, and on every other worker's node; all workers call it.

        Returns the names of those that were fetched.
        """
        fetched = self._fetch() if worker_rank().rank == 0 else []
        if worker_rank().rank == 0:
            there = self._remote()
            for path in self._local():
                if path.name not in there:
                    self.store.push_folder(path, f"{self.name}/{path.name}")
        broadcast_from_rank0(lambda: None)  # the others wait for it
        fetched += self._fetch()
        self._known = self._remote()
        for path in self._local():
            if path.name not in self._known:  # of an attempt that others do not know
                shutil.rmtree(path, ignore_errors=True)
        return fetched

    def upload(self, path: Path) -> None:
        """Copy a checkpoint, and remove there what this attempt knew of and has no longer."""
        self.store.push_folder(path, f"{self.name}/{path.name}")
        here = {each.name for each in self._local()}
        for name in self._known - here:
            self.store.remove(f"{self.name}/{name}")
        self._known = here

    def finished(self) -> None:
        """Copy the result, by the first worker; no checkpoint is needed on this node's disk any more."""
        if worker_rank().rank == 0:
            self.store.push_folder(self.folder / RESULT_DIR, f"{self.name}/{RESULT_DIR}")
        for path in self._local():
            shutil.rmtree(path, ignore_errors=True)

    def _fetch(self) -> list[str]:
        """Bring the whole checkpoints here that are not; returns their names."""
        there = [f"{self.name}/{name}" for name in sorted(self._remote())]
        before = {path.name for path in self._local()}
        return [
            name.rpartition("/")[2]
            for name in there
            if self.store.pull_sealed(name, self.folder / name.rpartition("/")[2])
            and name.rpartition("/")[2] not in before
        ]

    def _local(self) -> list[Path]:
        return sorted(self.folder.glob("step_*"))

    def _remote(self) -> set[str]:
        return {name for name in self.store.sealed(self.name) if name.startswith("step_")}

    def _copy_on(self) -> None:
        while not self._over.wait(_EVERY_S):
            with suppress(Failure, OSError):  # the next time, or the last time, tells
                self._copy_small()
                if self.store.exists(f"locks/{self.stop_file.name}"):
                    self.stop_file.parent.mkdir(parents=True, exist_ok=True)
                    self.stop_file.touch()

    def _copy_small(self) -> None:
        for file in self._small():
            with suppress(FileNotFoundError):
                state = (file.stat().st_size, file.stat().st_mtime)
                if self._pushed.get(str(file)) != state:
                    self.store.push(file, f"{self.name}/{file.relative_to(self.folder)}")
                    self._pushed[str(file)] = state

    def _small(self) -> list[Path]:
        """Files of this worker's own: its log and what it failed over; of the first one, what is the trial's too."""
        own = [self.folder / FILE, file_of(self.folder, worker_rank())]
        return (
            own + [self.folder / name for name in (LOG, HEARTBEAT, MICROBATCH)]
            if worker_rank().rank == 0
            else own
        )
