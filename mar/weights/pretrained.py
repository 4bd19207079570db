"""Loads pre-trained weights into a model, and checks first that every tensor fits.

``mar.weights.reading`` reads the files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from mar.config.overrides import SETTING_PATHS, SettingError, build, flatten, merge
from mar.config.schema import TrainingConfig
from mar.errors import UserError
from mar.model.mar import MAR
from mar.safe_text import printable
from mar.weights.checkpoint_settings import (
    BLOCK_PATTERN,
    SIZES,
    STATED_SETTINGS,
    is_bridging,
    stated_heads,
)
from mar.weights.layouts import NOT_KNOWN
from mar.weights.reading import MAX_NAMED, Weights, listed, read_weights

EVERYTHING = ("encoder.", "decoder.", "classifier.")
"""The parts of a model, for :func:`load`."""
_BRANCH_OF = {
    "encoder.": "encoder.",
    "classifier.": "classifier.",
    "data.": "classifier.",
    "reconstruction.": "decoder.",
}
"""Branch of the settings -> the model's part that it describes."""


@dataclass(frozen=True)
class Loaded:
    """The tensors that were loaded, and those that were not."""

    loaded: tuple[str, ...]
    initialised: tuple[str, ...]
    """In the model, but not in the file: they keep their random values."""
    left_over: dict[str, str]
    """Key in the file that was not loaded -> why."""

    def text(self, weights: Weights) -> str:
        """Return a line each for what was loaded, initialised and left over."""
        # One line for each reason: a file can have hundreds of keys that are left over.
        reasons = sorted({*self.left_over.values()})
        left = (
            f"{_grouped([key for key, why in self.left_over.items() if why == r])}: {r}"
            for r in reasons
        )
        lines = [
            f"weights    {weights.source} ({weights.layout})",
            f"loaded     {_counted(self.loaded, weights.tensors)}",
        ]
        if self.initialised:
            lines.append(f"at random  {_grouped(self.initialised)}")
        return "\n".join([*lines, *(f"left over  {item}" for item in left)])


def model_settings(weights: Weights, overrides: Mapping[str, Any] | None = None) -> TrainingConfig:
    """Return settings whose model has the sizes of the file.

    Raises:
        SettingError: the number of heads is neither in the file, nor that of a known model, nor
            given.
    """
    # The user's values replace those of the file: a file may state none, or wrong ones.
    known = {**weights.settings, **flatten(overrides or {})}
    # Attention's matrices have the same shape for any number of heads, so a wrong number would
    # load without an error. A named encoder size fixes its heads; all others must be known.
    has_bridging = "classifier.project.weight" in weights.tensors and is_bridging(weights.tensors)
    needs = [
        ("encoder.heads", known.get("encoder.size") == "custom"),
        ("classifier.heads", has_bridging),
        ("reconstruction.heads", "decoder.project.weight" in weights.tensors),
    ]
    for path, is_needed in needs:
        if is_needed and path not in known:
            raise SettingError(path, f"no file states the number of heads: give it, as {path}=4")
    return build(merge({}, known))


def read_model(
    name: str, shared: Mapping[str, Any], overrides: Mapping[str, Any]
) -> tuple[TrainingConfig, MAR, tuple[str, ...]]:
    """Return a complete classifier, ready to test, and its settings.

    Settings come from the file, then ``shared``, then ``overrides``; a later one replaces an
    earlier one.

    Returns:
        The settings, the model, and its classes' names by number (empty where the file has none).

    Raises:
        UserError: the file has no classifier, or does not fit; or its number of heads must be
            given.
    """
    weights = read_weights(name)
    if "classifier.head.weight" not in weights.tensors:
        raise UserError(
            f"{name} ({weights.layout}) has no classifier: it was pre-trained only; fine-tune it "
            "first"
        )
    settings = model_settings(weights, {**flatten(shared), **flatten(overrides)})
    model = MAR(settings).eval()
    # The decoder is not used in a test: it keeps random weights.
    load(model, weights, settings, ("encoder.", "classifier."))
    return settings, model, weights.classes


def start(model: MAR, settings: TrainingConfig) -> str:
    """Load ``encoder.weights`` at the start of a training.

    Loads the encoder, and the decoder under ``reconstruction.init: pretrained``.

    Returns:
        The report: a line each for what was loaded, initialised and left over.

    Raises:
        UserError: the checkpoint does not fit; the first keys are named.
    """
    weights, parts = _to_start_from(model, settings)
    return load(model, weights, settings, parts, lends_norm=True).text(weights)


def check_start(settings: TrainingConfig) -> None:
    """Raise a UserError if :func:`start` would; nothing is computed."""
    # On the meta device a model has names and shapes alone: a launch checks ViT-H in no memory.
    with torch.device("meta"):
        model = MAR(settings)
    weights, parts = _to_start_from(model, settings)
    fitting(model, weights, settings, parts, lends_norm=True)


