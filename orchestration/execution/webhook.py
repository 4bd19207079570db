"""Posts a message to a webhook when a study ends."""

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
    """Post how the study ended to the webhook, if there is one.

    An address that does not answer is only mentioned.
    """
    address = recorder.launch.webhook
    if not address:
        return
    state = "finished"
    if recorder.failures:
        state = "failed"
    elif recorder.was_stopped:
        state = "stopped"
    counts = f"{len(recorder.done)} trials done, {len(recorder.failures)} failed"
    payload = {
        "text": f"{study.file.title}: {state}; {counts}",
        "study": study.name,
        "state": state,
        "failures": failures_by_kind(recorder),
    }
    body = json.dumps(payload, ensure_ascii=False).encode()
    headers = {"Content-Type": "application/json"}
    try:
        # The scheme was checked when the option was read.
        request = urllib.request.Request(address, body, headers)  # noqa: S310
        urllib.request.urlopen(request, timeout=10).close()  # noqa: S310
    except (OSError, ValueError) as error:
        # Not the error's own message: it may contain the address, and whoever has that can post
        # there.
        reason = getattr(error, "reason", None) or type(error).__name__
        print(f"--webhook: the message was not delivered ({reason})")
