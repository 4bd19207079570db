"""MAR: encode the visible tokens, run two branches, add their losses by Eq. 5 (section III)."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mar.config.schema import TrainingConfig
from mar.model.classifier import build_classifier
from mar.model.content_masks import hidden_by_content, run_lengths
from mar.model.decoder import Decoder, reconstruction_loss, reconstruction_target
from mar.model.encoder import build_encoder, frozen_parts, patchify, take
from mar.model.masking import DrawnMask, decoder_order
from mar.model.pixels import IMAGENET_MEAN, IMAGENET_STD


@dataclass(frozen=True)
class Losses:
    """The losses L, L_c and L_r of each clip (Eqs. 3 to 5), before the average over the batch."""

    total: Float[Tensor, " B"]
    classification: Float[Tensor, " B"]
    reconstruction: Float[Tensor, " B"]


def num_hidden_of(drawn: DrawnMask) -> int:
    """Return how many tokens a drawn mask hides, which is the same for each of its clips.

    It is drawn on the CPU, so counting does not make an accelerator wait.
    """
    first = drawn[0]
    if drawn.dtype == torch.bool:
        return int(first.sum())
    return int((first >= 0).sum())


def split_indices(
    hidden: Bool[Tensor, "B t h w"], num_hidden: int | None = None
) -> tuple[Int[Tensor, "B K"], Int[Tensor, "B M"]]:
    """Return the flat indices of visible and of hidden tokens, both in order t, h, w.

    Without ``num_hidden``, the hidden tokens of the first mask are counted.
    """
    flat = hidden.flatten(1)
    # Visible tokens (0) sort before hidden ones (1). The stable sort keeps each group in the order
    # t, h, w.
    order = flat.to(torch.uint8).argsort(dim=1, stable=True)
    if num_hidden is None:
        num_hidden = num_hidden_of(hidden)
    num_visible = flat.shape[1] - num_hidden
    return order[:, :num_visible], order[:, num_visible:]


def _decoder(settings: TrainingConfig) -> Decoder:
    return Decoder(
        settings.reconstruction,
        settings.encoder.dimensions[0],
        prod(settings.grid),
        3 * prod(settings.encoder.tubelet),
        settings.encoder.init,
    )


class MAR(nn.Module):
    """Masked Action Recognition (Fig. 2).

    Takes videos with pixel values from 0 to 1, and a mask that is True where a token is hidden; or,
    of a strategy that sees the clip, the order that :mod:`mar.model.masking` drew in its place.
    """

    mean: Tensor
    std: Tensor
    decoder_order: Tensor

    def __init__(self, settings: TrainingConfig) -> None:
        super().__init__()
        self.tubelet = settings.encoder.tubelet
        self.mask = settings.mask
        self.grid = settings.grid
        self.reconstruction = settings.reconstruction
        # Not persistent: constants are no part of a checkpoint. As buffers they move to the device
        # with the model.
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(3, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(3, 1), persistent=False)
        self.encoder = build_encoder(settings)
        self.frozen = frozen_parts(self.encoder, settings.encoder)
        for part in self.frozen:
            part.requires_grad_(False)
            # A new module is in training; ``train`` keeps these parts out of it.
            part.eval()
        # Also built for a pre-training, which has none: its initialisation takes numbers from
        # PyTorch's generator, and without it the decoder would start from other random weights.
        classifier = build_classifier(settings)
        self.classifier = None if settings.pretrains else classifier
        has_decoder = settings.reconstructs
        if has_decoder:
            self.decoder = _decoder(settings)
            self.register_buffer("decoder_order", decoder_order(settings.grid), persistent=False)
        else:
            self.decoder = None

    def train(self, mode: bool = True) -> MAR:
        """Set the mode of training; what is not trained stays in that of evaluation."""
        super().train(mode)
        for part in self.frozen:
            part.eval()
        return self

    def forward(
        self,
        pixels: Float[Tensor, "B C T H W"] | Float[Tensor, "B K D"],
        hidden: DrawnMask,
        labels: Float[Tensor, "B classes"],
    ) -> Losses:
        """Return L = λ L_r + L_c for each clip (Eq. 5), or L_r alone in a pre-training.

        ``labels`` are class probabilities. In place of pixels there may be cached tokens
        (``encoder.cached``): L_c alone.
        """
        if pixels.ndim == 3:
            scores = self.classify_tokens(pixels, hidden)
            losses = F.cross_entropy(scores.float(), labels, reduction="none")
            return Losses(losses, losses, torch.zeros_like(losses))
        tubelets = patchify(pixels, self.tubelet)
        visible_indices, hidden_indices = self.indices(hidden, tubelets)
        tokens = self._encode(tubelets, visible_indices)
        nothing = torch.zeros(len(pixels), device=pixels.device)
        classification = reconstruction = nothing
        if self.classifier is not None:
            scores = self.classifier(tokens, visible_indices)
            # L_c of Eq. 4: minus the sum over classes of z_i log p_i. z has smoothed and mixed
            # labels (Table I). Under autocast the scores are bfloat16; the loss is in float32.
            classification = F.cross_entropy(scores.float(), labels, reduction="none")
        if self.decoder is not None:
            if self.training:
                hidden_indices = self._reconstructed(hidden_indices)
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

    def _reconstructed(self, hidden: Int[Tensor, "B M"]) -> Int[Tensor, "B R"]:
        """Return those of the hidden tokens that are reconstructed (``reconstruction.tokens``)."""
        count = self.reconstruction.num_reconstructed(hidden.shape[1])
        if count == hidden.shape[1]:
            return hidden
        first = self.decoder_order[hidden].argsort(dim=1)[:, :count]
        # In the order t, h, w, as they were.
        return hidden.gather(1, first.sort(dim=1).values)

    def classify(
        self, pixels: Float[Tensor, "B C T H W"], hidden: DrawnMask
    ) -> Float[Tensor, "B classes"]:
        """Return the class scores; the reconstruction branch is not run (Fig. 2)."""
        assert self.classifier is not None
        tubelets = patchify(pixels, self.tubelet)
        visible_indices, _ = self.indices(hidden, tubelets)
        return self.classifier(self._encode(tubelets, visible_indices), visible_indices)

    def classify_tokens(
        self, tokens: Float[Tensor, "B K D"], hidden: DrawnMask
    ) -> Float[Tensor, "B classes"]:
        """Return the class scores of the encoder's tokens, under the mask that left these."""
        assert self.classifier is not None
        visible_indices, _ = split_indices(hidden.to(self.device))
        return self.classifier(tokens, visible_indices)

    def features(
        self, pixels: Float[Tensor, "B C T H W"], hidden: DrawnMask
    ) -> Float[Tensor, "B K D"]:
        """Return the encoder's tokens F_v under a mask."""
        tubelets = patchify(pixels, self.tubelet)
        visible_indices, _ = self.indices(hidden, tubelets)
        return self._encode(tubelets, visible_indices)

    def reconstruct(
        self, pixels: Float[Tensor, "B C T H W"], hidden: DrawnMask
    ) -> Float[Tensor, "B M P"]:
        """Return the predicted values of the hidden tubelets (Fig. 6)."""
        assert self.decoder is not None
        tubelets = patchify(pixels, self.tubelet)
        visible_indices, hidden_indices = self.indices(hidden, tubelets)
        tokens = self._encode(tubelets, visible_indices)
        return self.decoder(tokens, visible_indices, hidden_indices)

    def encode(
        self, pixels: Float[Tensor, "B C T H W"], visible: Int[Tensor, "B K"]
    ) -> Float[Tensor, "B K D"]:
        """Return the encoder's tokens F_v of the visible tubelets, by their flat indices."""
        return self._encode(patchify(pixels, self.tubelet), visible)

    def _encode(
        self, tubelets: Float[Tensor, "B N P"], visible: Int[Tensor, "B K"]
    ) -> Float[Tensor, "B K D"]:
        # Normalised after hidden tubelets are dropped, and not as whole clips: nothing reads those.
        normalised = self._normalised(take(tubelets, visible))
        if not self.mask.lengths:
            return self.encoder(normalised, visible)
        lengths = run_lengths(self.mask, visible, tubelets.unflatten(1, self.grid))
        return self.encoder(normalised, visible, lengths)

    def _normalised(self, tubelets: Float[Tensor, "B K P"]) -> Float[Tensor, "B K P"]:
        channels = tubelets.unflatten(-1, (3, -1))
        return ((channels - self.mean) / self.std).flatten(-2)

    def _embedded(self, tubelets: Float[Tensor, "B N P"]) -> Float[Tensor, "B N D"]:
        return self.encoder.embed(self._normalised(tubelets))

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return self.mean.device

    def masked(
        self, drawn: DrawnMask, tubelets: Float[Tensor, "B N P"], num_hidden: int | None = None
    ) -> Bool[Tensor, "B t h w"]:
        """Return the masks of clips; ``drawn`` is one already, unless the strategy sees the clip.

        Without ``num_hidden``, the hidden tokens of ``drawn`` are counted.
        """
        if drawn.dtype == torch.bool:
            return drawn
        if num_hidden is None:
            num_hidden = num_hidden_of(drawn)
        order = drawn.to(self.device, non_blocking=True)
        return hidden_by_content(self.mask, order, num_hidden, tubelets, self._embedded)

    def indices(
        self, drawn: DrawnMask, tubelets: Float[Tensor, "B N P"], num_hidden: int | None = None
    ) -> tuple[Int[Tensor, "B K"], Int[Tensor, "B M"]]:
        """Return the indices of visible and of hidden tokens, on the model's device.

        Without ``num_hidden``, the hidden tokens of ``drawn`` are counted.
        """
        if num_hidden is None:
            num_hidden = num_hidden_of(drawn)
        hidden = self.masked(drawn, tubelets, num_hidden)
        visible_indices, hidden_indices = split_indices(hidden, num_hidden)
        device = self.device
        # The copies may be asynchronous: the device's stream runs them before the kernels that
        # read the indices.
        return (
            visible_indices.to(device, non_blocking=True),
            hidden_indices.to(device, non_blocking=True),
        )