def _to_start_from(model: MAR, settings: TrainingConfig) -> tuple[Weights, tuple[str, ...]]:
    """Return the weights that a training starts from, and the parts of the model to load.

    Raises:
        UserError: the checkpoint cannot be read, or lacks the decoder that the settings ask for.
    """
    assert settings.encoder.weights
    # A 2D patch embedding of an image model is inflated to the tubelet's frames.
    weights = read_weights(settings.encoder.weights, settings.encoder.tubelet[0])
    has_decoder = model.decoder is not None and settings.reconstruction.init == "pretrained"
    if has_decoder and not any(name.startswith("decoder.") for name in weights.tensors):
        raise UserError(
            f"encoder.weights: {weights.source} has no decoder: set reconstruction.init: random"
        )
    if has_decoder:
        return weights, ("encoder.", "decoder.")
    return weights, ("encoder.",)


def load(
    model: MAR,
    weights: Weights,
    settings: TrainingConfig,
    parts: Sequence[str],
    lends_norm: bool = False,
) -> Loaded:
    """Load those parts of a model whose names begin with one of ``parts``.

    Raises:
        UserError: see :func:`fitting`.
    """
    names = fitting(model, weights, settings, parts, lends_norm)
    ours = model.state_dict()
    # Not strict, because other parts stay as they are; ``fitting`` has compared these parts.
    model.load_state_dict({name: weights.tensors[name] for name in names}, strict=False)
    left_over = {
        name: "not asked for" if name in ours else "not of this model" for name in weights.tensors
    }
    left_over = {name: why for name, why in left_over.items() if name not in names}
    return Loaded(
        names, tuple(name for name in ours if name not in names), weights.unused | left_over
    )


def fitting(
    model: MAR,
    weights: Weights,
    settings: TrainingConfig,
    parts: Sequence[str],
    lends_norm: bool = False,
) -> tuple[str, ...]:
    """Return the names of the tensors to load for those parts.

    Model and file must have the same tensors, in the same shapes. With ``lends_norm``, the
    encoder's last norm may be in only one of the two: fine-tuned VideoMAE models do not have it,
    and a model with ``classifier.norm: pooled`` has its norm in the classifier.

    Raises:
        UserError: tensors are missing, too many or of other shapes, or the file states other heads
            or tubelets; the first are named, and the settings that would fit.
    """
    ours = model.state_dict()
    of_parts = [name for name in {**ours, **weights.tensors} if name.startswith(tuple(parts))]
    both = [name for name in of_parts if not (lends_norm and name.startswith("encoder.norm."))]
    faults = _faults(ours, of_parts, both, weights, settings)
    if any(faults.values()):
        problems = [f"{kind}: {listed(names)}" for kind, names in faults.items() if names]
        # Two lengths show whether the width, the tubelet or the number of classes differs.
        if faults["other shapes"]:
            name = faults["other shapes"][0]
            shapes = weights.tensors[name].shape, ours[name].shape
            theirs, own = (" × ".join(str(length) for length in shape) for shape in shapes)
            problems.append(f"{name} is {theirs} in the file, {own} in the model")
        advice = _advice(weights, settings)
        raise UserError(
            f"{weights.source} ({weights.layout}) does not fit. {'; '.join(problems)}{advice}"
        )
    return tuple(name for name in of_parts if name in ours and name in weights.tensors)


def _faults(
    ours: Mapping[str, Tensor],
    of_parts: Sequence[str],
    both: Sequence[str],
    weights: Weights,
    settings: TrainingConfig,
) -> dict[str, list[str]]:
    """Return what does not fit, by kind: names of tensors, and at last paths of settings.

    ``of_parts`` are the names in the model or the file; those of ``both`` must be in both.
    """
    # All kinds are collected: together they show better than one alone what differs.
    return {
        "missing": [name for name in both if name not in weights.tensors],
        # Also unknown keys inside a block (a layer scale, a norm of the queries): without them the
        # block would compute something else.
        "too many": [name for name in both if name not in ours]
        + [
            key
            for key, why in weights.unused.items()
            if why == NOT_KNOWN and BLOCK_PATTERN.search(key)
        ],
        "other shapes": [
            name
            for name in of_parts
            if name in ours
            and name in weights.tensors
            and weights.tensors[name].shape != ours[name].shape
        ],
        "other settings": [
            path
            for path in STATED_SETTINGS
            if path in weights.stated and _contradicts(path, weights, settings)
        ]
        + _other_positions(weights, settings),
    }


