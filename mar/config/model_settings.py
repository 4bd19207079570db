"""Settings of the model: encoder, classifier, reconstruction branch."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import (
    Field,
    NonNegativeFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from mar import plugins
from mar.config.node import Node
from mar.config.types import Depth, Fraction, PretrainedGrid, TrainedBlocks, Tubelet, Width

ENCODER_SIZES = {
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
    "huge": (1280, 32, 16),
}
"""Name -> (width D, depth L, heads) of the plain ViT family (Dosovitskiy et al., Table 1)."""
_LEAST_ROTARY_HEAD = 6
"""Channels of an attention head: a pair for each of time, height and width."""
CLASSIFIER_KINDS = ("bridging", "linear", "mlp", "attentive")
"""``classifier.kind`` without what packages add."""


class EncoderConfig(Node):
    """The plain ViT with joint space-time attention (section IV-A)."""

    size: Annotated[str, Field(json_schema_extra={"enum": [*ENCODER_SIZES, "custom"]})] = "base"
    """Named size; ``custom`` takes ``width``, ``depth`` and ``heads``; or an encoder that an
    installed package adds."""
    options: dict[str, Any] = {}
    """Settings of a package's own encoder."""
    width: Width | None = None
    """Token width D, when ``custom``."""
    depth: Depth | None = None
    """Number of blocks L, when ``custom``."""
    heads: PositiveInt | None = None
    """Attention heads, when ``custom``."""
    mlp_ratio: Annotated[float, Field(gt=0.0, le=64.0)] = 4.0
    """Hidden width of a block's MLP over the token width (VideoMAE V2's giant: 48 / 11)."""
    tubelet: Tubelet = (2, 16, 16)
    """Frames, height and width of the patch that becomes one token (section IV-A)."""
    positions: Literal["computed", "interpolated", "rotary_vjepa2", "rotary_vjepa2_1"] = "computed"
    """Where a token is. ``computed``: sin-cos of its flat index, added (section III-B).
    ``interpolated``: the same of ``pretrained_grid``, resized to the clip's. ``rotary_vjepa2``,
    ``rotary_vjepa2_1``: queries and keys are turned, as in V-JEPA 2 and 2.1."""
    pretrained_grid: PretrainedGrid | None = None
    """Tokens in time, height and width of the clips of pre-training, when positions are
    ``interpolated``; a VideoMAE of 16 frames of 224 pixels: [8, 14, 14]."""
    drop_path: Fraction = 0.1
    """Stochastic depth of the last block, rising linearly from 0 (Table I)."""
    init: Literal["xavier", "torch"] = "xavier"
    """Random start of the patch embedding and the decoder's first projection: Xavier uniform, or
    PyTorch's own (release)."""
    weights: str | None = None
    """Pre-trained weights to start from: a file, a folder, a Hugging Face or timm name
    (``owner/name@revision``), a file there (``hub:owner/name/file@revision``), or ``mini``, the
    small model that ships with mar; none: random (Table IX b)."""

    train: TrainedBlocks = "all"
    """Which parts of the encoder are trained: ``all``; ``none``, for a probe of what it knows; or
    ``{last: N}``, its last N blocks and its last norm. What is not trained has no stochastic
    depth."""

    cached: bool = False
    """With ``train: none``: compute the tokens of each video's test views once, keep them, and
    train the classifier on them: no augmentation, the mask of testing, one view of each video an
    epoch."""

    @field_validator("size")
    @classmethod
    def _is_known(cls, name: str) -> str:
        return plugins.check_name(plugins.ENCODERS, name, (*ENCODER_SIZES, "custom"))

    @model_validator(mode="after")
    def _options_fit(self) -> Self:
        is_built_in = not self.is_of_package
        checked = plugins.checked_options(plugins.ENCODERS, self.size, self.options, is_built_in)
        object.__setattr__(self, "options", checked)
        return self

    @model_validator(mode="after")
    def _sizes_agree(self) -> Self:
        # A width beside a named size would be ignored without a word, so it is an error.
        given = (self.width, self.depth, self.heads)
        if self.size == "custom" and None in given:
            raise ValueError("size 'custom' needs width, depth and heads")
        if self.size != "custom" and given != (None, None, None):
            raise ValueError(
                f"size '{self.size}' fixes width, depth and heads; set size: custom to choose them"
            )
        if not self.is_of_package and self.dimensions[0] % self.dimensions[2]:
            raise ValueError(
                f"width {self.dimensions[0]} is not divisible by {self.dimensions[2]} heads"
            )
        return self

    @model_validator(mode="after")
    def _positions_apply(self) -> Self:
        is_interpolated = self.positions == "interpolated"
        has_own = self.positions != "computed" or self.mlp_ratio != 4.0
        if self.is_of_package and has_own:
            raise ValueError(
                f"positions and mlp_ratio are the ViT's; {self.size} has options of its own"
            )
        if is_interpolated and self.pretrained_grid is None:
            raise ValueError(
                "positions: 'interpolated' needs pretrained_grid, the tokens in time, height and "
                "width of the pre-training's clips, as [8, 14, 14]"
            )
        if not is_interpolated and self.pretrained_grid is not None:
            raise ValueError(
                f"pretrained_grid has an effect with positions: interpolated, not {self.positions}"
            )
        if self.is_of_package:
            return self
        head = self.dimensions[0] // self.dimensions[2]
        if self.is_rotary and (head < _LEAST_ROTARY_HEAD or head % 2):
            raise ValueError(
                f"positions: '{self.positions}' needs an even number of at least "
                f"{_LEAST_ROTARY_HEAD} channels in a head, two for each axis; it has {head}"
            )
        if self.mlp_width < 1:
            raise ValueError(f"mlp_ratio: {self.mlp_ratio} of {self.dimensions[0]} is no channel")
        return self

    @model_validator(mode="after")
    def _has_blocks_to_train(self) -> Self:
        if self.cached and self.train != "none":
            raise ValueError(
                f"cached: tokens are computed once of an encoder that is not trained: set train: "
                f"none, not {self.train}"
            )
        if isinstance(self.train, int) and self.is_of_package:
            raise ValueError(f"train: which blocks of {self.size} are last is not known: all, none")
        if isinstance(self.train, int) and self.train > self.dimensions[1]:
            raise ValueError(f"train: the last {self.train} of {self.dimensions[1]} blocks")
        return self

    @property
    def num_frozen(self) -> int:
        """The number of blocks, from the first on, that are not trained."""
        depth = self.dimensions[1]
        if self.train == "all":
            return 0
        if self.train == "none":
            return depth
        return depth - self.train

    @property
    def mlp_width(self) -> int:
        """The hidden width of a block's MLP."""
        return round(self.mlp_ratio * self.dimensions[0])

    @property
    def is_rotary(self) -> bool:
        """Whether positions turn queries and keys, instead of being added to the tokens."""
        return self.positions.startswith("rotary")

    @property
    def is_of_package(self) -> bool:
        """Whether an installed package adds this encoder."""
        # A name that is built in wins over a package's own.
        return self.size != "custom" and self.size not in ENCODER_SIZES

    @property
    def dimensions(self) -> tuple[int, int, int]:
        """Width D, depth L, heads; a package's encoder has a width, the others are 0."""
        if self.size == "custom":
            assert self.width and self.depth and self.heads
            return self.width, self.depth, self.heads
        if self.is_of_package:
            added: plugins.EncoderFactory = plugins.load(plugins.ENCODERS, self.size)
            options = plugins.options(plugins.ENCODERS, self.size, self.options)
            with plugins.package_errors(plugins.ENCODERS, self.size):
                return added.width(options), 0, 0
        return ENCODER_SIZES[self.size]


