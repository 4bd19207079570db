"""The queue between Tune's trial and the workers of a pool: trials in, reports out."""

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
"""How often the pool checks whether its trainer is alive."""


@dataclass(frozen=True)
class QueueStatus:
    """What ``TrialQueue.poll`` returns."""

    reports: list[dict[str, Any]]
    """New ones, of the trial under way."""
    is_taken: bool
    """Whether a worker has started the trial."""
    is_done: bool
    reason: dict[str, str] | None
    """Why the trial failed permanently, if it did."""
    was_restarted: bool
    """Whether Ray Train restarted the workers: then they have used some of the next trial's
    retries."""
    placement_group: PlacementGroup | None
    """Where the workers run."""


class TrialQueue:
    """An actor between Tune's trial and the workers: one trial at a time, and its reports."""

    def __init__(self) -> None:
        self.number = 0
        """Trials submitted so far: the number of the one under way."""
        self.num_taken = 0
        """The number of the newest trial that a worker has taken."""
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
        """Hand out a trial; the one before it must be done."""
        self.number += 1
        self.spec = spec
        self.is_done = False
        self.is_cancelled = False
        self.reports = []
        self.reason = None
        await self._notify()

    async def next_trial(
        self, after: int, rank: int, placement_group: Any
    ) -> tuple[int, dict[str, Any] | None]:
        """Wait for the trial after number ``after`` (0: the one under way).

        Returns its number, and none at the end.
        """
        if rank == 0 and after == 0:
            self.num_groups += 1
            self.placement_group = placement_group
        async with self.changed:
            await self.changed.wait_for(lambda: self.is_shut_down or self._is_waiting(after))
        self.num_taken = self.number
        if self.is_shut_down:
            return self.number, None
        return self.number, self.spec

    def _is_waiting(self, after: int) -> bool:
        """Whether there is a trial that a worker which had number ``after`` is to take."""
        return self.number > after and not self.is_done

    async def report(self, metrics: dict[str, Any]) -> None:
        """Add a report of the trial under way."""
        self.reports.append(metrics)
        await self._notify()

    async def cancel(self) -> None:
        """Have the trial under way stopped without saving."""
        self.is_cancelled = True

    async def poll_signal(self) -> TrainingSignal:
        """Return the signal for the trial under way.

        A cancelled trial is not resumed, so it does not save.
        """
        if self.is_cancelled:
            return TrainingSignal.ABORT
        if self.is_shut_down:
            return TrainingSignal.STOP
        return TrainingSignal.CONTINUE

    async def mark_done(self, reason: dict[str, str] | None) -> None:
        """Note that the trial under way is over, and why, if it failed permanently."""
        self.is_done = True
        self.reason = reason
        await self._notify()

    async def shutdown(self) -> None:
        """Let the workers end: there is no other trial for them."""
        self.is_shut_down = True
        await self._notify()

    async def poll(self) -> QueueStatus:
        """Wait up to ``_POLL_S`` for reports or for the trial's end, and return them."""
        async with self.changed:
            with suppress(TimeoutError):
                async with asyncio.timeout(_POLL_S):
                    await self.changed.wait_for(lambda: bool(self.reports) or self.is_done)
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
