"""A worker's copies of its trial in an object store: checkpoints as they are stored, logs and pulse meanwhile."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from filelock import FileLock

from mar import RESULT
from mar.errors import Failure
from mar.parallel import of_first, share
from orchestration.remote import Remote

_EVERY_S = 5.0
"""How often a trial's small files are copied, and a wish to stop is looked for."""


class Copies:
    """A worker's copies of a trial's folder: checkpoints as they are stored, the rest every few seconds and on leaving."""

    def __init__(self, place: Remote, key: str, folder: Path, stop_file: Path) -> None:
        self.place, self.name, self.folder, self.stop_file = place, f"trials/{key}", folder, stop_file
        self._pushed: dict[str, tuple[int, float]] = {}
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._copy_on, name="copies", daemon=True)

    def __enter__(self) -> Copies:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Copy what was said last."""
        self._over.set()
        self._thread.join()
        self._copy_small()

    def ready(self) -> None:
        """Have the same checkpoints here, there, and on every other worker's node; all workers call it."""
        if share().rank == 0:
            self._fetch()
            there = self._there()
            for path in self._here():
                if path.name not in there:
                    self.place.push_folder(path, f"{self.name}/{path.name}")
        of_first(lambda: None)  # the others wait for it
        self._fetch()
        there = self._there()
        for path in self._here():
            if path.name not in there:  # of an attempt that others do not know
                shutil.rmtree(path, ignore_errors=True)

    def stored(self, path: Path) -> None:
        """Copy a checkpoint, and remove there what is no longer here."""
        self.place.push_folder(path, f"{self.name}/{path.name}")
        here = {each.name for each in self._here()}
        for name in self._there() - here:
            self.place.remove(f"{self.name}/{name}")

    def finished(self) -> None:
        """Copy the result."""
        self.place.remove(f"{self.name}/{RESULT}")
        self.place.push_folder(self.folder / RESULT, f"{self.name}/{RESULT}")

    def _fetch(self) -> None:
        """Bring the newest whole checkpoint here."""
        with FileLock(self.folder / "fetching"):
            for name in sorted(self._there(), reverse=True):
                if self.place.pull_sealed(f"{self.name}/{name}", self.folder / name):
                    return

    def _here(self) -> list[Path]:
        return sorted(self.folder.glob("step_*"))

    def _there(self) -> set[str]:
        return {name for name in self.place.names(self.name) if name.startswith("step_")}

    def _copy_on(self) -> None:
        while not self._over.wait(_EVERY_S):
            with suppress(Failure, OSError):  # the next time, or the last time, tells
                self._copy_small()
                if self.place.exists(f"locks/{self.stop_file.name}"):
                    self.stop_file.parent.mkdir(parents=True, exist_ok=True)
                    self.stop_file.touch()

    def _copy_small(self) -> None:
        with self._lock:
            for file in _small(self.folder):
                with suppress(FileNotFoundError):
                    state = (file.stat().st_size, file.stat().st_mtime)
                    if self._pushed.get(str(file)) != state:
                        self.place.push(file, f"{self.name}/{file.relative_to(self.folder)}")
                        self._pushed[str(file)] = state


def _small(folder: Path) -> Iterable[Path]:
    """A trial's logs, pulse and failure: whatever is neither a checkpoint nor a result."""
    files = [*folder.glob("*.txt"), *folder.glob("*.json"), *(folder / "logs").glob("*.txt")]
    return [file for file in files if not file.name.startswith(".")]
