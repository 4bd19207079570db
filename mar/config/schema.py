"""All settings that affect a result: one immutable, closed, typed tree.

Imports neither torch nor Ray, so that a thousand trials can be planned in a second.
Where and how a trial runs (workers, devices, storage) is in ``orchestration.config.LaunchConfig``,
because a result does not depend on it.

pydantic takes the string below a field as the field's description.
"""

from __future__ import annotations

from math import prod
from typing import Annotated, Any, Literal, Self

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

from mar import plugins
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


MASKS_OF_CONTENT = ("motion", "redundancy", "static")
"""Strategies that see the clip (``mar.model.content_masks``)."""
MASK_STRATEGIES = ("cell", "random", "block", "uniform", "tube", "frame", *MASKS_OF_CONTENT)
"""``mask.strategy`` without what packages add."""
MASKS_WITH_CELLS = ("cell", "uniform")
"""Strategies whose masks have cells; that of ``uniform`` is the token grid."""
CLASSIFIER_KINDS = ("bridging", "linear", "mlp")
"""``classifier.kind`` without what packages add."""
ANNOTATION_FORMATS = (
    "list", "folders", "ssv2", "kinetics", "ucf101", "hmdb51", "diving48", "jester",
)  # fmt: skip
"""``data.format`` without what packages add."""
_MOST_TOKENS = 2**18
"""Most tokens of a clip; the paper's have 1,568. More is a mistake, or a file that is made to
exhaust the memory."""


class Node(BaseModel):
    """A branch of the settings tree: immutable, and unknown names are refused."""

    # Without extra="forbid" pydantic would ignore a misspelt setting, and the trial would train
    # with the default. Infinity and nan are refused because no setting can use them, and JSON, in
    # which settings are stored, has neither.
    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )


AUTO_CACHE = "auto"
"""``data.cache``: the frames are packed into the store (``mar.data.auto_cache``)."""


class DataConfig(Node):
    """The data set: its videos and their labels."""

    format: Annotated[str, Field(json_schema_extra={"enum": list(ANNOTATION_FORMATS)})] = "list"
    """Format of the annotations. ``list``: a path and a class number on each line; ``folders``: a
    folder for each class; the format in which a benchmark is distributed; or one that an installed
    package adds."""
    root: str = "data"
    """Folder of the data set. It is not part of a trial's identity; the data's fingerprint is."""
    videos: str = "."
    """Folder of the videos; relative to ``root``."""
    train: str | None = None
    """Annotation file of the training split; relative to ``root``, or absolute; none: the file with
    the official name."""
    val: str | None = None
    """Annotation file of the evaluation split; relative to ``root``, or absolute; none: the file
    with the official name."""
    labels: str | None = None
    """File of the class names, where the format has one; relative to ``root``, or absolute; none:
    the file with the official name."""
    split: Annotated[int, Field(ge=1, le=3)] = 1
    """Number of the split of UCF101 or HMDB51, which have three."""
    cache: str | None = None
    """Where frames are read instead of from the videos: the folder of a frame cache (``mar data
    pack``), or ``auto``: a cache in the store, packed before the first epoch with the videos' own
    pixels; none: the videos are decoded for every clip."""
    decoder: Literal["auto", "decord", "torchcodec", "pyav"] = "auto"
    """Library that decodes; ``auto``: torchcodec, or decord where torchcodec does not work. PyAV
    decodes the files for which the two would return wrong frames."""
    num_classes: ClassCount = 174
    """Number of classes C."""
    missing: Literal["error", "skip"] = "error"
    """``error``: a missing video is treated as one that cannot be decoded; ``skip``: it is left out
    of its split (in Kinetics some videos are always missing)."""
    broken: Literal["error", "skip"] = "error"
    """``error``: a training video that cannot be decoded stops the trial; ``skip``: it is left out
    and counted."""

    @field_validator("format")
    @classmethod
    def _is_known(cls, name: str) -> str:
        return plugins.check_name(plugins.FORMATS, name, ANNOTATION_FORMATS)

    @property
    def cache_folder(self) -> str | None:
        """The folder of the frame cache; None where there is none, or none yet (``auto``)."""
        return None if self.cache == AUTO_CACHE else self.cache


