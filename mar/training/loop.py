"""``fit``: the only training loop. It reports through callbacks and does not know what runs it.

Load order: settings, data, model, optimiser, then the newest complete checkpoint of the trial's
folder. A training that was stopped and resumed equals one that was not: bit for bit on the CPU
(``mar.training.step``).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from mar import MANIFEST, RESULT_DIR, distributed
from mar.atomic_dir import read_atomic_dir
from mar.config.overrides import build, without_paths
from mar.config.schema import TrainingConfig
from mar.data import frame_cache
from mar.data.annotations import Video, read_split
from mar.data.dataset import Batch, TrainingOrder, training_batches
from mar.errors import Failure, Stopped, UserError
from mar.evaluation.correctness import read_history
from mar.evaluation.evaluator import Evaluator, Predictions, Reconstruction
from mar.model.mar import MAR
from mar.training import checkpoint
from mar.training.checkpoint import Progress, Saver
from mar.training.memory import peak_training_memory_gib
from mar.training.optim import build_optimizer, learning_rate, set_learning_rate
from mar.training.reports import EpochReport, TrainingCallbacks, TrainingSignal
from mar.training.result import FinishedTraining, write_result
from mar.training.step import RuntimeConfig, TrainState, train_step
from mar.weights import pretrained


@dataclass
class Training(TrainState):
    """A training in progress."""

    callbacks: TrainingCallbacks
    steps_per_epoch: int
    saver: Saver
    is_to_stop: bool = False
    """Whether it was asked to save and stop."""

    @property
    def epoch(self) -> int:
        """Finished epochs."""
        return len(self.progress.history)

    @property
    def num_steps(self) -> int:
        """Steps of the whole training."""
        return self.steps_per_epoch * self.settings.recipe.epochs


def fit(
    settings: TrainingConfig, folder: Path, runtime: RuntimeConfig, callbacks: TrainingCallbacks
) -> dict[str, float]:
    """Train from the newest checkpoint in ``folder`` (or from the start), then test.

    Reports every epoch, replaying those before a resumption, so that a reader that lost some gets
    all. Leaves ``folder/result``: ``model.safetensors``, ``settings.yaml``, ``metrics.json``,
    ``history.csv``, ``curves.png`` and, where there are classes, ``predictions.csv``,
    ``correctness.npz`` and ``confusion.png``.

    Raises:
        UserError: the settings do not fit the data.
        Failure: the loss is not finite, a video is broken (``data.broken: error``), or the disk
            refuses.
        Stopped: ``callbacks.on_step`` asked for it; what was done is saved.
    """
    finished = distributed.broadcast_from_rank0(lambda: _finished(settings, folder))
    if finished is not None:
        return _replay_result(finished, settings, callbacks)
    train = read_split(settings.data, "train")
    val = read_split(settings.data, "val")
    frame_cache.check(settings.data, train)
    order = TrainingOrder(settings, len(train), distributed.worker_rank())
    torch.manual_seed(settings.seed)
    model = MAR(settings).to(runtime.device)
    optimizer = build_optimizer(model, settings.recipe)
    # Rank 0 looks for the checkpoint, so that all workers resume from the same one.
    found = distributed.broadcast_from_rank0(
        lambda: checkpoint.latest(folder, settings, callbacks.log)
    )
    progress = Progress()
    if found:
        progress = checkpoint.restore(found, model, optimizer)
    elif settings.encoder.weights:
        callbacks.log(pretrained.start(model, settings))
    order.first_step = progress.step
    for epoch, metrics in enumerate(progress.history, start=1):
        callbacks.report(EpochReport(epoch, metrics, is_replay=True))
    processes = runtime.loader_processes
    batches = training_batches(settings, train, order, processes, runtime.device)
    validate = Evaluator(
        settings,
        val,
        runtime.device,
        loader_processes=processes,
        is_kept=True,
        alive=callbacks.heartbeat,
    )
    with Saver(
        folder, settings, runtime.keep, callbacks.on_checkpoint, callbacks.on_write_error
    ) as saver:
        training = Training(
            settings,
            runtime,
            model,
            optimizer,
            progress,
            callbacks,
            order.steps_per_epoch,
            saver,
        )
        while training.epoch < settings.recipe.epochs:
            _epoch(training, batches, validate)
    # Their loader processes end before those of testing start.
    batches.close()
    del batches, validate
    trained = FinishedTraining(settings, folder, model, progress.history)
    return _finish(trained, val, runtime, callbacks)


def reevaluate(
    settings: TrainingConfig,
    result: Path,
    folder: Path,
    runtime: RuntimeConfig,
    callbacks: TrainingCallbacks,
) -> dict[str, float]:
    """Test a finished training under other settings of ``evaluation`` (Tables III b, III c).

    Returns the final metrics.

    ``result`` is the training's result folder. Its training metrics are reported unchanged. Leaves
    ``folder/result`` as ``fit`` does, without the model: ``trained_by.txt`` names the folder that
    has it.

    Raises:
        UserError: the settings do not fit the data.
        Failure: ``result`` is not complete, or the disk refuses.
    """
    finished = distributed.broadcast_from_rank0(lambda: _finished(settings, folder))
    if finished is not None:
        return _replay_result(finished, settings, callbacks)
    val = read_split(settings.data, "val")
    manifest = read_atomic_dir(result)
    model = MAR(settings).to(runtime.device)
    model.load_state_dict(load_file(result / "model.safetensors"))
    history = {
        name: value
        for name, value in manifest["metrics"].items()
        if not name.startswith(("val/", "test/"))
    }
    trained = FinishedTraining(settings, folder, model, [history], trained_in=result)
    return _finish(trained, val, runtime, callbacks)


def _finished(settings: TrainingConfig, folder: Path) -> list[dict[str, float]] | None:
    """Return the metrics of each epoch, and last the final ones, of a result in the folder.

    None: it has none of these settings.

    It has one when the launch was killed before it recorded the result, or when the database was
    lost since.

    Raises:
        Failure: the result is damaged.
    """
    result = folder / RESULT_DIR
    if not (result / MANIFEST).is_file():
        return None
    try:
        manifest = read_atomic_dir(result)
    except Failure as damage:
        raise Failure(
            f"{result} is damaged: {damage}. To train it again, remove that folder", "damaged"
        ) from None
    if without_paths(build(manifest["settings"])) != without_paths(settings):
        return None
    final = {name: float(value) for name, value in manifest["metrics"].items()}
    return [*read_history(result), final]


def _replay_result(
    finished: list[dict[str, float]], settings: TrainingConfig, callbacks: TrainingCallbacks
) -> dict[str, float]:
    """Report a result that exists as its training did; returns the final metrics."""
    *history, final = finished
    for epoch, metrics in enumerate(history, start=1):
        callbacks.report(EpochReport(epoch, metrics, is_replay=True))
    callbacks.report(EpochReport(settings.recipe.epochs, final, is_final=True))
    return final


class _Clock:
    """Adds the time from its creation to ``stop`` to the progress."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.started = time.perf_counter()

    def stop(self) -> None:
        self.progress.elapsed_s += time.perf_counter() - self.started


