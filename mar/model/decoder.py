"""The reconstruction branch: decoder, target and the loss L_r (section III-D, Eq. 3)."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mar.config.schema import ReconstructionConfig
from mar.model.encoder import take_tubelets
from mar.model.layers import LayerNorm, initialise, sin_cos_positions, transformer_blocks


class Decoder(nn.Module):
    """The decoder of the reconstruction branch: predicts hidden tubelets from visible tokens.

    The last block's queries, its MLP and the pixel head run on hidden tokens only. The released
    code runs them on all tokens and then selects the hidden ones, with the same result.
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
        # Not persistent: the table follows from its shape alone.
        self.register_buffer(
            "positions", sin_cos_positions(num_tokens, config.width), persistent=False
        )
        self.blocks = transformer_blocks(config.width, config.depth, config.heads)
        self.norm = LayerNorm(config.width)
        self.head = nn.Linear(config.width, patch_values)
        # With encoder.init: torch, as in the release, the projection keeps PyTorch's own start.
        initialise(self, [self.project] if init == "torch" else [])
        # VideoMAE's start of the mask token.
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
        # Visible tokens first, hidden ones last, because a Block's ``num_out`` takes the last ones.
        # The order changes no result: positions are added already, and attention has no order.
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
    """Return x_M of Eq. 3: the hidden tubelets of ``pixels``, channel last.

    ``pixels`` have values from 0 to 1. With ``normalize``, each channel is normalised within each
    tubelet (Table VIII).
    """
    tubelets = take_tubelets(pixels, tubelet, hidden)
    # Tubelets have the channel first. The pre-trained pixel heads of VideoMAE have it last.
    channels = tubelets.unflatten(-1, (pixels.shape[1], -1)).transpose(-1, -2)
    # As in the release: the unbiased deviation, and a small number where a tubelet has one colour.
    if normalize:
        mean = channels.mean(dim=-2, keepdim=True)
        channels = (channels - mean) / (channels.std(dim=-2, keepdim=True) + 1e-6)
    return channels.flatten(-2)


def reconstruction_loss(
    predicted: Float[Tensor, "B M P"], target: Float[Tensor, "B M P"]
) -> Float[Tensor, " B"]:
    """Return L_r of Eq. 3: the mean squared error over the hidden tubelets of each clip."""
    # Eq. 3 is ‖x_M - y_M‖ / Ω(x_M), with Ω the number of hidden values. As the text and the release
    # say, the norm is squared. Under autocast the prediction is bfloat16; the loss is in float32.
    return (predicted.float() - target).square().mean(dim=(1, 2))
