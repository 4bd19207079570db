"""A trial trained inside Tune's own process: one worker, under a second to start."""

from __future__ import annotations

from typing import Any

from orchestration.backends.base import report_with_replay


def run_inline(config: dict[str, Any]) -> None:
    """Train inside Tune's trial: one worker, no process of its own, under a second to start."""
    from ray import tune

    from orchestration.worker.trial_runner import train

    reason = train(config["assignment"], report_with_replay(tune.report))
    if reason:
        tune.report(reason.plain())  # on a full disk it is in no file
