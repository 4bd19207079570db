"""Continues a longer training where a shorter one's rate began to fall.

Under ``recipe.schedule: warmup_stable_decay`` the epochs before the decay do not depend on how many
follow. So a training leaves a checkpoint of that moment in ``RuntimeConfig.stable_dir``, which all
lengths of it share, and a longer one starts from the latest of them: exactly as if it had been
trained in one go.
"""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path

from mar.atomic_dir import read_atomic_dir
from mar.config.schedule import stable_epochs
from mar.config.schema import TrainingConfig
from mar.errors import Failure
from mar.training.checkpoint import Checkpoint, Progress


def shared_start(folder: Path | None, settings: TrainingConfig) -> Checkpoint | None:
    """Return the latest checkpoint of other lengths' stable parts that this training begins with.

    A damaged one is passed over: an earlier one only costs time.
    """
    if folder is None:
        return None
    for path in sorted(folder.glob("step_*"), reverse=True):
        with suppress(Failure, KeyError, TypeError):
            progress = Progress(**read_atomic_dir(path)["progress"])
            if len(progress.history) <= stable_epochs(settings.recipe):
                return Checkpoint(path, progress)
    return None


def share(checkpoint: Path, folder: Path) -> None:
    """Copy the checkpoint at the end of the stable part to the folder that all lengths share.

    Raises:
        Failure: the disk refuses.
    """
    target = folder / checkpoint.name
    if _is_whole(target):
        return
    # Renamed at the end, so that a folder of this name is complete.
    unfinished = folder / f".{checkpoint.name}.{os.getpid()}.unfinished"
    try:
        # Left by processes that were ended while they copied; one that still copies tries again.
        for old in folder.glob(f".{checkpoint.name}.*.unfinished"):
            shutil.rmtree(old, ignore_errors=True)
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(checkpoint, unfinished)
        unfinished.rename(target)
    except (OSError, shutil.Error) as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        # Another training of this length may have written it meanwhile.
        if not target.exists():
            raise Failure(f"{folder} cannot be written: {error}", "disk") from None


def _is_whole(path: Path) -> bool:
    try:
        read_atomic_dir(path)
    except Failure:
        return False
    return True
