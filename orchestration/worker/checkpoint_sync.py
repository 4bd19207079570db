"""Synchronizes a trial's folder with an object store.

Checkpoints are uploaded when they are written, logs and the heartbeat every few seconds.
"""

from __future__ import annotations

import shutil
import threading
from contextlib import suppress
from pathlib import Path

from mar import RESULT_DIR
from mar.distributed import broadcast_from_rank0, worker_rank
from mar.errors import Failure
from orchestration.storage.object_store import ObjectStore
from orchestration.worker.spec import TrialSpec

_EVERY_S = 5.0
"""Seconds between two uploads of a trial's small files, and between two checks for a stop
request."""


class CheckpointSync:
    """A worker's part in the synchronization of a trial's folder with an object store.

    The object store wins over the local disk, which may have files of an old launch.
    """

    def __init__(self, store: ObjectStore, spec: TrialSpec) -> None:
        self.store = store
        self.trial_dir = spec.trial_dir
        self.remote_dir = f"trials/{spec.key}"
        self.stop_file = spec.stop_file
        self._uploaded: dict[str, tuple[int, float]] = {}
        """Size in bytes and modification time of each small file at its last upload."""
        # Another worker's checkpoint must not be removed: a worker of a killed launch may still run
        # on another node.
        self._known: set[str] = set()
        """Checkpoints in the object store that this attempt found or uploaded there."""
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="checkpoint-sync", daemon=True)

    def __enter__(self) -> CheckpointSync:
        """Replace local files of an earlier launch: a stop request, a failure, an older log."""
        if not self.store.exists(f"locks/{self.stop_file.name}"):
            self.stop_file.unlink(missing_ok=True)
        for file in self._small_files():
            is_remote = self.store.download(self._remote_name(file), file)
            # A local state that the object store lacks is outdated, for example a failure that
            # was removed there. A log is kept, because it only informs the user.
            if not is_remote and file.suffix == ".json":
                file.unlink(missing_ok=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Upload what was written last."""
        self._over.set()
        # The thread must have ended: two uploads of one file at a time could mix.
        self._thread.join()
        # A training does not fail because a log could not be uploaded.
        with suppress(Failure, OSError):
            self._upload_small_files()

    def restore(self) -> list[str]:
        """Give every worker's node and the object store the same checkpoints.

        All workers must call it, because they wait for each other in it.

        Returns:
            The names of the checkpoints that were downloaded.
        """
        downloaded: list[str] = []
        # The first worker's node may have a checkpoint that was written but not yet uploaded.
        if worker_rank().rank == 0:
            downloaded = self._download_checkpoints()
            remote = self._remote()
            for path in self.trial_dir.checkpoints():
                if path.name not in remote:
                    self.store.upload_dir(path, f"{self.remote_dir}/{path.name}")
        # A barrier: the other workers download what the first worker uploaded.
        broadcast_from_rank0(lambda: None)
        downloaded += self._download_checkpoints()
        self._known = self._remote()
        for path in self.trial_dir.checkpoints():
            # It is from an attempt that the other nodes do not know. If this worker resumed from
            # it, the workers would train from different steps.
            if path.name not in self._known:
                shutil.rmtree(path, ignore_errors=True)
        return downloaded

    def upload(self, path: Path) -> None:
        """Upload a checkpoint, and remove remotely what the retention policy removed locally."""
        # The upload comes first: the object store always has a complete checkpoint.
        self.store.upload_dir(path, f"{self.remote_dir}/{path.name}")
        local = {each.name for each in self.trial_dir.checkpoints()}
        for name in self._known - local:
            self.store.remove(f"{self.remote_dir}/{name}")
        self._known = local

    def finished(self) -> None:
        """Upload the result, in the first worker only, and remove this node's checkpoints.

        A finished trial does not resume, so no node needs its checkpoints.
        """
        if worker_rank().rank == 0:
            self.store.upload_dir(self.trial_dir.result, f"{self.remote_dir}/{RESULT_DIR}")
        for path in self.trial_dir.checkpoints():
            shutil.rmtree(path, ignore_errors=True)

    def remove_failure(self) -> None:
        """Remove the failure of an earlier attempt from the object store."""
        self.store.remove(self._remote_name(self.trial_dir.failure))

    def _remote_name(self, file: Path) -> str:
        return f"{self.remote_dir}/{file.relative_to(self.trial_dir.root)}"

    def _remote(self) -> set[str]:
        """Return the names of the complete checkpoints in the object store."""
        complete = self.store.complete_dirs(self.remote_dir)
        return {name for name in complete if name.startswith("step_")}

    def _download_checkpoints(self) -> list[str]:
        """Download the complete checkpoints that this node lacks; returns their names."""
        before = {path.name for path in self.trial_dir.checkpoints()}
        downloaded: list[str] = []
        for name in sorted(self._remote()):
            is_complete = self.store.download_dir(
                f"{self.remote_dir}/{name}", self.trial_dir.root / name
            )
            if is_complete and name not in before:
                downloaded.append(name)
        return downloaded

    def _run(self) -> None:
        """Upload the small files and check for a stop request, until the worker ends."""
        while not self._over.wait(_EVERY_S):
            # If the object store does not answer, the next round tries again.
            with suppress(Failure, OSError):
                self._upload_small_files()
                # The training looks for the stop request on its own disk alone.
                if self.store.exists(f"locks/{self.stop_file.name}"):
                    self.stop_file.parent.mkdir(parents=True, exist_ok=True)
                    self.stop_file.touch()

    def _upload_small_files(self) -> None:
        for file in self._small_files():
            with suppress(FileNotFoundError):
                state = (file.stat().st_size, file.stat().st_mtime)
                if self._uploaded.get(str(file)) != state:
                    self.store.upload(file, self._remote_name(file))
                    self._uploaded[str(file)] = state

    def _small_files(self) -> list[Path]:
        """Return the paths of this worker's log and failure.

        The first worker also has the files that all workers of the trial share.
        """
        trial_dir = self.trial_dir
        own = [trial_dir.failure, trial_dir.worker_log(worker_rank().rank)]
        if worker_rank().rank == 0:
            own += [trial_dir.log, trial_dir.heartbeat, trial_dir.microbatch]
        return own
