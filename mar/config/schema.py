"""Every setting that bears on a result: one frozen, closed, typed tree.

Imports neither torch nor Ray, so that a thousand trials can be planned in a second.
Where and how a trial runs (workers, devices, storage) is not here but in
``orchestration.config.LaunchConfig``: a result does not depend on it.
"""

from __future__ import annotations

from math import prod
from typing import Annotated, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from mar.config.randaugment_policy import RandAugmentPolicy
from mar.config.types import (
    Area,
    ClassCount,
    Depth,
    Fraction,
    FrameCount,
    Grid,
    MaskRatio,
    PixelCount,
    Scale,
    Tubelet,
    Width,
)

ENCODER_SIZES = {
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
    "huge": (1280, 32, 16),
}
"""Name -> (width D, depth L, heads) of the plain ViT family (Dosovitskiy et al., Table 1)."""


_MOST_TOKENS = 2**18
"""Of a clip; the paper's have 1,568. More is a slip, or a file that is to exhaust the memory."""


class Node(BaseModel):
    """A branch of the settings tree: immutable, and closed to names it does not know."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )


AUTO_CACHE = "auto"
"""``data.cache``: the frames are packed into the store (``mar.data.auto_cache``)."""


class DataConfig(Node):
    """Which videos, and what they are labelled."""

    format: Literal["list", "folders", "ssv2", "kinetics", "ucf101", "hmdb51"] = "list"
    """How it is annotated: a path and a class number a line, a folder a class, or as a benchmark is
    distributed."""
    root: str = "data"
    """Folder of the data set. Not part of a trial's identity: the content's fingerprint is."""
    videos: str = "."
    """Folder of the videos; relative to ``root``."""
    train: str | None = None
    """Annotation file of the training split; relative to ``root``, or absolute; none: by its
    official name."""
    val: str | None = None
    """Annotation file of the evaluation split; relative to ``root``, or absolute; none: by its
    official name."""
    labels: str | None = None
    """File of the class names, where the format has one; relative to ``root``, or absolute; none:
    by its official name."""
    split: Annotated[int, Field(ge=1, le=3)] = 1
    """Which of the three splits of UCF101 and HMDB51."""
    cache: str | None = None
    """Where frames are read instead of from the videos: the folder of a frame cache (``mar data
    pack``), or ``auto``: a cache in the store, packed before the first epoch with the videos' own
    pixels; none: the videos are decoded for every clip."""
    decoder: Literal["auto", "decord", "torchcodec", "pyav"] = "auto"
    """Who decodes; ``auto``: torchcodec, or where it does not work decord. PyAV has the files in
    which they would be wrong."""
    num_classes: ClassCount = 174
    """Number of classes C."""
    missing: Literal["error", "skip"] = "error"
    """A video that is not there is as a broken one, or is left out of its split (Kinetics: some
    always are)."""
    broken: Literal["error", "skip"] = "error"
    """A training video that cannot be decoded stops the trial, or is left out and counted."""

    @property
    def cache_folder(self) -> str | None:
        """The folder of the frame cache; None where there is none, or none yet (``auto``)."""
        return None if self.cache == AUTO_CACHE else self.cache


class ClipConfig(Node):
    """Which pixels of a video the model is given."""

    frames: FrameCount = 16
    """Frames T in a clip (section IV-A)."""
    size: PixelCount = 224
    """Height and width of a clip, pixels (section IV-A); 112 is "D.S. 2x" of Table II."""
    sampling: Literal["segments", "dense"] = "segments"
    """``segments``: one frame from each of T equal segments (SSv2). ``dense``: T frames, ``stride``
    apart."""
    stride: PositiveInt = 4
    """Frames from one sampled frame to the next, when ``dense`` (Kinetics: 4)."""
    fps: PositiveFloat | None = None
    """Frames a second that ``stride`` is meant for, when ``dense``: another rate is converted
    (release: 30); none: not."""
    antialias: bool = True
    """Resize with antialiasing; the release resizes without it."""
    round_frames: bool = False
    """With ``segments``, in training: what is drawn is rounded to the nearest frame (release), and
    not down."""


class EncoderConfig(Node):
    """The plain ViT with joint space-time attention (section IV-A)."""

    size: Literal["tiny", "small", "base", "large", "huge", "custom"] = "base"
    """Named size; ``custom`` takes ``width``, ``depth`` and ``heads``."""
    width: Width | None = None
    """Token width D, when ``custom``."""
    depth: Depth | None = None
    """Number of blocks L, when ``custom``."""
    heads: PositiveInt | None = None
    """Attention heads, when ``custom``."""
    tubelet: Tubelet = (2, 16, 16)
    """Frames, height and width of the patch that becomes one token (section IV-A)."""
    drop_path: Fraction = 0.1
    """Stochastic depth of the last block, rising linearly from 0 (Table I)."""
    init: Literal["xavier", "torch"] = "xavier"
    """How the patch embedding and the decoder's first projection start: Xavier uniform, or as
    PyTorch's (release)."""
    weights: str | None = None
    """Pre-trained weights to start from: a file, a folder, a Hugging Face or timm name; none:
    random (Table IX b)."""

    @model_validator(mode="after")
    def _sizes_agree(self) -> Self:
        given = (self.width, self.depth, self.heads)
        if self.size == "custom" and None in given:
            raise ValueError("size 'custom' needs width, depth and heads")
        if self.size != "custom" and given != (None, None, None):
            raise ValueError(
                f"size '{self.size}' fixes width, depth and heads; set size: custom to choose them"
            )
        if self.dimensions[0] % self.dimensions[2]:
            raise ValueError(
                f"width {self.dimensions[0]} is not divisible by {self.dimensions[2]} heads"
            )
        return self

    @property
    def dimensions(self) -> tuple[int, int, int]:
        """Width D, depth L, heads."""
        if self.size == "custom":
            assert self.width and self.depth and self.heads
            return self.width, self.depth, self.heads
        return ENCODER_SIZES[self.size]


