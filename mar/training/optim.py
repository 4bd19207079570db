"""AdamW's parameter groups with layer-wise decay, and the learning rate as a pure function."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from mar.config.schema import RecipeConfig
from mar.model.mar import MAR


def peak_lr(recipe: RecipeConfig) -> float:
    """Return the learning rate after warm-up.

    base × batch / 256 under linear scaling (Table I, footnote).
    """
    return recipe.base_lr * (recipe.batch_size / 256 if recipe.lr_scaling == "linear" else 1)


def learning_rate(recipe: RecipeConfig, epoch: float) -> float:
    """Return the learning rate at a time in epochs.

    Linear warm-up, then half a cosine to ``min_lr``.
    """
    if epoch < recipe.warmup_epochs:
        end = _cosine(recipe, recipe.warmup_epochs)
        return recipe.warmup_lr + (end - recipe.warmup_lr) * epoch / recipe.warmup_epochs
    return _cosine(recipe, epoch)


def _cosine(recipe: RecipeConfig, epoch: float) -> float:
    start = recipe.warmup_epochs if recipe.cosine_from == "warmup" else 0.0
    progress = (epoch - start) / max(recipe.epochs - start, 1e-9)
    return (
        recipe.min_lr
        + (peak_lr(recipe) - recipe.min_lr) * (1 + math.cos(math.pi * min(progress, 1))) / 2
    )


def layer_scale(name: str, depth: int, recipe: RecipeConfig) -> float:
    """Return the learning-rate factor of a parameter.

    decay^(L - k) in block k of L, decay^(L + 1) at the embedding.

    Under ``layer_decay_of: weights``, the release's rule, norms and biases have a factor of 1
    everywhere, and the decoder's mask token has the embedding's.
    """
    decay, weights_only = recipe.layer_decay, recipe.layer_decay_of == "weights"
    if weights_only and (_is_norm(name) or name.endswith("bias")):
        return 1.0
    if name.startswith("encoder.embed") or (weights_only and name == "decoder.mask_token"):
        return decay ** (depth + 1)
    if name.startswith("encoder.blocks."):
        return decay ** (depth - int(name.split(".")[2]))
    return 1.0


def _is_norm(name: str) -> bool:
    return "norm" in name


def is_decayed(name: str, recipe: RecipeConfig) -> bool:
    """Whether weight decay applies: not to norms and biases.

    To mask tokens under the release's rule alone.
    """
    if name.endswith("mask_token"):
        return recipe.layer_decay_of == "weights"
    return not _is_norm(name) and not name.endswith("bias")


def parameter_groups(model: MAR, recipe: RecipeConfig) -> list[dict[str, Any]]:
    """Return one group for each learning-rate factor and each weight decay.

    Its factor is ``lr_scale``.
    """
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    depth = len(model.encoder.blocks)
    for name, parameter in model.named_parameters():
        scale = layer_scale(name, depth, recipe)
        decay = recipe.weight_decay if is_decayed(name, recipe) else 0.0
        group = groups.setdefault(
            (scale, decay), {"params": [], "lr_scale": scale, "weight_decay": decay}
        )
        group["params"].append(parameter)
    return list(groups.values())


def build_optimizer(model: MAR, recipe: RecipeConfig) -> torch.optim.AdamW:
    """Return AdamW (Table I) over the model's parameter groups."""
    return torch.optim.AdamW(
        parameter_groups(model, recipe), lr=peak_lr(recipe), betas=recipe.betas, fused=True
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give each group ``rate`` times its layer's factor."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]


def gradient_norm(model: nn.Module, limit: float | None) -> Tensor:
    """Return the gradient's norm; where there is a ``limit``, shorten the gradient to it."""
    if limit is not None:
        return nn.utils.clip_grad_norm_(model.parameters(), limit)
    return nn.utils.get_total_norm(
        [each.grad for each in model.parameters() if each.grad is not None]
    )


def step_if_finite(optimizer: torch.optim.Optimizer, has_non_finite_grad: Tensor) -> None:
    """Take the step; where ``spoiled``, change nothing.

    Decided on the device: nobody waits for the answer.
    """
    optimizer.grad_scale, optimizer.found_inf = None, has_non_finite_grad.float()  # pyright: ignore[reportAttributeAccessIssue]
    optimizer.step()
