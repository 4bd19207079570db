"""One optimiser step on one worker's share of a batch, and how it runs.

What a step draws (masks, flips, mixing, dropout) follows from the seed and the step number alone.
Random draws happen on the CPU and are sent to the device; checks of numbers run on the device,
without a synchronisation.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mar import distributed
from mar.augmentation.augment import augmented, draw_step, mix, soft_labels
from mar.config.schema import TrainingConfig
from mar.data.dataset import Batch, batch_indices, one_after_another
from mar.model.layers import set_execution_mode
from mar.model.mar import MAR, Losses
from mar.model.masking import evaluation_mask
from mar.rng import Stream, rng, rng_seed
from mar.training.checkpoint import Progress
from mar.training.optim import gradient_norm, step_if_finite
from mar.training.retention import RetentionPolicy


@dataclass(frozen=True)
class RuntimeConfig:
    """How to run a training.

    No value here changes a result, except by the order of floating-point sums.
    """

    device: torch.device
    loader_processes: int = 0
    """Processes that decode; 0: the training process does."""
    max_microbatch_clips: int | None = None
    """Largest forward-backward pass of one worker; a larger share of the batch accumulates
    gradients over several."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass where memory is short: a third more work."""
    compile: bool = False
    """Compile the transformer blocks: 20 s and more at the start. On an H200, ViT-B then trains at
    29 % more clips a second; on a CPU at 3 % (benchmarks/)."""
    checkpoint_every_steps: int | None = None
    """Also save in the middle of an epoch."""
    keep: RetentionPolicy = field(default_factory=RetentionPolicy)
    """Which checkpoints stay."""
    stable_dir: Path | None = None
    """Folder that all lengths of a training under ``warmup_stable_decay`` share (``prolong``)."""
    tokens_root: Path | None = None
    """Folder of the tokens of frozen encoders (``encoder.cached``), which trainings share; None: in
    the trial's own folder."""


@dataclass
class TrainState:
    """A model in training, and what its steps need."""

    settings: TrainingConfig
    runtime: RuntimeConfig
    model: MAR
    optimizer: torch.optim.Optimizer
    progress: Progress

    def __post_init__(self) -> None:
        self.worker_rank = distributed.worker_rank()
        self.has_non_finite_grad = torch.zeros((), dtype=torch.bool, device=self.runtime.device)
        """Whether a gradient was not finite: from then on no step changes anything."""
        mode = ""
        if self.runtime.compile:
            mode = "default"
        num_ratios = len(self.settings.mask.in_training)
        set_execution_mode(self.model, mode, self.runtime.activation_checkpointing, num_ratios)
        self.wrapped: nn.Module = self.model
        if self.worker_rank.world > 1:
            device = self.runtime.device
            # DistributedDataParallel requires None on a CPU.
            device_ids = None
            if device.type == "cuda":
                device_ids = [device.index]
            self.wrapped = DistributedDataParallel(
                self.model,
                device_ids=device_ids,
                gradient_as_bucket_view=True,
                # Buffers are constants (positions, the pixels' mean): equal on all workers.
                broadcast_buffers=False,
            )


def train_step(state: TrainState, batch: Batch) -> Tensor:
    """Take one optimiser step on this worker's share of the batch.

    Each clip's loss is divided by the global batch size, so that the step does not depend on how
    the batch is divided over workers and micro-batches. A broken video keeps its position in the
    batch and has no weight in the loss.

    Returns:
        Sums over this worker's good clips: total, classification and reconstruction loss, and their
            number.
    """
    settings = state.settings
    device = state.runtime.device
    rank = state.worker_rank
    step = state.progress.step
    batch = one_after_another(batch)
    drawn = draw_step(settings, step).of(batch_indices(settings, rank))
    # Dropout and stochastic depth draw from PyTorch's global stream; each worker has its own.
    torch.manual_seed(rng_seed(settings.seed, Stream.DROPOUT, step, rank.rank))
    sums = torch.zeros(4, dtype=torch.float64, device=device)
    state.optimizer.zero_grad(set_to_none=True)
    microbatches = _microbatches(len(batch.labels), state.runtime.max_microbatch_clips)
    # DistributedDataParallel averages gradients over the workers; the loss is a sum over the global
    # batch.
    scale = rank.world / settings.recipe.batch_size
    for part in microbatches:
        chosen = drawn.of(range(len(drawn.erased))[part])
        good = batch.good[part]
        hidden = chosen.hidden
        if settings.encoder.cached:
            # Tokens: nothing of them can be augmented, and the mask of testing has left them.
            pixels = batch.clips[part].float()
            smoothing = settings.augment.smoothing
            targets = soft_labels(batch.labels[part], settings.data.num_classes, smoothing)
            hidden = evaluation_mask(settings, views=1).expand(len(pixels), -1, -1, -1)
        else:
            pixels, targets = augmented(batch.clips[part], batch.labels[part], chosen, settings)
            # Every micro-batch draws the same share and box: one mixing for the whole batch.
            mixing = rng(settings.seed, Stream.MIX, step)
            pixels, targets = mix(pixels, targets, settings.augment, mixing, good)
        with torch.autocast(
            device.type, torch.bfloat16, enabled=settings.recipe.precision == "bf16"
        ):
            losses: Losses = state.wrapped(pixels, hidden, targets)
        # Gradients accumulate locally and are exchanged once, with the last micro-batch.
        synchronise = nullcontext()
        if part is not microbatches[-1]:
            synchronise = _no_sync(state.wrapped)
        with synchronise:
            ((losses.total * good).sum() * scale).backward()
        sums += _sums(losses, good)
    norm = gradient_norm(state.model, settings.recipe.clip_grad)
    state.has_non_finite_grad |= ~norm.isfinite()
    step_if_finite(state.optimizer, state.has_non_finite_grad)
    return sums


def _sums(losses: Losses, good: Tensor) -> Tensor:
    """Return the sums of a micro-batch's losses over its good clips, and their number."""
    columns = (
        losses.total,
        losses.classification,
        losses.reconstruction,
        torch.ones_like(losses.total),
    )
    # In float64: an epoch adds many values, and float32 would lose digits.
    return torch.stack([(column.detach() * good).sum(dtype=torch.float64) for column in columns])


def _microbatches(num_clips: int, limit: int | None) -> list[slice]:
    """Return the micro-batches of a share of the batch.

    Their length is even, so that a clip and its mixing partner (2k and 2k + 1) are in the same one.
    """
    length = max(num_clips, 1)
    if limit:
        length = max(2, limit - limit % 2)
    return [slice(first, min(first + length, num_clips)) for first in range(0, num_clips, length)]


def _no_sync(model: nn.Module) -> AbstractContextManager[None]:
    """Accumulate gradients without exchanging them between workers."""
    if isinstance(model, DistributedDataParallel):
        return model.no_sync()
    return nullcontext()
