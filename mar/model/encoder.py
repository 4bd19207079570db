"""The ViT encoder: tubelet embedding and blocks, over visible tokens only (section III-A)."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mar.config.schema import EncoderConfig
from mar.model.layers import LayerNorm, initialise, sin_cos_positions, transformer_blocks


def patchify(
    video: Float[Tensor, "B C T H W"], tubelet: tuple[int, int, int]
) -> Float[Tensor, "B N P"]:
    """Cut clips into tubelets, tokens in order t, h, w.

    Within one, channel, frame, row, column (P values).
    """
    return _tubelets(video, tubelet).flatten(1, 3).flatten(2)


def take_tubelets(
    video: Float[Tensor, "B C T H W"], tubelet: tuple[int, int, int], indices: Int[Tensor, "B K"]
) -> Float[Tensor, "B K P"]:
    """Return some of the tubelets of ``patchify``, by their flat index.

    The others are not copied.
    """
    tubelets = _tubelets(video, tubelet)
    _, _, h, w = tubelets.shape[:4]
    clip = torch.arange(video.shape[0], device=indices.device)[:, None]
    return tubelets[clip, indices // (h * w), indices // w % h, indices % w].flatten(2)


def _tubelets(
    video: Float[Tensor, "B C T H W"], tubelet: tuple[int, int, int]
) -> Float[Tensor, "B t h w C frames height width"]:
    frames, height, width = tubelet
    parts = video.unfold(2, frames, frames).unfold(3, height, height).unfold(4, width, width)
    return parts.permute(0, 2, 3, 4, 1, 5, 6, 7)


def unpatchify(
    patches: Float[Tensor, "B N P"], grid: tuple[int, int, int], tubelet: tuple[int, int, int]
) -> Float[Tensor, "B C T H W"]:
    """Put tubelets together again: the inverse of ``patchify``."""
    parts = patches.unflatten(1, grid).unflatten(-1, (-1, *tubelet))
    return parts.permute(0, 4, 1, 5, 2, 6, 3, 7).flatten(2, 3).flatten(3, 4).flatten(4, 5)


class Encoder(nn.Module):
    """Visible tubelets in, visible tokens F_v out.

    The hidden tubelets are dropped before the embedding: what is hidden is never touched.
    """

    positions: Tensor

    def __init__(self, config: EncoderConfig, num_tokens: int, last_norm: bool = True) -> None:
        super().__init__()
        width, depth, heads = config.dimensions
        self.tubelet = config.tubelet
        self.embed = nn.Linear(3 * config.tubelet[0] * config.tubelet[1] * config.tubelet[2], width)
        self.register_buffer("positions", sin_cos_positions(num_tokens, width), persistent=False)
        self.blocks = transformer_blocks(width, depth, heads, config.drop_path)
        self.norm = LayerNorm(width) if last_norm else nn.Identity()
        initialise(self, [self.embed] if config.init == "torch" else [])

    def forward(
        self, video: Float[Tensor, "B C T H W"], visible: Int[Tensor, "B K"]
    ) -> Float[Tensor, "B K D"]:
        """Embed the visible tubelets, add their positions, run the blocks and the final norm."""
        tokens = self.embed(take_tubelets(video, self.tubelet, visible)) + self.positions[visible]
        return self.norm(self.blocks(tokens))


def flat_conv_weight(weight: Float[Tensor, "D C t h w"]) -> Float[Tensor, "D P"]:
    """Return a 3D convolution's patch embedding as the matrix that :func:`patchify` order needs."""
    return torch.flatten(weight, 1)
