"""The reconstruction branch: decoder, target and the loss L_r (section III-D, Eq. 3)."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mar.config.schema import ReconstructionConfig
from mar.model.encoder import take_tubelets
from mar.model.layers import LayerNorm, initialise, sin_cos_positions, transformer_blocks


class Decoder(nn.Module):
    """Predicts the pixels of hidden tubelets from visible tokens.

    The last block's queries, its MLP and the pixel head run on hidden tokens only; the released
    code runs them on all and then selects.
    """

    positions: Tensor

    def __init__(
        self,
        config: ReconstructionConfig,
        encoder_width: int,
        num_tokens: int,
        patch_values: int,
        init: str = "xavier",
    ) -> None:
        super().__init__()
        self.project = nn.Linear(encoder_width, config.width, bias=False)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.register_buffer(
            "positions", sin_cos_positions(num_tokens, config.width), persistent=False
        )
        self.blocks = transformer_blocks(config.width, config.depth, config.heads)
        self.norm = LayerNorm(config.width)
        self.head = nn.Linear(config.width, patch_values)
        initialise(self, [self.project] if init == "torch" else [])
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    def forward(
        self,
        tokens: Float[Tensor, "B K D"],
        visible: Int[Tensor, "B K"],
        hidden: Int[Tensor, "B M"],
    ) -> Float[Tensor, "B M P"]:
        """Return predicted values of the hidden tubelets, pixel by pixel with the channel last."""
        seen = self.project(tokens) + self.positions[visible]
        unseen = self.mask_token + self.positions[hidden]
        decoded = self.blocks(
            torch.cat([seen, unseen.to(seen.dtype)], dim=1), num_out=hidden.shape[1]
        )
        return self.head(self.norm(decoded))


def reconstruction_target(
    pixels: Float[Tensor, "B C T H W"],
    hidden: Int[Tensor, "B M"],
    tubelet: tuple[int, int, int],
    normalize: bool,
) -> Float[Tensor, "B M P"]:
    """Return x_M of Eq.

    3: hidden tubelets of ``pixels`` (0 to 1), normalised by channel within each tubelet.
    """
    tubelets = take_tubelets(pixels, tubelet, hidden)
    channels = tubelets.unflatten(-1, (pixels.shape[1], -1)).transpose(-1, -2)
    if normalize:
        mean = channels.mean(dim=-2, keepdim=True)
        channels = (channels - mean) / (channels.std(dim=-2, keepdim=True) + 1e-6)
    return channels.flatten(-2)


def reconstruction_loss(
    predicted: Float[Tensor, "B M P"], target: Float[Tensor, "B M P"]
) -> Float[Tensor, " B"]:
    """L_r, Eq. 3: mean squared error over the hidden tubelets of each clip."""
    return (predicted.float() - target).square().mean(dim=(1, 2))
