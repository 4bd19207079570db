"""Parts of encoder, decoder and bridging classifier: attention and transformer blocks.

Departures from the released code:

- Attention does not build the matrix softmax(QKᵀ), except where that is faster.
- The blocks are timm's, whose key projection has a bias. Softmax does not change when the same
  vector is added to every key, so a checkpoint without this bias is loaded with zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from timm.layers.attention import Attention as TimmAttention
from timm.layers.drop import DropPath
from timm.models.vision_transformer import Block as TimmBlock
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mar.model.positions import rotated

_CLIPS_AT_ONCE = 4
"""Clips of an evaluation's batch whose softmax(QKᵀ) is in memory at one time."""
LayerNorm = partial(nn.LayerNorm, eps=1e-6)
"""LayerNorm with the ε of the released models."""


def attention(
    queries: Float[Tensor, "B heads Q d"],
    keys: Float[Tensor, "B heads N d"],
    values: Float[Tensor, "B heads N d"],
) -> Float[Tensor, "B heads Q d"]:
    """Return softmax(QKᵀ/√d)V by the fastest way on the device.

    That is PyTorch's fused kernel, except on a CPU in bfloat16: there, two plain matrix products
    are about twice as fast, forward and backward (benchmarks/, docs/log.md).
    """
    if queries.device.type == "cpu" and queries.dtype == torch.bfloat16:
        # In training the whole matrix is kept for the backward pass anyway.
        if torch.is_grad_enabled():
            return explicit_attention(queries, keys, values)
        # In evaluation nothing is kept, so pieces of a batch bound the memory.
        pieces = zip(*(each.split(_CLIPS_AT_ONCE) for each in (queries, keys, values)), strict=True)
        return torch.cat([explicit_attention(*piece) for piece in pieces])
    return F.scaled_dot_product_attention(queries, keys, values)


def explicit_attention(
    queries: Float[Tensor, "B heads Q d"],
    keys: Float[Tensor, "B heads N d"],
    values: Float[Tensor, "B heads N d"],
) -> Float[Tensor, "B heads Q d"]:
    """Return softmax(QKᵀ/√d)V by two matrix products."""
    return torch.softmax(queries * queries.shape[-1] ** -0.5 @ keys.mT, dim=-1) @ values


class Attention(TimmAttention):
    """timm's self-attention, with :func:`attention` inside.

    With ``num_queries``, only that many last tokens are computed.
    """

    def forward(
        self,
        x: Float[Tensor, "B N D"],
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        num_queries: int | None = None,
        rotation: Float[Tensor, "2 B 1 N d"] | None = None,
    ) -> Float[Tensor, "B Q D"]:
        """Return the attention of each token, or of each of the last ones, to all tokens.

        ``rotation`` turns queries and keys by the tokens' positions (:mod:`mar.model.positions`).
        """
        # timm's signature has both arguments. MAR drops hidden tokens before the encoder, so no
        # attention mask is needed.
        assert attn_mask is None and not is_causal, "every token sees every token here"
        if num_queries is None:
            queries, keys, values = (
                self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
            )
        else:
            # timm stacks the projections of queries, keys and values in one matrix, in this order.
            # The rows of the queries are applied to the last tokens, the others to all.
            width = x.shape[-1]
            weight = self.qkv.weight
            bias = self.qkv.bias
            query = F.linear(x[:, -num_queries:], weight[:width], bias[:width])
            queries = query.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            rest = F.linear(x, weight[width:], bias[width:])
            keys, values = rest.unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        if rotation is not None:
            queries = rotated(queries, rotation[..., -queries.shape[2] :, :])
            keys = rotated(keys, rotation)
        return self.proj(attention(queries, keys, values).transpose(1, 2).flatten(2))


class Block(TimmBlock):
    """timm's pre-norm block, which can compute the last ``num_out`` tokens only."""

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        x: Float[Tensor, "B N D"],
        num_out: int | None = None,
        rotation: Float[Tensor, "2 B 1 N d"] | None = None,
    ) -> Float[Tensor, "B Q D"]:
        """Return all tokens, or the last ones.

        For the others only keys and values are computed. ``rotation`` is that of the attention.
        """
        # Drawn outside of :meth:`transform`: the rate differs from block to block. In compiled code
        # it would be a constant, and each block would need a version of its own.
        attention_scale = self._path_scale(x, self.drop_path1)
        mlp_scale = self._path_scale(x, self.drop_path2)
        return self.transform(x, num_out, attention_scale, mlp_scale, rotation)

    def transform(
        self,
        x: Float[Tensor, "B N D"],
        num_out: int | None,
        attention_scale: Float[Tensor, "B 1 1"] | None,
        mlp_scale: Float[Tensor, "B 1 1"] | None,
        rotation: Float[Tensor, "2 B 1 N d"] | None,
    ) -> Float[Tensor, "B Q D"]:
        """Return the block's output; stochastic depth multiplies a branch by its scale."""
        kept = x if num_out is None else x[:, -num_out:]
        attended = self.attn(self.norm1(x), num_queries=num_out, rotation=rotation)
        x = kept + _scaled(attended, attention_scale)
        return x + _scaled(self.mlp(self.norm2(x)), mlp_scale)

    def _path_scale(
        self, x: Float[Tensor, "B N D"], path: nn.Module
    ) -> Float[Tensor, "B 1 1"] | None:
        """Draw stochastic depth's factor of each clip: 0, or 1 over the share that is kept."""
        # A block whose rate is 0 has an nn.Identity here.
        if not self.training or not isinstance(path, DropPath):
            return None
        kept = 1 - path.drop_prob
        return x.new_empty((x.shape[0], 1, 1)).bernoulli_(kept).div_(kept)