def _other_positions(weights: Weights, settings: TrainingConfig) -> list[str]:
    """Return the path of the setting of positions if the file's encoder has others."""
    in_file = str(weights.settings.get("encoder.positions", "computed"))
    # Both are sin-cos tables: resizing one is the user's choice.
    added = ("computed", "interpolated")
    here = settings.encoder.positions
    fits = in_file == here or (in_file in added and here in added)
    has_encoder = any(name.startswith("encoder.") for name in weights.tensors)
    if fits or not has_encoder or settings.encoder.is_of_package:
        return []
    return ["encoder.positions"]


def _contradicts(path: str, weights: Weights, settings: TrainingConfig) -> bool:
    """Whether the file states another value than the settings have, for a part that both have."""
    # A linear classifier and an MLP have no heads: only blocks do.
    part = {
        "encoder": "encoder.",
        "classifier": "classifier.blocks.",
        "reconstruction": "decoder.",
    }[path.split(".")[0]]
    if not any(name.startswith(part) for name in weights.tensors):
        return False
    here: dict[str, Any] = {
        "encoder.tubelet": list(settings.encoder.tubelet),
        "encoder.heads": settings.encoder.dimensions[2],
        "classifier.heads": settings.classifier.heads,
        "reconstruction.heads": settings.reconstruction.heads,
    }
    in_file = weights.settings.get(path)
    if path == "encoder.heads":
        in_file = stated_heads(weights.settings)
    return in_file not in (None, here[path])


def _advice(weights: Weights, settings: TrainingConfig) -> str:
    """Return the sentence that names the file's sizes that the settings do not have, or nothing."""
    here = flatten(settings.model_dump(mode="json"))
    # Only sizes decide whether tensors fit: a rate of dropout would be no help.
    sizes = {
        path: value for path, value in weights.settings.items() if path.split(".")[-1] in SIZES
    }
    # The usual values, which no file says.
    sizes = {"encoder.positions": "computed", "encoder.mlp_ratio": 4.0} | sizes
    other = {
        path: value
        for path, value in sizes.items()
        if path.startswith(tuple(_BRANCH_OF)) and here.get(path) != value
    }
    if other:
        return f". The file has {', '.join(f'{key}={value}' for key, value in other.items())}"
    return ""


def _grouped(names: Sequence[str]) -> str:
    """Return the names; where a part has many, the part and their number instead."""
    parts: dict[str, list[str]] = {}
    for name in names:
        parts.setdefault(name.split(".")[0], []).append(name)
    return ", ".join(
        f"{part}.… ({len(own)} tensors)" if len(own) > MAX_NAMED else ", ".join(own)
        for part, own in parts.items()
    )


def _counted(names: Sequence[str], tensors: Mapping[str, Tensor]) -> str:
    """Return the number of tensors and values of each part."""
    parts: list[str] = []
    for part in sorted(
        {name.split(".")[0] for name in names}, key=["encoder", "decoder", "classifier"].index
    ):
        own = [tensors[name] for name in names if name.startswith(f"{part}.")]
        values_m = sum(prod(tensor.shape) for tensor in own) / 1e6
        parts.append(f"{part}: {len(own)} tensors, {values_m:.2f} M values")
    return "; ".join(parts)


def _position_of(path: str) -> int:
    """Return the position of a setting in the schema; options of a package have their branch's."""
    branch, _, rest = path.partition(".")
    if rest.startswith("options."):
        path = f"{branch}.options"
    return SETTING_PATHS.index(path)


def contents(weights: Weights) -> str:
    """Return a description of a checkpoint, one item a line.

    The items are its layout, its parts, the settings that follow from it, and unused tensors.
    """
    by_reason: dict[str, list[str]] = {}
    for key, why in weights.unused.items():
        by_reason.setdefault(why, []).append(key)
    # A file has settings of all branches; those of a part that it lacks describe nothing.
    branches = [
        branch
        for branch, part in _BRANCH_OF.items()
        if any(name.startswith(part) for name in weights.tensors)
    ]
    sizes = {
        path: value
        for path, value in weights.settings.items()
        if path.startswith((*branches, "clip."))
    }
    # The order of the schema puts the settings of a branch together.
    in_order = sorted(sizes.items(), key=lambda each: _position_of(each[0]))
    sizes_text = ", ".join(
        f"{path}={value}" for path, value in in_order if path.split(".")[-1] in SIZES and value
    )
    lines = [
        f"weights    {weights.source} ({weights.layout})",
        f"has        {_counted(list(weights.tensors), weights.tensors)}",
    ]
    lines += [
        f"settings   {sizes_text}",
        *(f"not used   {_grouped(keys)}: {why}" for why, keys in by_reason.items()),
    ]
    # Keys and names come from a stranger's file: control characters could rewrite the terminal.
    return printable("\n".join(lines))
