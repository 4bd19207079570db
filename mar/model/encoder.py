"""The ViT encoder: tubelet embedding and blocks, over visible tokens only (section III-A)."""

from __future__ import annotations

from math import prod

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mar import plugins
from mar.config.model_settings import EncoderConfig
from mar.config.schema import TrainingConfig
from mar.config.types import Grid
from mar.model.layers import LayerNorm, initialise, transformer_blocks
from mar.model.merging import run_merging
from mar.model.positions import added_positions, rotations


def patchify(
    video: Float[Tensor, "B C T H W"], tubelet: tuple[int, int, int]
) -> Float[Tensor, "B N P"]:
    """Cut clips into N tubelets of P values.

    Tubelets are in the order t, h, w. The values of a tubelet are in the order channel, frame, row,
    column.
    """
    frames, height, width = tubelet
    # unfold() with a step of its size cuts a dimension into parts without a copy.
    parts = video.unfold(2, frames, frames).unfold(3, height, height).unfold(4, width, width)
    # One copy of the whole clip: visible and hidden tubelets are then rows of one table, which are
    # taken twice as fast as the pieces of a few pixels that a tubelet is in the clip.
    return parts.permute(0, 2, 3, 4, 1, 5, 6, 7).flatten(1, 3).flatten(2)


def take(tubelets: Float[Tensor, "B N P"], indices: Int[Tensor, "B K"]) -> Float[Tensor, "B K P"]:
    """Return some of each clip's tubelets, by their flat index."""
    # A column of clip numbers is broadcast against the K indices of each clip.
    clip = torch.arange(tubelets.shape[0], device=indices.device)[:, None]
    return tubelets[clip, indices]


def unpatchify(
    patches: Float[Tensor, "B N P"], grid: tuple[int, int, int], tubelet: tuple[int, int, int]
) -> Float[Tensor, "B C T H W"]:
    """Join tubelets to clips again: the inverse of ``patchify``."""
    parts = patches.unflatten(1, grid).unflatten(-1, (-1, *tubelet))
    # B t h w C frames height width -> B C (t frames) (h height) (w width)
    return parts.permute(0, 4, 1, 5, 2, 6, 3, 7).flatten(2, 3).flatten(3, 4).flatten(4, 5)


class Encoder(nn.Module):
    """The encoder: maps visible tubelets to visible tokens F_v.

    Hidden tubelets are dropped before the embedding, and cost nothing.
    """

    positions: Tensor | None
    rotations: Tensor | None

    def __init__(
        self, config: EncoderConfig, grid: Grid, last_norm: bool = True, merge: int = 0
    ) -> None:
        super().__init__()
        self.merge = merge
        width, depth, heads = config.dimensions
        # A 3D convolution whose stride is its kernel is a linear layer on each tubelet. As a linear
        # layer it can run on the visible ones only.
        self.embed = nn.Linear(3 * prod(config.tubelet), width)
        # Not persistent: a table is a constant and no part of a checkpoint. As a buffer it moves to
        # the device with the model.
        added = None
        turned = None
        if config.is_rotary:
            turned = rotations(config, grid)
        else:
            added = added_positions(config, grid)
        self.register_buffer("positions", added, persistent=False)
        self.register_buffer("rotations", turned, persistent=False)
        self.blocks = transformer_blocks(width, depth, heads, config.drop_path, config.mlp_width)
        # Without the last norm a linear classifier norms the average instead (norm: pooled).
        self.norm = LayerNorm(width) if last_norm else nn.Identity()
        # The release leaves the embedding as PyTorch initialises a Conv3d, uniform in ± 1/√fan_in,
        # which is also nn.Linear's own start.
        initialise(self, [self.embed] if config.init == "torch" else [])

    def forward(
        self,
        tubelets: Float[Tensor, "B K P"],
        visible: Int[Tensor, "B K"],
        lengths: Int[Tensor, "B K"] | None = None,
    ) -> Float[Tensor, "B K D"]:
        """Embed visible, normalised tubelets, apply their positions, run the blocks and the norm.

        ``lengths`` (``mask.lengths``) are added to the positions: 0 adds nothing.
        """
        tokens = self.embed(tubelets)
        if self.rotations is not None:
            # Under autocast the embedding is bfloat16; the sum of all residuals is not.
            tokens = tokens.to(self.embed.weight.dtype)
            # The axis of the heads is that between clips and tokens.
            rotation = self.rotations[:, visible].unsqueeze(2)
            return self.norm(self.blocks(tokens, rotation=rotation))
        assert self.positions is not None
        tokens = tokens + self.positions[visible]
        if lengths is not None:
            # The table of positions serves for lengths too, from its first row on.
            code = self.positions[lengths] - self.positions[0]
            tokens = tokens + code
        if self.merge and not self.training:
            return self.norm(run_merging(self.blocks, tokens, self.merge))
        return self.norm(self.blocks(tokens))


def build_encoder(settings: TrainingConfig) -> Encoder:
    """Return the encoder that ``encoder.size`` names: the ViT, or one of an installed package.

    Raises:
        UserError: the package's code fails.
    """
    config = settings.encoder
    if not config.is_of_package:
        last_norm = settings.classifier.norm == "tokens"
        return Encoder(config, settings.grid, last_norm, settings.evaluation.merge)
    factory: plugins.EncoderFactory = plugins.load(plugins.ENCODERS, config.size)
    options = plugins.options(plugins.ENCODERS, config.size, config.options)
    with plugins.package_errors(plugins.ENCODERS, config.size):
        # The call is an Encoder's. What reads its parts too is for the ViT alone.
        return factory.build(options, settings.grid, 3 * prod(config.tubelet))


def frozen_parts(encoder: Encoder, config: EncoderConfig) -> list[nn.Module]:
    """Return the parts of an encoder that are not trained (``encoder.train``)."""
    if config.train == "all":
        return []
    # A package's encoder too.
    if config.train == "none":
        return [encoder]
    return [encoder.embed, *encoder.blocks[: config.num_frozen]]


def flat_conv_weight(weight: Float[Tensor, "D C t h w"]) -> Float[Tensor, "D P"]:
    """Return the weights of a 3D convolution as those of a linear layer on tubelets."""
    # The convolution's dimensions have patchify()'s order already: channel, frame, row, column.
    return torch.flatten(weight, 1)
