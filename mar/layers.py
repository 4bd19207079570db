"""The parts that encoder, decoder and bridging classifier share: sin-cos positions and transformer blocks.

Departure from the released code: the blocks are timm's, whose key projection has a bias. Softmax does
not change when every key moves by the same vector, so a checkpoint without one is loaded with zeros.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from timm.models import vision_transformer
from torch import Tensor, nn

_timm: Any = vision_transformer
LayerNorm = partial(nn.LayerNorm, eps=1e-6)
"""LayerNorm with the ε of the released models."""


def sin_cos_positions(num_tokens: int, width: int) -> Float[Tensor, "N D"]:
    """Return the fixed table: sine in even and cosine in odd channels of p / 10000^(2⌊j/2⌋/D), p the flat index."""
    position = torch.arange(num_tokens, dtype=torch.float64)[:, None]
    channel = torch.arange(width)
    angle = position / torch.pow(10000.0, 2 * (channel // 2).double() / width)
    return torch.where(channel % 2 == 0, angle.sin(), angle.cos()).float()


def transformer_blocks(width: int, depth: int, heads: int, drop_path: float = 0.0) -> nn.Sequential:
    """Return ``depth`` pre-norm blocks (MLP ratio 4, GELU); stochastic depth rises linearly to ``drop_path``."""
    rates = [drop_path * block / max(depth - 1, 1) for block in range(depth)]
    return nn.Sequential(
        *(
            _timm.Block(width, heads, mlp_ratio=4.0, qkv_bias=True, drop_path=rate, norm_layer=LayerNorm)
            for rate in rates
        )
    )


def take_tokens(tokens: Float[Tensor, "B N D"], places: Int[Tensor, "B K"]) -> Float[Tensor, "B K D"]:
    """Gather tokens by their flat index in the clip."""
    return tokens.gather(1, places[..., None].expand(-1, -1, tokens.shape[-1]))


def initialise(module: nn.Module) -> None:
    """Xavier-uniform weights and zero biases for linear layers; norms start as the identity."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight)
            if part.bias is not None:  # pyright: ignore[reportUnnecessaryComparison]
                nn.init.zeros_(part.bias)
