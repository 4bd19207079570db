"""The cost of a model from its settings: GFLOPs in the paper's convention, parameters, tokens.

The convention is fvcore's, and it reproduces every GFLOPs figure of the paper for MAR:

- one multiply-add counts one, and a LayerNorm counts five for each value;
- biases, GELU, softmax, residuals and averages count nothing;
- the patch embedding is counted on all tokens, as the release embeds them all before it drops any;
- the reconstruction branch is not counted, because it does not run in testing;
- a mask that sees the clip is counted: one for each value that it compares, and the patch embedding
  once more where it compares embeddings.

Of an encoder or a classifier that a package adds, PyTorch counts the matrix products
(:mod:`mar.model.package_cost`). The number of attention heads has no effect. N is the number of
tokens, D the width of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from mar.config.mask_settings import MaskConfig
from mar.config.model_settings import EncoderConfig
from mar.config.schema import TrainingConfig

if TYPE_CHECKING:
    from mar.model.package_cost import PackageCost


@dataclass(frozen=True)
class Cost:
    """Figures of one view of one clip."""

    gflops: float
    """Inference, 10⁹ multiply-adds."""
    train_gflops: float
    """One training step of one clip: three times the forward pass, reconstruction branch
    included."""
    params_m: float
    """Millions of parameters without the reconstruction branch, as the paper counts."""
    train_params_m: float
    """Millions of parameters with it."""
    tokens: int
    """Tokens N of the clip."""
    visible_tokens: int
    """Tokens K that the encoder sees in testing."""


def cost(settings: TrainingConfig) -> Cost:
    """Return the cost of a model from its settings alone."""
    # Training and testing may hide different shares (Table III c).
    tokens = prod(settings.grid)
    test = tokens - settings.test_mask.num_hidden(settings.grid)
    # Of several ratios a step has any with the same chance.
    masks = settings.mask.in_training
    training = sum(_training_flops(settings, mask) for mask in masks) / len(masks)
    inference = (
        _encoder_flops(settings, test, settings.evaluation.merge)
        + _classifier_flops(settings, test)
        + _selection_flops(settings, settings.test_mask)
    )
    inference_params = _encoder_params(settings) + _classifier_params(settings)
    return Cost(
        gflops=inference / 1e9,
        train_gflops=training / 1e9,
        params_m=inference_params / 1e6,
        train_params_m=(inference_params + _decoder_params(settings)) / 1e6,
        tokens=tokens,
        visible_tokens=test,
    )


def classifier_gflops(settings: TrainingConfig) -> float:
    """Return the operations of the classifier alone on one view, 10⁹ multiply-adds."""
    visible = prod(settings.grid) - settings.test_mask.num_hidden(settings.grid)
    return _classifier_flops(settings, visible) / 1e9


def _training_flops(settings: TrainingConfig, mask: MaskConfig) -> int:
    """Return the operations of a training step on one clip, with a mask of one ratio."""
    visible = prod(settings.grid) - mask.num_hidden(settings.grid)
    # Of cached tokens the encoder has run before the training.
    encoder = 0 if settings.encoder.cached else _encoder_flops(settings, visible)
    heads = _classifier_flops(settings, visible) + _decoder_flops(settings, visible)
    # A backward pass has about twice the operations of a forward pass: one product each for the
    # gradients of inputs and of weights. A mask that sees the clip has none, nor has what is not
    # trained of the encoder.
    backward = 2 * (_trained_flops(settings, visible, encoder) + heads)
    return encoder + heads + backward + _selection_flops(settings, mask)


def _trained_flops(settings: TrainingConfig, visible: int, encoder: int) -> int:
    """Return the operations of those parts of the encoder that are trained."""
    config = settings.encoder
    if config.train == "all":
        return encoder
    if config.train == "none":
        return 0
    width = config.dimensions[0]
    last_norm = 5 * visible * width * (settings.classifier.norm == "tokens")
    return _blocks_flops(visible, width, config.train, config.mlp_width) + last_norm


def _blocks_flops(num_tokens: int, width: int, depth: int, mlp_width: int | None = None) -> int:
    # A block: 3 D² for queries, keys and values, D² for their projection, 2 D M for the MLP of
    # hidden width M (8 D² at the usual ratio of 4), each for N tokens; N² D each for QKᵀ and its
    # product with V; two LayerNorms, 5 N D each.
    mlp = 2 * width * (mlp_width or 4 * width)
    return depth * (
        (4 * width**2 + mlp) * num_tokens + 2 * num_tokens**2 * width + 10 * num_tokens * width
    )


def _merging_blocks_flops(num_tokens: int, config: EncoderConfig, merge: int) -> int:
    """Return the operations of blocks that each merge tokens between attention and MLP."""
    width, depth, heads = config.dimensions
    flops = 0
    for _ in range(depth):
        attention = 4 * width**2 * num_tokens + 2 * num_tokens**2 * width + 5 * num_tokens * width
        # The keys of even tokens with those of odd ones, averaged over the heads.
        matching = -(-num_tokens // 2) * (num_tokens // 2) * width // heads
        num_tokens -= min(merge, num_tokens // 2)
        mlp = 2 * width * config.mlp_width * num_tokens
        flops += attention + matching + mlp + 5 * num_tokens * width
    return flops


def _encoder_flops(settings: TrainingConfig, visible: int, merge: int = 0) -> int:
    if settings.encoder.is_of_package:
        return _package_encoder(settings, visible).operations
    width, depth, _ = settings.encoder.dimensions
    blocks = _blocks_flops(visible, width, depth, settings.encoder.mlp_width)
    if merge:
        blocks = _merging_blocks_flops(visible, settings.encoder, merge)
    embedding = prod(settings.grid) * _patch_values(settings) * width
    # With norm: pooled the encoder has no last norm; the linear classifier counts its own.
    last_norm = 5 * visible * width * (settings.classifier.norm == "tokens")
    return embedding + blocks + last_norm


def _classifier_flops(settings: TrainingConfig, visible: int) -> int:
    if settings.pretrains:
        return 0
    config = settings.classifier
    if config.is_of_package:
        return _package_classifier(settings, visible).operations
    width = settings.encoder.dimensions[0]
    classes = settings.data.num_classes
    if config.kind == "linear":
        return 5 * width * (config.norm == "pooled") + width * classes
    project = visible * width * config.width
    if config.kind == "attentive":
        inner = config.width
        # Keys and values of each token, its products with the query, and a norm of it.
        tokens = visible * (2 * inner**2 + 2 * inner + 5 * inner)
        # The query's projections and MLP, its two norms, and the scores.
        query = (2 + 8) * inner**2 + 10 * inner + inner * classes
        return project + _blocks_flops(visible, inner, config.depth - 1) + tokens + query
    # Only the MLP's first layer runs on each token; the others run on one averaged vector.
    if config.kind == "mlp":
        return project + max(config.depth - 2, 0) * config.width**2 + config.width * classes
    # With mask tokens (Table VII) the blocks run on all N tokens instead of the visible ones.
    inside = prod(settings.grid) if config.mask_tokens else visible
    return (
        project
        + _blocks_flops(inside, config.width, config.depth)
        + 5 * config.width
        + config.width * classes
    )


def _decoder_flops(settings: TrainingConfig, visible: int) -> int:
    if not settings.reconstructs:
        return 0
    config = settings.reconstruction
    unseen = config.num_reconstructed(prod(settings.grid) - visible)
    tokens = visible + unseen
    encoder_width = settings.encoder.dimensions[0]
    # The projection runs on visible tokens, the last norm and the pixel head on the hidden ones
    # that are reconstructed. The blocks are counted on both, though the last one computes less (see
    # Decoder).
    ends = visible * encoder_width * config.width + unseen * config.width * _patch_values(settings)
    return ends + _blocks_flops(tokens, config.width, config.depth) + 5 * unseen * config.width


def _selection_flops(settings: TrainingConfig, mask: MaskConfig) -> int:
    """Return the operations with which the pixels of a clip decide what is hidden."""
    if not mask.sees_clip or not mask.first_ratio:
        return 0
    tokens = prod(settings.grid)
    values = tokens * _patch_values(settings)
    if mask.sees_embeddings:
        width = settings.encoder.dimensions[0]
        return values * width + tokens * width
    if mask.lengths:
        # Once to choose, and once more for the lengths of what was chosen.
        return 2 * values
    return values


def _patch_values(settings: TrainingConfig) -> int:
    return 3 * prod(settings.encoder.tubelet)


def _blocks_params(width: int, depth: int, mlp_width: int | None = None) -> int:
    # A block's matrices have 4 D² + 2 D M weights. Biases of the query, key, value and output
    # projections have 4 D values and those of the MLP M + D; two LayerNorms have 2 D each.
    hidden = mlp_width or 4 * width
    return depth * (4 * width**2 + 2 * width * hidden + hidden + 9 * width)


def _encoder_params(settings: TrainingConfig) -> int:
    if settings.encoder.is_of_package:
        return _package_encoder(settings, 1).params
    width, depth, _ = settings.encoder.dimensions
    return (
        (_patch_values(settings) + 1) * width
        + _blocks_params(width, depth, settings.encoder.mlp_width)
        + 2 * width * (settings.classifier.norm == "tokens")
    )


def _classifier_params(settings: TrainingConfig) -> int:
    if settings.pretrains:
        return 0
    config = settings.classifier
    if config.is_of_package:
        return _package_classifier(settings, 1).params
    width = settings.encoder.dimensions[0]
    classes = settings.data.num_classes
    if config.kind == "linear":
        return 2 * width * (config.norm == "pooled") + (width + 1) * classes
    head = (config.width + 1) * classes
    if config.kind == "attentive":
        inner = config.width
        # The query itself; four projections and the MLP with their biases; three norms.
        query = inner + 12 * inner**2 + 9 * inner + 6 * inner
        return width * inner + _blocks_params(inner, config.depth - 1) + query + head
    if config.kind == "mlp":
        return (
            (width + 1) * config.width
            + max(config.depth - 2, 0) * (config.width + 1) * config.width
            + head
        )
    mask_token = config.width if config.mask_tokens else 0
    return (
        width * config.width
        + _blocks_params(config.width, config.depth)
        + 2 * config.width
        + mask_token
        + head
    )


def _decoder_params(settings: TrainingConfig) -> int:
    if not settings.reconstructs:
        return 0
    config = settings.reconstruction
    ends = settings.encoder.dimensions[0] * config.width + config.width + 2 * config.width
    return (
        ends
        + _blocks_params(config.width, config.depth)
        + (config.width + 1) * _patch_values(settings)
    )


def _package_encoder(settings: TrainingConfig, visible: int) -> PackageCost:
    # Imported here: everything else in this file is arithmetic and needs no PyTorch.
    from mar.model.package_cost import encoder_cost

    return encoder_cost(settings, visible)


def _package_classifier(settings: TrainingConfig, visible: int) -> PackageCost:
    from mar.model.package_cost import classifier_cost

    return classifier_cost(settings, visible)
