"""Checkpoints of VideoMAE and of the MAR release, made up: their names, shapes and nesting."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    VideoMAEConfig,
    VideoMAEForPreTraining,
    VideoMAEForVideoClassification,
)


def pretraining(**overrides: Any) -> Any:
    return theirs(VideoMAEForPreTraining, use_mean_pooling=False, **overrides)


def classifying(**overrides: Any) -> Any:
    return theirs(VideoMAEForVideoClassification, use_mean_pooling=True, num_labels=5, **overrides)


def saved(model: Any, folder: Path) -> str:
    model.save_pretrained(folder)
    return str(folder)


def clips() -> tuple[Tensor, Tensor]:
    """Pixels from 0 to 1, axes B, C, T, H, W.

    And as transformers wants them, normalised, axes B, T, C, H, W.
    """
    pixels = torch.rand(2, 3, 4, 64, 64, generator=torch.Generator().manual_seed(1))
    mean, std = (
        torch.tensor(values).view(3, 1, 1, 1)
        for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    return pixels, ((pixels - mean) / std).transpose(1, 2)


def theirs(kind: Any, **overrides: Any) -> Any:
    torch.manual_seed(0)
    return randomised(kind(VideoMAEConfig(**{**SIZES, **overrides})))


SIZES: dict[str, Any] = {
    "image_size": 64,
    "num_frames": 4,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 192,
    "decoder_hidden_size": 24,
    "decoder_num_hidden_layers": 2,
    "decoder_num_attention_heads": 4,
    "decoder_intermediate_size": 96,
    "layer_norm_eps": 1e-6,
}


def randomised(model: nn.Module) -> Any:
    """Random everywhere, norms and biases too.

    Ε as the official models have it, where transformers fixes another.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    for part in model.modules():
        if isinstance(part, nn.LayerNorm):
            part.eps = 1e-6
    return model.eval()
