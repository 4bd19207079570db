"""The identity of a trial: one line of text that is the same for trials with equal results.

A part of it is the same for trials with equal trainings. Identities are stored in MLflow: a change
of their text makes every earlier run another trial.
"""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache
from typing import Any

from mar import RESULTS_VERSION, plugins
from mar.config.canonical import canonical
from mar.config.input_settings import ANNOTATION_FORMATS
from mar.config.mask_settings import MASK_STRATEGIES
from mar.config.overrides import build, without_paths
from mar.config.schema import TrainingConfig
from mar.weights.hub import ABSENT as WEIGHTS_ABSENT
from mar.weights.hub import fingerprint

_KEY_LENGTH = 12
"""Hexadecimal digits: among a million trials, two share a key with a chance of one in 500."""


@lru_cache
def weights_fingerprint(name: str) -> str:
    """Return the fingerprint of pre-trained weights."""
    # Cached, because a thousand trials of a study may start from the same file. Whoever reads a
    # study clears the cache, since the file may have changed.
    return fingerprint(name)


def key_of(identity_line: str) -> str:
    """Return the key of the trial with an identity."""
    return hashlib.sha256(identity_line.encode()).hexdigest()[:_KEY_LENGTH]


def identity(settings: TrainingConfig, data_fingerprint: str) -> str:
    """Return one line of JSON that is the same for trials with equal results.

    It has the settings, with fingerprints instead of paths, and ``RESULTS_VERSION``.
    """
    # Settings without effect get their defaults, so that they do not make a second training.
    settings = canonical(settings)
    tree: dict[str, Any] = without_paths(settings)
    tree["fingerprint"] = data_fingerprint
    # With another version of the code, equal settings may give other results.
    tree["results"] = RESULTS_VERSION
    # None means the ratio of training: the same ratio written out is the same test.
    if settings.evaluation.mask.ratio == settings.mask.first_ratio:
        mask = {**tree["evaluation"]["mask"], "ratio": None}
        tree["evaluation"] = {**tree["evaluation"], "mask": mask}
    # What another package computes may change with its version.
    packages = _packages(settings)
    if packages:
        tree["packages"] = packages
    # The content of the weights, not their name: a file may be renamed or replaced.
    if settings.encoder.weights:
        weights = weights_fingerprint(settings.encoder.weights)
        tree["encoder"] = {**tree["encoder"], "weights": weights}
    return _line(tree)


def _packages(settings: TrainingConfig) -> dict[str, str]:
    """Return the packages and versions of what the settings name from outside mar."""
    used: dict[str, str] = {}
    # What is built in wins over a package's own of the same name, as where it is used.
    if settings.mask.strategy not in MASK_STRATEGIES:
        used["mask.strategy"] = plugins.origin(plugins.MASKS, settings.mask.strategy)
    if settings.encoder.is_of_package:
        used["encoder.size"] = plugins.origin(plugins.ENCODERS, settings.encoder.size)
    if settings.classifier.is_of_package:
        used["classifier.kind"] = plugins.origin(plugins.CLASSIFIERS, settings.classifier.kind)
    if settings.data.format not in ANNOTATION_FORMATS:
        used["data.format"] = plugins.origin(plugins.FORMATS, settings.data.format)
    return used


def training_identity(identity_line: str) -> str:
    """Return the part of an identity that the training depends on: all but ``evaluation``."""
    tree: dict[str, Any] = json.loads(identity_line)
    evaluation: dict[str, Any] = tree.pop("evaluation")
    # Cached tokens are those of the test's views: what says which these are decides the training.
    if tree["encoder"].get("cached"):
        for name in ("every_epochs", "shuffled_frames"):
            evaluation.pop(name)
        tree["views"] = evaluation
    # Without a mask in training, the other mask settings affect the test alone.
    if not tree["mask"]["ratio"]:
        tree["mask"] = {"ratio": 0.0}
    return _line(tree)


def stable_identity(identity_line: str) -> str | None:
    """Return the part of an identity that trainings of all lengths share.

    None: the rate falls from the start, so that no epoch of one length is an epoch of another.
    """
    tree: dict[str, Any] = json.loads(identity_line)
    if tree["recipe"].get("schedule", "cosine") == "cosine":
        return None
    # Accuracies of validation are in each epoch's metrics: of ``evaluation`` nothing is left out.
    recipe = {
        name: value
        for name, value in tree["recipe"].items()
        if name not in ("epochs", "decay_share")
    }
    return _line({**tree, "recipe": recipe})


def settings_of_identity(identity_line: str) -> TrainingConfig:
    """Return the settings of an identity; its weights are a fingerprint, and data have no paths.

    Raises:
        ValueError: it is not an identity.
        SettingError: it has a setting or value that does not exist today.
    """
    tree: dict[str, Any] = json.loads(identity_line)
    for name in ("fingerprint", "results", "packages"):
        tree.pop(name, None)
    return build(tree)


def with_defaults_filled(
    identity_line: str, data_fingerprint: str | None = None, weights: str | None = None
) -> str:
    """Return an identity of an earlier version, with today's default for each setting it lacks.

    ``data_fingerprint`` replaces the fingerprint of the data: while the data is missing here, its
    content is unknown, and runs are matched by their settings alone. ``weights``, the name of the
    pre-trained weights, replaces their fingerprint for the same reason.

    Raises:
        ValueError: it is not an identity, or has a setting or value that does not exist today.
        KeyError: it lacks a part that every identity has.
    """
    tree: dict[str, Any] = json.loads(identity_line)
    own_fingerprint = tree.pop("fingerprint")
    # The first version had no number in its identities.
    results = tree.pop("results", 1)
    packages = tree.pop("packages", None)
    if weights:
        tree["encoder"]["weights"] = f"{WEIGHTS_ABSENT}{weights}"
    filled: dict[str, Any] = json.loads(identity(build(tree), data_fingerprint or own_fingerprint))
    # ``identity`` writes today's version, which is not that of the run.
    filled["results"] = results
    # Nor is today's version of a package.
    if packages is not None:
        filled["packages"] = packages
    return _line(filled)


def _line(tree: dict[str, Any]) -> str:
    """Return a tree as one line of JSON with sorted keys, so that equal trees are equal text."""
    return json.dumps(tree, sort_keys=True, ensure_ascii=False)
