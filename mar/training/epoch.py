"""One epoch of a training: its steps, validation, checkpoint and report."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mar import distributed
from mar.config.schedule import stable_epochs
from mar.config.schema import TrainingConfig
from mar.data.dataset import Batch
from mar.errors import Failure, Stopped
from mar.evaluation.evaluator import Evaluator, Predictions, Reconstruction
from mar.model.mar import MAR
from mar.training.checkpoint import Progress, Saver, path_for
from mar.training.optim import learning_rate, set_learning_rate
from mar.training.prolong import share
from mar.training.reports import EpochReport, TrainingCallbacks, TrainingSignal
from mar.training.step import TrainState, train_step


@dataclass
class Training(TrainState):
    """A training in progress."""

    callbacks: TrainingCallbacks
    steps_per_epoch: int
    saver: Saver
    is_to_stop: bool = False
    """Whether the training was asked to save and stop."""

    @property
    def epoch(self) -> int:
        """Finished epochs."""
        return len(self.progress.history)

    @property
    def num_steps(self) -> int:
        """Steps of the whole training."""
        return self.steps_per_epoch * self.settings.recipe.epochs


class _Clock:
    """Adds the time from its creation to ``stop`` to the progress."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.started = time.perf_counter()

    def stop(self) -> None:
        self.progress.elapsed_s += time.perf_counter() - self.started


def run_epoch(training: Training, batches: Iterator[Batch], validate: Evaluator) -> None:
    """Finish the epoch that the progress is in: train, validate when it is due, save, report.

    Raises:
        Stopped: the training was asked to stop; the epoch is saved.
    """
    settings = training.settings
    progress = training.progress
    metrics = _train_epoch(training, batches)
    if (training.epoch + 1) % settings.evaluation.every_epochs == 0:
        # ``elapsed_s`` counts training and evaluation; saving and reporting are not timed.
        clock = _Clock(progress)
        metrics |= evaluate(validate, training.model, settings).metrics("val")
        clock.stop()
    metrics["time/elapsed_s"] = progress.elapsed_s
    # The checkpoint must have this epoch in its history: a resumed training counts epochs by it.
    progress.history.append(metrics)
    _save(training)
    share_stable_part(training)
    training.callbacks.report(EpochReport(training.epoch, metrics))
    # After the last epoch only the test is left: the training finishes and does not stop.
    if training.is_to_stop and training.epoch < settings.recipe.epochs:
        training.saver.wait()
        raise Stopped(f"stopped after epoch {training.epoch}, saved")


def share_stable_part(training: Training) -> None:
    """At the end of the stable part, leave its checkpoint for longer trainings."""
    folder = training.runtime.stable_dir
    is_its_end = training.epoch == stable_epochs(training.settings.recipe)
    if folder is None or not is_its_end or training.worker_rank.rank:
        return
    training.saver.wait()
    checkpoint = path_for(training.saver.folder, training.progress)
    if not checkpoint.is_dir():
        return
    # It only saves longer trainings time: this one goes on without it.
    try:
        share(checkpoint, folder)
    except Failure as failure:
        training.callbacks.log(f"{failure}: longer trainings will not continue this one")


def evaluate(
    evaluator: Evaluator, model: MAR, settings: TrainingConfig
) -> Predictions | Reconstruction:
    """Measure the accuracy, or in pre-training the reconstruction loss."""
    if settings.pretrains:
        return evaluator.reconstruction(model)
    return evaluator(model)


def _train_epoch(training: Training, batches: Iterator[Batch]) -> dict[str, float]:
    """Train to the end of the epoch that the progress is in.

    Returns the epoch's metrics and starts new sums.

    Raises:
        Stopped: the step callback asked to stop before the epoch's end.
    """
    settings = training.settings
    progress = training.progress
    end = (training.epoch + 1) * training.steps_per_epoch
    sums = _resumed_sums(training)
    clock = _Clock(progress)
    first_step = progress.step
    elapsed_before_s = progress.elapsed_s
    # A checkpoint may be inside an epoch, so the loop can begin in the middle of one.
    rate = 0.0
    while progress.step < end:
        batch = next(batches)
        sums[4] += _count_broken(training, batch)
        # The rate changes in every step: its time is a fraction of an epoch.
        rate = learning_rate(settings.recipe, progress.step / training.steps_per_epoch)
        set_learning_rate(training.optimizer, rate)
        sums[:4] += train_step(training, batch)
        progress.step += 1
        # On an accelerator, reading the flag waits for the device: once an epoch is enough there.
        if training.runtime.device.type == "cpu" or progress.step == end:
            _check_finite(training, rate)
        # At an epoch's end ``run_epoch`` saves, with the validation.
        if _is_checkpoint_due(training) and progress.step < end:
            # No checkpoint is saved after a gradient that is not finite.
            _check_finite(training, rate)
            progress.sums = distributed.all_reduce_sum(sums).tolist()
            clock.stop()
            _save_inside_epoch(training)
            clock = _Clock(progress)
    totals = distributed.all_reduce_sum(sums).tolist()
    clock.stop()
    # Sums of zero mark a checkpoint at an epoch's end (``mar.training.retention``).
    progress.sums = Progress().sums
    metrics = _epoch_metrics(training, totals, rate)
    # Steps of an earlier attempt are in neither figure.
    num_clips = (progress.step - first_step) * settings.recipe.batch_size
    metrics["throughput/clips_per_s"] = num_clips / (progress.elapsed_s - elapsed_before_s)
    return metrics


