"""The message to a webhook when a study ends."""

from __future__ import annotations

import json
import urllib.request

from mar.errors import FailureKind
from orchestration.execution.recorder import Launch
from orchestration.studies.trial import Study


def by_kind(launched: Launch) -> dict[FailureKind, list[str]]:
    """Return the names of the trials that failed, by the kind of failure."""
    kinds: dict[FailureKind, list[str]] = {}
    for key, reason in launched.failures.items():
        kinds.setdefault(reason.kind, []).append(launched.trials[key].name)
    return kinds


def tell_webhook(study: Study, launched: Launch) -> None:
    """Tell the address that was given how the study ended; that nobody answers there is said and no more."""
    address = launched.store.launch.webhook
    if not address:
        return
    ended = "failed" if launched.failures else "stopped" if launched.was_stopped else "finished"
    words = f"{study.file.title}: {ended}; {len(launched.done)} trials done, {len(launched.failures)} failed"
    told = {"text": words, "study": study.name, "state": ended, "failures": by_kind(launched)}
    body = json.dumps(told, ensure_ascii=False).encode()
    try:
        request = urllib.request.Request(address, body, {"Content-Type": "application/json"})  # noqa: S310  (checked)
        urllib.request.urlopen(request, timeout=10).close()  # noqa: S310
    except (OSError, ValueError) as error:
        # Not its own words: they may have the address in them, and whoever knows that may write there.
        print(
            f"--webhook: nobody took the message ({getattr(error, 'reason', None) or type(error).__name__})"
        )
