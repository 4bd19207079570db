"""How many trials run at once, and how many of them beside each other on one GPU.

A worker's share of a GPU is what Ray counts: with 0.25, four workers get the same device. PyTorch
keeps each below its share of the memory (``worker/trial_runner.py``). A trial that runs out of
memory so is started again with twice the share, from its last checkpoint, before its micro-batch is
made smaller: then fewer trials run beside each other, and the steps stay as they were. Where no
larger share fits, it divides its batch after all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mar.errors import UserError, notice
from mar.model.flops import cost
from orchestration.config import AUTO_TRIALS, LaunchConfig
from orchestration.studies.trial import Trial

_MEMORY_SHARE = 0.9
"""Share of a GPU's memory that trials beside each other may take, by measurement."""
_CONTEXT_GIB = 0.6
"""What each process needs beside PyTorch's own memory: the CUDA context and its kernels."""
_MOST_TRIALS = 16
"""Most trials on one GPU under ``auto``: more share its arithmetic, not its memory."""


_POLL_S = 1.0
"""Seconds between two looks for a stop request while it measures."""
_measured: dict[tuple[str, int], tuple[float, float] | None] = {}
"""Settings and clips -> what was measured: a launch has several rounds, and measures once."""


@dataclass(frozen=True)
class Share:
    """A worker's share of a GPU."""

    gpus: float
    """GPUs of a worker: a whole number, or a fraction below one."""
    message: str = ""
    """What to tell the user; empty where nothing was decided."""
    divides_batch: bool = True
    """Whether a trial that runs out of memory divides its batch; else it gets a larger share."""


def _share(gpus: float, message: str = "") -> Share:
    return Share(gpus, message, divides_batch=not 0 < gpus < 1)


def larger_share(launch: LaunchConfig, share: Share) -> Share:
    """Return twice a share; where that does not fit, the same, and trials divide their batch."""
    larger = _share(min(1.0, 2 * share.gpus))
    try:
        max_concurrent_trials(launch, larger.gpus)
    except UserError:
        return Share(share.gpus)
    return larger


def share_of(launch: LaunchConfig, trials: Sequence[Trial]) -> Share:
    """Return the share of a GPU that each worker gets; Ray must run.

    Args:
        launch: Its options.
        trials: What is to run, as far as it is known: ``auto`` measures the largest.

    Raises:
        UserError: trials are to share a GPU, and the cluster has none.
    """
    import ray

    if launch.worker.gpus_per_worker is not None:
        return _share(launch.worker.gpus_per_worker)
    has_gpu = ray.cluster_resources().get("GPU", 0) >= 1
    if launch.trials_per_gpu is None:
        return _share(float(has_gpu))
    if not has_gpu:
        raise UserError(f"--trials-per-gpu {launch.trials_per_gpu}: the cluster has no GPU")
    if launch.trials_per_gpu != AUTO_TRIALS:
        return _share(_fraction(int(launch.trials_per_gpu)))
    return _measured_share(launch, trials)


def _fraction(trials: int) -> float:
    # Ray counts in ten-thousandths: a third, rounded up, would fit only twice.
    return int(10_000 / trials) / 10_000


def _measured_share(launch: LaunchConfig, trials: Sequence[Trial]) -> Share:
    if not trials:
        return Share(1.0, "trials per GPU: 1 (auto: a search knows no trial yet to measure)")

    def clips_of(trial: Trial) -> int:
        clips = trial.settings.recipe.batch_size // launch.worker.workers
        return min(clips, launch.worker.max_microbatch_clips or clips)

    # Activations take most of the memory: as many as operations, for each clip of a pass.
    largest = max(trials, key=lambda trial: cost(trial.settings).train_gflops * clips_of(trial))
    measured = _measure(largest, clips_of(largest), launch.stop_file)
    if measured is None:
        return Share(1.0, "trials per GPU: 1 (auto: memory cannot be measured on this device)")
    needed, total = measured
    number = int(_MEMORY_SHARE * total / (needed + _CONTEXT_GIB))
    number = max(1, min(number, _MOST_TRIALS))
    return _share(
        _fraction(number),
        f"trials per GPU: {number} (the largest, {largest.name}, needs {needed:.1f} of "
        f"{total:.1f} GiB)",
    )


def _measure(trial: Trial, clips: int, stop_file: Path) -> tuple[float, float] | None:
    """Return the peak memory of a training step, and a GPU's memory, GiB.

    None: the device has no CUDA, the measurement failed, or the study is to stop.
    """
    import ray
    from ray.exceptions import RayError

    settings = trial.settings.model_dump_json()
    if (settings, clips) in _measured:
        return _measured[settings, clips]
    notice("trials per GPU: measuring the largest, once a GPU is free")
    # In a process of its own, on a node with a GPU: this one may have none.
    remote: Any = ray.remote(num_gpus=1, max_calls=1)(_peak_and_total)
    pending = remote.remote(settings, clips)
    while not ray.wait([pending], timeout=_POLL_S)[0]:
        if stop_file.exists():
            ray.cancel(pending)
            return None
    try:
        _measured[settings, clips] = ray.get(pending)
    except RayError:
        return None
    return _measured[settings, clips]


def _peak_and_total(settings_json: str, clips: int) -> tuple[float, float] | None:
    import torch

    from mar.config.schema import TrainingConfig
    from mar.training.memory import peak_training_memory_gib

    if not torch.cuda.is_available():
        return None
    total = torch.cuda.get_device_properties(0).total_memory / 2**30
    try:
        settings = TrainingConfig.model_validate_json(settings_json)
        return peak_training_memory_gib(settings, clips), total
    except UserError:
        # Not even one fits: the trial itself will divide its batch.
        return total, total


def max_concurrent_trials(launch: LaunchConfig, gpus: float) -> int:
    """Return how many trials fit at once.

    If Tune started more, trials could hold some of the workers that others wait for, forever.

    Raises:
        UserError: not one fits.
    """
    import ray

    worker = launch.worker
    total = ray.cluster_resources()
    per_worker = {"CPU": worker.cpus_per_worker, "GPU": gpus}
    asked = {name: amount for name, amount in per_worker.items() if amount}
    # How many workers the scarcest resource allows.
    num_workers = min(_how_many(name, total.get(name, 0), each) for name, each in asked.items())
    # An elastic trial starts with fewer workers, and then gets all that the cluster has.
    fewest = worker.min_workers or worker.workers
    if num_workers < fewest:
        has = ", ".join(f"{total.get(name, 0):g} {name}" for name in asked)
        asks = ", ".join(f"{fewest * amount:g} {name}" for name, amount in asked.items())
        raise UserError(f"--workers {fewest}: a trial asks for {asks}, the cluster has {has}")
    num_trials = max(1, num_workers // worker.workers)
    return min(num_trials, launch.max_concurrent_trials or num_trials)


def _how_many(name: str, total: float, amount: float) -> int:
    """Return how many workers a resource allows."""
    # A share of a GPU is of one GPU: 0.6 fits once in each, not three times in two.
    if name == "GPU" and amount < 1:
        return int(total) * int(1 / amount + 1e-6)
    return int(total / amount + 1e-6)
