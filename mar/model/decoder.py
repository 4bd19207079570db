"""The reconstruction branch: decoder, target and the loss L_r (section III-D, Eq. 3)."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mar.config.model_settings import ReconstructionConfig
from mar.model.layers import LayerNorm, initialise, transformer_blocks
from mar.model.positions import sin_cos_positions


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
    tubelets: Float[Tensor, "B M P"], normalize: bool
) -> Float[Tensor, "B M P"]:
    """Return x_M of Eq. 3: hidden tubelets, as ``patchify`` has them, with the channel last.

    Their values are from 0 to 1. With ``normalize``, each channel is normalised within each
    tubelet (Table VIII).
    """
    channels = tubelets.unflatten(-1, (3, -1))
    if normalize:
        channels = channels - channels.mean(dim=-1, keepdim=True)
        # As in the release: the unbiased deviation, and a small number where a tubelet has one
        # colour. Written out, because Tensor.std() takes ten times as long on a CPU.
        degrees_of_freedom = channels.shape[-1] - 1
        std = (channels.square().sum(dim=-1, keepdim=True) / degrees_of_freedom).sqrt()
        channels = channels / (std + 1e-6)
    # The pre-trained pixel heads of VideoMAE have the channel last.
    return channels.transpose(-1, -2).flatten(-2)


def reconstruction_loss(
    predicted: Float[Tensor, "B M P"], target: Float[Tensor, "B M P"]
) -> Float[Tensor, " B"]:
    """Return L_r of Eq. 3: the mean squared error over the hidden tubelets of each clip."""
    # Eq. 3 is ‖x_M - y_M‖ / Ω(x_M), with Ω the number of hidden values. As the text and the release
    # say, the norm is squared. Under autocast the prediction is bfloat16; the loss is in float32.
    return (predicted.float() - target).square().mean(dim=(1, 2))