class ClipConfig(Node):
    """How a clip is taken from a video: frames, size and sampling."""

    frames: FrameCount = 16
    """Frames T in a clip (section IV-A)."""
    size: PixelCount = 224
    """Height and width of a clip, pixels (section IV-A); 112 is "D.S. 2x" of Table II."""
    sampling: Literal["segments", "dense"] = "segments"
    """``segments``: one frame from each of T equal segments (SSv2). ``dense``: T frames, ``stride``
    apart."""
    stride: PositiveInt = 4
    """Distance between two sampled frames, when ``dense`` (Kinetics: 4)."""
    fps: PositiveFloat | None = None
    """Frame rate for which ``stride`` is meant, when ``dense``: for a video with another rate the
    stride is converted (release: 30); none: not converted."""
    antialias: bool = True
    """Resize with antialiasing; the release resizes without it."""
    round_frames: bool = False
    """With ``segments``, in training: round the drawn position to the nearest frame (release),
    instead of down."""


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
    tubelet: Tubelet = (2, 16, 16)
    """Frames, height and width of the patch that becomes one token (section IV-A)."""
    drop_path: Fraction = 0.1
    """Stochastic depth of the last block, rising linearly from 0 (Table I)."""
    init: Literal["xavier", "torch"] = "xavier"
    """Random start of the patch embedding and the decoder's first projection: Xavier uniform, or
    PyTorch's own (release)."""
    weights: str | None = None
    """Pre-trained weights to start from: a file, a folder, a Hugging Face or timm name, or
    ``mini``, the small model that ships with mar; none: random (Table IX b)."""

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


