"""Tune's trial that is trained by Ray Train, and the workers that go from trial to trial.

A TorchTrainer starts five processes of its own, and its workers load PyTorch: ten seconds and more, for every trial. So the
workers of one train not one trial but all that are handed to them, one after another, each under its own settings, folder
and log. What ends a worker (a lost node, a hang, memory) is Ray Train's to heal, as in any training: it starts the group
again, which takes up the same trial from its checkpoint. A group that was healed is not used for another trial: each has
its ``retries`` to itself.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Generator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray import train, tune
from ray.exceptions import RayActorError
from ray.train import TrainingFailedError
from ray.util.placement_group import (
    PlacementGroup,
    get_current_placement_group,
    remove_placement_group,
)
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from mar.errors import Failure
from orchestration.backends.base import report_with_replay
from orchestration.failures import FailureReason
from orchestration.storage.object_store import remote
from orchestration.storage.trial_dir import read_reason, write_reason
from orchestration.worker.spec import TrialSpec

if TYPE_CHECKING:
    from mar.training.step import Wish

_NEWS_S = 1.0
"""How often it is seen whether the trainer is still there."""
_HOME_S = 6.0
"""How long workers may take to go home: Tune kills a trial that it ended after ten."""
_LEFT_S = 30.0
"""How long a trial that is to be left may take for a step, or for a batch of its last test."""
_FAILED_S = 60.0
"""How long Ray Train may take to end by itself when the trial's own process has failed."""


@dataclass(frozen=True)
class News:
    """What a lane's desk tells."""

    reports: list[dict[str, Any]]
    """New ones, of the trial under way."""
    is_taken: bool
    """Whether a worker has begun the trial."""
    is_done: bool
    reason: dict[str, str] | None
    """Why the trial was given up, if it was."""
    was_healed: bool
    """Whether the workers were started again: then they have had some of the next trial's retries."""
    placement_group: PlacementGroup | None
    """Where the workers are."""


class Desk:
    """An actor between Tune's trial and the workers: trials are handed out here, and what they report comes back."""

    def __init__(self) -> None:
        self.number, self.taken, self.groups = 0, 0, 0
        self.assignment: dict[str, Any] | None = None
        self.placement_group: PlacementGroup | None = None
        self.reports: list[dict[str, Any]] = []
        self.is_done, self.is_dropped, self.is_closed = True, False, False
        self.reason: dict[str, str] | None = None
        self.changed = asyncio.Condition()

    async def put(self, assignment: dict[str, Any]) -> None:
        """Hand out a trial; the one before it must be done."""
        self.number, self.assignment = self.number + 1, assignment
        self.is_done = self.is_dropped = False
        self.reports, self.reason = [], None
        await self._tell()

    async def take(
        self, after: int, rank: int, placement_group: Any
    ) -> tuple[int, dict[str, Any] | None]:
        """Wait for the trial after number ``after`` (0: the one under way); returns its number, and none at the end."""
        if rank == 0 and after == 0:
            self.groups, self.placement_group = self.groups + 1, placement_group
        async with self.changed:
            await self.changed.wait_for(
                lambda: self.is_closed or (self.number > after and not self.is_done)
            )
        self.taken = self.number
        return self.number, None if self.is_closed else self.assignment

    async def report(self, metrics: dict[str, Any]) -> None:
        """Note what the first worker reports."""
        self.reports.append(metrics)
        await self._tell()

    async def drop(self) -> None:
        """Wish that the trial under way is left."""
        self.is_dropped = True

    async def wish(self) -> Wish:
        """Return what is wished of the trial under way; one that is not dropped may be gone on with."""
        return "leave" if self.is_dropped else "stop" if self.is_closed else "go on"

    async def done(self, reason: dict[str, str] | None) -> None:
        """Note that the trial under way is over, and why, if it was given up."""
        self.is_done, self.reason = True, reason
        await self._tell()

    async def close(self) -> None:
        """Send the workers home."""
        self.is_closed = True
        await self._tell()

    async def news(self) -> News:
        """Wait a little for reports, or the trial's end."""
        async with self.changed:
            try:
                async with asyncio.timeout(_NEWS_S):
                    await self.changed.wait_for(lambda: bool(self.reports) or self.is_done)
            except TimeoutError:
                pass
        reports, self.reports = self.reports, []
        return News(
            reports,
            self.taken == self.number,
            self.is_done,
            self.reason,
            self.groups > 1,
            self.placement_group,
        )

    async def _tell(self) -> None:
        async with self.changed:
            self.changed.notify_all()