def _epoch(training: Training, batches: Iterator[Batch], validate: Evaluator) -> None:
    """Finish the epoch that the progress is in: train, validate when it is due, save, report.

    Raises:
        Stopped: it was asked to stop; the epoch is saved.
    """
    settings = training.settings
    progress = training.progress
    metrics = _train_epoch(training, batches)
    if (training.epoch + 1) % settings.evaluation.every_epochs == 0:
        clock = _Clock(progress)
        metrics |= _evaluate(validate, training.model, settings).metrics("val")
        clock.stop()
    metrics["time/elapsed_s"] = progress.elapsed_s
    progress.history.append(metrics)
    _save(training)
    training.callbacks.report(EpochReport(training.epoch, metrics))
    if training.is_to_stop and training.epoch < settings.recipe.epochs:
        training.saver.wait()
        raise Stopped(f"stopped after epoch {training.epoch}, saved")


def _evaluate(
    evaluator: Evaluator, model: MAR, settings: TrainingConfig
) -> Predictions | Reconstruction:
    """Measure what the training is for: accuracy, or in pre-training the reconstruction loss."""
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
    rate = 0.0
    while progress.step < end:
        batch = next(batches)
        sums[4] += _count_broken(training, batch)
        rate = learning_rate(settings.recipe, progress.step / training.steps_per_epoch)
        set_learning_rate(training.optimizer, rate)
        sums[:4] += train_step(training, batch)
        progress.step += 1
        # On an accelerator, reading the flag waits for the device: once an epoch is enough there.
        if training.runtime.device.type == "cpu" or progress.step == end:
            _check_finite(training, rate)
        if _is_checkpoint_due(training) and progress.step < end:
            _check_finite(training, rate)
            progress.sums = distributed.all_reduce_sum(sums).tolist()
            clock.stop()
            _save_inside_epoch(training)
            clock = _Clock(progress)
    totals = distributed.all_reduce_sum(sums).tolist()
    clock.stop()
    progress.sums = Progress().sums
    metrics = _epoch_metrics(training, totals, rate)
    num_clips = (progress.step - first_step) * settings.recipe.batch_size
    metrics["throughput/clips_per_s"] = num_clips / (progress.elapsed_s - elapsed_before_s)
    return metrics