class ClassifierConfig(Node):
    """From encoded visible tokens to class scores (section III-C)."""

    kind: Annotated[str, Field(json_schema_extra={"enum": list(CLASSIFIER_KINDS)})] = "bridging"
    """``bridging``: transformer blocks (Eq. 2); the baselines of Tables V and VI; ``attentive``: a
    learned query that attends to the tokens, as V-JEPA's probes; or a classifier that an installed
    package adds."""
    options: dict[str, Any] = {}
    """Settings of a package's own classifier."""
    width: Width = 512
    """Token width of the bridging and the attentive classifier, and hidden width of the MLP (Table
    VI)."""
    depth: Depth = 2
    """Blocks of the bridging and the attentive classifier, the query's included, or layers of the
    MLP (Table VI)."""
    heads: PositiveInt = 4
    """Attention heads of the bridging and the attentive classifier."""
    positions: bool = False
    """Add sin-cos positions to the input of the bridging classifier (Table VII)."""
    mask_tokens: bool = False
    """Add a learned token to its input for each hidden token (Table VII)."""
    dropout: Fraction = 0.1
    """Dropout before the last linear layer (Table I)."""
    norm: Literal["tokens", "pooled"] = "tokens"
    """The encoder's last norm: on each token, or on their average, as in VideoMAE's fine-tuned
    models."""

    @field_validator("kind")
    @classmethod
    def _is_known(cls, name: str) -> str:
        return plugins.check_name(plugins.CLASSIFIERS, name, CLASSIFIER_KINDS)

    @model_validator(mode="after")
    def _options_fit(self) -> Self:
        is_built_in = not self.is_of_package
        checked = plugins.checked_options(plugins.CLASSIFIERS, self.kind, self.options, is_built_in)
        object.__setattr__(self, "options", checked)
        return self

    @property
    def is_of_package(self) -> bool:
        """Whether an installed package adds this classifier."""
        return self.kind not in CLASSIFIER_KINDS

    @model_validator(mode="after")
    def _options_apply(self) -> Self:
        # An option without an effect is refused: trials that differ only in it would be equal.
        if self.kind in ("bridging", "attentive") and self.width % self.heads:
            raise ValueError(f"width {self.width} is not divisible by {self.heads} heads")
        if self.kind == "mlp" and self.depth < 2:
            raise ValueError(
                "an MLP has at least two layers: set depth: 2 or more, or kind: linear"
            )
        if self.kind != "bridging" and (self.positions or self.mask_tokens):
            raise ValueError("positions and mask_tokens need kind: bridging (Table VII)")
        if self.kind != "linear" and self.norm == "pooled":
            raise ValueError("norm: 'pooled' needs kind: linear")
        return self


class ReconstructionConfig(Node):
    """The auxiliary branch that reconstructs hidden patches, in training only (section III-D)."""

    weight: NonNegativeFloat = 0.1
    """λ of Eq. 5; at 0 the model has no such branch (Table IX a)."""
    normalize_target: bool = True
    """Normalise each channel of a target patch by its own mean and deviation (Eq. 3, Table
    VIII)."""
    width: Width = 384
    """Token width of the decoder."""
    depth: Depth = 4
    """Blocks of the decoder."""
    heads: PositiveInt = 6
    """Attention heads of the decoder."""
    init: Literal["pretrained", "random"] = "pretrained"
    """Start the decoder from ``encoder.weights`` too, if they have a decoder, or at random (Table
    VIII)."""
    tokens: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Share of the hidden tokens that are reconstructed in training, spread by a running cell
    (VideoMAE V2's dual masking); in testing all are."""

    def num_reconstructed(self, num_hidden: int) -> int:
        """Return how many of a clip's hidden tokens are reconstructed in training."""
        return max(1, round(self.tokens * num_hidden))

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not divisible by {self.heads} heads")
        return self
