"""Settings of masks, in training and in testing."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    field_validator,
    model_validator,
)

from mar import plugins
from mar.config.node import Node
from mar.config.types import Fraction, Grid, MaskRatio, MaskRatios

MASKS_OF_CONTENT = ("motion", "redundancy", "static")
"""Strategies that see the clip (``mar.model.content_masks``)."""
MASK_STRATEGIES = ("cell", "random", "block", "uniform", "tube", "frame", *MASKS_OF_CONTENT)
"""``mask.strategy`` without what packages add."""
MASKS_WITH_CELLS = ("cell", "uniform")
"""Strategies whose masks have cells; that of ``uniform`` is the token grid."""


class MaskConfig(Node):
    """Which tokens are hidden in training (section III-B)."""

    strategy: Annotated[str, Field(json_schema_extra={"enum": list(MASK_STRATEGIES)})] = "cell"
    """Arrangement of the hidden tokens (Table II), or a strategy that an installed package adds."""
    options: dict[str, Any] = {}
    """Settings of a package's own strategy."""
    motion: Literal["running", "standard"] = "running"
    """Whether the mask moves from slice to slice, Eq. 1 (Table II)."""
    ratio: MaskRatios = 0.5
    """ρ, the share of hidden tokens; 0 hides nothing (Tables II, III c, V). A list, as
    ``[0.5, 0.25, 0.75]``: each step of training draws one, and testing has the first unless
    ``evaluation.mask.ratio`` says otherwise."""
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
    lengths: bool = False
    """``static``: a visible token's position says how many hidden ones after it are like it."""

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
    def first_ratio(self) -> float:
        """ρ, the first of several."""
        if isinstance(self.ratio, tuple):
            return self.ratio[0]
        return self.ratio

    @property
    def in_training(self) -> tuple[MaskConfig, ...]:
        """The masks of training: one for each ratio."""
        if not isinstance(self.ratio, tuple):
            return (self,)
        # The ratios are checked already.
        return tuple(self.model_copy(update={"ratio": ratio}) for ratio in self.ratio)

    @property
    def hides(self) -> bool:
        """Whether training hides anything."""
        return any(each.first_ratio > 0 for each in self.in_training)

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
    def content_decides(self) -> bool:
        """Whether content decides everything: of cells, in every cell."""
        return self.sees_clip and (self.strategy != "cell" or self.content == 1)

    @property
    def sees_embeddings(self) -> bool:
        """Whether it compares the embeddings of patches, which only our own encoder offers."""
        kind = self.strategy
        if self.strategy == "cell":
            kind = self.choice
        return self.sees_clip and kind == "redundancy"

    def num_hidden(self, grid: Grid) -> int:
        """Return the number of hidden tokens in a clip, which is the same in every clip."""
        t, h, w = grid
        if self.strategy not in MASK_STRATEGIES:
            added: plugins.MaskStrategy = plugins.load(plugins.MASKS, self.strategy)
            options = plugins.options(plugins.MASKS, self.strategy, self.options)
            return added.num_hidden(options, self.first_ratio, grid)
        # Whole slices.
        if self.strategy == "frame":
            return round(self.first_ratio * t) * h * w
        # The mask of one slice is repeated or moved, so each slice hides the same number. int()
        # rounds down, as the release and VideoMAE do.
        if self.strategy in ("tube", "block") or (
            self.strategy == "random" and self.motion == "running"
        ):
            return t * int(self.first_ratio * h * w)
        return int(self.first_ratio * t * h * w)


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
