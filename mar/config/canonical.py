"""Settings without an effect, set to their defaults: equal trainings then have equal settings."""

from __future__ import annotations

from typing import Any

from mar.config.input_settings import AugmentConfig
from mar.config.mask_settings import MASKS_WITH_CELLS, MaskConfig
from mar.config.model_settings import ClassifierConfig, EncoderConfig, ReconstructionConfig
from mar.config.schema import EvaluationConfig, RecipeConfig, TrainingConfig


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
    changes: dict[str, Any] = {
        "encoder": _encoder(settings),
        "classifier": _classifier(settings.classifier),
        "recipe": _recipe(settings),
        "mask": _mask(settings),
    }
    changes["evaluation"] = _evaluation(settings, changes["mask"])
    if not settings.reconstructs:
        changes["reconstruction"] = ReconstructionConfig(weight=0.0)
    # Cached tokens are not augmented, but for their labels.
    if settings.encoder.cached:
        changes["augment"] = AugmentConfig(smoothing=settings.augment.smoothing)
        changes["clip"] = settings.clip.model_copy(update={"round_frames": False})
    # All changed branches are valid already, and model_copy does not validate again.
    return settings.model_copy(update=changes)


def _encoder(settings: TrainingConfig) -> EncoderConfig:
    encoder = settings.encoder
    default = EncoderConfig()
    changes: dict[str, Any] = {}
    if encoder.is_of_package:
        changes |= {"drop_path": default.drop_path, "init": default.init}
    if encoder.train == "none":
        changes["drop_path"] = default.drop_path
    if encoder.positions == "interpolated" and encoder.pretrained_grid == settings.grid:
        changes |= {"positions": "computed", "pretrained_grid": None}
    return encoder.model_copy(update=changes)


def _classifier(classifier: ClassifierConfig) -> ClassifierConfig:
    if classifier.is_of_package:
        effective = {"kind": classifier.kind, "options": classifier.options}
        return ClassifierConfig.model_validate(effective)
    # The validator of ClassifierConfig ensures that ``positions`` and ``mask_tokens`` are off here.
    if classifier.kind == "linear":
        effective = {"kind": "linear", "dropout": classifier.dropout, "norm": classifier.norm}
        return ClassifierConfig.model_validate(effective)
    return classifier


def _recipe(settings: TrainingConfig) -> RecipeConfig:
    recipe = settings.recipe
    default = RecipeConfig()
    changes: dict[str, Any] = {}
    if recipe.schedule == "cosine":
        changes["decay_share"] = default.decay_share
    else:
        changes["cosine_from"] = default.cosine_from
    # Under ``layer_decay_of: weights`` the decay is the decoder's mask token's too.
    if settings.encoder.train == "none" and not settings.reconstructs:
        changes["layer_decay"] = default.layer_decay
    return recipe.model_copy(update=changes)


def _mask(settings: TrainingConfig) -> MaskConfig:
    mask = settings.mask
    default = MaskConfig()
    # With a ratio of 0 in training alone, the cell still shapes the mask in testing.
    if not mask.hides and not settings.test_ratio:
        mask = MaskConfig(ratio=0.0)
    elif _is_running_uniform(mask):
        # model_copy skips validation on purpose: the cell is the grid, so it divides it.
        mask = default.model_copy(update={"ratio": mask.ratio, "cell": settings.grid[1:]})
    elif mask.strategy not in MASKS_WITH_CELLS:
        mask = mask.model_copy(
            update={
                "cell": default.cell,
                "spatial": default.spatial,
                "temporal": default.temporal,
            }
        )
    mask = mask.model_copy(update=_content_without_effect(mask))
    # The tokens are those of the mask of testing, which is one for all clips.
    if settings.encoder.cached:
        orders = {"spatial": default.spatial, "temporal": default.temporal}
        mask = mask.model_copy(update=orders)
    return mask


def _evaluation(settings: TrainingConfig, mask: MaskConfig) -> EvaluationConfig:
    """Return the settings of testing; ``mask`` has those of the mask that have an effect."""
    evaluation = settings.evaluation
    changes: dict[str, Any] = {}
    if evaluation.clips * evaluation.crops == 1:
        changes = {"views": "same"}
    # Where content decides in every cell, the states say only how many tokens each shows.
    if mask.strategy not in MASKS_WITH_CELLS or mask.content_decides or not settings.test_ratio:
        changes = {"start": 0, "views": "same"}
    if settings.mask.strategy in MASKS_WITH_CELLS or not settings.test_ratio:
        changes["per_video"] = False
    return evaluation.model_copy(update={"mask": evaluation.mask.model_copy(update=changes)})


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