class Lane:
    """A trainer with its workers, and the desk where they take their trials."""

    def __init__(self, assignment: TrialSpec) -> None:
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        actor: Any = ray.remote(Desk)
        self.desk = actor.options(
            num_cpus=0, max_concurrency=1000, scheduling_strategy=here
        ).remote()
        self.error: Exception | None = None
        self.news: News | None = None
        """The last."""
        self.trainer = _trainer(assignment, self.desk)
        self.thread = threading.Thread(target=self._fit, name="trainer", daemon=True)
        self.thread.start()

    def _fit(self) -> None:
        try:
            self.trainer.fit()
        except Exception as error:
            self.error = error

    def is_usable(self) -> bool:
        """Whether another trial can be given to it: the one before it is done."""
        news = self._ask()
        return self.thread.is_alive() and news.is_done and not news.was_healed

    def train(self, assignment: TrialSpec) -> Generator[dict[str, Any], None, bool]:
        """Have a trial trained; yields what it reports. One that the trainer gives up has a reason in its folder.

        Returns whether a worker began with it: a trainer may end while it waits for another trial.
        """
        ray.get(self.desk.put.remote(assignment.plain()))
        while True:
            is_alive = (
                self.thread.is_alive()
            )  # before the news: what was reported before its end is among them
            news = self._ask()
            yield from news.reports
            if news.is_done:
                if news.reason:  # on a full disk it is in no file
                    yield news.reason
                return True
            if not is_alive:
                break
        if news.is_taken:
            self.give_up(assignment)
        return news.is_taken

    def give_up(self, assignment: TrialSpec) -> None:
        """Leave in the trial's folder why the trainer ended without it; raises what Ray Train itself failed over."""
        if self.error and not isinstance(self.error, TrainingFailedError):
            raise self.error
        folder = Path(assignment.folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_reason(
            folder, read_reason(folder, self.error) or FailureReason("Ray lost the trial", "node")
        )

    def drop(self) -> None:
        """Have the trial under way, if there is one, left after its next step; its workers are ended if they do not."""
        ray.get(self.desk.drop.remote())
        until = time.monotonic() + _LEFT_S
        while self.thread.is_alive() and not self._ask().is_done and time.monotonic() < until:
            pass

    def close(self, home_s: float) -> None:
        """End the workers and wait for it: the next lane, or the next study, wants their place.

        Ray frees the place of a trainer that is not ended in order when the whole job ends, and no sooner.
        """
        with suppress(RayActorError):  # lost; the workers notice
            ray.get(self.desk.close.remote())
        self.thread.join(home_s)
        placement_group = self.news.placement_group if self.news else None
        if placement_group is not None and (self.thread.is_alive() or self.error):
            remove_placement_group(placement_group)
            self.thread.join(_HOME_S / 2)

    def _ask(self) -> News:
        news: News = ray.get(self.desk.news.remote())
        self.news = news
        return news


class LaneTrial(tune.Trainable):
    """Tune's trial; its process is used for one after the other, and so is its lane.

    When the trainer gives a trial up, after its retries, this ends normally: Tune is there to try again when this process
    itself is lost.
    """

    _lane: Lane | None = None
    _reports: Generator[dict[str, Any]]

    @classmethod
    def default_resource_request(cls, config: dict[str, Any]) -> tune.PlacementGroupFactory:
        """Stay on the head node: the workers have what a training needs."""
        return tune.PlacementGroupFactory([{"node:__internal_head__": 0.001}])

    def setup(self, config: dict[str, Any]) -> None:
        """Begin with a trial."""
        self._reports = self._trained(TrialSpec(**config["assignment"]))

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Go on with another trial; one that was ended early is left first."""
        try:
            if self._lane:
                self._lane.drop()
                if not self._lane.is_usable():
                    self._close()
        except RayActorError:  # nothing of this is the next trial's fault
            self._close()
        self.setup(new_config)
        return True

    def step(self) -> dict[str, Any]:
        """Wait for the next report.

        Raises what Tune is to try again after; then the workers' place is free.
        """
        try:
            return next(self._reports, {"done": True})
        except Exception:
            self._close(_FAILED_S)
            raise

    def cleanup(self) -> None:
        """Send the workers home."""
        self._close()

    def _close(self, home_s: float = _HOME_S) -> None:
        lane, self._lane = self._lane, None
        if lane:
            lane.close(home_s)

    def _trained(self, assignment: TrialSpec) -> Generator[dict[str, Any]]:
        if Path(assignment.stop_file).exists():  # nobody else is to start
            return
        if self._lane and (yield from self._lane.train(assignment)):
            return
        self._close()
        os.environ.update(assignment.environment)  # what Ray Train reads as it starts
        self._lane = Lane(assignment)
        if not (yield from self._lane.train(assignment)):
            self._lane.give_up(assignment)


def _trainer(assignment: TrialSpec, desk: Any) -> Any:
    from ray.train.torch import TorchTrainer

    resources = {"CPU": float(assignment.cpus_per_worker)}
    if assignment.gpus_per_worker:
        resources["GPU"] = float(assignment.gpus_per_worker)
    is_elastic = assignment.min_workers < assignment.workers
    storage, files = assignment.storage, None
    if assignment.remote:
        store = remote(assignment.remote)
        storage, files = f"{store.root}/ray", store.files
    return TorchTrainer(
        work,
        train_loop_config={"desk": desk},
        scaling_config=train.ScalingConfig(
            num_workers=(assignment.min_workers, assignment.workers)
            if is_elastic
            else assignment.workers,
            use_gpu=assignment.gpus_per_worker > 0,
            resources_per_worker=resources,
            elastic_resize_monitor_interval_s=assignment.resize_s,
        ),
        run_config=train.RunConfig(
            name=assignment.key,
            storage_path=storage,
            storage_filesystem=files,
            failure_config=train.FailureConfig(
                max_failures=assignment.retries,
                controller_failure_limit=-1
                if assignment.waits_for_nodes
                else 1,  # another node may come
            ),
        ),
    )


def work(config: dict[str, Any]) -> None:
    """Train what is handed out, as one of a TorchTrainer's workers; what the first reports is heard."""
    from orchestration.worker import (
        trial_runner,  # loads PyTorch, which the launch, where this class is named, does without
    )

    desk, rank, number = config["desk"], train.get_context().get_world_rank(), 0

    def send(metrics: dict[str, Any]) -> None:
        if rank == 0:
            ray.get(desk.report.remote(metrics))

    def wished() -> Wish:
        is_to_go = (
            train.get_preemption_info() is not None
        )  # workers meet in it: all of them must ask
        wish: Wish = ray.get(desk.wish.remote()) if rank == 0 else "go on"
        return "save" if is_to_go and wish == "go on" else wish

    while True:
        number, assignment = ray.get(desk.take.remote(number, rank, get_current_placement_group()))
        if assignment is None:
            return
        reason = trial_runner.train(assignment, report_with_replay(send), wished)
        if rank == 0:
            ray.get(desk.done.remote(reason.plain() if reason else None))
        if reason and reason.kind == "code" and assignment["gpus_per_worker"]:
            raise Failure(
                f"{reason.message}: a new process for the next trial, the device may be spoilt"
            )