class MaskConfig(Node):
    """Which tokens are hidden in training (section III-B)."""

    strategy: Literal["cell", "random", "block", "uniform", "tube", "frame"] = "cell"
    """How hidden tokens are placed in a slice (Table II)."""
    motion: Literal["running", "standard"] = "running"
    """Whether the mask moves from slice to slice, Eq. 1 (Table II)."""
    ratio: MaskRatio = 0.5
    """ρ, the share of hidden tokens; 0 hides nothing (Tables II, III c, V)."""
    cell: tuple[PositiveInt, PositiveInt] = (2, 2)
    """Height r and width q of the running cell, tokens (Table IV)."""
    spatial: Literal["repeated", "random"] = "repeated"
    """All cells start in the same random state, or each in its own (Table III a)."""
    temporal: Literal["shuffled", "fixed"] = "shuffled"
    """Slices in random order, or in running order (Table III a)."""

    @model_validator(mode="after")
    def _can_run(self) -> Self:
        if self.strategy in ("tube", "frame") and self.motion == "running":
            raise ValueError(f"a {self.strategy} mask cannot run: set motion: standard (Table II)")
        return self

    def num_hidden(self, grid: Grid) -> int:
        """Return the number of hidden tokens in a clip.

        For one setting, it is the same in every clip.
        """
        t, h, w = grid
        if self.strategy == "frame":
            return round(self.ratio * t) * h * w
        if self.strategy in ("tube", "block") or (
            self.strategy == "random" and self.motion == "running"
        ):
            return t * int(self.ratio * h * w)
        return int(self.ratio * t * h * w)


class ClassifierConfig(Node):
    """From encoded visible tokens to class scores (section III-C)."""

    kind: Literal["bridging", "linear", "mlp"] = "bridging"
    """Transformer blocks, Eq. 2, or the baselines of Tables V and VI."""
    width: Width = 512
    """Token width of the bridging classifier, and hidden width of the MLP (Table VI)."""
    depth: Depth = 2
    """Blocks of the bridging classifier, or layers of the MLP (Table VI)."""
    heads: PositiveInt = 4
    """Attention heads of the bridging classifier."""
    positions: bool = False
    """Add sin-cos positions at its input (Table VII)."""
    mask_tokens: bool = False
    """Give it learned tokens in the hidden places (Table VII)."""
    dropout: Fraction = 0.1
    """Dropout before the last linear layer (Table I)."""
    norm: Literal["tokens", "pooled"] = "tokens"
    """The encoder's last norm: on each token, or on their average, as VideoMAE's fine-tuned models
    have it."""

    @model_validator(mode="after")
    def _options_apply(self) -> Self:
        if self.kind == "bridging" and self.width % self.heads:
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
    """The auxiliary branch that redraws hidden patches, in training only (section III-D)."""

    weight: NonNegativeFloat = 0.1
    """λ of Eq. 5; at 0 there is no such branch (Table IX a)."""
    normalize_target: bool = True
    """Normalise each target patch by its own mean and deviation (Table VIII)."""
    width: Width = 384
    """Token width of the decoder."""
    depth: Depth = 4
    """Blocks of the decoder."""
    heads: PositiveInt = 6
    """Attention heads of the decoder."""
    init: Literal["pretrained", "random"] = "pretrained"
    """Start the decoder from ``encoder.weights`` too (where there are any), or at random (Table
    VIII)."""

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not divisible by {self.heads} heads")
        return self