def _scaled(
    branch: Float[Tensor, "B N D"], scale: Float[Tensor, "B 1 1"] | None
) -> Float[Tensor, "B N D"]:
    # In the branch's own type, as timm's DropPath: bfloat16 under autocast.
    return branch if scale is None else branch * scale.to(branch.dtype)


class Blocks(nn.Sequential):
    """Transformer blocks, one after another."""

    activation_checkpointing = False
    """Keep no activations inside a block: compute them again in the backward pass. This takes less
    memory and a third more work."""

    def forward(
        self,
        input: Float[Tensor, "B N D"],
        num_out: int | None = None,
        rotation: Float[Tensor, "2 B 1 N d"] | None = None,
    ) -> Float[Tensor, "B Q D"]:
        """Return all tokens, or the last ``num_out``; ``rotation`` is that of the attention."""
        x = input
        for number, block in enumerate(self, start=1):
            # Only the last block may drop tokens: the blocks before it need all keys and values.
            wanted = num_out if number == len(self) else None
            if self.activation_checkpointing and torch.is_grad_enabled():
                again = checkpoint(block, x, wanted, rotation, use_reentrant=False)
                x = cast("Tensor", again)
            else:
                x = block(x, wanted, rotation)
        return x


def transformer_blocks(
    width: int, depth: int, heads: int, drop_path: float = 0.0, mlp_width: int | None = None
) -> Blocks:
    """Return ``depth`` pre-norm blocks (GELU, timm's defaults).

    ``mlp_width`` is the hidden width of their MLPs; None: four times ``width``.

    The rate of stochastic depth rises linearly from 0 in the first block to ``drop_path`` in the
    last (Table I).
    """
    # With one block the divisor would be 0; its rate is 0 then.
    rates = [drop_path * block / max(depth - 1, 1) for block in range(depth)]
    hidden = mlp_width or 4 * width
    block = partial(
        Block,
        width,
        heads,
        # timm cuts the product down to a whole number; half a channel more keeps it from being one
        # too small.
        mlp_ratio=(hidden + 0.5) / width,
        qkv_bias=True,
        norm_layer=cast("type[nn.Module]", LayerNorm),
        attn_layer=Attention,
    )
    return Blocks(*(block(drop_path=rate) for rate in rates))


def set_execution_mode(
    model: nn.Module,
    compiled: str = "",
    activation_checkpointing: bool = False,
    num_ratios: int = 1,
) -> None:
    """Set how a model's blocks run.

    ``compiled`` is a mode of ``torch.compile`` (empty: not compiled). ``activation_checkpointing``
    recomputes activations in the backward pass. With several mask ratios, ``num_ratios``, the same
    code is compiled for as many numbers of tokens.
    """
    # A worker trains one trial after another. Code that was compiled for an earlier trial counts
    # against PyTorch's limit of eight versions, and the new model would run uncompiled.
    if compiled:
        torch.compiler.reset()
        # PyTorch's own limit for one number of visible tokens. It has no public name for it.
        limit = 8 * num_ratios
        torch._dynamo.config.recompile_limit = limit  # pyright: ignore[reportPrivateUsage]
    for part in model.modules():
        if isinstance(part, Blocks):
            part.activation_checkpointing = activation_checkpointing
        if isinstance(part, Block) and compiled:
            # Whole blocks: the residual sums, the scales and the norms become one pass over memory.
            part.transform = torch.compile(part.transform, mode=compiled, dynamic=False)


def initialise(module: nn.Module, as_made: Sequence[nn.Module] = ()) -> None:
    """Give linear layers Xavier-uniform weights and zero biases.

    Those in ``as_made`` keep PyTorch's own initialisation. So do norms, which start as the
    identity.
    """
    for part in module.modules():
        if isinstance(part, nn.Linear) and part not in as_made:
            nn.init.xavier_uniform_(part.weight)
            # nn.Linear declares its bias as a tensor, but with bias=False it is None.
            if part.bias is not None:  # pyright: ignore[reportUnnecessaryComparison]
                nn.init.zeros_(part.bias)
