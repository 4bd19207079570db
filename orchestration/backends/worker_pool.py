"""Ray Train's workers, used for one trial after the other.

A TorchTrainer starts five processes of its own, and its workers load PyTorch: fourteen seconds for
every trial. So the workers of one trainer train not one trial but all that are put into a queue,
one after another, each with its own settings, folder and log. Whatever ends a worker (a lost node,
a stall, memory) is handled by Ray Train as in any training: it restarts the group, which takes the
same trial again and resumes it from its checkpoint. A pool whose group was restarted gets no other
trial: each trial has its retries to itself.

Three parts, in three kinds of process:

- ``PooledTrainable``, Tune's trainable, in a process of Tune: has one ``WorkerPool`` and hands it
  one trial after the other;
- ``TrialQueue``, an actor: trials go in, reports come out;
- ``run_worker``, on each worker of the TorchTrainer: takes trials from the queue and trains them.

The states of a trial in the queue, and the methods that change them:

| state | meaning | ends with |
|---|---|---|
| submitted | ``submit``: no worker has taken it | ``next_trial`` |
| taken | the workers train it; ``report`` adds its epochs | ``mark_done``, by the first worker |
| cancelled | it is pruned; ``poll_signal`` is ABORT after its next step | ``mark_done`` |
| done | ``QueueStatus`` has the reason of a failure | the next ``submit``, ``shutdown`` |

``shutdown`` ends the queue in any state: ``next_trial`` then returns none, and ``poll_signal`` is
STOP, so that a trial under way saves first. A group that is restarted calls ``next_trial`` with 0
and gets the trial under way again. Every wait is bounded: ``poll`` returns after ``_POLL_S`` at the
latest, a cancelled trial has ``_CANCEL_S``, a shutdown ``_SHUTDOWN_S``.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Generator
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import ray
from ray import train, tune
from ray.exceptions import RayActorError
from ray.train import TrainingFailedError
from ray.util.placement_group import (
    get_current_placement_group,
    remove_placement_group,
)
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from mar.errors import Failure
from mar.training.reports import TrainingSignal
from orchestration.backends.base import report_with_replay
from orchestration.backends.trial_queue import QueueStatus, TrialQueue
from orchestration.failures import FailureReason
from orchestration.storage.object_store import open_object_store
from orchestration.worker.spec import TrialSpec

if TYPE_CHECKING:
    from ray.train.torch import TorchTrainer

_SHUTDOWN_S = 6.0
"""How long workers may take to shut down: Tune kills a trial that it stopped after ten seconds."""
_CANCEL_S = 30.0
"""How long a cancelled trial may take for a step, or for a batch of its test."""
_FAILED_S = 60.0
"""How long Ray Train may take to end by itself when the trial's own process has failed."""


class WorkerPool:
    """A TorchTrainer with its workers, and the queue from which they take trials."""

    def __init__(self, spec: TrialSpec) -> None:
        # The queue lives on the node of Tune's trial: if that node is lost, both are.
        this_node = NodeAffinitySchedulingStrategy(
            ray.get_runtime_context().get_node_id(), soft=False
        )
        actor: Any = ray.remote(TrialQueue)
        self.queue = actor.options(
            num_cpus=0, max_concurrency=1000, scheduling_strategy=this_node
        ).remote()
        self.error: Exception | None = None
        self.status: QueueStatus | None = None
        """The last that was polled."""
        self.trainer = _trainer(spec, self.queue)
        self.thread = threading.Thread(target=self._fit, name="trainer", daemon=True)
        self.thread.start()

    def _fit(self) -> None:
        try:
            self.trainer.fit()
        except Exception as error:
            self.error = error

    def is_usable(self) -> bool:
        """Whether it can take another trial.

        The one before it is done, and its workers were never restarted.
        """
        status = self._poll()
        return self.thread.is_alive() and status.is_done and not status.was_restarted

    def train(self, spec: TrialSpec) -> Generator[dict[str, Any], None, bool]:
        """Have a trial trained; yields its reports.

        If it fails permanently, the reason is in its folder.

        Returns whether a worker started it: a trainer may end while it waits for another trial.
        """
        ray.get(self.queue.submit.remote(spec.to_json()))
        while True:
            # Checked before the poll: what was reported before the trainer ended is then among the
            # reports.
            is_alive = self.thread.is_alive()
            status = self._poll()
            yield from status.reports
            if status.is_done:
                # On a full disk the reason is in no file.
                if status.reason:
                    yield status.reason
                return True
            if not is_alive:
                break
        if status.is_taken:
            self.record_failure(spec)
        return status.is_taken

    def record_failure(self, spec: TrialSpec) -> None:
        """Write into the trial's folder why the trainer ended without it.

        Raises:
            Exception: the trainer did not fail over the training, but by itself.
        """
        if self.error and not isinstance(self.error, TrainingFailedError):
            raise self.error
        spec.folder.mkdir(parents=True, exist_ok=True)
        reason = spec.trial_dir.read_failure(self.error)
        if reason is None:
            reason = FailureReason("Ray lost the trial", "worker_lost")
        spec.trial_dir.write_failure(reason)

    def cancel(self) -> None:
        """Stop the trial under way, if there is one, after its next step.

        Its workers are ended if it does not stop.
        """
        ray.get(self.queue.cancel.remote())
        deadline = time.monotonic() + _CANCEL_S
        # Each poll waits for up to a second.
        while self.thread.is_alive() and time.monotonic() < deadline:
            if self._poll().is_done:
                return

    def close(self, timeout_s: float) -> None:
        """End the workers and wait for it: the next pool, or the next study, needs their resources.

        Ray frees the placement group of a trainer that is not ended in order only when the whole
        job ends.
        """
        with suppress(RayActorError):  # the queue is lost; the workers notice
            ray.get(self.queue.shutdown.remote())
        self.thread.join(timeout_s)
        placement_group = None
        if self.status:
            placement_group = self.status.placement_group
        if placement_group is not None and (self.thread.is_alive() or self.error):
            remove_placement_group(placement_group)
            self.thread.join(_SHUTDOWN_S / 2)

    def _poll(self) -> QueueStatus:
        status: QueueStatus = ray.get(self.queue.poll.remote())
        self.status = status
        return status


