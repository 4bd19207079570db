"""``fit``: the only training loop. It reports to a function it is given and knows nothing of what is behind it.

Load order: settings, data, model, optimiser, then the newest whole checkpoint of the trial's folder.
A training that was stopped and went on equals one that was not: bit for bit on the CPU (``mar.step``).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from mar import MANIFEST, RESULT_DIR, distributed
from mar.atomic_dir import read_atomic_dir
from mar.config.overrides import build, without_paths
from mar.config.schema import TrainingConfig
from mar.data import frame_cache
from mar.data.annotations import Video, read_split
from mar.data.dataset import Batch, TrainingOrder, training_batches
from mar.errors import Failure, Stopped, UserError
from mar.evaluation.correctness import read_history
from mar.evaluation.evaluator import Evaluator
from mar.model.mar import MAR
from mar.training import checkpoint
from mar.training.checkpoint import Progress, Saver
from mar.training.memory import peak_training_memory_gib
from mar.training.optim import build_optimizer, learning_rate, set_learning_rate
from mar.training.result import FinishedTraining, write_result
from mar.training.step import Execution, TrainState, train_step
from mar.weights import pretrained

Report = Callable[[int, dict[str, float], Path | None], None]
"""(finished epochs, metrics, the checkpoint that is being written or none) -> nothing. Called equally often on every worker."""


@dataclass
class Training(TrainState):
    """A training under way."""

    folder: Path
    steps_per_epoch: int
    saver: Saver
    is_to_stop: bool = False
    """Whether somebody wishes that it saves and stops."""

    @property
    def epoch(self) -> int:
        """Finished epochs."""
        return len(self.progress.history)


def fit(
    settings: TrainingConfig, folder: Path, report: Report, execution: Execution
) -> dict[str, float]:
    """Train from the newest checkpoint in ``folder`` (or from the start), test, and return the final metrics.

    Reports every epoch, those before the resumption included, so that a listener that lost some gets all.
    Leaves ``folder/result``: ``model.safetensors``, ``settings.yaml``, ``metrics.json``, ``history.csv``, ``curves.png`` and, where there
    are classes, ``predictions.csv``, ``answers.npz`` and ``confusion.png``.

    Raises:
        UserError: the settings do not fit the data.
        Failure: the loss is not finite, a video is broken (``data.broken: error``), or the disk refuses.
        Stopped: ``execution.step`` said so; what was done is saved.
    """
    finished = distributed.broadcast_from_rank0(lambda: _finished(settings, folder))
    if finished is not None:
        return _report_again(finished, settings, folder, report)
    train, val = read_split(settings.data, "train"), read_split(settings.data, "val")
    frame_cache.check(settings.data, train)
    order = TrainingOrder(settings, len(train), distributed.worker_rank())
    torch.manual_seed(settings.seed)
    model = MAR(settings).to(execution.device)
    optimizer = build_optimizer(model, settings.recipe)
    found = distributed.broadcast_from_rank0(
        lambda: checkpoint.latest(folder, settings, execution.say)
    )
    progress = checkpoint.restore(found, model, optimizer) if found else Progress()
    if settings.encoder.weights and not found:
        execution.say(pretrained.start(model, settings))
    order.first_step = progress.step
    for epoch, metrics in enumerate(progress.history, start=1):
        report(epoch, metrics, None)
    processes = execution.loader_processes
    batches = training_batches(settings, train, order, processes, execution.device)
    validate = Evaluator(
        settings,
        val,
        execution.device,
        loader_processes=processes,
        is_kept=True,
        alive=execution.alive,
    )
    with Saver(folder, settings, execution.keep, execution.stored, execution.try_again) as saver:
        training = Training(
            settings, execution, model, optimizer, progress, folder, order.steps_per_epoch, saver
        )
        while training.epoch < settings.recipe.epochs:
            metrics = _train_epoch(training, batches)
            if (training.epoch + 1) % settings.evaluation.every_epochs == 0:
                clock = _Clock(progress)
                metrics |= (validate.reconstruction if settings.pretrains else validate)(
                    model
                ).metrics("val")
                clock.stop()
            metrics["time/elapsed_s"] = progress.elapsed_s
            progress.history.append(metrics)
            report(training.epoch, metrics, _save(training))
            if training.is_to_stop and training.epoch < settings.recipe.epochs:
                saver.wait()
                raise Stopped(f"stopped after epoch {training.epoch}, saved")
    batches.close()
    del batches, validate  # their loader processes end before those of testing begin
    trained = FinishedTraining(settings, folder, execution, model, progress.history)
    return _finish(trained, val, report)


def reevaluate(
    settings: TrainingConfig, result: Path, folder: Path, report: Report, execution: Execution
) -> dict[str, float]:
    """Test a finished training under other settings of ``evaluation`` (Tables III b, III c); returns the final metrics.

    ``result`` is the training's result folder. What it measured in training is reported as it was. Leaves
    ``folder/result`` as ``fit`` does, without the model: ``trained_by.txt`` says where that is.

    Raises:
        UserError: the settings do not fit the data.
        Failure: ``result`` is not whole, or the disk refuses.
    """
    finished = distributed.broadcast_from_rank0(lambda: _finished(settings, folder))
    if finished is not None:
        return _report_again(finished, settings, folder, report)
    val = read_split(settings.data, "val")
    facts = read_atomic_dir(result)
    model = MAR(settings).to(execution.device)
    model.load_state_dict(load_file(result / "model.safetensors"))
    history = {
        name: value
        for name, value in facts["metrics"].items()
        if not name.startswith(("val/", "test/"))
    }
    return _finish(
        FinishedTraining(settings, folder, execution, model, [history], result), val, report
    )


def _finished(settings: TrainingConfig, folder: Path) -> list[dict[str, float]] | None:
    """Return the epochs' metrics, and last the final ones, of a result of these settings that is in the folder already.

    Whoever was to write it down was killed in that moment, or has lost its database since. None: there is no such.

    Raises:
        Failure: there is one, and it is damaged.
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


