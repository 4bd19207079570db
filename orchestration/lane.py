"""A group of Ray Train workers that goes from trial to trial.

A TorchTrainer starts five processes of its own and its workers load PyTorch: ten seconds and more, for every trial. So its
workers train not one trial but all that are handed to them, one after another, each under its own settings, folder and
log. What ends a worker (a lost node, a hang, memory) is Ray Train's to heal, as in any training: it starts the group
again, which takes up the same trial from its checkpoint. A group that was healed is not used for another trial: each
trial has its ``retries`` to itself.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from orchestration.failures import Reason, read_reason, write_reason
from orchestration.trial import Assignment, one_by_one

_NEWS_S = 1.0
"""How often it is seen whether the trainer is still there."""


class Desk:
    """An actor between a trial's process and the workers: trials are handed out here, and what they report comes back."""

    def __init__(self) -> None:
        self.number, self.groups = 0, 0
        self.assignment: dict[str, Any] | None = None
        self.reports: list[dict[str, Any]] = []
        self.is_done = self.is_closed = False
        self.changed = asyncio.Condition()

    async def put(self, assignment: dict[str, Any]) -> None:
        """Hand out a trial."""
        self.number += 1
        self.assignment, self.is_done = assignment, False
        await self._tell()

    async def take(self, after: int, rank: int) -> tuple[int, dict[str, Any] | None]:
        """Wait for the trial after number ``after`` (0: the one under way); returns its number, and none at the end."""
        self.groups += after == 0 and rank == 0
        async with self.changed:
            await self.changed.wait_for(lambda: self.is_closed or (self.number > after and not self.is_done))
        return self.number, None if self.is_closed else self.assignment

    async def report(self, metrics: dict[str, Any]) -> None:
        """Note what the first worker reports."""
        self.reports.append(metrics)
        await self._tell()

    async def done(self) -> None:
        """Note that the trial under way is over."""
        self.is_done = True
        await self._tell()

    async def close(self) -> None:
        """Send the workers home."""
        self.is_closed = True
        await self._tell()

    async def news(self) -> tuple[list[dict[str, Any]], bool, bool]:
        """Wait a little for reports; returns them, whether the trial is over, and whether its group was started again."""
        async with self.changed:
            try:
                async with asyncio.timeout(_NEWS_S):
                    await self.changed.wait_for(lambda: bool(self.reports) or self.is_done)
            except TimeoutError:
                pass
        reports, self.reports = self.reports, []
        return reports, self.is_done, self.groups > 1

    async def _tell(self) -> None:
        async with self.changed:
            self.changed.notify_all()


class Lane:
    """A trainer with its workers, and the desk where they take their trials."""

    def __init__(self, assignment: Assignment) -> None:
        import ray

        actor: Any = ray.remote(Desk)
        self.desk = actor.options(num_cpus=0, max_concurrency=1000).remote()
        self.error: Exception | None = None
        self.is_spent = False
        self.trainer = _trainer(assignment, self.desk)
        self.thread = threading.Thread(target=self._fit, name="trainer", daemon=True)
        self.thread.start()

    def _fit(self) -> None:
        try:
            self.trainer.fit()
        except Exception as error:
            self.error = error

    @property
    def is_usable(self) -> bool:
        """Whether another trial can be given to it."""
        return self.thread.is_alive() and not self.is_spent

    def train(self, assignment: Assignment) -> Iterator[dict[str, Any]]:
        """Have a trial trained; yields what it reports. One that the trainer gives up has a reason in its folder."""
        import ray

        ray.get(self.desk.put.remote(assignment.plain()))
        is_done = False
        while not is_done:
            is_alive = self.thread.is_alive()  # before the news: what was reported before its end is among them
            reports, is_done, self.is_spent = ray.get(self.desk.news.remote())
            yield from reports
            if not is_alive and not is_done:
                folder = Path(assignment.folder)
                folder.mkdir(parents=True, exist_ok=True)
                write_reason(folder, read_reason(folder, self.error) or Reason("Ray lost the trial", "node"))
                return
        if self.is_spent:
            self.close()

    def close(self) -> None:
        """End the workers and wait for it: the next lane wants their place."""
        import ray

        ray.get(self.desk.close.remote())
        self.thread.join()


_warm: list[Lane] = []
"""This process's lane, if it has one."""


def train_in_lane(assignment: Assignment, report: Callable[[dict[str, Any]], object]) -> None:
    """Have a trial trained by this process's lane, which is started if there is none."""
    if not _warm or not _warm[0].is_usable:
        _warm[:] = [Lane(assignment)]
    for told in _warm[0].train(assignment):
        report(told)


def _trainer(assignment: Assignment, desk: Any) -> Any:
    from ray import train
    from ray.train.torch import TorchTrainer

    from orchestration.remote import remote

    resources = {"CPU": float(assignment.cpus_per_worker)}
    if assignment.gpus_per_worker:
        resources["GPU"] = float(assignment.gpus_per_worker)
    is_elastic = assignment.min_workers < assignment.workers
    storage, files = assignment.storage, None
    if assignment.remote:
        place = remote(assignment.remote)
        storage, files = f"{place.root}/ray", place.files
    return TorchTrainer(
        work,
        train_loop_config={"desk": desk},
        scaling_config=train.ScalingConfig(
            num_workers=(assignment.min_workers, assignment.workers) if is_elastic else assignment.workers,
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
                controller_failure_limit=-1 if assignment.waits_for_nodes else 1,  # another node may come
            ),
        ),
    )


def work(config: dict[str, Any]) -> None:
    """Train what is handed out, as one of a TorchTrainer's workers; what the first reports is heard."""
    import ray
    from ray import train as ray_train

    from orchestration.worker import train

    desk, rank, number = config["desk"], ray_train.get_context().get_world_rank(), 0

    def send(metrics: dict[str, Any]) -> None:
        if rank == 0:
            ray.get(desk.report.remote(metrics))

    while True:
        number, assignment = ray.get(desk.take.remote(number, rank))
        if assignment is None:
            return
        train(assignment, one_by_one(send), lambda: ray_train.get_preemption_info() is not None)
        if rank == 0:
            ray.get(desk.done.remote())
