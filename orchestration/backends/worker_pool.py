"""Ray Train's workers, used for one trial after the other.

A TorchTrainer starts five processes of its own, and its workers load PyTorch: that takes fourteen
seconds. So the workers of one trainer train not one trial but many, one after another, which they
take from a queue; each trial has its own settings, folder and log. Whatever ends a worker (a lost
node, a stall, memory) is handled by Ray Train as in any training: it restarts the group of workers,
which takes the same trial again and resumes it from its checkpoint. A pool whose group was
restarted gets no other trial, because Ray Train counts failures for the life of a trainer, and each
trial is to have all of its retries.

Three parts run in three kinds of process:

- ``PooledTrainable``, Tune's trainable, in a process of Tune's: has one ``WorkerPool`` and hands it
  one trial after the other;
- ``TrialQueue``, an actor: takes trials in, and collects their reports;
- ``run_worker``, on each worker of the TorchTrainer: takes trials from the queue and trains them.

The states of a trial in the queue, and the methods that change them:

| state | meaning | ends with |
|---|---|---|
| submitted | ``submit``: no worker has taken it | ``next_trial`` |
| taken | the workers train it; ``report`` adds its epochs | ``mark_done``, by the first worker |
| cancelled | it is pruned; ``poll_signal`` is ABORT after its next step | ``mark_done`` |
| done | ``QueueStatus`` has the reason of a failure | the next ``submit``, ``shutdown`` |

``shutdown`` ends the queue in any state: ``next_trial`` then returns none, and ``poll_signal`` is
STOP, so that a running trial saves first. A group that was restarted calls ``next_trial`` with 0
and gets the running trial again. Every wait is bounded: ``poll`` returns after ``_POLL_S`` at the
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
"""Seconds that workers may take to shut down; Tune kills a trial ten seconds after stopping it."""
_CANCEL_S = 30.0
"""Seconds that a cancelled trial may take for its last step, or for a batch of its test."""
_FAILED_S = 60.0
"""Seconds that Ray Train may take to end by itself when the trial's own process has failed."""


