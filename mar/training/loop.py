"""``fit``: the only training loop. It reports through callbacks and does not know what runs it.

Load order: settings, data, model, optimiser, then the newest complete checkpoint of the trial's
folder. A training that was stopped and resumed equals one that was not: bit for bit on the CPU
(``mar.training.step``).
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import torch
from safetensors.torch import load_file

from mar import MANIFEST, RESULT_DIR, distributed
from mar.atomic_dir import read_atomic_dir
from mar.config.overrides import build, without_paths
from mar.config.schema import TrainingConfig
from mar.data import frame_cache
from mar.data.annotations import Video, read_split
from mar.data.dataset import TrainingOrder
from mar.data.loaders import training_batches
from mar.errors import Failure, UserError
from mar.evaluation.correctness import read_history
from mar.evaluation.evaluator import Evaluator
from mar.model.mar import MAR
from mar.training import checkpoint
from mar.training.checkpoint import Progress, Saver
from mar.training.epoch import Training, evaluate, run_epoch, share_stable_part
from mar.training.frozen_tokens import FrozenTokens, cache_tokens
from mar.training.memory import peak_training_memory_gib
from mar.training.optim import build_optimizer
from mar.training.prolong import shared_start
from mar.training.reports import EpochReport, TrainingCallbacks
from mar.training.result import FinishedTraining, write_result
from mar.training.step import RuntimeConfig
from mar.weights import pretrained


def fit(
    settings: TrainingConfig, folder: Path, runtime: RuntimeConfig, callbacks: TrainingCallbacks
) -> dict[str, float]:
    """Train from the newest checkpoint in ``folder`` (or from the start), then test.

    Reports every epoch, and those before a resumption once more, because a reader may have lost
    some. Writes ``folder/result``: ``model.safetensors``, ``settings.yaml``, ``metrics.json``,
    ``history.csv``, ``curves.png`` and, where there are classes, ``predictions.csv``,
    ``correctness.npz``, ``classes.csv`` and ``confusion.png``.

    Raises:
        UserError: the settings do not fit the data.
        Failure: the loss is not finite, a video is broken (``data.broken``), or the disk refuses.
        Stopped: ``callbacks.on_step`` asked for it; the state is saved, except after ``ABORT``.
    """
    # Rank 0 alone looks: workers that saw different folders would wait for each other forever.
    finished = distributed.broadcast_from_rank0(lambda: _finished(settings, folder))
    if finished is not None:
        return _replay_result(finished, settings, callbacks)
    train = read_split(settings.data, "train")
    val = read_split(settings.data, "val")
    frame_cache.check(settings.data, train)
    order = TrainingOrder(settings, [video.label for video in train], distributed.worker_rank())
    # Initial weights draw from PyTorch's global stream, dropout from one that each step seeds.
    torch.manual_seed(settings.seed)
    model = MAR(settings).to(runtime.device)
    optimizer = build_optimizer(model, settings.recipe)
    progress = _resume(settings, folder, model, optimizer, callbacks, runtime.stable_dir)
    tokens = None
    if settings.encoder.cached:
        tokens = cache_tokens(settings, train, val, model, folder, runtime, callbacks)
    # Before the batches are made: their loader processes load ahead from this step.
    order.first_step = progress.step
    batches = training_batches(
        settings,
        train,
        order,
        runtime.loader_processes,
        runtime.device,
        tokens.train if tokens else None,
    )
    validate = _validation(settings, val, runtime, callbacks, tokens)
    with Saver(
        folder, settings, runtime.keep, callbacks.on_checkpoint, callbacks.on_write_error
    ) as saver:
        steps = order.steps_per_epoch
        training = Training(settings, runtime, model, optimizer, progress, callbacks, steps, saver)
        # It may have been ended between its checkpoint and sharing it.
        share_stable_part(training)
        while training.epoch < settings.recipe.epochs:
            run_epoch(training, batches, validate)
    # Their loader processes end before those of testing start.
    batches.close()
    del batches, validate
    trained = FinishedTraining(settings, folder, model, progress.history)
    return _finish(trained, val, runtime, callbacks, tokens)


def _validation(
    settings: TrainingConfig,
    val: list[Video],
    runtime: RuntimeConfig,
    callbacks: TrainingCallbacks,
    tokens: FrozenTokens | None,
) -> Evaluator:
    """Return the evaluator of the epochs: one view of each video; of cached tokens, all views."""
    clips = 1
    crops = 1
    if tokens:
        clips = settings.evaluation.clips
        crops = settings.evaluation.crops
    return Evaluator(
        settings,
        val,
        runtime.device,
        clips=clips,
        crops=crops,
        loader_processes=runtime.loader_processes,
        is_kept=True,
        alive=callbacks.heartbeat,
        tokens=tokens.val if tokens else None,
    )


def _resume(
    settings: TrainingConfig,
    folder: Path,
    model: MAR,
    optimizer: torch.optim.Optimizer,
    callbacks: TrainingCallbacks,
    stable_dir: Path | None,
) -> Progress:
    """Load the newest checkpoint, or the pre-trained weights at the start; replay finished epochs.

    Without a checkpoint of its own it begins with a shorter training's stable part, if there is
    one.

    Returns:
        How far the training is.
    """
    # Rank 0 looks for the checkpoint, so that all workers resume from the same one.
    found = distributed.broadcast_from_rank0(
        lambda: checkpoint.latest(folder, settings, callbacks.log)
    )
    if found is None:
        shared = distributed.broadcast_from_rank0(lambda: shared_start(stable_dir, settings))
        # Workers on other nodes may not see this disk.
        if shared and all(distributed.all_gather(shared.path.is_dir())):
            found = shared
            epochs = len(shared.progress.history)
            callbacks.log(f"continues a shorter training after its epoch {epochs}")
    progress = Progress()
    if found:
        progress = checkpoint.restore(found, model, optimizer)
    # A checkpoint has the weights that training has changed since: the pre-trained ones are only
    # for the start.
    elif settings.encoder.weights:
        callbacks.log(pretrained.start(model, settings))
    for epoch, metrics in enumerate(progress.history, start=1):
        callbacks.report(EpochReport(epoch, metrics, is_replay=True))
    return progress


def reevaluate(
    settings: TrainingConfig,
    result: Path,
    folder: Path,
    runtime: RuntimeConfig,
    callbacks: TrainingCallbacks,
) -> dict[str, float]:
    """Test a finished training under other settings of ``evaluation`` (Tables III b, III c).

    ``result`` is the training's result folder. Its training metrics are reported unchanged. Writes
    ``folder/result`` as ``fit`` does, without the model: ``trained_by.txt`` names the folder that
    has it.

    Returns:
        The final metrics.

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
    weights = result / "model.safetensors"
    if not weights.is_file():
        raise Failure(
            f"{weights} is gone: nothing can be tested with that training. Remove its folder, "
            f"{result.parent}, and it is trained again"
        )
    model.load_state_dict(load_file(weights))
    # The other training was validated and tested under other settings: those figures are not ours.
    history = {
        name: value
        for name, value in manifest["metrics"].items()
        if not name.startswith(("val/", "test/"))
    }
    trained = FinishedTraining(settings, folder, model, [history], trained_in=result)
    return _finish(trained, val, runtime, callbacks)


