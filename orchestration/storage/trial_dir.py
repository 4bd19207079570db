"""The files of a trial's folder."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from mar.safe_input import read_json
from orchestration.failures import FailureReason

LOG = "log.txt"
"""File, below the trial's folder, with what its workers had to say to a person."""


LOGS = "logs"
"""Folder, below the trial's folder, with a log of each worker: what it ran on, warnings, tracebacks, stacks."""


HEARTBEAT = "pulse.json"
"""File, below the trial's folder: how far its training is, for ``mar status``."""


ATTEMPTS = "attempts.json"
"""File, below the trial's folder: how often this launch has begun to train it, in whatever process."""


CLEARED = "clearing.json"
"""File, below the trial's folder, while the checkpoints of its training are to go: which of them stay for good."""


HOLDER = "holder.txt"
"""File, below the trial's folder: who trains it now, for whoever waits for that."""


RECORD = "trial.json"
"""File, below the trial's folder: its study, name and tags, from which a lost database is made again."""


MICROBATCH = "passes.json"
"""File, below the trial's folder, with the largest pass that its memory holds, once it held no larger."""


FILE = "failure.json"
"""In a trial's folder: why it was given up, from the process that knows."""


def write_reason(folder: Path, reason: FailureReason) -> None:
    """Leave a reason in the trial's folder."""
    (folder / FILE).write_text(json.dumps(asdict(reason), ensure_ascii=False), encoding="utf-8")


def read_reason(folder: Path, error: object = None) -> FailureReason | None:
    """Return the reason that the trial's process left; else what Ray says, which then lost that process; else none."""
    try:
        return FailureReason(**read_json(folder / FILE))
    except (OSError, ValueError, TypeError):
        pass
    if error is None:
        return None
    lines = str(error).strip().splitlines()
    return FailureReason(lines[-1] if lines else "Ray lost the trial", "node")