class MaskConfig(Node):
    """Which tokens are hidden in training (section III-B)."""

    strategy: Annotated[str, Field(json_schema_extra={"enum": list(MASK_STRATEGIES)})] = "cell"
    """Arrangement of the hidden tokens (Table II), or a strategy that an installed package adds."""
    options: dict[str, Any] = {}
    """Settings of a package's own strategy."""
    motion: Literal["running", "standard"] = "running"
    """Whether the mask moves from slice to slice, Eq. 1 (Table II)."""
    ratio: MaskRatio = 0.5
    """ρ, the share of hidden tokens; 0 hides nothing (Tables II, III c, V). A list, as
    ``[0.5, 0.25, 0.75]``: each step of training draws one, and testing has the first unless
    ``evaluation.mask.ratio`` says otherwise."""
    ratios: tuple[MaskRatio, ...] = ()
    """The list, if ``ratio`` was given as one; it is filled in."""
    cell: tuple[PositiveInt, PositiveInt] = (2, 2)
    """Height r and width q of the running cell, tokens (Table IV)."""
    spatial: Literal["repeated", "random"] = "repeated"
    """All cells start in the same random state, or each in its own (Table III a)."""
    temporal: Literal["shuffled", "fixed"] = "shuffled"
    """Slices in random order, or in running order (Table III a)."""
    choice: Literal["rotation", "motion", "redundancy"] = "rotation"
    """Which tokens of a running cell are visible: those of its state (Eq. 1), or as many of those
    that change most, as in the strategies ``motion`` and ``redundancy``. Ours."""
    content: Fraction = 1.0
    """Share of the cells in which ``choice`` decides; in the others the state does."""
    keep: Literal["most", "least"] = "most"
    """Where content decides: the tokens that change most are visible, or, as a control, least."""
    static_below: NonNegativeFloat = 0.02
    """``static``: a token is like the one before it if its pixels, from 0 to 1, differ by less in
    the mean."""

    @model_validator(mode="before")
    @classmethod
    def _with_ratios(cls, given: Any) -> Any:
        """Take the list that ``ratio`` may be apart."""
        if not isinstance(given, dict) or not isinstance(given.get("ratio"), list | tuple):
            return given
        ratios = given["ratio"]
        if not ratios:
            raise ValueError("ratio: the list is empty")
        # A list of one is that one.
        several = ratios if len(ratios) > 1 else []
        return {**given, "ratio": ratios[0], "ratios": several}

    @field_validator("strategy")
    @classmethod
    def _is_known(cls, name: str) -> str:
        return plugins.check_name(plugins.MASKS, name, MASK_STRATEGIES)

    @model_validator(mode="after")
    def _options_fit(self) -> Self:
        is_built_in = self.strategy in MASK_STRATEGIES
        checked = plugins.checked_options(plugins.MASKS, self.strategy, self.options, is_built_in)
        object.__setattr__(self, "options", checked)
        return self

    @model_validator(mode="after")
    def _can_run(self) -> Self:
        # A tube mask is the same in all slices by definition, and a frame mask hides whole slices.
        if self.strategy in ("tube", "frame") and self.motion == "running":
            raise ValueError(f"a {self.strategy} mask cannot run: set motion: standard (Table II)")
        return self

    @property
    def hides(self) -> bool:
        """Whether training hides anything."""
        return any(each.ratio > 0 for each in self.in_training)

    @property
    def in_training(self) -> tuple[MaskConfig, ...]:
        """The masks of training: one for each ratio."""
        if not self.ratios:
            return (self,)
        # The ratios are checked already.
        return tuple(
            self.model_copy(update={"ratio": ratio, "ratios": ()}) for ratio in self.ratios
        )

    @property
    def sees_clip(self) -> bool:
        """Whether the pixels of a clip decide which of its tokens are hidden."""
        if self.strategy == "cell":
            return self.choice != "rotation" and self.content > 0
        if self.strategy in MASK_STRATEGIES:
            return self.strategy in MASKS_OF_CONTENT
        added: plugins.MaskStrategy = plugins.load(plugins.MASKS, self.strategy)
        return added.score is not None

    @property
    def sees_embeddings(self) -> bool:
        """Whether it compares the embeddings of patches, which only our own encoder offers."""
        return "redundancy" in (self.strategy, self.choice) and self.sees_clip

    def num_hidden(self, grid: Grid) -> int:
        """Return the number of hidden tokens in a clip, which is the same in every clip."""
        t, h, w = grid
        if self.strategy not in MASK_STRATEGIES:
            added: plugins.MaskStrategy = plugins.load(plugins.MASKS, self.strategy)
            options = plugins.options(plugins.MASKS, self.strategy, self.options)
            return added.num_hidden(options, self.ratio, grid)
        # Whole slices.
        if self.strategy == "frame":
            return round(self.ratio * t) * h * w
        # The mask of one slice is repeated or moved, so each slice hides the same number. int()
        # rounds down, as the release and VideoMAE do.
        if self.strategy in ("tube", "block") or (
            self.strategy == "random" and self.motion == "running"
        ):
            return t * int(self.ratio * h * w)
        return int(self.ratio * t * h * w)


class ClassifierConfig(Node):
    """From encoded visible tokens to class scores (section III-C)."""

    kind: Annotated[str, Field(json_schema_extra={"enum": list(CLASSIFIER_KINDS)})] = "bridging"
    """``bridging``: transformer blocks (Eq. 2); the baselines of Tables V and VI; or a classifier
    that an installed package adds."""
    options: dict[str, Any] = {}
    """Settings of a package's own classifier."""
    width: Width = 512
    """Token width of the bridging classifier, and hidden width of the MLP (Table VI)."""
    depth: Depth = 2
    """Blocks of the bridging classifier, or layers of the MLP (Table VI)."""
    heads: PositiveInt = 4
    """Attention heads of the bridging classifier."""
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