def _report_again(
    finished: list[dict[str, float]], settings: TrainingConfig, folder: Path, report: Report
) -> dict[str, float]:
    for epoch, metrics in enumerate(finished[:-1], start=1):
        report(epoch, metrics, None)
    report(settings.recipe.epochs, finished[-1], folder / RESULT_DIR)
    return finished[-1]


class _Clock:
    """Adds the time until ``stop`` to the progress."""

    def __init__(self, progress: Progress) -> None:
        self.progress, self.started = progress, time.perf_counter()

    def stop(self) -> None:
        self.progress.elapsed_s += time.perf_counter() - self.started


def _train_epoch(training: Training, batches: Iterator[Batch]) -> dict[str, float]:
    """Finish the epoch that the progress stands in; returns its metrics and starts new sums."""
    settings, progress, device = training.settings, training.progress, training.execution.device
    end, every = (
        (training.epoch + 1) * training.steps_per_epoch,
        training.execution.checkpoint_every_steps,
    )
    sums = torch.tensor(progress.sums, dtype=torch.float64, device=device) * (
        training.worker_rank.rank == 0
    )
    clock, first_step, elapsed_s, rate = _Clock(progress), progress.step, progress.elapsed_s, 0.0
    while progress.step < end:
        batch = next(batches)
        sums[4] += _count_broken(training, batch)
        rate = learning_rate(settings.recipe, progress.step / training.steps_per_epoch)
        set_learning_rate(training.optimizer, rate)
        sums[:4] += train_step(training, batch)
        progress.step += 1
        if device.type == "cpu" or progress.step == end:  # elsewhere to look is to wait
            _check_numbers(training, rate)
        wish = training.execution.step(
            progress.step, training.steps_per_epoch * settings.recipe.epochs
        )
        if wish == "leave":
            raise Stopped(f"left at step {progress.step}, not saved")
        training.is_to_stop = training.is_to_stop or wish == "stop"
        is_due = bool(every) and progress.step % every == 0
        if (is_due or wish != "go on") and progress.step < end:
            _check_numbers(training, rate)
            progress.sums = distributed.all_reduce_sum(sums).tolist()
            clock.stop()
            _save(training)
            if training.is_to_stop:
                training.saver.wait()
                raise Stopped(f"stopped at step {progress.step}, saved")
            clock = _Clock(progress)
    total, classification, reconstruction, clips, broken = distributed.all_reduce_sum(sums).tolist()
    clock.stop()
    progress.sums = Progress().sums
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
    trained = (progress.step - first_step) * settings.recipe.batch_size
    return metrics | {
        "train/num_broken": broken,
        "throughput/clips_per_s": trained / (progress.elapsed_s - elapsed_s),
    }


