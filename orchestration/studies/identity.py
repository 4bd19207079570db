"""Which trials are equal: one line of text for equal results, one for equal trainings."""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache
from typing import Any

from mar import RESULTS_VERSION
from mar.config.overrides import build, without_paths
from mar.config.schema import ClassifierConfig, MaskConfig, ReconstructionConfig, TrainingConfig
from mar.weights.hub import ABSENT as WEIGHTS_ABSENT
from mar.weights.hub import fingerprint


@lru_cache
def weights_fingerprint(name: str) -> str:
    """Look at a checkpoint once for a study: a thousand trials may start from it."""
    return fingerprint(name)


def key_of(identity_line: str) -> str:
    """Return the key of the trial with an identity."""
    return hashlib.sha256(identity_line.encode()).hexdigest()[:12]


def identity(settings: TrainingConfig, data_fingerprint: str) -> str:
    """Return one line that is equal for equal trainings: settings with the data's content instead of its place."""
    settings = canonical(settings)
    tree: dict[str, Any] = {
        **without_paths(settings),
        "fingerprint": data_fingerprint,
        "results": RESULTS_VERSION,
    }
    if settings.evaluation.mask.ratio == settings.mask.ratio:  # the same as to leave it out
        tree["evaluation"] = {
            **tree["evaluation"],
            "mask": {**tree["evaluation"]["mask"], "ratio": None},
        }
    if settings.encoder.weights:
        tree["encoder"] = {
            **tree["encoder"],
            "weights": weights_fingerprint(settings.encoder.weights),
        }
    return json.dumps(tree, sort_keys=True, ensure_ascii=False)


def canonical(settings: TrainingConfig) -> TrainingConfig:
    """Return the settings with those that do nothing at their defaults: they must not make two trainings of one.

    A linear classifier has no width; where nothing is hidden there are no cells and nothing is rebuilt; a running
    uniform mask is a running cell as large as the token grid.
    """
    changes: dict[str, Any] = {}
    kept = settings.classifier
    if kept.kind == "linear":
        linear = {"kind": "linear", "dropout": kept.dropout, "norm": kept.norm}
        changes["classifier"] = ClassifierConfig.model_validate(linear)
    if not settings.reconstructs:
        changes["reconstruction"] = ReconstructionConfig(weight=0.0)
    mask, plain = settings.mask, MaskConfig()
    if not mask.ratio and not settings.test_ratio:
        changes["mask"] = MaskConfig(ratio=0.0)
    elif (mask.strategy, mask.motion, mask.spatial, mask.temporal) == ("uniform", *_RUNNING):
        changes["mask"] = plain.model_copy(update={"ratio": mask.ratio, "cell": settings.grid[1:]})
    return settings.model_copy(update=changes)


_RUNNING = (MaskConfig().motion, MaskConfig().spatial, MaskConfig().temporal)


def training_identity(identity_line: str) -> str:
    """Return the part of an identity that a training depends on: all but how it is tested."""
    tree: dict[str, Any] = json.loads(identity_line)
    tree.pop("evaluation")
    if not tree["mask"]["ratio"]:  # then the mask is of testing alone
        tree["mask"] = {"ratio": 0.0}
    return json.dumps(tree, sort_keys=True, ensure_ascii=False)


def with_defaults_filled(
    identity_line: str, data_fingerprint: str | None = None, weights: str | None = None
) -> str:
    """Return an identity that an earlier version wrote, with the settings it did not know yet at their defaults.

    ``data_fingerprint`` is put in the place of its own: where the data is not at hand, settings alone must do. So
    is the name of the pre-trained ``weights``: where they are not at hand, their name must do.
    """
    tree: dict[str, Any] = json.loads(identity_line)
    own, results = tree.pop("fingerprint"), tree.pop("results", 1)
    if weights:
        tree["encoder"]["weights"] = f"{WEIGHTS_ABSENT}{weights}"
    line = json.loads(identity(build(tree), data_fingerprint or own))
    return json.dumps({**line, "results": results}, sort_keys=True, ensure_ascii=False)