class AugmentConfig(Node):
    """Training-time augmentation (Table I)."""

    crop_scale: Area = (0.08, 1.0)
    """Range of the random-resized crop's area, as a share of the frame."""
    # Written out, because the value is part of every trial's identity: 4 / 3 as a float.
    crop_aspect: Scale = (0.75, 1.3333333333333333)
    """Range of the random-resized crop's aspect ratio."""
    repeats: PositiveInt = 1
    """Clips of each video in a batch, repeated sampling (Table I: 2 on Kinetics)."""
    repeat: Literal["clips", "frames"] = "clips"
    """Repeats are clips of other frames (release), or the same frames augmented anew (VideoMAE)."""
    randaugment: str | None = None
    """RandAugment's policy in timm's notation, as ``rand-m9-mstd0.5-inc1``; none: no RandAugment
    (Tables I, X)."""
    randaugment_interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """Interpolation of RandAugment's operations that move pixels (release: bicubic)."""
    randaugment_before_crop: bool = False
    """Apply RandAugment before the crop, to whole frames in the loader (release, on Kinetics); or
    after it, on the device."""
    erasing: Fraction = 0.0
    """Share of clips in which a box, the same in all frames, is erased with noise (Table X)."""
    erasing_attempts: PositiveInt = 10
    """Most boxes tried until one fits; the release tries 100 on Kinetics."""
    flip: bool = False
    """Mirror half of the clips. If classes differ in left and right, set ``flip_swaps`` too."""
    flip_swaps: tuple[tuple[NonNegativeInt, NonNegativeInt], ...] = ()
    """Pairs of classes that are swapped in a mirrored clip (Something-Something: left and
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
        # Parsed here only to be checked: a wrong policy is reported while studies are planned, and
        # not by a worker.
        if text is not None:
            RandAugmentPolicy.parse(text)
        return text


class RecipeConfig(Node):
    """Objective, optimiser and schedule (Table I)."""

    objective: Literal["classification", "reconstruction"] = "classification"
    """``classification``: Eq. 5; ``reconstruction``: the reconstruction loss alone (Eq. 3), with no
    classifier, as in VideoMAE's pre-training (Tables IX b, XIII)."""
    epochs: PositiveInt = 40
    """Passes over the training split."""
    class_sampling: Literal["natural", "balanced"] = "natural"
    """``natural``: each video once an epoch. ``balanced``: as many videos an epoch, drawn so that
    every class is equally frequent: those of a rare class several times."""
    batch_size: PositiveInt = 512
    """Clips per optimiser step, over all workers together."""
    base_lr: PositiveFloat = 1.0e-3
    """Learning rate at a batch of 256 (``linear``), or at any batch (``none``)."""
    lr_scaling: Literal["linear", "none"] = "linear"
    """``linear``: multiply by batch_size / 256 (Table I, footnote)."""
    warmup_epochs: NonNegativeFloat = 5.0
    """Epochs of linear warm-up from ``warmup_lr``."""
    cosine_from: Literal["warmup", "start"] = "warmup"
    """``warmup``: the cosine begins at the peak when warm-up ends; ``start``: it begins at epoch 0,
    and warm-up rises to the cosine's value where the two meet (release)."""
    warmup_lr: NonNegativeFloat = 1.0e-6
    """Learning rate of the first step, if ``warmup_epochs`` is above 0."""
    min_lr: NonNegativeFloat = 1.0e-6
    """Learning rate at the end of the cosine."""
    # Table I says 0.5; every configuration of the release has 0.05.
    weight_decay: NonNegativeFloat = 0.05
    """AdamW's weight decay; not applied to biases, norms and mask tokens (in the release, with
    ``layer_decay_of: weights``, it is applied to mask tokens)."""
    betas: tuple[MaskRatio, MaskRatio] = (0.9, 0.999)
    """AdamW's momenta β₁, β₂ (Table I)."""
    layer_decay: Annotated[float, Field(gt=0.0, le=1.0)] = 0.75
    """Learning-rate factor from each encoder block to the one below it."""
    layer_decay_of: Literal["all", "weights"] = "all"
    """``all``: layer decay applies to all parameters of a block (VideoMAE); ``weights``: not to
    norms and biases (release)."""
    clip_grad: PositiveFloat | None = None
    """Largest gradient norm; none: not clipped."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Number format of the matrix products; the weights themselves are always float32."""