def _finished(settings: TrainingConfig, folder: Path) -> list[dict[str, float]] | None:
    """Return the metrics of each epoch, and last the final ones, of a result in the folder.

    None: the folder has no result of these settings. It has one if the launch was killed before it
    recorded the result, or if the database was lost since.

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
    # Paths may differ: the data may have moved.
    if without_paths(build(manifest["settings"])) != without_paths(settings):
        return None
    final = {name: float(value) for name, value in manifest["metrics"].items()}
    return [*read_history(result), final]


def _replay_result(
    finished: list[dict[str, float]], settings: TrainingConfig, callbacks: TrainingCallbacks
) -> dict[str, float]:
    """Report an existing result as its training reported it; returns the final metrics."""
    *history, final = finished
    for epoch, metrics in enumerate(history, start=1):
        callbacks.report(EpochReport(epoch, metrics, is_replay=True))
    callbacks.report(EpochReport(settings.recipe.epochs, final, is_final=True))
    return final


def _finish(
    trained: FinishedTraining,
    val: list[Video],
    runtime: RuntimeConfig,
    callbacks: TrainingCallbacks,
    tokens: FrozenTokens | None = None,
) -> dict[str, float]:
    """Test with all views, write the result folder, report the final metrics."""
    settings = trained.settings
    model = trained.model
    test = _evaluator(trained, val, runtime, callbacks, tokens=tokens)
    predictions = evaluate(test, model, settings)
    if predictions.broken:
        callbacks.log(
            f"{len(predictions.broken)} of {len(val)} test videos could not be decoded, "
            f"the first: {predictions.broken[0]}"
        )
    metrics = trained.history[-1] | predictions.metrics("test")
    if settings.redraws_in_testing and not settings.pretrains:
        # The loss needs no views: one clip of each video, as in validation.
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
    # Every worker has all predictions by now: one result is enough.
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
    tokens: FrozenTokens | None = None,
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
        tokens=tokens.val if tokens else None,
    )
