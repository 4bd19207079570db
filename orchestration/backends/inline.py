"""A trial trained inside Tune's own process: one worker, under a second to start."""

from __future__ import annotations

from typing import Any

from ray import tune

from orchestration.backends.base import report_with_replay


def run_inline(config: dict[str, Any]) -> None:
    """Train the trial that Tune hands over."""
    # Loads PyTorch, which the launch's process, where this module is imported, does without.
    from orchestration.worker.trial_runner import train

    reason = train(config["spec"], report_with_replay(tune.report))
    if reason:
        # On a full disk the reason is in no file.
        tune.report(reason.to_report())
