"""MAR: encode the visible tokens, run two branches, add their losses by Eq. 5 (section III)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mar.config.schema import TrainingConfig
from mar.model.classifier import build_classifier
from mar.model.decoder import Decoder, reconstruction_loss, reconstruction_target
from mar.model.encoder import Encoder, patchify, take


@dataclass(frozen=True)
class Losses:
    """The losses L, L_c and L_r of each clip (Eqs. 3 to 5), before the average over the batch."""

    total: Float[Tensor, " B"]
    classification: Float[Tensor, " B"]
    reconstruction: Float[Tensor, " B"]


def split_indices(hidden: Bool[Tensor, "B t h w"]) -> tuple[Int[Tensor, "B K"], Int[Tensor, "B M"]]:
    """Return the flat indices of visible and of hidden tokens, both in order t, h, w.

    Masks are drawn on the CPU, so counting here does not make an accelerator wait.
    """
    flat = hidden.flatten(1)
    # Visible tokens (0) sort before hidden ones (1). The stable sort keeps each group in the order
    # t, h, w.
    order = flat.to(torch.uint8).argsort(dim=1, stable=True)
    # The first clip's count serves for all: all masks of a batch hide the same number of tokens.
    num_visible = flat.shape[1] - int(flat[0].sum())
    return order[:, :num_visible], order[:, num_visible:]


def _decoder(settings: TrainingConfig, width: int, num_tokens: int, patch_values: int) -> Decoder:
    return Decoder(settings.reconstruction, width, num_tokens, patch_values, settings.encoder.init)


class MAR(nn.Module):
    """Masked Action Recognition (Fig. 2).

    Takes videos with pixel values from 0 to 1, and a mask that is True where a token is hidden.
    """

    def __init__(self, settings: TrainingConfig) -> None:
        super().__init__()
        t, h, w = settings.grid
        num_tokens = t * h * w
        width = settings.encoder.dimensions[0]
        self.reconstruction = settings.reconstruction
        self.encoder = Encoder(
            settings.encoder, num_tokens, last_norm=settings.classifier.norm == "tokens"
        )
        # Also built for a pre-training, which has none: its initialisation takes numbers from
        # PyTorch's generator, and without it the decoder would start from other random weights.
        classifier = build_classifier(
            settings.classifier, width, num_tokens, settings.data.num_classes
        )
        self.classifier = None if settings.pretrains else classifier
        patch_values = self.encoder.embed.in_features
        has_decoder = settings.reconstructs
        if has_decoder:
            self.decoder = _decoder(settings, width, num_tokens, patch_values)
        else:
            self.decoder = None

    def forward(
        self,
        pixels: Float[Tensor, "B C T H W"],
        hidden: Bool[Tensor, "B t h w"],
        labels: Float[Tensor, "B classes"],
    ) -> Losses:
        """Return L = λ L_r + L_c for each clip (Eq. 5), or L_r alone in a pre-training.

        ``labels`` are class probabilities.
        """
        visible_indices, hidden_indices = self.indices(hidden)
        tubelets = patchify(pixels, self.encoder.tubelet)
        tokens = self.encoder(take(tubelets, visible_indices), visible_indices)
        nothing = torch.zeros(len(pixels), device=pixels.device)
        classification = reconstruction = nothing
        if self.classifier is not None:
            scores = self.classifier(tokens, visible_indices)
            # L_c of Eq. 4: minus the sum over classes of z_i log p_i. z has smoothed and mixed
            # labels (Table I). Under autocast the scores are bfloat16; the loss is in float32.
            classification = F.cross_entropy(scores.float(), labels, reduction="none")
        if self.decoder is not None:
            predicted = self.decoder(tokens, visible_indices, hidden_indices)
            # The target x_M of Eq. 3 has the pixels from 0 to 1, as in the release: without
            # ImageNet's mean and deviation, which are for the encoder alone.
            target = reconstruction_target(
                take(tubelets, hidden_indices), self.reconstruction.normalize_target
            )
            reconstruction = reconstruction_loss(predicted, target)
        if self.classifier is None:
            return Losses(reconstruction, nothing, reconstruction)
        # Eq. 5, where λ is reconstruction.weight. Without a decoder L_r is zero here.
        return Losses(
            self.reconstruction.weight * reconstruction + classification,
            classification,
            reconstruction,
        )

    def classify(
        self, pixels: Float[Tensor, "B C T H W"], hidden: Bool[Tensor, "B t h w"]
    ) -> Float[Tensor, "B classes"]:
        """Return the class scores; the reconstruction branch is not run (Fig. 2)."""
        assert self.classifier is not None
        visible_indices, _ = self.indices(hidden)
        return self.classifier(self.encode(pixels, visible_indices), visible_indices)

    def reconstruct(
        self, pixels: Float[Tensor, "B C T H W"], hidden: Bool[Tensor, "B t h w"]
    ) -> Float[Tensor, "B M P"]:
        """Return the predicted values of the hidden tubelets (Fig. 6)."""
        assert self.decoder is not None
        visible_indices, hidden_indices = self.indices(hidden)
        tokens = self.encode(pixels, visible_indices)
        return self.decoder(tokens, visible_indices, hidden_indices)

    def encode(
        self, pixels: Float[Tensor, "B C T H W"], visible: Int[Tensor, "B K"]
    ) -> Float[Tensor, "B K D"]:
        """Return the encoder's tokens F_v of the visible tubelets, by their flat indices."""
        tubelets = patchify(pixels, self.encoder.tubelet)
        return self.encoder(take(tubelets, visible), visible)

    def indices(
        self, hidden: Bool[Tensor, "B t h w"]
    ) -> tuple[Int[Tensor, "B K"], Int[Tensor, "B M"]]:
        """Return the indices of visible and of hidden tokens, on the model's device."""
        visible_indices, hidden_indices = split_indices(hidden)
        device = self.encoder.positions.device
        # The copies may be asynchronous: the device's stream runs them before the kernels that
        # read the indices.
        return (
            visible_indices.to(device, non_blocking=True),
            hidden_indices.to(device, non_blocking=True),
        )