class EvaluationMaskConfig(Node):
    """The mask of evaluation: always the same one."""

    start: NonNegativeInt = 0
    """State of the running cell in the first slice: 0 is A (Table III b)."""
    ratio: MaskRatio | None = None
    """ρ in testing; none: as in training (Table III c)."""
    views: Literal["same", "complementary"] = "same"
    """``same``: all views of a video have one mask; ``complementary``: each view (clip and crop)
    shows the tokens of a cell that the views before it showed least."""
    per_video: bool = False
    """Of strategies without cells: chance decides for each video of the split anew, instead of once
    for all (a control for masks that see the clip)."""


class EvaluationConfig(Node):
    """How accuracy is measured."""

    clips: PositiveInt = 2
    """Clips from each video in the final test; probabilities are averaged."""
    segment_frames: Literal["even", "ends", "videomae"] = "even"
    """Which frames a video's test clips have. With ``segments``, ``even``: spread evenly within
    each segment; ``ends``: from each segment's first to its last frame (release). ``videomae``: as
    in VideoMAE's test, with ``segments`` (at most two clips) and with ``dense``."""
    crop_from: Literal["frame", "resized"] = "frame"
    """``frame``: cut test crops from the frame, then resize them; ``resized``: resize the frame's
    short side first, then cut (release)."""
    crops: Literal[1, 3] = 3
    """Crops of each clip in the final test: the centre, or three along the long side."""
    mask: EvaluationMaskConfig = EvaluationMaskConfig()
    """The mask in testing."""
    merge: NonNegativeInt = 0
    """Tokens that each block of the encoder merges in testing, without training (ToMe); 0: none."""
    every_epochs: PositiveInt = 1
    """Epochs between two one-view validations during training."""
    shuffled_frames: bool = False
    """Also test with each clip's frames in random order, which removes the motion."""


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
    """Seed of all random numbers."""

    # Rules between branches. Each message begins with the path of the setting to change:
    # overrides.build() splits it off to name the file and line.
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
                f"clip: {list(shape)} makes {prod(self.grid)} tokens; at most {_MOST_TOKENS} are "
                "allowed: set a smaller clip.frames or clip.size"
            )
        # Where nothing is hidden, the cell has no effect and need not fit.
        if self.mask.strategy == "cell" and (self.mask.hides or self.test_ratio):
            _, h, w = self.grid
            if h % self.mask.cell[0] or w % self.mask.cell[1]:
                raise ValueError(
                    f"mask.cell: {list(self.mask.cell)} does not divide the {h} x {w} token grid"
                )
        # Mixup and cutmix mix clips 2k and 2k + 1 of a batch that has one clip of every video, then
        # another of every video. An even number keeps such a pair on one worker (WorkerRank.of).
        if self.augment.repeats > 1 and self.recipe.batch_size % (2 * self.augment.repeats):
            raise ValueError(
                f"recipe.batch_size: {self.recipe.batch_size} is not an even number of videos, "
                f"each {self.augment.repeats} times (augment.repeats)"
            )
        # A class in two pairs would be swapped twice, and the result would depend on their order.
        swapped = [label for pair in self.augment.flip_swaps for label in pair]
        if max(swapped, default=0) >= self.data.num_classes or len({*swapped}) < len(swapped):
            raise ValueError(
                f"augment.flip_swaps: each of the {self.data.num_classes} classes may be in one "
                f"pair only, and the last is number {self.data.num_classes - 1}"
            )
        if self.pretrains and not self.reconstructs:
            raise ValueError(
                "recipe.objective: 'reconstruction' needs mask.ratio and reconstruction.weight "
                "above 0"
            )
        if self.classifier.norm == "pooled" and self.encoder.is_of_package:
            raise ValueError(
                f"classifier.norm: 'pooled' moves the ViT's last norm; {self.encoder.size} has its "
                "own: set it to tokens"
            )
        if self.classifier.norm == "pooled" and self.reconstructs:
            raise ValueError(
                "classifier.norm: 'pooled' leaves the decoder tokens without a norm; set it to "
                "tokens, or reconstruction.weight to 0"
            )
        # A ratio below 1 can still hide everything, because a frame mask rounds to whole slices.
        masks = [("mask.ratio", each) for each in self.mask.in_training]
        for path, mask in (*masks, ("evaluation.mask.ratio", self.test_mask)):
            if mask.num_hidden(self.grid) >= prod(self.grid):
                raise ValueError(
                    f"{path}: {mask.ratio} leaves no token of {prod(self.grid)} visible"
                )
        return self

    @model_validator(mode="after")
    def _every_ratio_reconstructs(self) -> Self:
        hidden = [each.num_hidden(self.grid) for each in self.mask.in_training]
        if self.reconstruction.weight > 0 and max(hidden) > 0 == min(hidden):
            raise ValueError(
                f"mask.ratio: {list(self.mask.ratios)} has one that hides nothing, which leaves "
                "nothing to reconstruct; leave it out, or set reconstruction.weight to 0"
            )
        return self

    @model_validator(mode="after")
    def _content_is_known(self) -> Self:
        if self.mask.sees_embeddings and self.encoder.is_of_package:
            raise ValueError(
                "mask: 'redundancy' compares the ViT's patch embeddings, and "
                f"{self.encoder.size} is of a package; choose motion"
            )
        return self

    @model_validator(mode="after")
    def _vit_merges(self) -> Self:
        if self.evaluation.merge and self.encoder.is_of_package:
            raise ValueError(
                f"evaluation.merge: merges tokens in the blocks of the ViT; {self.encoder.size} is "
                "of a package: set it to 0"
            )
        return self

    @model_validator(mode="after")
    def _views_have_cells(self) -> Self:
        has_cells = self.mask.strategy in MASKS_WITH_CELLS
        if self.evaluation.mask.views == "complementary" and not has_cells:
            raise ValueError(
                f"evaluation.mask.views: 'complementary' needs mask.strategy: "
                f"{' or '.join(MASKS_WITH_CELLS)}, not {self.mask.strategy}"
            )
        return self

    @model_validator(mode="after")
    def _test_clips_exist(self) -> Self:
        # VideoMAE's test takes a segment's first and middle frame: there is no third clip.
        if (
            self.evaluation.segment_frames == "videomae"
            and self.clip.sampling == "segments"
            and self.evaluation.clips > 2
        ):
            raise ValueError(
                f"evaluation.clips: {self.evaluation.clips} with segment_frames: videomae, which "
                "has at most two clips where clip.sampling is segments; set it to 1 or 2"
            )
        return self

    @property
    def grid(self) -> Grid:
        """The token grid (t, h, w): the tubelets of a clip in time, height and width."""
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
        # model_copy does not validate again, and need not: the ratio has been checked.
        return self.mask.model_copy(update={"ratio": self.test_ratio, "ratios": ()})

    @property
    def redraws_in_testing(self) -> bool:
        """Whether the model has a decoder, and the mask of testing hides something."""
        return self.reconstructs and self.test_ratio > 0

    @property
    def pretrains(self) -> bool:
        """Whether this is a self-supervised pre-training: no classifier, no labels."""
        return self.recipe.objective == "reconstruction"

    @property
    def reconstructs(self) -> bool:
        """Whether the model has a reconstruction branch: λ > 0, and the mask hides something."""
        # With nothing hidden the loss of Eq. 3 would be the mean of no values, nan.
        hidden = [each.num_hidden(self.grid) for each in self.mask.in_training]
        return self.reconstruction.weight > 0 and max(hidden) > 0
