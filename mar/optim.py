"""AdamW's parameter groups with layer-wise decay, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from mar.config import RecipeConfig
from mar.model import MAR


def peak_lr(recipe: RecipeConfig) -> float:
    """Return the learning rate after warm-up: base x batch / 256 under linear scaling (Table I, footnote)."""
    return recipe.base_lr * (recipe.batch_size / 256 if recipe.lr_scaling == "linear" else 1)


def learning_rate(recipe: RecipeConfig, epoch: float) -> float:
    """Return the learning rate at a time in epochs: linear warm-up, then half a cosine to ``min_lr``."""
    peak = peak_lr(recipe)
    if epoch < recipe.warmup_epochs:
        return recipe.warmup_lr + (peak - recipe.warmup_lr) * epoch / recipe.warmup_epochs
    progress = (epoch - recipe.warmup_epochs) / max(recipe.epochs - recipe.warmup_epochs, 1e-9)
    return recipe.min_lr + (peak - recipe.min_lr) * (1 + math.cos(math.pi * min(progress, 1))) / 2


def layer_scale(name: str, depth: int, decay: float) -> float:
    """Return the learning-rate factor of a parameter: decay^(L - k) in block k of L, decay^(L + 1) at the embedding."""
    if name.startswith("encoder.embed"):
        return decay ** (depth + 1)
    if name.startswith("encoder.blocks."):
        return decay ** (depth - int(name.split(".")[2]))
    return 1.0


def parameter_groups(model: MAR, recipe: RecipeConfig) -> list[dict[str, Any]]:
    """Return one group for each learning-rate factor and each weight decay; its factor is ``lr_scale``."""
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    depth = len(model.encoder.blocks)
    for name, parameter in model.named_parameters():
        scale = layer_scale(name, depth, recipe.layer_decay)
        decayed = parameter.ndim > 1 and not name.endswith("mask_token")
        decay = recipe.weight_decay if decayed else 0.0
        group = groups.setdefault((scale, decay), {"params": [], "lr_scale": scale, "weight_decay": decay})
        group["params"].append(parameter)
    return list(groups.values())


def build_optimizer(model: MAR, recipe: RecipeConfig) -> torch.optim.AdamW:
    """Return AdamW (Table I) over the model's parameter groups."""
    return torch.optim.AdamW(parameter_groups(model, recipe), lr=peak_lr(recipe), betas=recipe.betas, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give each group ``rate`` times its layer's factor."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]


def gradient_norm(model: nn.Module, limit: float | None) -> None:
    """Shorten the gradient to ``limit``, when there is one."""
    if limit is not None:
        nn.utils.clip_grad_norm_(model.parameters(), limit)