def _resumed_sums(training: Training) -> Tensor:
    """Return this worker's sums at the epoch's current step.

    A checkpoint has them over all workers; the first worker carries them on, the others start at
    zero.
    """
    device = training.runtime.device
    sums = torch.tensor(training.progress.sums, dtype=torch.float64, device=device)
    return sums * (training.worker_rank.rank == 0)


def _is_checkpoint_due(training: Training) -> bool:
    """Ask what to do after a step; whether to save now, in the middle of an epoch.

    Raises:
        Stopped: to stop without saving.
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
    """Save in the middle of an epoch, and stop if that was asked for.

    Raises:
        Stopped: it was, and the checkpoint is on the disk.
    """
    _save(training)
    if training.is_to_stop:
        training.saver.wait()
        raise Stopped(f"stopped at step {training.progress.step}, saved")


def _epoch_metrics(training: Training, totals: list[float], rate: float) -> dict[str, float]:
    """Return an epoch's mean losses from its sums over all workers.

    Raises:
        Failure: not one video could be decoded.
    """
    settings = training.settings
    total, classification, reconstruction, clips, broken = totals
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
        Failure: one was not; the weights are those before it, and the last checkpoint is good.
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
    """Have a checkpoint written beside the training; one worker writes for all."""
    if training.worker_rank.rank == 0:
        training.saver.save(training.model, training.optimizer, training.progress)


def _finish(
    trained: FinishedTraining,
    val: list[Video],
    runtime: RuntimeConfig,
    callbacks: TrainingCallbacks,
) -> dict[str, float]:
    """Test with all views, write the result folder, report the final metrics."""
    settings = trained.settings
    model = trained.model
    test = _evaluator(trained, val, runtime, callbacks)
    predictions = _evaluate(test, model, settings)
    if predictions.broken:
        callbacks.log(
            f"{len(predictions.broken)} of {len(val)} test videos could not be decoded, "
            f"the first: {predictions.broken[0]}"
        )
    metrics = trained.history[-1] | predictions.metrics("test")
    if settings.redraws_in_testing and not settings.pretrains:
        one_view = Evaluator(
            settings,
            val,
            runtime.device,
            loader_processes=runtime.loader_processes,
            alive=callbacks.heartbeat,
        )
        metrics["test/reconstruction_loss"] = one_view.reconstruction(model).loss
    if settings.evaluation.shuffled_frames and not settings.pretrains:
        shuffled = _evaluator(trained, val, runtime, callbacks, shuffled=True)
        metrics["test/top1_shuffled_frames"] = shuffled(model).accuracy(1)
    if runtime.device.type == "cuda" and trained.trained_in is None:
        # There may be no room beside the model; a trial does not fail over this figure.
        with suppress(UserError):
            metrics["memory/batch_of_1_gib"] = peak_training_memory_gib(settings, 1)
    if distributed.worker_rank().rank == 0:
        write_result(trained, val, predictions, metrics, callbacks.on_write_error)
    callbacks.report(EpochReport(settings.recipe.epochs, metrics, is_final=True))
    return metrics


def _evaluator(
    trained: FinishedTraining,
    val: list[Video],
    runtime: RuntimeConfig,
    callbacks: TrainingCallbacks,
    shuffled: bool = False,
) -> Evaluator:
    """Return the evaluator of the test: all views of each video."""
    views = trained.settings.evaluation
    return Evaluator(
        trained.settings,
        val,
        runtime.device,
        clips=views.clips,
        crops=views.crops,
        shuffled=shuffled,
        loader_processes=runtime.loader_processes,
        alive=callbacks.heartbeat,
    )