def _resumed_sums(training: Training) -> Tensor:
    """Return this worker's sums at the epoch's current step.

    A checkpoint has the sums over all workers, so the first worker starts from them and the others
    start at zero.
    """
    device = training.runtime.device
    sums = torch.tensor(training.progress.sums, dtype=torch.float64, device=device)
    return sums * (training.worker_rank.rank == 0)


def _is_checkpoint_due(training: Training) -> bool:
    """Ask what to do after a step; returns whether to save now, in the middle of an epoch.

    Raises:
        Stopped: the answer is to stop without saving.
    """
    step = training.progress.step
    signal = training.callbacks.on_step(step, training.num_steps)
    if signal == TrainingSignal.ABORT:
        raise Stopped(f"left at step {step}, not saved")
    if signal == TrainingSignal.STOP:
        training.is_to_stop = True
    every = training.runtime.checkpoint_every_steps
    is_due = every is not None and step % every == 0
    return is_due or signal != TrainingSignal.CONTINUE


def _save_inside_epoch(training: Training) -> None:
    """Save in the middle of an epoch, then stop if the training was asked to.

    Raises:
        Stopped: the training was asked to stop; the checkpoint is on the disk.
    """
    _save(training)
    if training.is_to_stop:
        # The message says that it was saved, and the save runs in another thread.
        training.saver.wait()
        raise Stopped(f"stopped at step {training.progress.step}, saved")


def _epoch_metrics(training: Training, totals: list[float], rate: float) -> dict[str, float]:
    """Return an epoch's mean losses from its sums over all workers.

    Raises:
        Failure: not one video could be decoded.
    """
    settings = training.settings
    total, classification, reconstruction, clips, broken = totals
    # The means would divide by zero.
    if not clips:
        raise Failure(
            f"not one video of epoch {training.epoch + 1} could be decoded: run mar data check",
            "data",
        )
    metrics = {"train/loss": total / clips, "train/lr": rate}
    if not settings.pretrains:
        metrics["train/classification_loss"] = classification / clips
    if settings.reconstructs:
        metrics["train/reconstruction_loss"] = reconstruction / clips
    metrics["train/num_broken"] = broken
    return metrics


def _check_finite(training: Training, rate: float) -> None:
    """Check that every gradient so far was finite.

    Raises:
        Failure: one was not. The weights have not changed since, and the last checkpoint is good.
    """
    if training.has_non_finite_grad.item():
        recipe = training.settings.recipe
        step = training.progress.step
        raise Failure(
            f"the gradient is not finite at or before step {step} (epoch {training.epoch + 1}); "
            "no step was taken with "
            f"it. Likely causes: recipe.base_lr={recipe.base_lr:g} (rate {rate:.2g}), "
            f"recipe.clip_grad={recipe.clip_grad}, recipe.precision={recipe.precision}",
            "non_finite",
        )


def _count_broken(training: Training, batch: Batch) -> int:
    """Return the number of broken videos in the batch.

    Raises:
        Failure: there is one, and the settings allow none.
    """
    if batch.broken and training.settings.data.broken == "error":
        raise Failure(
            f"{batch.broken[0]}. Repair or remove it, or set data.broken: skip to leave such "
            "videos out",
            "data",
        )
    return len(batch.broken)


def _save(training: Training) -> None:
    """Start to write a checkpoint; rank 0 alone writes, since all workers have the same state."""
    if training.worker_rank.rank == 0:
        training.saver.save(training.model, training.optimizer, training.progress)
