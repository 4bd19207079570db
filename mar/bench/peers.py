"""The peers of a step: the same weights and inputs, computed as others compute them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from mar.config.schema import TrainingConfig
from mar.model.decoder import reconstruction_loss
from mar.model.encoder import patchify
from mar.model.layers import Attention
from mar.model.mar import MAR
from mar.weights.state_dict_mapping import hugging_face_names


class Released(nn.Module):
    """MAR as its released code computes it, written from the facts known about it.

    Every token is embedded before the mask; attention builds softmax(QKᵀ); every block's output is
    normalised and put into a list of which the last alone is used; the pixel head runs on all
    tokens, and the target is made of all tubelets.
    """

    def __init__(self, model: MAR) -> None:
        super().__init__()
        self.mar = model

    def forward(
        self,
        pixels: Float[Tensor, "B C T H W"],
        hidden: Bool[Tensor, "B t h w"],
        labels: Float[Tensor, "B classes"],
    ) -> Float[Tensor, " B"]:
        """Return L of each clip (Eq. 5)."""
        hidden = hidden.to(pixels.device).flatten(1)
        tokens = self._encoded(pixels, hidden)
        loss = F.cross_entropy(self._scores(tokens).float(), labels, reduction="none")
        if self.mar.decoder is None:
            return loss
        predicted, target = self._redrawn(tokens, hidden), self._target(pixels, hidden)
        return loss + self.mar.reconstruction.weight * reconstruction_loss(predicted, target)

    def classify(
        self, pixels: Float[Tensor, "B C T H W"], hidden: Bool[Tensor, "B t h w"]
    ) -> Float[Tensor, "B classes"]:
        """Return the class scores."""
        return self._scores(self._encoded(pixels, hidden.to(pixels.device).flatten(1)))

    def _encoded(self, pixels: Tensor, hidden: Tensor) -> Tensor:
        encoder = self.mar.encoder
        kernel = encoder.embed.weight.unflatten(1, (3, *encoder.tubelet))
        video = (pixels - self.mar.mean) / self.mar.std
        tokens = (
            F.conv3d(video, kernel, encoder.embed.bias, stride=encoder.tubelet)
            .flatten(2)
            .transpose(1, 2)
        )
        visible = (tokens + encoder.positions)[~hidden].unflatten(0, (len(pixels), -1))
        outputs: list[Tensor] = []
        for block in encoder.blocks:
            visible = _block(block, visible)
            outputs.append(encoder.norm(visible))
        return outputs[-1]

    def _scores(self, tokens: Tensor) -> Tensor:
        classifier: Any = self.mar.classifier
        bridged = classifier.project(tokens)
        for block in classifier.blocks:
            bridged = _block(block, bridged)
        return classifier.head(classifier.dropout(classifier.norm(bridged.mean(dim=1))))

    def _redrawn(self, tokens: Tensor, hidden: Tensor) -> Tensor:
        decoder = self.mar.decoder
        assert decoder is not None
        positions = decoder.positions.expand(len(tokens), -1, -1)
        seen, unseen = (
            positions[where].unflatten(0, (len(tokens), -1)) for where in (~hidden, hidden)
        )
        seen = decoder.project(tokens) + seen
        everywhere = torch.cat([seen, (decoder.mask_token + unseen).to(seen.dtype)], dim=1)
        for block in decoder.blocks:
            everywhere = _block(block, everywhere)
        return decoder.head(decoder.norm(everywhere))[:, seen.shape[1] :]

    def _target(self, pixels: Tensor, hidden: Tensor) -> Tensor:
        tubelets = (
            patchify(pixels, self.mar.encoder.tubelet)
            .unflatten(-1, (pixels.shape[1], -1))
            .transpose(-1, -2)
        )
        if self.mar.reconstruction.normalize_target:
            mean, std = tubelets.mean(dim=-2, keepdim=True), tubelets.std(dim=-2, keepdim=True)
            tubelets = (tubelets - mean) / (std + 1e-6)
        return tubelets.flatten(-2)[hidden].unflatten(0, (len(pixels), -1))


def _block(block: Any, x: Tensor) -> Tensor:
    x = x + block.drop_path1(_attention(block.attn, block.norm1(x)))
    return x + block.drop_path2(block.mlp(block.norm2(x)))


def _attention(layer: Attention, x: Tensor) -> Tensor:
    queries, keys, values = (
        layer.qkv(x).unflatten(-1, (3, layer.num_heads, -1)).permute(2, 0, 3, 1, 4)
    )
    weights = torch.softmax(queries * layer.scale @ keys.transpose(-2, -1), dim=-1)
    return layer.proj((weights @ values).transpose(1, 2).flatten(2))


def videomae(model: MAR, settings: TrainingConfig) -> Any:
    """Return ``transformers``' VideoMAE classifier with the weights of one of our models.

    The model needs the linear classifier with ``norm: pooled``.

    Raises:
        ImportError: ``transformers`` is not installed.
    """
    from transformers import VideoMAEConfig, VideoMAEForVideoClassification

    width, depth, heads = settings.encoder.dimensions
    frames, patch, _ = settings.encoder.tubelet
    config = VideoMAEConfig(
        image_size=settings.clip.size,
        num_frames=settings.clip.frames,
        patch_size=patch,
        tubelet_size=frames,
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        layer_norm_eps=1e-6,
        use_mean_pooling=True,
    )
    config.num_labels = settings.data.num_classes
    theirs = VideoMAEForVideoClassification(config)
    named = hugging_face_names(
        model.state_dict(), settings.encoder.tubelet
    )  # as checkpoints have them, not the module
    renamed = {
        name.replace("q_bias", "query.bias").replace("v_bias", "value.bias"): named[name]
        for name in named
    }
    expected = theirs.state_dict()
    for name, value in expected.items():
        if (
            name.endswith("key.bias") and name not in renamed
        ):  # transformers 5.17 has it, of zeros; 5.23 has not
            renamed[name] = torch.zeros_like(value)
    theirs.load_state_dict(renamed)
    return theirs
