"""The backend ``inline``: trains a trial with one worker in Tune's own process.

A trial starts within a second.
"""

from __future__ import annotations

from typing import Any

from ray import tune

from orchestration.backends.base import report_with_replay


def run_inline(config: dict[str, Any]) -> None:
    """Train the trial that Tune hands over."""
    # Not at the top: it loads PyTorch, and the launch's process imports this module too.
    from orchestration.worker.trial_runner import train

    reason = train(config["spec"], report_with_replay(tune.report))
    if reason:
        # On a full disk no file has the reason.
        tune.report(reason.to_report())