class AugmentConfig(Node):
    """Training-time augmentation (Table I)."""

    crop_scale: Area = (0.08, 1.0)
    """Area of the random-resized crop, share of the frame, from and to."""
    crop_aspect: Scale = (0.75, 1.3333333333333333)
    """Aspect ratio of the random-resized crop, from and to."""
    repeats: PositiveInt = 1
    """Clips of each video in a batch, repeated sampling (Table I: 2 on Kinetics)."""
    repeat: Literal["clips", "frames"] = "clips"
    """Repeats are clips of other frames (release), or the same frames augmented anew (VideoMAE)."""
    randaugment: str | None = None
    """RandAugment's policy in timm's notation, as ``rand-m9-mstd0.5-inc1``; none: no RandAugment
    (Tables I, X)."""
    randaugment_interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """Of its operations that move pixels; the release's are bicubic."""
    randaugment_before_crop: bool = False
    """Before the crop, on whole frames and by the loader (release, on Kinetics); or after it, on
    the device."""
    erasing: Fraction = 0.0
    """Share of clips in which a box, the same in all frames, is erased with noise (Table X)."""
    erasing_attempts: PositiveInt = 10
    """Boxes tried until one fits; the release tries 100 on Kinetics."""
    flip: bool = False
    """Mirror half of the clips; where a class means left or right, ``flip_swaps`` must say so."""
    flip_swaps: tuple[tuple[NonNegativeInt, NonNegativeInt], ...] = ()
    """Pairs of classes that trade places in a mirrored clip (Something-Something: left and
    right)."""
    mixup: NonNegativeFloat = 0.8
    """Beta parameter of mixup; 0 switches it off (Table X)."""
    cutmix: NonNegativeFloat = 1.0
    """Beta parameter of cutmix, one box for all frames; 0 switches it off (Table X)."""
    smoothing: Fraction = 0.1
    """Label smoothing."""

    @field_validator("randaugment")
    @classmethod
    def _is_a_policy(cls, text: str | None) -> str | None:
        if text is not None:
            RandAugmentPolicy.parse(text)
        return text


class RecipeConfig(Node):
    """What is minimised, optimiser and schedule (Table I)."""

    objective: Literal["classification", "reconstruction"] = "classification"
    """Eq. 5; or the reconstruction loss alone, with no classifier: VideoMAE's pre-training (Tables
    IX b, XIII)."""
    epochs: PositiveInt = 40
    """Passes over the training split."""
    batch_size: PositiveInt = 512
    """Clips per optimiser step, over all workers together."""
    base_lr: PositiveFloat = 1.0e-3
    """Learning rate at a batch of 256 (``linear``), or as it is (``none``)."""
    lr_scaling: Literal["linear", "none"] = "linear"
    """``linear``: multiply by batch_size / 256 (Table I, footnote)."""
    warmup_epochs: NonNegativeFloat = 5.0
    """Epochs of linear warm-up from ``warmup_lr``."""
    cosine_from: Literal["warmup", "start"] = "warmup"
    """The cosine begins when warm-up ends, at the peak; or at epoch 0, and warm-up rises to meet it
    (release)."""
    warmup_lr: NonNegativeFloat = 1.0e-6
    """Learning rate of the first step when there is a warm-up."""
    min_lr: NonNegativeFloat = 1.0e-6
    """Learning rate at the end of the cosine."""
    weight_decay: NonNegativeFloat = 0.05
    """AdamW's; not applied to biases, norms and mask tokens."""
    betas: tuple[MaskRatio, MaskRatio] = (0.9, 0.999)
    """AdamW's momenta β₁, β₂."""
    layer_decay: Annotated[float, Field(gt=0.0, le=1.0)] = 0.75
    """Learning-rate factor from each encoder block to the one below it."""
    layer_decay_of: Literal["all", "weights"] = "all"
    """Layer decay is for all parameters of a block (VideoMAE), or not for norms and biases
    (release)."""
    clip_grad: PositiveFloat | None = None
    """Largest gradient norm; none: not clipped."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Type of the matrix products; master weights are float32 always."""


class EvaluationMaskConfig(Node):
    """The mask of evaluation: deterministic, the same for every clip."""

    start: NonNegativeInt = 0
    """State of the running cell in the first slice: 0 is A (Table III b)."""
    ratio: MaskRatio | None = None
    """ρ in testing; none: as in training (Table III c)."""


