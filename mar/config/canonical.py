"""Settings that have no effect, set to their defaults.

Two trainings that are equal have equal settings then.
"""

from __future__ import annotations

from typing import Any

from mar.config.schema import ClassifierConfig, MaskConfig, ReconstructionConfig, TrainingConfig


def canonical(settings: TrainingConfig) -> TrainingConfig:
    """Return the settings with those that have no effect at their defaults.

    A linear classifier has no width. Where nothing is hidden there are no cells, and nothing is
    reconstructed. A running uniform mask is a running cell as large as the token grid.
    """
    changes: dict[str, Any] = {}
    classifier = settings.classifier
    if classifier.kind == "linear":
        effective = {"kind": "linear", "dropout": classifier.dropout, "norm": classifier.norm}
        changes["classifier"] = ClassifierConfig.model_validate(effective)
    if not settings.reconstructs:
        changes["reconstruction"] = ReconstructionConfig(weight=0.0)
    if not settings.mask.ratio and not settings.test_ratio:
        changes["mask"] = MaskConfig(ratio=0.0)
    elif _is_running_uniform(settings.mask):
        cell = settings.grid[1:]
        changes["mask"] = MaskConfig().model_copy(
            update={"ratio": settings.mask.ratio, "cell": cell}
        )
    return settings.model_copy(update=changes)


def _is_running_uniform(mask: MaskConfig) -> bool:
    """Whether a mask is uniform and runs as a cell does by default."""
    default = MaskConfig()
    return (
        mask.strategy == "uniform"
        and mask.motion == default.motion
        and mask.spatial == default.spatial
        and mask.temporal == default.temporal
    )
