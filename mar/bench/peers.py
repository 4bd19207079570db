"""The peers of a step: the same weights and inputs, computed as other code computes them."""

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
    """MAR computed as in its released code: our reconstruction, from what is known about that code.

    It differs from ours in the work that it does, not in the result. Every token is embedded
    before the mask is applied; attention builds softmax(QKᵀ); the output of every block is
    normalised and put into a list of which only the last is used; the pixel head runs on all
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
        """Return the loss L of each clip (Eq. 5)."""
        hidden = hidden.to(pixels.device).flatten(1)
        tokens = self._encode(pixels, hidden)
        loss = F.cross_entropy(self._class_scores(tokens).float(), labels, reduction="none")
        if self.mar.decoder is None:
            return loss
        predicted = self._reconstruct(tokens, hidden)
        target = self._target(pixels, hidden)
        return loss + self.mar.reconstruction.weight * reconstruction_loss(predicted, target)

    def classify(
        self, pixels: Float[Tensor, "B C T H W"], hidden: Bool[Tensor, "B t h w"]
    ) -> Float[Tensor, "B classes"]:
        """Return the class scores."""
        return self._class_scores(self._encode(pixels, hidden.to(pixels.device).flatten(1)))

    def _encode(self, pixels: Tensor, hidden: Tensor) -> Tensor:
        """Return the visible tokens F_v of the encoder."""
        encoder = self.mar.encoder
        # Our embedding is a matrix over visible tubelets; the release convolves the whole video.
        kernel = encoder.embed.weight.unflatten(1, (3, *self.mar.tubelet))
        mean = self.mar.mean.view(3, 1, 1, 1)
        std = self.mar.std.view(3, 1, 1, 1)
        video = (pixels - mean) / std
        embedded = F.conv3d(video, kernel, encoder.embed.bias, stride=self.mar.tubelet)
        tokens = embedded.flatten(2).transpose(1, 2)
        assert encoder.positions is not None
        visible = (tokens + encoder.positions)[~hidden].unflatten(0, (len(pixels), -1))
        outputs: list[Tensor] = []
        for block in encoder.blocks:
            visible = _block(block, visible)
            # A norm after every block, as in the release; only the last one is used.
            outputs.append(encoder.norm(visible))
        return outputs[-1]

    def _class_scores(self, tokens: Tensor) -> Tensor:
        """Return the class scores of the bridging classifier."""
        classifier: Any = self.mar.classifier
        bridged = classifier.project(tokens)
        for block in classifier.blocks:
            bridged = _block(block, bridged)
        return classifier.head(classifier.dropout(classifier.norm(bridged.mean(dim=1))))

    def _reconstruct(self, tokens: Tensor, hidden: Tensor) -> Tensor:
        """Return the decoder's prediction of the hidden tubelets."""
        decoder = self.mar.decoder
        assert decoder is not None
        positions = decoder.positions.expand(len(tokens), -1, -1)
        visible_positions = positions[~hidden].unflatten(0, (len(tokens), -1))
        hidden_positions = positions[hidden].unflatten(0, (len(tokens), -1))
        seen = decoder.project(tokens) + visible_positions
        unseen = (decoder.mask_token + hidden_positions).to(seen.dtype)
        decoded = torch.cat([seen, unseen], dim=1)
        for block in decoder.blocks:
            decoded = _block(block, decoded)
        # The head runs on all tokens; the hidden ones, which come last, are selected after it.
        return decoder.head(decoder.norm(decoded))[:, seen.shape[1] :]

    def _target(self, pixels: Tensor, hidden: Tensor) -> Tensor:
        """Return x_M of Eq. 3, normalised by channel within each tubelet if the settings say so."""
        # All tubelets are prepared; the hidden ones are selected at the end.
        tubelets = patchify(pixels, self.mar.tubelet)
        tubelets = tubelets.unflatten(-1, (pixels.shape[1], -1)).transpose(-1, -2)
        if self.mar.reconstruction.normalize_target:
            mean = tubelets.mean(dim=-2, keepdim=True)
            std = tubelets.std(dim=-2, keepdim=True)
            tubelets = (tubelets - mean) / (std + 1e-6)
        return tubelets.flatten(-2)[hidden].unflatten(0, (len(pixels), -1))


def _block(block: Any, x: Tensor) -> Tensor:
    """Return the output of a pre-norm transformer block, with explicit attention."""
    x = x + block.drop_path1(_attention(block.attn, block.norm1(x)))
    return x + block.drop_path2(block.mlp(block.norm2(x)))


def _attention(layer: Attention, x: Tensor) -> Tensor:
    """Return self-attention that builds the matrix softmax(QKᵀ)."""
    # (B, N, 3 D) -> (3, B, heads, N, d)
    projected = layer.qkv(x).unflatten(-1, (3, layer.num_heads, -1)).permute(2, 0, 3, 1, 4)
    queries, keys, values = projected
    weights = torch.softmax(queries * layer.scale @ keys.transpose(-2, -1), dim=-1)
    return layer.proj((weights @ values).transpose(1, 2).flatten(2))


def videomae(model: MAR, settings: TrainingConfig) -> Any:
    """Return ``transformers``' VideoMAE classifier with the weights of ``model``.

    The model must have a linear classifier (``norm: pooled``).

    Raises:
        ImportError: ``transformers`` is not installed.
    """
    # An optional package: only this peer needs it.
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
        # The ε of the official models; the default of transformers is 1e-12.
        layer_norm_eps=1e-6,
        use_mean_pooling=True,
    )
    config.num_labels = settings.data.num_classes
    theirs = VideoMAEForVideoClassification(config)
    # The names of all versions of transformers; this one has some of them.
    named = hugging_face_names(model.state_dict(), settings.encoder.tubelet)
    theirs.load_state_dict({name: named[name] for name in theirs.state_dict()})
    return theirs
