"""Token merging (ToMe, Bolya et al., 2023): the blocks of a trained encoder merge similar tokens.

It needs no training: it is a way to test a model with fewer operations (``evaluation.merge``).
Between a block's attention and its MLP, the ``r`` most similar pairs of tokens become one each. The
tokens are divided by their place, even and odd; each even one has the odd one whose key is most
similar, and the ``r`` even ones with the greatest similarity are merged into theirs. A merged token
is the mean of the tokens in it, and counts as many times in the attention after it.

At the end every token gets the value of the merged one that it went into. So what follows the
encoder has as many tokens as without merging, and treats a merged one as often as it counts.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from mar.model.layers import Attention, Block, Blocks


def num_merged(num_tokens: int, merge: int) -> int:
    """Return how many of some tokens a block merges: at most one for each odd one."""
    return min(merge, num_tokens // 2)


def run_merging(blocks: Blocks, tokens: Float[Tensor, "B K D"], merge: int) -> Tensor:
    """Return the blocks' output for each token, where each block merges ``merge`` of them."""
    x = tokens
    sizes = torch.ones_like(x[..., :1], dtype=torch.float32)
    # Of each token of the input, the index of the merged token that it is in.
    in_token = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
    for block in blocks:
        block = cast("Block", block)
        attended, keys = _attention(cast("Attention", block.attn), block.norm1(x), sizes)
        x = x + attended
        count = num_merged(x.shape[1], merge)
        # One token is left.
        if count:
            x, sizes, moved = _merged(x, sizes, keys, count)
            in_token = moved.gather(1, in_token)
        x = x + block.mlp(block.norm2(x))
    return x.gather(1, in_token[..., None].expand(-1, -1, x.shape[-1]))


def _attention(
    attention: Attention, x: Float[Tensor, "B N D"], sizes: Float[Tensor, "B N 1"]
) -> tuple[Float[Tensor, "B N D"], Float[Tensor, "B N d"]]:
    """Return the attention's output and the keys, averaged over the heads.

    A token that stands for several counts as often: its size multiplies the exponential of its
    logits.
    """
    queries, keys, values = (
        attention.qkv(x).unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    )
    bias = sizes.log().transpose(1, 2)[:, None].to(queries.dtype)
    output = F.scaled_dot_product_attention(queries, keys, values, attn_mask=bias)
    return attention.proj(output.transpose(1, 2).flatten(2)), keys.mean(dim=1)


def _merged(
    x: Float[Tensor, "B N D"],
    sizes: Float[Tensor, "B N 1"],
    keys: Float[Tensor, "B N d"],
    count: int,
) -> tuple[Float[Tensor, "B R D"], Float[Tensor, "B R 1"], Int[Tensor, "B N"]]:
    """Merge ``count`` pairs of tokens.

    Returns:
        The tokens that are left, their sizes, and the new place of each token.
    """
    # Autocast would compute the product in bfloat16, which has few values near 1.
    with torch.autocast(x.device.type, enabled=False):
        keys = F.normalize(keys.float(), dim=-1)
        similarity, partner = (keys[:, ::2] @ keys[:, 1::2].mT).max(dim=-1)
    order = similarity.argsort(dim=1, descending=True, stable=True)
    gone, kept = order[:, :count], order[:, count:].sort(dim=1).values
    into = partner.gather(1, gone)
    # Sums, weighted by size, which are divided at the end.
    total = torch.cat([x.float() * sizes, sizes], dim=-1)
    even, odd = total[:, ::2], total[:, 1::2]
    odd = odd.scatter_add(1, _wide(into, total), even.gather(1, _wide(gone, total)))
    total = torch.cat([even.gather(1, _wide(kept, total)), odd], dim=1)
    # Even tokens that stay come first, in their order, and the odd ones after them.
    num_kept = kept.shape[1]
    new_even = torch.empty_like(order)
    new_even.scatter_(1, kept, torch.arange(num_kept, device=x.device).expand(kept.shape))
    new_even.scatter_(1, gone, num_kept + into)
    moved = torch.empty(x.shape[:2], dtype=torch.long, device=x.device)
    moved[:, ::2] = new_even
    moved[:, 1::2] = num_kept + torch.arange(odd.shape[1], device=x.device)
    sizes = total[..., -1:]
    return (total[..., :-1] / sizes).to(x.dtype), sizes, moved


def _wide(indices: Int[Tensor, "B n"], values: Float[Tensor, "B N D"]) -> Int[Tensor, "B n D"]:
    return indices[..., None].expand(-1, -1, values.shape[-1])
