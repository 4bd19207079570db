"""The kinds of failures: what to do about each, and after which another attempt makes sense."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mar.errors import Failure, FailureKind, UserError

TEMPORARY: frozenset[FailureKind] = frozenset({"memory", "worker_lost", "stalled"})
"""Kinds after which another attempt may succeed; after the others it would fail again."""
REMEDIES: dict[FailureKind, str] = {
    "user": "correct the settings",
    "data": "mar data check names every such video; repair it, or set data.broken=skip",
    "disk": "make room, or choose another --store; the same command resumes",
    "memory": (
        "--max-microbatch-clips N computes the batch in smaller passes, "
        "--activation-checkpointing keeps fewer activations; the result is the same"
    ),
    "shm": (
        "--loader-processes 0 needs none; or enlarge /dev/shm (docker run --shm-size=8g, "
        "Kubernetes: an emptyDir of medium Memory)"
    ),
    "non_finite": "a smaller recipe.base_lr, recipe.clip_grad, or recipe.precision=fp32",
    "stalled": "the log has every thread's stack; for slow steps, give a larger --hang-timeout-s",
    "worker_lost": "the same command resumes from the last checkpoint",
    "internal": "the trial's log has the traceback; please report it",
    "damaged": "the message names the folder; nothing is trained again before it is removed",
    "stopped": "the same command resumes",
}


@dataclass(frozen=True)
class FailureReason:
    """Why a trial failed permanently."""

    message: str
    kind: FailureKind = "internal"

    def __str__(self) -> str:
        return self.message

    def to_report(self) -> dict[str, str]:
        """Return it as a trial's process reports it; ``reason_in_report`` reads that."""
        return {"failure": self.message, "failure_kind": self.kind}


def reason_in_report(result: Mapping[str, Any]) -> FailureReason | None:
    """Return the reason in a trial's last report, if there is one."""
    if "failure" not in result:
        return None
    return FailureReason(result["failure"], result["failure_kind"])


def classify_error(error: BaseException) -> FailureReason:
    """Return an error as a failure with a kind."""
    if isinstance(error, UserError):
        return FailureReason(str(error), "user")
    if isinstance(error, Failure):
        return FailureReason(str(error), error.kind)
    if is_full_disk(error):
        return FailureReason(f"the disk is full: {first_line(error)}", "disk")
    if is_out_of_memory(error):
        return FailureReason(f"out of memory: {first_line(error)}", "memory")
    # PyTorch raises a plain RuntimeError for a lost loader process: only its text tells.
    if "DataLoader worker (pid" in str(error):
        return FailureReason(f"a loader process was lost: {first_line(error)}", "worker_lost")
    kind: FailureKind = "internal"
    if is_lost_peer(error):
        kind = "worker_lost"
    return FailureReason(f"{type(error).__name__}: {first_line(error)}", kind)


def is_lost_peer(error: BaseException) -> bool:
    """Whether another worker of the same training was lost during a collective operation."""
    # By name: the classes are PyTorch's and Ray's, which this module does not load. gloo raises a
    # plain RuntimeError ("Connection reset by peer"), so the text is searched too.
    names = {kind.__name__ for kind in type(error).__mro__}
    text = str(error).lower()
    return bool(
        names & {"DistBackendError", "DistNetworkError", "DistStoreError", "RayActorError"}
    ) or any(
        sign in text for sign in ("gloo", "nccl", "closed by peer", "connection reset", "tcpstore")
    )


def is_full_disk(error: BaseException) -> bool:
    """Whether a file could not be written because the disk, or the user's quota, is full."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device's memory or this machine's is full."""
    # By name, without loading PyTorch.
    names = {kind.__name__ for kind in type(error).__mro__}
    signs = (
        "can't allocate memory",  # PyTorch on a CPU
        "could not create a primitive",  # oneDNN, when there is almost no memory left
        # "CUDA error: out of memory", "CUDNN_STATUS… out of memory", the driver itself
        "out of memory",
        "CUBLAS_STATUS_ALLOC_FAILED",
        "CUDNN_STATUS_ALLOC_FAILED",
        "CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED",
        "CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    )
    return bool(names & {"OutOfMemoryError", "MemoryError"}) or any(
        sign in str(error) for sign in signs
    )


def first_line(error: object) -> str:
    """Return the first line of an error's message that is not empty, at most 300 characters."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)[
        :300
    ]
