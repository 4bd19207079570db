"""The queue between Tune's trial and the workers of a pool: it passes trials and reports on.

The states of a trial in it are in the docstring of ``worker_pool``.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from ray.util.placement_group import (
    PlacementGroup,
)

from mar.training.reports import TrainingSignal

_POLL_S = 1.0
"""Seconds that ``poll`` waits; after each poll the pool checks whether its trainer is alive."""


@dataclass(frozen=True)
class QueueStatus:
    """What ``TrialQueue.poll`` returns."""

    reports: list[dict[str, Any]]
    """Reports of the running trial since the last poll."""
    is_taken: bool
    """Whether a worker has taken the trial."""
    is_done: bool
    reason: dict[str, str] | None
    """Why the trial failed permanently, if it did."""
    was_restarted: bool
    """Whether Ray Train restarted the workers.

    The trainer's count of failures then holds some of the next trial's retries.
    """
    placement_group: PlacementGroup | None
    """The workers' placement group; none before the first worker has called."""


class TrialQueue:
    """An actor that holds one trial at a time, and its reports.

    Its methods are coroutines, so Ray runs their calls in one event loop: between two ``await``
    nothing else changes its members, and no lock is needed.
    """

    def __init__(self) -> None:
        self.number = 0
        """How many trials were submitted: the number of the running one."""
        self.num_taken = 0
        """The number of the last trial that a worker has taken."""
        self.num_groups = 0
        """How often a group of workers has started."""
        self.spec: dict[str, Any] | None = None
        self.placement_group: PlacementGroup | None = None
        self.reports: list[dict[str, Any]] = []
        self.is_done = True
        self.is_cancelled = False
        self.is_shut_down = False
        self.reason: dict[str, str] | None = None
        self.changed = asyncio.Condition()

    async def submit(self, spec: dict[str, Any]) -> None:
        """Offer a trial to the workers; the one before it must be done."""
        self.number += 1
        self.spec = spec
        # What is left of the trial before must not reach this one.
        self.is_done = False
        self.is_cancelled = False
        self.reports = []
        self.reason = None
        await self._notify()

    async def next_trial(
        self, after: int, rank: int, placement_group: Any
    ) -> tuple[int, dict[str, Any] | None]:
        """Wait for the trial after number ``after`` (0: the running one).

        Returns:
            Its number and its spec; none in place of the spec if there is no other trial.
        """
        # Only a worker that has just started asks with 0: a second time means a restarted group.
        if rank == 0 and after == 0:
            self.num_groups += 1
            self.placement_group = placement_group
        # Every worker of the group waits here, and all of them get the same trial.
        async with self.changed:
            await self.changed.wait_for(lambda: self.is_shut_down or self._is_waiting(after))
        self.num_taken = self.number
        if self.is_shut_down:
            return self.number, None
        return self.number, self.spec

    def _is_waiting(self, after: int) -> bool:
        """Whether there is a trial to take for a worker whose last trial was number ``after``."""
        # A restarted worker asks with 0: it takes the running trial, but not one that is done.
        return self.number > after and not self.is_done

    async def report(self, metrics: dict[str, Any]) -> None:
        """Add a report of the running trial."""
        self.reports.append(metrics)
        await self._notify()

    async def cancel(self) -> None:
        """Let the running trial stop without saving."""
        # The workers see it at their next ``poll_signal``; nobody waits for this change.
        self.is_cancelled = True

    async def poll_signal(self) -> TrainingSignal:
        """Return the signal for the running trial."""
        # First: a cancelled trial is not resumed, so it need not save even at a shutdown.
        if self.is_cancelled:
            return TrainingSignal.ABORT
        if self.is_shut_down:
            return TrainingSignal.STOP
        return TrainingSignal.CONTINUE

    async def mark_done(self, reason: dict[str, str] | None) -> None:
        """Mark the running trial as done; ``reason`` says why it failed permanently, if it did."""
        self.is_done = True
        self.reason = reason
        await self._notify()

    async def shutdown(self) -> None:
        """Let the workers end: they get no other trial."""
        self.is_shut_down = True
        await self._notify()

    async def poll(self) -> QueueStatus:
        """Wait up to ``_POLL_S`` for reports or for the trial's end, and return the status."""
        async with self.changed:
            with suppress(TimeoutError):
                async with asyncio.timeout(_POLL_S):
                    await self.changed.wait_for(lambda: bool(self.reports) or self.is_done)
        # Each report is returned by one poll only.
        reports = self.reports
        self.reports = []
        return QueueStatus(
            reports=reports,
            is_taken=self.num_taken == self.number,
            is_done=self.is_done,
            reason=self.reason,
            was_restarted=self.num_groups > 1,
            placement_group=self.placement_group,
        )

    async def _notify(self) -> None:
        async with self.changed:
            self.changed.notify_all()