def _check_numbers(training: Training, rate: float) -> None:
    """See that every gradient was finite.

    Raises:
        Failure: one was not; the weights are those before it, and the last checkpoint is good.
    """
    if training.has_non_finite_grad.item():
        recipe, step = training.settings.recipe, training.progress.step
        raise Failure(
            f"the gradient is not finite at or before step {step} (epoch {training.epoch + 1}); no step was taken with "
            f"it. To blame, likely: recipe.base_lr={recipe.base_lr:g} (rate {rate:.2g}), "
            f"recipe.clip_grad={recipe.clip_grad}, recipe.precision={recipe.precision}",
            "numbers",
        )


def _count_broken(training: Training, batch: Batch) -> int:
    """Return the number of broken videos in the batch, if the settings allow any."""
    if batch.broken and training.settings.data.broken == "error":
        raise Failure(
            f"{batch.broken[0]}. Repair or remove it, or set data.broken: skip to leave such videos out",
            "data",
        )
    return len(batch.broken)


def _save(training: Training) -> Path:
    """Have a checkpoint written beside the training; returns where it will be."""
    if training.worker_rank.rank == 0:
        training.saver.save(training.model, training.optimizer, training.progress)
    return checkpoint.path_for(training.folder, training.progress)


def _finish(trained: FinishedTraining, val: list[Video], report: Report) -> dict[str, float]:
    """Test with all views, write the result folder, report the last time."""
    settings, execution, model = trained.settings, trained.execution, trained.model
    views, device, processes = settings.evaluation, execution.device, execution.loader_processes
    test = Evaluator(
        settings,
        val,
        device,
        clips=views.clips,
        crops=views.crops,
        loader_processes=processes,
        alive=execution.alive,
    )
    predictions = (test.reconstruction if settings.pretrains else test)(model)
    if predictions.broken:
        first = f"the first: {predictions.broken[0]}"
        execution.say(
            f"{len(predictions.broken)} of {len(val)} test videos could not be decoded, {first}"
        )
    metrics = trained.history[-1] | predictions.metrics("test")
    one_view = Evaluator(settings, val, device, loader_processes=processes, alive=execution.alive)
    if settings.redraws_in_testing and not settings.pretrains:
        metrics["test/reconstruction_loss"] = one_view.reconstruction(model).loss
    if settings.evaluation.shuffled_frames and not settings.pretrains:
        shuffle = Evaluator(
            settings,
            val,
            device,
            clips=views.clips,
            crops=views.crops,
            shuffled=True,
            loader_processes=processes,
            alive=execution.alive,
        )
        metrics["test/top1_shuffled_frames"] = shuffle(model).accuracy(1)
    if device.type == "cuda" and not trained.by:
        with suppress(
            UserError
        ):  # no room beside the model: a trial does not fail over this figure
            metrics["memory/batch_of_1_gib"] = peak_training_memory_gib(settings, 1)
    if distributed.worker_rank().rank == 0:
        write_result(trained, val, predictions, metrics)
    report(settings.recipe.epochs, metrics, trained.folder / RESULT_DIR)
    return metrics
