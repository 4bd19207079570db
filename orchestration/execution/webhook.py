"""The message to a webhook when a study ends."""

from __future__ import annotations

import json
import urllib.request

from mar.errors import FailureKind
from orchestration.execution.recorder import RunRecorder
from orchestration.studies.trial import Study


def failures_by_kind(recorder: RunRecorder) -> dict[FailureKind, list[str]]:
    """Return the names of the trials that failed, by the kind of failure."""
    kinds: dict[FailureKind, list[str]] = {}
    for key, reason in recorder.failures.items():
        kinds.setdefault(reason.kind, []).append(recorder.trials[key].name)
    return kinds


def notify_webhook(study: Study, recorder: RunRecorder) -> None:
    """Tell the address that was given how the study ended; that nobody answers there is said and no more."""
    address = recorder.store.launch.webhook
    if not address:
        return
    pruned = "failed" if recorder.failures else "stopped" if recorder.was_stopped else "finished"
    text = f"{study.file.title}: {pruned}; {len(recorder.done)} trials done, {len(recorder.failures)} failed"
    payload = {
        "text": text,
        "study": study.name,
        "state": pruned,
        "failures": failures_by_kind(recorder),
    }
    body = json.dumps(payload, ensure_ascii=False).encode()
    try:
        request = urllib.request.Request(address, body, {"Content-Type": "application/json"})  # noqa: S310  (checked)
        urllib.request.urlopen(request, timeout=10).close()  # noqa: S310
    except (OSError, ValueError) as error:
        # Not its own words: they may have the address in them, and whoever knows that may write there.
        print(
            f"--webhook: nobody took the message ({getattr(error, 'reason', None) or type(error).__name__})"
        )
