"""AdamW's parameter groups with layer-wise decay, and the learning rate, a function of the step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from mar.config.schedule import decay_epochs, stable_epochs
from mar.config.schema import RecipeConfig
from mar.model.mar import MAR


def peak_lr(recipe: RecipeConfig) -> float:
    """Return the learning rate after warm-up.

    Under linear scaling it is the base rate x batch size / 256 (Table I, footnote).
    """
    if recipe.lr_scaling == "linear":
        return recipe.base_lr * (recipe.batch_size / 256)
    return recipe.base_lr


def learning_rate(recipe: RecipeConfig, epoch: float) -> float:
    """Return the rate at a time in epochs: linear warm-up, then what ``schedule`` says."""
    after_warmup = _cosine
    if recipe.schedule == "warmup_stable_decay":
        after_warmup = _stable_decay
    if epoch < recipe.warmup_epochs:
        # With ``cosine_from: start`` the cosine is below its peak when warm-up ends.
        end = after_warmup(recipe, recipe.warmup_epochs)
        return recipe.warmup_lr + (end - recipe.warmup_lr) * epoch / recipe.warmup_epochs
    return after_warmup(recipe, epoch)


def _stable_decay(recipe: RecipeConfig, epoch: float) -> float:
    """Return the peak, which falls linearly to ``min_lr`` in the last epochs (Hu et al., 2024)."""
    progress = (epoch - stable_epochs(recipe)) / decay_epochs(recipe)
    progress = min(max(progress, 0.0), 1.0)
    return peak_lr(recipe) + (recipe.min_lr - peak_lr(recipe)) * progress


def _cosine(recipe: RecipeConfig, epoch: float) -> float:
    """Return half a cosine's rate at a time in epochs; ``min_lr`` from the last epoch on."""
    start = 0.0
    if recipe.cosine_from == "warmup":
        start = recipe.warmup_epochs
    # At least 1e-9: no division by zero if warm-up takes all epochs.
    progress = (epoch - start) / max(recipe.epochs - start, 1e-9)
    height = peak_lr(recipe) - recipe.min_lr
    # Falls from 2 to 0.
    wave = 1 + math.cos(math.pi * min(progress, 1))
    return recipe.min_lr + height * wave / 2


def layer_scale(name: str, depth: int, recipe: RecipeConfig) -> float:
    """Return the learning-rate factor of a parameter, for an encoder of ``depth`` blocks.

    It is decay^(L - k) in block k of L, decay^(L + 1) at the embedding, and 1 outside the encoder.
    Under ``layer_decay_of: weights``, the release's rule, norms and biases have a factor of 1
    everywhere, and the decoder's mask token has the embedding's factor.
    """
    decay = recipe.layer_decay
    weights_only = recipe.layer_decay_of == "weights"
    if weights_only and (_is_norm(name) or name.endswith("bias")):
        return 1.0
    if name.startswith("encoder.embed") or (weights_only and name == "decoder.mask_token"):
        return decay ** (depth + 1)
    if name.startswith("encoder.blocks."):
        # Names count blocks from 0, as k does: "encoder.blocks.11.attn.qkv.weight".
        block = int(name.split(".")[2])
        return decay ** (depth - block)
    return 1.0


def _is_norm(name: str) -> bool:
    return "norm" in name


def is_decayed(name: str, recipe: RecipeConfig) -> bool:
    """Whether weight decay applies to a parameter.

    It does not apply to norms and biases. It applies to mask tokens under the release's rule only.
    """
    if name.endswith("mask_token"):
        return recipe.layer_decay_of == "weights"
    return not _is_norm(name) and not name.endswith("bias")


def parameter_groups(model: MAR, recipe: RecipeConfig) -> list[dict[str, Any]]:
    """Return one group for each pair of learning-rate factor (``lr_scale``) and weight decay."""
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    everything = dict(model.named_parameters())
    # The decay counts all blocks, also where only the last are trained.
    parameters = {name: each for name, each in everything.items() if each.requires_grad}
    # By name: a package's encoder may have no blocks.
    depth = len({name.split(".")[2] for name in everything if name.startswith("encoder.blocks.")})
    for name, parameter in parameters.items():
        scale = layer_scale(name, depth, recipe)
        if is_decayed(name, recipe):
            decay = recipe.weight_decay
        else:
            decay = 0.0
        new_group: dict[str, Any] = {"params": [], "lr_scale": scale, "weight_decay": decay}
        group = groups.setdefault((scale, decay), new_group)
        group["params"].append(parameter)
    return list(groups.values())


def build_optimizer(model: MAR, recipe: RecipeConfig) -> torch.optim.AdamW:
    """Return AdamW (Table I) over the model's parameter groups."""
    # The fused kernel is also what reads ``found_inf`` (see ``step_if_finite``).
    return torch.optim.AdamW(
        parameter_groups(model, recipe), lr=peak_lr(recipe), betas=recipe.betas, fused=True
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the rate of each group to ``rate`` times the group's factor."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]


def gradient_norm(model: nn.Module, limit: float | None) -> Tensor:
    """Return the norm of the gradient; with a ``limit``, also scale the gradient down to it."""
    if limit is not None:
        return nn.utils.clip_grad_norm_(model.parameters(), limit)
    gradients = [each.grad for each in model.parameters() if each.grad is not None]
    return nn.utils.get_total_norm(gradients)


def step_if_finite(optimizer: torch.optim.Optimizer, has_non_finite_grad: Tensor) -> None:
    """Take a step, or change nothing if ``has_non_finite_grad``.

    The device decides: the flag is not read by the CPU, so nothing waits for the device.
    """
    # PyTorch's GradScaler sets these two attributes; fused AdamW skips a step if found_inf is 1.
    # No gradient is scaled here.
    optimizer.grad_scale = None  # pyright: ignore[reportAttributeAccessIssue]
    optimizer.found_inf = has_non_finite_grad.float()  # pyright: ignore[reportAttributeAccessIssue]
    optimizer.step()
