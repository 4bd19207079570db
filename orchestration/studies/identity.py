"""Which trials are equal: one line of text for equal results, one for equal trainings."""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache
from typing import Any

from mar import RESULTS_VERSION
from mar.config.canonical import canonical
from mar.config.overrides import build, without_paths
from mar.config.schema import TrainingConfig
from mar.weights.hub import ABSENT as WEIGHTS_ABSENT
from mar.weights.hub import fingerprint

_KEY_LENGTH = 12
"""Hexadecimal digits: among a million trials, two share a key with a chance of one in 500."""


@lru_cache
def weights_fingerprint(name: str) -> str:
    """Return the fingerprint of pre-trained weights.

    Read once for a study, a thousand trials may start from them.
    """
    return fingerprint(name)


def key_of(identity_line: str) -> str:
    """Return the key of the trial with an identity."""
    return hashlib.sha256(identity_line.encode()).hexdigest()[:_KEY_LENGTH]


def identity(settings: TrainingConfig, data_fingerprint: str) -> str:
    """Return one line of JSON that is equal for equal results.

    The settings, with fingerprints in place of paths.

    It has the version of results too: with another one, equal settings give other results.
    """
    settings = canonical(settings)
    tree: dict[str, Any] = without_paths(settings)
    tree["fingerprint"] = data_fingerprint
    tree["results"] = RESULTS_VERSION
    # Testing with the ratio of training is the default, written or not.
    if settings.evaluation.mask.ratio == settings.mask.ratio:
        mask = {**tree["evaluation"]["mask"], "ratio": None}
        tree["evaluation"] = {**tree["evaluation"], "mask": mask}
    if settings.encoder.weights:
        weights = weights_fingerprint(settings.encoder.weights)
        tree["encoder"] = {**tree["encoder"], "weights": weights}
    return _line(tree)


def training_identity(identity_line: str) -> str:
    """Return the part of an identity that the training depends on.

    Everything but how it is tested.
    """
    tree: dict[str, Any] = json.loads(identity_line)
    tree.pop("evaluation")
    # Without a mask in training, the other mask settings are those of testing alone.
    if not tree["mask"]["ratio"]:
        tree["mask"] = {"ratio": 0.0}
    return _line(tree)


def with_defaults_filled(
    identity_line: str, data_fingerprint: str | None = None, weights: str | None = None
) -> str:
    """Return an identity of an earlier version, with settings it did not know at defaults.

    ``data_fingerprint`` replaces its own: where the data is missing, its content is unknown and the
    settings alone must do. ``weights``, the name of the pre-trained weights, replaces their content
    for the same reason.
    """
    tree: dict[str, Any] = json.loads(identity_line)
    own_fingerprint = tree.pop("fingerprint")
    results = tree.pop("results", 1)
    if weights:
        tree["encoder"]["weights"] = f"{WEIGHTS_ABSENT}{weights}"
    filled: dict[str, Any] = json.loads(identity(build(tree), data_fingerprint or own_fingerprint))
    filled["results"] = results
    return _line(filled)


def _line(tree: dict[str, Any]) -> str:
    return json.dumps(tree, sort_keys=True, ensure_ascii=False)