class PooledTrainable(tune.Trainable):
    """Tune's trainable.

    Tune reuses its process for one trial after the other, and so it reuses its pool.

    When Ray Train fails a trial permanently, after its retries, this ends normally: Tune tries
    again only when this process itself is lost.
    """

    _pool: WorkerPool | None = None
    _reports: Generator[dict[str, Any]]

    @classmethod
    def default_resource_request(cls, config: dict[str, Any]) -> tune.PlacementGroupFactory:
        """Stay on the head node, without a core: the workers have what a training needs."""
        return tune.PlacementGroupFactory([{"node:__internal_head__": 0.001}])

    def setup(self, config: dict[str, Any]) -> None:
        """Start with a trial."""
        self._reports = self._train(TrialSpec.from_json(config["spec"]))

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Start another trial; one that was pruned is cancelled first."""
        try:
            if self._pool:
                self._pool.cancel()
                if not self._pool.is_usable():
                    self._close()
        except RayActorError:  # the next trial gets a new pool
            self._close()
        self.setup(new_config)
        return True

    def step(self) -> dict[str, Any]:
        """Wait for the next report.

        Raises:
            Exception: Tune is to try again; the workers' resources are free then.
        """
        try:
            return next(self._reports, {"done": True})
        except Exception:
            self._close(_FAILED_S)
            raise

    def cleanup(self) -> None:
        """Shut the workers down."""
        self._close()

    def _close(self, timeout_s: float = _SHUTDOWN_S) -> None:
        pool = self._pool
        self._pool = None
        if pool:
            pool.close(timeout_s)

    def _train(self, spec: TrialSpec) -> Generator[dict[str, Any]]:
        if spec.stop_file.exists():  # the study is to stop: no other trial starts
            return
        if self._pool and (yield from self._pool.train(spec)):
            return
        # There is no pool, or its trainer ended while it waited for a trial.
        self._close()
        os.environ.update(spec.environment)  # Ray Train reads it as it starts
        self._pool = WorkerPool(spec)
        if not (yield from self._pool.train(spec)):
            self._pool.record_failure(spec)


def _trainer(spec: TrialSpec, queue: Any) -> TorchTrainer:
    from ray.train.torch import TorchTrainer

    worker = spec.worker
    resources = {"CPU": float(worker.cpus_per_worker)}
    if spec.gpus_per_worker:
        resources["GPU"] = float(spec.gpus_per_worker)
    num_workers: int | tuple[int, int] = worker.workers
    if worker.min_workers is not None and worker.min_workers < worker.workers:  # elastic
        num_workers = (worker.min_workers, worker.workers)
    storage = spec.storage
    filesystem = None
    if worker.object_store:
        store = open_object_store(worker.object_store)
        storage = f"{store.root}/ray"
        filesystem = store.files
    # How often the controller may fail: on a cluster without limit, since another node may come.
    controller_failures = 1
    if spec.waits_for_nodes:
        controller_failures = -1
    return TorchTrainer(
        run_worker,
        train_loop_config={"queue": queue},
        scaling_config=train.ScalingConfig(
            num_workers=num_workers,
            use_gpu=spec.gpus_per_worker > 0,
            resources_per_worker=resources,
            elastic_resize_monitor_interval_s=worker.resize_s,
        ),
        run_config=train.RunConfig(
            name=spec.key,
            storage_path=storage,
            storage_filesystem=filesystem,
            failure_config=train.FailureConfig(
                max_failures=worker.retries, controller_failure_limit=controller_failures
            ),
        ),
    )


def run_worker(config: dict[str, Any]) -> None:
    """Train the trials of the queue, as one of a TorchTrainer's workers; the first worker reports.

    Raises:
        Failure: an internal error on a GPU: the next trial is to get a new process.
    """
    # Loads PyTorch, which the launch's process, where this module is imported, does without.
    from orchestration.worker import trial_runner

    queue = config["queue"]
    rank = train.get_context().get_world_rank()
    number = 0

    def send(metrics: dict[str, Any]) -> None:
        if rank == 0:
            ray.get(queue.report.remote(metrics))

    def poll_signal() -> TrainingSignal:
        # The workers meet in this call: all of them must make it.
        is_preempted = train.get_preemption_info() is not None
        signal = TrainingSignal.CONTINUE
        if rank == 0:
            answer: Any = ray.get(queue.poll_signal.remote())
            signal = TrainingSignal(answer)
        if is_preempted and signal == TrainingSignal.CONTINUE:
            return TrainingSignal.CHECKPOINT
        return signal

    while True:
        number, spec = ray.get(queue.next_trial.remote(number, rank, get_current_placement_group()))
        if spec is None:
            return
        reason = trial_runner.train(spec, report_with_replay(send), poll_signal)
        if rank == 0:
            report = None
            if reason:
                report = reason.to_report()
            ray.get(queue.mark_done.remote(report))
        # After an error of a kernel every later call on that device fails in this process.
        if reason and reason.kind == "internal" and spec["gpus_per_worker"]:
            raise Failure(
                f"{reason.message}: a new process for the next trial, the device may be unusable "
                "in this one"
            )
