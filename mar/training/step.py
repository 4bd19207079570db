"""One optimiser step on one worker's share of a batch, and how it runs.

What is drawn in a step (masks, flips, mixing, dropout) follows from the seed and the step alone. Nothing here waits for
the device: what is drawn is drawn on the CPU and sent, and what is decided over numbers is decided where they are.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mar import distributed
from mar.augmentation.augment import augmented, draw_step, mix
from mar.config.schema import TrainingConfig
from mar.data.dataset import Batch, batch_indices, one_after_another
from mar.errors import Failure
from mar.model.layers import set_execution_mode
from mar.model.mar import MAR, Losses
from mar.rng import draw
from mar.training.checkpoint import Progress
from mar.training.optim import gradient_norm, step_if_finite
from mar.training.retention import RetentionPolicy

Wish = Literal["go on", "save", "stop", "leave"]
"""Go on; save at once, the machine may go; save and stop; stop, nobody will go on with it."""


@dataclass(frozen=True)
class Execution:
    """How to run, not what: no value here changes a result (up to the order of floating-point sums)."""

    device: torch.device
    loader_processes: int = 0
    """Processes that decode; 0: the training process does."""
    max_microbatch_clips: int | None = None
    """Largest forward-backward pass of one worker; a larger share of the batch is accumulated over several."""
    activation_checkpointing: bool = False
    """Compute activations again in the backward pass where memory is short: a third more work."""
    compile: bool = False
    """Compile the transformer blocks: half a minute and more at the start, for steps that are 3 % faster on a CPU."""
    checkpoint_every_steps: int | None = None
    """Also save in the middle of an epoch."""
    keep: RetentionPolicy = field(default_factory=RetentionPolicy)
    """Which checkpoints stay."""
    stored: Callable[[Path], None] = lambda path: None
    """Told of each checkpoint that is whole on the disk."""
    try_again: Callable[[Failure], bool] = lambda failure: False
    """Asked when the disk refuses a checkpoint or the result: may wait for room; false: it is a failure."""
    say: Callable[[str], None] = print
    """Where messages for a person go."""
    step: Callable[[int, int], Wish] = lambda done, of: "go on"
    """Told of each step, of how many; answers whether to go on. All workers must have the same answer."""
    alive: Callable[[], None] = lambda: None
    """Told of each batch that is tested."""


@dataclass
class TrainState:
    """A model that is being trained, and what its steps need."""

    settings: TrainingConfig
    execution: Execution
    model: MAR
    optimizer: torch.optim.Optimizer
    progress: Progress

    def __post_init__(self) -> None:
        self.worker_rank = distributed.worker_rank()
        self.has_non_finite_grad = torch.zeros((), dtype=torch.bool, device=self.execution.device)
        """Whether a gradient was not finite: from then on no step changes anything."""
        set_execution_mode(
            self.model,
            "default" if self.execution.compile else "",
            self.execution.activation_checkpointing,
        )
        self.wrapped: nn.Module = self.model
        if self.worker_rank.world > 1:
            ids = [self.execution.device.index] if self.execution.device.type == "cuda" else None
            self.wrapped = DistributedDataParallel(
                self.model, device_ids=ids, gradient_as_bucket_view=True, broadcast_buffers=False
            )


def train_step(state: TrainState, batch: Batch) -> Tensor:
    """Take one optimiser step on this worker's share of the batch; returns sums of the losses and the clips.

    Each clip's loss is divided by the global batch, so that the step is the same however it is shared out
    over workers and passes. A broken video's clip is in its place, and counts nothing.
    """
    settings, device, worker_rank = state.settings, state.execution.device, state.worker_rank
    step, batch = state.progress.step, one_after_another(batch)
    drawn = draw_step(settings, step).of(batch_indices(settings, worker_rank))
    torch.manual_seed(
        int(draw(settings.seed, 4, step, worker_rank.rank).integers(2**62))
    )  # dropout, stochastic depth
    sums = torch.zeros(4, dtype=torch.float64, device=device)
    state.optimizer.zero_grad(set_to_none=True)
    microbatches = _microbatches(len(batch.labels), state.execution.max_microbatch_clips)
    for part in microbatches:
        chosen, good = drawn.of(range(len(drawn.erased))[part]), batch.good[part]
        pixels, targets = augmented(batch.clips[part], batch.labels[part], chosen, settings)
        pixels, targets = mix(pixels, targets, settings.augment, draw(settings.seed, 3, step), good)
        with torch.autocast(
            device.type, torch.bfloat16, enabled=settings.recipe.precision == "bf16"
        ):
            losses: Losses = state.wrapped(pixels, chosen.hidden, targets)
        scale = (
            worker_rank.world / settings.recipe.batch_size
        )  # DistributedDataParallel averages over the workers
        with _no_sync(state.wrapped) if part is not microbatches[-1] else nullcontext():
            ((losses.total * good).sum() * scale).backward()
        columns = (
            losses.total,
            losses.classification,
            losses.reconstruction,
            torch.ones_like(losses.total),
        )
        sums += torch.stack(
            [(column.detach() * good).sum(dtype=torch.float64) for column in columns]
        )
    norm = gradient_norm(state.model, settings.recipe.clip_grad)
    state.has_non_finite_grad |= ~norm.isfinite()
    step_if_finite(state.optimizer, state.has_non_finite_grad)
    return sums


def _microbatches(num_clips: int, limit: int | None) -> list[slice]:
    """Return the forward-backward passes of a share: of even length, so that clips keep their mixing partners."""
    length = max(2, limit - limit % 2) if limit else num_clips
    return [
        slice(first, min(first + length, num_clips))
        for first in range(0, num_clips, max(length, 1))
    ]


def _no_sync(model: nn.Module) -> AbstractContextManager[None]:
    return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()