class EvaluationConfig(Node):
    """How accuracy is measured."""

    clips: PositiveInt = 2
    """Clips from each video in the final test; probabilities are averaged."""
    segment_frames: Literal["even", "ends", "videomae"] = "even"
    """Which frames a video's test clips have. ``even``: with ``segments``, spread evenly within
    each; ``ends``: from each segment's first to its last frame (release). ``videomae``: as VideoMAE
    tests, with ``segments`` and with ``dense``."""
    crop_from: Literal["frame", "resized"] = "frame"
    """Test crops are cut from the frame and resized, or cut from the frame resized to its short
    side (release)."""
    crops: Literal[1, 3] = 3
    """Crops of each clip in the final test: the centre, or three along the long side."""
    mask: EvaluationMaskConfig = EvaluationMaskConfig()
    """The mask in testing."""
    every_epochs: PositiveInt = 1
    """Epochs between two one-view validations during training."""
    shuffled_frames: bool = False
    """Also test with each clip's frames in random order: what is left is not motion."""


class TrainingConfig(Node):
    """One training, completely described. Equal trees give equal results."""

    data: DataConfig = DataConfig()
    clip: ClipConfig = ClipConfig()
    encoder: EncoderConfig = EncoderConfig()
    mask: MaskConfig = MaskConfig()
    classifier: ClassifierConfig = ClassifierConfig()
    reconstruction: ReconstructionConfig = ReconstructionConfig()
    augment: AugmentConfig = AugmentConfig()
    recipe: RecipeConfig = RecipeConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    seed: NonNegativeInt = 0
    """Seed of everything that is drawn."""

    @model_validator(mode="after")
    def _shapes_fit(self) -> Self:
        shape = (self.clip.frames, self.clip.size, self.clip.size)
        if any(length % patch for length, patch in zip(shape, self.encoder.tubelet, strict=True)):
            raise ValueError(
                f"encoder.tubelet: {list(self.encoder.tubelet)} does not divide a clip of "
                f"{list(shape)}"
            )
        if prod(self.grid) > _MOST_TOKENS:
            raise ValueError(
                f"clip: {list(shape)} makes {prod(self.grid)} tokens; at most {_MOST_TOKENS} can "
                "be attended to"
            )
        ratios = (self.mask.ratio, self.test_ratio)
        if self.mask.strategy == "cell" and any(ratios):
            _, h, w = self.grid
            if h % self.mask.cell[0] or w % self.mask.cell[1]:
                raise ValueError(
                    f"mask.cell: {list(self.mask.cell)} does not divide the {h} x {w} token grid"
                )
        if self.augment.repeats > 1 and self.recipe.batch_size % (2 * self.augment.repeats):
            raise ValueError(
                f"recipe.batch_size: {self.recipe.batch_size} is not an even number of videos, "
                "each "
                f"{self.augment.repeats} times (augment.repeats)"
            )
        swapped = [label for pair in self.augment.flip_swaps for label in pair]
        if max(swapped, default=0) >= self.data.num_classes or len({*swapped}) < len(swapped):
            raise ValueError(
                f"augment.flip_swaps: each of the {self.data.num_classes} classes may stand there "
                "once"
            )
        if self.pretrains and not self.reconstructs:
            raise ValueError(
                "recipe.objective: 'reconstruction' needs mask.ratio and reconstruction.weight "
                "above 0"
            )
        if self.classifier.norm == "pooled" and self.reconstructs:
            raise ValueError(
                "classifier.norm: 'pooled' leaves the decoder tokens without a norm; set it to "
                "tokens, or "
                "reconstruction.weight to 0"
            )
        for path, mask in (("mask.ratio", self.mask), ("evaluation.mask.ratio", self.test_mask)):
            if mask.num_hidden(self.grid) >= prod(self.grid):
                raise ValueError(
                    f"{path}: {mask.ratio} leaves no token of {prod(self.grid)} visible"
                )
        return self

    @property
    def grid(self) -> Grid:
        """The token grid (t, h, w)."""
        frames, height, width = self.encoder.tubelet
        return self.clip.frames // frames, self.clip.size // height, self.clip.size // width

    @property
    def videos_per_batch(self) -> int:
        """Videos in a batch; each gives ``augment.repeats`` clips."""
        return self.recipe.batch_size // self.augment.repeats

    @property
    def test_ratio(self) -> float:
        """ρ in testing."""
        ratio = self.evaluation.mask.ratio
        return self.mask.ratio if ratio is None else ratio

    @property
    def test_mask(self) -> MaskConfig:
        """The mask's settings in testing."""
        return self.mask.model_copy(update={"ratio": self.test_ratio})

    @property
    def redraws_in_testing(self) -> bool:
        """Whether there is a decoder, and something for it to redraw under the mask of testing."""
        return self.reconstructs and self.test_ratio > 0

    @property
    def pretrains(self) -> bool:
        """Whether it is a self-supervised pre-training: no classifier, no labels."""
        return self.recipe.objective == "reconstruction"

    @property
    def reconstructs(self) -> bool:
        """Whether there is a reconstruction branch: λ > 0 and something to redraw."""
        return self.reconstruction.weight > 0 and self.mask.num_hidden(self.grid) > 0
