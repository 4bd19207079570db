"""The peak memory of training on a CUDA device (Table V, "GPU Mem.")."""

from __future__ import annotations

import torch
from torch import Tensor

from mar.config.schema import TrainingConfig
from mar.data.token_cache import view_shape
from mar.errors import UserError
from mar.model.mar import MAR
from mar.model.masking import training_mask
from mar.training.optim import build_optimizer

_STEPS = 3


def peak_training_memory_gib(settings: TrainingConfig, num_clips: int) -> float:
    """Return the most memory that PyTorch held over a few optimiser steps on random clips, GiB.

    It includes weights, gradients, AdamW's state, activations and workspaces. It does not include
    the CUDA context, which no setting changes.

    Raises:
        UserError: this machine has no CUDA device, or the device has too little memory.
    """
    if not torch.cuda.is_available():
        raise UserError("--memory: no CUDA device found; peak memory is measured, not estimated")
    device = torch.device("cuda")
    # The mask is drawn on the CPU, as in a training step.
    generator = torch.Generator().manual_seed(0)
    torch.cuda.empty_cache()
    # Memory that this process holds for something else, such as a finished training.
    held_bytes = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    num_classes = settings.data.num_classes
    is_bf16 = settings.recipe.precision == "bf16"
    # Of several ratios, the one that hides least.
    mask = min(settings.mask.in_training, key=lambda each: each.first_ratio)
    try:
        model = MAR(settings).to(device)
        optimizer = build_optimizer(model, settings.recipe)
        pixels = _inputs(settings, num_clips, device)
        # Any class probabilities give the same memory.
        labels = torch.full((num_clips, num_classes), 1 / num_classes, device=device)
        # AdamW allocates its state in the first step, so that step is not yet the peak.
        for _ in range(_STEPS):
            hidden = training_mask(mask, settings.grid, num_clips, generator)
            with torch.autocast("cuda", torch.bfloat16, enabled=is_bf16):
                losses = model(pixels, hidden, labels)
            losses.total.mean().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    except torch.OutOfMemoryError:
        raise UserError(
            f"--memory: {num_clips} clips per step do not fit in this device's memory; "
            "use a smaller --batch-size"
        ) from None
    return (torch.cuda.max_memory_allocated(device) - held_bytes) / 2**30


def _inputs(settings: TrainingConfig, num_clips: int, device: torch.device) -> Tensor:
    """Return random clips, or what a classifier of cached tokens gets in their place."""
    if settings.encoder.cached:
        return torch.rand(num_clips, *view_shape(settings), device=device)
    clip = settings.clip
    return torch.rand(num_clips, 3, clip.frames, clip.size, clip.size, device=device)
