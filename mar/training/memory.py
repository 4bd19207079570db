"""Peak memory of training on a CUDA device (Table V, "GPU Mem.")."""

from __future__ import annotations

import torch

from mar.config.schema import TrainingConfig
from mar.errors import UserError
from mar.model.mar import MAR
from mar.model.masking import training_mask
from mar.training.optim import build_optimizer

_STEPS = 3


def peak_training_memory_gib(settings: TrainingConfig, num_clips: int) -> float:
    """Return the peak of PyTorch's memory over a few optimiser steps on random clips, GiB.

    Weights, gradients, AdamW's state, activations and workspaces; not the CUDA context, which no
    setting changes.

    Raises:
        UserError: there is no CUDA device here, or it has too little memory.
    """
    if not torch.cuda.is_available():
        raise UserError(
            "--memory: there is no CUDA device here, and peak memory is measured, not guessed"
        )
    device, generator = torch.device("cuda"), torch.Generator().manual_seed(0)
    torch.cuda.empty_cache()
    held_bytes = torch.cuda.memory_allocated(
        device
    )  # by others in this process: a training that is over
    torch.cuda.reset_peak_memory_stats(device)
    model = MAR(settings).to(device)
    optimizer = build_optimizer(model, settings.recipe)
    clip, num_classes = settings.clip, settings.data.num_classes
    pixels = torch.rand(num_clips, 3, clip.frames, clip.size, clip.size, device=device)
    labels = torch.full((num_clips, num_classes), 1 / num_classes, device=device)
    try:
        for _ in range(_STEPS):
            hidden = training_mask(settings.mask, settings.grid, num_clips, generator)
            with torch.autocast(
                "cuda", torch.bfloat16, enabled=settings.recipe.precision == "bf16"
            ):
                losses = model(pixels, hidden, labels)
            losses.total.mean().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    except torch.OutOfMemoryError:
        raise UserError(
            f"--memory: {num_clips} clips a step do not fit this device: take a smaller "
            "--batch-size"
        ) from None
    return (torch.cuda.max_memory_allocated(device) - held_bytes) / 2**30
