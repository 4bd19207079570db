"""All settings that affect a result: one immutable, closed, typed tree.

Imports neither torch nor Ray, so that a thousand trials can be planned in a second.
Where and how a trial runs (workers, devices, storage) is in ``orchestration.config.LaunchConfig``,
because a result does not depend on it.

pydantic takes the string below a field as the field's description.
"""

from __future__ import annotations

from math import prod
from typing import Annotated, Literal, Self

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from mar.config.input_settings import AugmentConfig, ClipConfig, DataConfig
from mar.config.mask_settings import MASKS_WITH_CELLS, EvaluationMaskConfig, MaskConfig
from mar.config.model_settings import ClassifierConfig, EncoderConfig, ReconstructionConfig
from mar.config.node import Node
from mar.config.schedule import decay_epochs, stable_epochs
from mar.config.types import Grid, MaskRatio

_MOST_TOKENS = 2**18
"""Most tokens of a clip; the paper's have 1,568. More is a mistake, or a file that is made to
exhaust the memory."""


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
    schedule: Literal["cosine", "warmup_stable_decay"] = "cosine"
    """How the rate falls after warm-up. ``cosine``: over all epochs (Table I).
    ``warmup_stable_decay``: it stays, and falls linearly in the last epochs; such a training is the
    beginning of a longer one, which continues it."""
    decay_share: Annotated[float, Field(gt=0.0, le=1.0)] = 0.2
    """Share of the epochs in which the rate falls, at least one epoch, under
    ``warmup_stable_decay``."""
    cosine_from: Literal["warmup", "start"] = "warmup"
    """``warmup``: the cosine begins at the peak when warm-up ends; ``start``: it begins at epoch 0,
    and warm-up rises to the cosine's value where the two meet (release)."""
    warmup_lr: NonNegativeFloat = 1.0e-6
    """Learning rate of the first step, if ``warmup_epochs`` is above 0."""
    min_lr: NonNegativeFloat = 1.0e-6
    """Learning rate at the end of the training."""
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

    @model_validator(mode="after")
    def _warmup_ends_before_the_decay(self) -> Self:
        is_stable = self.schedule == "warmup_stable_decay"
        if is_stable and self.warmup_epochs > stable_epochs(self):
            raise ValueError(
                f"warmup_epochs: {self.warmup_epochs:g} of {self.epochs} epochs, of which the last "
                f"{decay_epochs(self)} are the decay: set fewer, or a smaller decay_share"
            )
        return self


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
    """Epochs between two validations during training: of one view, and of cached tokens all."""
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
                f"mask.ratio: {self.mask.ratio} has one that hides nothing, which leaves "
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
    def _static_tokens_have_lengths(self) -> Self:
        if self.mask.lengths and (self.mask.strategy != "static" or self.encoder.is_of_package):
            raise ValueError(
                "mask.lengths: are those of mask.strategy: static, and of the ViT; set it to false"
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
    def _pretrained_grid_has_a_size(self) -> Self:
        grid = self.encoder.pretrained_grid
        if grid is not None and prod(grid) > _MOST_TOKENS:
            raise ValueError(
                f"encoder.pretrained_grid: {list(grid)} are more than {_MOST_TOKENS} tokens"
            )
        return self

    @model_validator(mode="after")
    def _positions_are_added(self) -> Self:
        # Both work on tokens that have their positions already: a merged token is at no place that
        # its query could be turned by.
        for path, is_set in (
            ("evaluation.merge", self.evaluation.merge > 0),
            ("mask.lengths", self.mask.lengths),
        ):
            if is_set and self.encoder.is_rotary:
                raise ValueError(
                    f"{path}: needs positions that are added to the tokens, and encoder.positions: "
                    f"{self.encoder.positions} turns queries and keys"
                )
        return self

    @model_validator(mode="after")
    def _tokens_can_be_cached(self) -> Self:
        if not self.encoder.cached:
            return self
        # Each would have no effect, or needs what the cache does not have.
        conflicts = {
            "reconstruction.weight": (self.reconstruction.weight > 0, "set it to 0"),
            "augment.repeats": (self.augment.repeats > 1, "set it to 1"),
            "mask.strategy": (self.mask.sees_clip, "choose one that does not see the clip"),
            "mask.ratio": (
                self.mask.in_training[0].first_ratio != self.test_ratio
                or len(self.mask.in_training) > 1,
                "set the ratio of testing, which is the only one",
            ),
            "evaluation.mask.views": (
                self.evaluation.mask.views != "same",
                "set it to same",
            ),
            "evaluation.mask.per_video": (self.evaluation.mask.per_video, "set it to false"),
            "evaluation.merge": (self.evaluation.merge > 0, "set it to 0"),
            "recipe.objective": (self.pretrains, "a pre-training trains the encoder"),
        }
        for path, (is_set, advice) in conflicts.items():
            if is_set:
                raise ValueError(f"{path}: does not go with encoder.cached: {advice}")
        return self

    @model_validator(mode="after")
    def _views_have_cells(self) -> Self:
        has_cells = self.mask.strategy in MASKS_WITH_CELLS
        if self.evaluation.mask.views == "complementary" and not has_cells:
            raise ValueError(
                f"evaluation.mask.views: 'complementary' needs mask.strategy: "
                f"{' or '.join(MASKS_WITH_CELLS)}, not {self.mask.strategy}"
            )
        if self.evaluation.mask.views == "complementary" and self.mask.content_decides:
            raise ValueError(
                "evaluation.mask.views: 'complementary' shows the states of a cell in turn, and "
                f"with mask.choice: {self.mask.choice} no state decides: set it to same"
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
        return self.mask.first_ratio if ratio is None else ratio

    @property
    def test_mask(self) -> MaskConfig:
        """The mask's settings in testing."""
        # model_copy does not validate again, and need not: the ratio has been checked.
        return self.mask.model_copy(update={"ratio": self.test_ratio})

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