class WorkerPool:
    """A TorchTrainer with its workers, and the queue from which they take trials."""

    def __init__(self, spec: TrialSpec) -> None:
        # The queue runs on the node of Tune's trial, so that both are lost together.
        this_node = NodeAffinitySchedulingStrategy(
            ray.get_runtime_context().get_node_id(), soft=False
        )
        actor: Any = ray.remote(TrialQueue)
        # Concurrency: each worker waits in a call of its own, and none may block the others.
        self.queue = actor.options(
            num_cpus=0, max_concurrency=1000, scheduling_strategy=this_node
        ).remote()
        self.error: Exception | None = None
        self.status: QueueStatus | None = None
        """The status of the last poll."""
        self.trainer = _trainer(spec, self.queue)
        # ``fit`` blocks until all trials are over; this thread yields their reports meanwhile.
        self.thread = threading.Thread(target=self._fit, name="trainer", daemon=True)
        self.thread.start()

    def _fit(self) -> None:
        try:
            self.trainer.fit()
        except Exception as error:
            self.error = error

    def is_usable(self) -> bool:
        """Whether it can take another trial.

        It can if the trial before it is done and its workers were never restarted.
        """
        status = self._poll()
        return self.thread.is_alive() and status.is_done and not status.was_restarted

    def train(self, spec: TrialSpec) -> Generator[dict[str, Any], None, bool]:
        """Hand a trial to the workers, and yield its reports.

        If it fails permanently, the reason is in its folder.

        Returns:
            Whether a worker started it: a trainer may end while its workers wait for a trial.
        """
        ray.get(self.queue.submit.remote(spec.to_json()))
        while True:
            # Checked before the poll, so that this poll still gets what the workers reported before
            # the trainer ended.
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
        """Write into the trial's folder why the trainer ended before the trial did.

        Raises:
            Exception: the trainer itself failed, and not the training.
        """
        # Raised, so that Tune tries the trial again: the training was not at fault.
        if self.error and not isinstance(self.error, TrainingFailedError):
            raise self.error
        spec.folder.mkdir(parents=True, exist_ok=True)
        reason = spec.trial_dir.read_failure(self.error)
        if reason is None:
            reason = FailureReason("Ray lost the trial", "worker_lost")
        spec.trial_dir.write_failure(reason)

    def cancel(self) -> None:
        """Stop the running trial, if there is one, after its next step.

        Returns after ``_CANCEL_S`` at the latest; the caller closes a pool that is not usable then.
        """
        ray.get(self.queue.cancel.remote())
        deadline = time.monotonic() + _CANCEL_S
        # Each poll waits for up to a second, so the loop needs no pause.
        while self.thread.is_alive() and time.monotonic() < deadline:
            if self._poll().is_done:
                return

    def close(self, timeout_s: float) -> None:
        """End the workers, and wait until their resources are free for the next pool or study.

        If a trainer does not end in order, Ray frees its placement group only when the whole job
        ends. Then this removes the placement group.
        """
        # If the queue is lost, the next call of the workers fails, and that ends them.
        with suppress(RayActorError):
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
    """Tune's trainable: it has one pool, and hands it one trial after the other.

    Tune reuses its process for several trials (``reuse_actors``), and so the pool lives on.

    When a trial has failed permanently, after its retries by Ray Train, this ends normally: Tune is
    to try again only when this process itself is lost.
    """

    _pool: WorkerPool | None = None
    _reports: Generator[dict[str, Any]]

    @classmethod
    def default_resource_request(cls, config: dict[str, Any]) -> tune.PlacementGroupFactory:
        """Ask for the head node and for no core: only the workers need resources."""
        # Ray refuses a request without any resource, and every head node has this one. With a
        # fraction of a core, the cores that are left would hold fewer workers.
        return tune.PlacementGroupFactory([{"node:__internal_head__": 0.001}])

    def setup(self, config: dict[str, Any]) -> None:
        """Prepare the first trial; ``step`` starts it."""
        self._reports = self._train(TrialSpec.from_json(config["spec"]))

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Prepare another trial; one that was pruned is cancelled first."""
        try:
            if self._pool:
                self._pool.cancel()
                if not self._pool.is_usable():
                    self._close()
        # The queue is lost: the next trial gets a new pool.
        except RayActorError:
            self._close()
        self.setup(new_config)
        return True

    def step(self) -> dict[str, Any]:
        """Wait for the next report, and return it.

        Raises:
            Exception: Tune is to try again; the workers' resources are free by then.
        """
        try:
            return next(self._reports, {"done": True})
        except Exception:
            # The next attempt needs the workers' resources: wait longer than a stop may take.
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
        # The study is to stop: no other trial starts.
        if spec.stop_file.exists():
            return
        if self._pool and (yield from self._pool.train(spec)):
            return
        # There is no pool, or its trainer ended before a worker took the trial.
        self._close()
        # Ray Train reads it when it starts. On a cluster a raylet starts this process, without the
        # launch's environment.
        os.environ.update(spec.environment)
        self._pool = WorkerPool(spec)
        if not (yield from self._pool.train(spec)):
            self._pool.record_failure(spec)


def _trainer(spec: TrialSpec, queue: Any) -> TorchTrainer:
    from ray.train.torch import TorchConfig, TorchTrainer

    worker = spec.worker
    resources = {"CPU": float(worker.cpus_per_worker)}
    if spec.gpus_per_worker:
        resources["GPU"] = float(spec.gpus_per_worker)
    num_workers: int | tuple[int, int] = worker.workers
    # A range of workers makes Ray Train elastic.
    if worker.min_workers is not None and worker.min_workers < worker.workers:
        num_workers = (worker.min_workers, worker.workers)
    storage = spec.storage
    filesystem = None
    if worker.object_store:
        store = open_object_store(worker.object_store)
        storage = f"{store.root}/ray"
        filesystem = store.files
    # How often the controller may fail to start a group of workers: -1 is without limit, since on a
    # cluster another node may come. On one machine a limit ends a wait that nothing could end.
    controller_failures = 1
    if spec.waits_for_nodes:
        controller_failures = -1
    # NCCL refuses two workers of one group on one GPU; gloo does not.
    torch_config = None
    if spec.shares_gpu and worker.workers > 1:
        torch_config = TorchConfig(backend="gloo")
    return TorchTrainer(
        run_worker,
        torch_config=torch_config,
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
        Failure: an internal error on a GPU, so that the next trial gets a new process.
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
        # A collective call of Ray Train's: every worker must make it, at the same steps.
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
        # After a failed kernel, CUDA fails every later call of this process on that device.
        if reason and reason.kind == "internal" and spec["gpus_per_worker"]:
            raise Failure(
                f"{reason.message}: a new process for the next trial, the device may be unusable "
                "in this one"
            )
