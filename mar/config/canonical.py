"""Settings without an effect, set to their defaults: equal trainings then have equal settings."""

from __future__ import annotations

from typing import Any

from mar.config.input_settings import AugmentConfig
from mar.config.mask_settings import MASKS_WITH_CELLS, MaskConfig
from mar.config.model_settings import ClassifierConfig, EncoderConfig, ReconstructionConfig
from mar.config.schema import RecipeConfig, TrainingConfig


def canonical(settings: TrainingConfig) -> TrainingConfig:
    """Return the settings with those that have no effect at their defaults.

    A linear classifier has no width. Where nothing is hidden there are no cells, and nothing is
    reconstructed. A running uniform mask is a running cell as large as the token grid. Masks
    without cells have no cell's size, spatial or temporal order, and no start state in testing.
    Where a mask does not see the clip, content decides nothing. One view has nothing to complement.
    A package's encoder and classifier have their own options alone. Each schedule of the rate has
    its own settings. An encoder that is not trained has no stochastic depth and no rates; cached
    tokens are not augmented, and have the mask of testing.
    """
    changes: dict[str, Any] = {}
    classifier = settings.classifier
    # The validator of ClassifierConfig ensures that ``positions`` and ``mask_tokens`` are off here.
    if classifier.kind == "linear":
        effective = {"kind": "linear", "dropout": classifier.dropout, "norm": classifier.norm}
        changes["classifier"] = ClassifierConfig.model_validate(effective)
    if classifier.is_of_package:
        effective = {"kind": classifier.kind, "options": classifier.options}
        changes["classifier"] = ClassifierConfig.model_validate(effective)
    if settings.encoder.is_of_package:
        vit = EncoderConfig()
        changes["encoder"] = settings.encoder.model_copy(
            update={"drop_path": vit.drop_path, "init": vit.init}
        )
    encoder = changes.get("encoder", settings.encoder)
    if encoder.positions == "interpolated" and encoder.pretrained_grid == settings.grid:
        encoder = encoder.model_copy(update={"positions": "computed", "pretrained_grid": None})
    unused_rates: dict[str, Any] = {}
    if encoder.train == "none":
        encoder = encoder.model_copy(update={"drop_path": EncoderConfig().drop_path})
        # Under ``layer_decay_of: weights`` it is the decoder's mask token's too.
        if not settings.reconstructs:
            unused_rates = {"layer_decay": RecipeConfig().layer_decay}
    changes["encoder"] = encoder
    # Cached tokens are not augmented, but for their labels.
    if encoder.cached:
        changes["augment"] = AugmentConfig(smoothing=settings.augment.smoothing)
        changes["clip"] = settings.clip.model_copy(update={"round_frames": False})
    if settings.recipe.schedule == "cosine":
        unused = {"decay_share": RecipeConfig().decay_share}
    else:
        unused = {"cosine_from": RecipeConfig().cosine_from}
    changes["recipe"] = settings.recipe.model_copy(update={**unused, **unused_rates})
    if not settings.reconstructs:
        changes["reconstruction"] = ReconstructionConfig(weight=0.0)
    # With a ratio of 0 in training alone, the cell still shapes the mask in testing.
    if not settings.mask.hides and not settings.test_ratio:
        changes["mask"] = MaskConfig(ratio=0.0)
    elif _is_running_uniform(settings.mask):
        # model_copy skips validation on purpose: the cell is the grid, so it divides it.
        mask = settings.mask
        changes["mask"] = MaskConfig().model_copy(
            update={"ratio": mask.ratio, "cell": settings.grid[1:]}
        )
    elif settings.mask.strategy not in MASKS_WITH_CELLS:
        default = MaskConfig()
        changes["mask"] = settings.mask.model_copy(
            update={
                "cell": default.cell,
                "spatial": default.spatial,
                "temporal": default.temporal,
            }
        )
    mask = changes.get("mask", settings.mask)
    changes["mask"] = mask.model_copy(update=_content_without_effect(mask))
    # Its tokens are those of the mask of testing, which is one for all clips.
    if encoder.cached:
        default_mask = MaskConfig()
        unused_orders = {"spatial": default_mask.spatial, "temporal": default_mask.temporal}
        changes["mask"] = changes["mask"].model_copy(update=unused_orders)
    evaluation = settings.evaluation
    without_effect: dict[str, Any] = {}
    if evaluation.clips * evaluation.crops == 1:
        without_effect = {"views": "same"}
    # Where content decides in every cell, the states say only how many tokens each shows.
    if mask.strategy not in MASKS_WITH_CELLS or mask.content_decides or not settings.test_ratio:
        without_effect = {"start": 0, "views": "same"}
    if settings.mask.strategy in MASKS_WITH_CELLS or not settings.test_ratio:
        without_effect["per_video"] = False
    if without_effect:
        test_mask = evaluation.mask.model_copy(update=without_effect)
        changes["evaluation"] = evaluation.model_copy(update={"mask": test_mask})
    # As in the copy above, all changed branches are valid already.
    return settings.model_copy(update=changes)


def _content_without_effect(mask: MaskConfig) -> dict[str, Any]:
    """Return the defaults of those settings of masks that see the clip that have no effect."""
    default = MaskConfig()
    names = {"choice", "content", "keep", "static_below", "lengths"}
    if mask.sees_clip:
        names = {"static_below", "lengths"}
        # Of a cell, the mask that has not seen the clip says how many tokens each shows.
        if mask.strategy != "cell":
            names |= {"choice", "content", "motion"}
        if mask.strategy == "static":
            names -= {"static_below", "lengths"}
    return {name: getattr(default, name) for name in names}


def _is_running_uniform(mask: MaskConfig) -> bool:
    """Return whether a mask is uniform and runs as a cell does by default."""
    # Only with the default augmentations does the change to MaskConfig() above keep them.
    default = MaskConfig()
    return (
        mask.strategy == "uniform"
        and mask.motion == default.motion
        and mask.spatial == default.spatial
        and mask.temporal == default.temporal
    )
