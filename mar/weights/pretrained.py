"""Weights in: read what others saved, say what fits, and load it, with nothing silently missing.

Files are opened so that nothing in them can run: safetensors, or ``torch.load(weights_only=True)``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mar.config.overrides import SETTING_PATHS, SettingError, build, flatten, merge
from mar.config.schema import ENCODER_SIZES, TrainingConfig
from mar.errors import UserError
from mar.model.mar import MAR
from mar.safe_text import printable
from mar.weights.hub import fetch, weight_files
from mar.weights.safe_loading import read_mapping, read_tensors
from mar.weights.state_dict_mapping import NOT_KNOWN, OURS, Layout, Translated, translate

EVERYTHING = ("encoder.", "decoder.", "classifier.")
"""The parts of a model, for :func:`load`."""
_BLOCK = re.compile(r"(^|\.)(blocks|layer|layers|decoder_layers)\.\d+\.")
_STATED = ("encoder.tubelet", "encoder.heads", "classifier.heads", "reconstruction.heads")
"""What shapes do not tell, and what must agree where the file states it."""
_KNOWN_CLASSIFIER_HEADS = {512: 4}
_KNOWN_DECODER_HEADS = {192: 3, 384: 6, 512: 8}
_BRANCH_OF = {
    "encoder.": "encoder.",
    "classifier.": "classifier.",
    "data.": "classifier.",
    "reconstruction.": "decoder.",
}
"""Branch of the settings -> the model's part that it describes."""
_SIZES = ("size", "width", "depth", "heads", "tubelet", "kind", "norm", "num_classes", "frames")
_MAX_NAMED = 3


@dataclass(frozen=True)
class Weights:
    """A checkpoint in our names, and the settings that follow from it."""

    source: str
    layout: str
    tensors: dict[str, Tensor]
    unused: dict[str, str]
    """Key in the file -> why the model has no use for it."""
    settings: dict[str, Any]
    """Dotted settings as the file tells them; ``…heads`` are missing where it does not."""
    stated: frozenset[str] = frozenset()
    """Of those, what a config beside the weights says, or the embedding's shape: not what known
    models have."""
    classes: tuple[str, ...] = ()
    """The classes' names by number; none where nobody told."""


@dataclass(frozen=True)
class Loaded:
    """What came of loading."""

    loaded: tuple[str, ...]
    initialised: tuple[str, ...]
    """Of the model, but not in the file."""
    left_over: dict[str, str]
    """In the file, but not of the model, and why."""

    def text(self, weights: Weights) -> str:
        """Return a line each for what was loaded, initialised and left over."""
        reasons = sorted({*self.left_over.values()})
        left = (
            f"{_grouped([key for key, why in self.left_over.items() if why == r])}: {r}"
            for r in reasons
        )
        lines = [
            f"weights    {weights.source} ({weights.layout})",
            f"loaded     {_counted(self.loaded, weights.tensors)}",
        ]
        lines += [f"at random  {_grouped(self.initialised)}"] if self.initialised else []
        return "\n".join([*lines, *(f"left over  {item}" for item in left)])


def read_weights(name: str, inflate_frames: int = 2) -> Weights:
    """Read a checkpoint of any known layout; ``name`` is what ``mar.sources.fetch`` takes.

    Raises:
        UserError: no such file, an unsafe or damaged file, or a layout that is not known.
    """
    path = fetch(name)
    tensors: dict[str, Tensor] = {}
    for file in weight_files(path):
        tensors |= read_tensors(file)
    translated = translate(tensors, inflate_frames)
    if translated is None:
        raise UserError(
            f"{name}: not a layout that mar knows (VideoMAE, MAR, Hugging Face VideoMAE, image "
            "ViT, mar's own); "
            f"its first keys: {_listed(list(tensors))}"
        )
    layout = translated.layout.name
    kept = translated.tensors
    unused = dict(translated.unused)
    config = _config_beside(path, translated.layout)
    if layout == "ViT":
        if "cls_token" in tensors or _is_flat(tensors):
            layout = "image ViT"
        else:
            layout = "VideoMAE, fine-tuned"
    if config.get("hidden_act", "gelu") != "gelu":
        raise UserError(
            f"{name}: its activation is {config['hidden_act']}; mar's blocks have GELU, and no "
            "other"
        )
    reads_first = (
        "classifier.head.weight" in kept
        and "encoder.norm.weight" in kept
        and translated.layout is not OURS
    )
    if reads_first and "classifier.project.weight" not in kept:
        heads = [key for key in kept if key.startswith("classifier.")]
        unused |= dict.fromkeys(heads, "its classifier reads the first token, and ours the average")
        kept = {key: value for key, value in kept.items() if key not in heads}
    settings, stated = _settings_of(translated, kept, config)
    return Weights(name, layout, kept, unused, settings, stated, _classes_beside(path, kept))


def model_settings(weights: Weights, overrides: Mapping[str, Any] | None = None) -> TrainingConfig:
    """Return settings whose model has the sizes of the file.

    Raises:
        SettingError: the number of heads is neither in the file, nor that of a known model, nor
            given.
    """
    known = {**weights.settings, **flatten(overrides or {})}
    needs = [("encoder.heads", known.get("encoder.size") == "custom")]
    needs += [
        (
            "classifier.heads",
            "classifier.project.weight" in weights.tensors and _is_bridging(weights.tensors),
        )
    ]
    needs += [("reconstruction.heads", "decoder.project.weight" in weights.tensors)]
    for path, is_needed in needs:
        if is_needed and path not in known:
            raise SettingError(path, f"no file tells the number of heads: give it, as {path}=4")
    return build(merge({}, known))


def read_model(
    name: str, shared: Mapping[str, Any], overrides: Mapping[str, Any]
) -> tuple[TrainingConfig, MAR, tuple[str, ...]]:
    """Return a complete classifier, ready to test, and its settings.

    Settings come from the file, then ``shared``, then ``overrides``.

    Last its classes' names by number; none where the file has none.

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
    load(model, weights, settings, ("encoder.", "classifier."))
    return settings, model, weights.classes


def start(model: MAR, settings: TrainingConfig) -> str:
    """Load ``encoder.weights`` at the start of a training.

    The encoder, and the decoder if it is to be pre-trained.

    Returns the report, a line each for what was loaded, initialised and left over.

    Raises:
        UserError: the checkpoint does not fit; the first keys are named.
    """
    weights, parts = _to_start_from(model, settings)
    return load(model, weights, settings, parts, lends_norm=True).text(weights)


def check_start(settings: TrainingConfig) -> None:
    """Raise a UserError if :func:`start` would; nothing is computed."""
    with torch.device("meta"):
        model = MAR(settings)
    weights, parts = _to_start_from(model, settings)
    fitting(model, weights, settings, parts, lends_norm=True)


def _to_start_from(model: MAR, settings: TrainingConfig) -> tuple[Weights, tuple[str, ...]]:
    assert settings.encoder.weights
    weights = read_weights(settings.encoder.weights, settings.encoder.tubelet[0])
    has_decoder = model.decoder is not None and settings.reconstruction.init == "pretrained"
    if has_decoder and not any(name.startswith("decoder.") for name in weights.tensors):
        raise UserError(
            f"encoder.weights: {weights.source} has no decoder: set reconstruction.init: random"
        )
    return weights, ("encoder.", "decoder.") if has_decoder else ("encoder.",)


def load(
    model: MAR,
    weights: Weights,
    settings: TrainingConfig,
    parts: Sequence[str],
    lends_norm: bool = False,
) -> Loaded:
    """Load the parts of a model whose names begin so.

    Raises:
        UserError: see :func:`fitting`.
    """
    names = fitting(model, weights, settings, parts, lends_norm)
    ours = model.state_dict()
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
    """Return the tensors of those parts.

    Model and file must have the same ones, in the same shapes.

    With ``lends_norm``, one may be the file's or the model's alone: the encoder's last norm, which
    fine-tuned VideoMAE models do not have, and which a model with ``classifier.norm: pooled`` has
    elsewhere.

    Raises:
        UserError: tensors are missing, too many or of other shapes, or the file states other heads
            or tubelets; the first are named, and the settings that would fit.
    """
    ours = model.state_dict()
    of_parts = [name for name in {**ours, **weights.tensors} if name.startswith(tuple(parts))]
    both = [name for name in of_parts if not (lends_norm and name.startswith("encoder.norm."))]
    faults = {
        "missing": [name for name in both if name not in weights.tensors],
        "too many": [name for name in both if name not in ours]
        + [key for key, why in weights.unused.items() if why == NOT_KNOWN and _BLOCK.search(key)],
        "other shapes": [
            name
            for name in of_parts
            if name in ours
            and name in weights.tensors
            and weights.tensors[name].shape != ours[name].shape
        ],
        "other settings": [
            path
            for path in _STATED
            if path in weights.stated and _contradicts(path, weights, settings)
        ],
    }
    if any(faults.values()):
        problems = [f"{kind}: {_listed(names)}" for kind, names in faults.items() if names]
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


def _contradicts(path: str, weights: Weights, settings: TrainingConfig) -> bool:
    """Whether the file states another value than the settings have, for a part that both have."""
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
    return weights.settings[path] not in (None, here[path])


def _advice(weights: Weights, settings: TrainingConfig) -> str:
    here = flatten(settings.model_dump(mode="json"))
    sizes = {
        path: value for path, value in weights.settings.items() if path.split(".")[-1] in _SIZES
    }
    other = {
        path: value
        for path, value in sizes.items()
        if path.startswith(tuple(_BRANCH_OF)) and here[path] != value
    }
    if other:
        return f". The file has {', '.join(f'{key}={value}' for key, value in other.items())}"
    return ""


def _is_flat(tensors: Mapping[str, Tensor]) -> bool:
    return tensors["patch_embed.proj.weight"].ndim == 4


def _is_bridging(tensors: Mapping[str, Tensor]) -> bool:
    return "classifier.blocks.0.attn.qkv.weight" in tensors


def _depth(tensors: Mapping[str, Tensor], prefix: str) -> int:
    return len({name.split(".")[2] for name in tensors if name.startswith(f"{prefix}.blocks.")})


def _settings_of(
    translated: Translated, tensors: Mapping[str, Tensor], config: Mapping[str, Any]
) -> tuple[dict[str, Any], frozenset[str]]:
    """Return dotted settings, those saved beside the weights and the sizes of the tensors.

    And which are stated.
    """
    if translated.layout is OURS and config:
        known = flatten(config)
        if known.get("encoder.size") != "custom":
            known["encoder.heads"] = None
        return {path: value for path, value in known.items() if value is not None}, frozenset(known)
    if "encoder.embed.weight" not in tensors:
        return {}, frozenset()
    width = len(tensors["encoder.embed.weight"])
    depth = _depth(tensors, "encoder")
    sizes = {(each[0], each[1]): (name, each[2]) for name, each in ENCODER_SIZES.items()}
    heads: int | None = config.get("num_attention_heads")
    known: dict[str, Any] = {
        "encoder.size": "custom",
        "encoder.width": width,
        "encoder.depth": depth,
    }
    if (width, depth) in sizes and heads in (None, sizes[width, depth][1]):
        known = {"encoder.size": sizes[width, depth][0]}
    stated_settings = {"encoder.heads": heads if known["encoder.size"] == "custom" else None}
    stated_settings |= {"encoder.tubelet": list(translated.tubelet) if translated.tubelet else None}
    stated_settings |= {
        "clip.size": config.get("image_size"),
        "clip.frames": config.get("num_frames"),
    }
    stated_settings |= {"reconstruction.normalize_target": config.get("norm_pix_loss")}
    known |= _classifier_settings(tensors) | _decoder_settings(tensors)
    if "decoder.project.weight" in tensors:
        stated_settings["reconstruction.heads"] = config.get("decoder_num_attention_heads")
    stated = {path: value for path, value in stated_settings.items() if value is not None}
    return known | stated, frozenset(stated)


def _classifier_settings(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    if "classifier.head.weight" not in tensors:
        return {}
    known: dict[str, Any] = {"data.num_classes": len(tensors["classifier.head.weight"])}
    if _is_bridging(tensors):
        width = len(tensors["classifier.project.weight"])
        known |= {"classifier.kind": "bridging", "classifier.width": width}
        known |= {"classifier.depth": _depth(tensors, "classifier")}
        return known | (
            {"classifier.heads": heads} if (heads := _KNOWN_CLASSIFIER_HEADS.get(width)) else {}
        )
    if "classifier.project.weight" in tensors:
        return known | {
            "classifier.kind": "mlp",
            "classifier.width": len(tensors["classifier.project.weight"]),
        }
    pooled = "classifier.norm.weight" in tensors
    sees_all = (
        {"mask.ratio": 0.0, "reconstruction.weight": 0.0} if pooled else {}
    )  # as VideoMAE is fine-tuned
    return (
        known
        | {"classifier.kind": "linear", "classifier.norm": "pooled" if pooled else "tokens"}
        | sees_all
    )


def _decoder_settings(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    if "decoder.project.weight" not in tensors:
        return {}
    width = len(tensors["decoder.project.weight"])
    known = {"reconstruction.width": width, "reconstruction.depth": _depth(tensors, "decoder")}
    return known | (
        {"reconstruction.heads": heads} if (heads := _KNOWN_DECODER_HEADS.get(width)) else {}
    )


def _config_beside(path: Path, layout: Layout) -> dict[str, Any]:
    """Return Hugging Face's config, or our settings, where they are beside weights of that layout.

    Raises:
        UserError: they are there and cannot be read.
    """
    folder = path if path.is_dir() else path.parent
    if layout is OURS:
        settings = folder / "settings.yaml"
        if settings.is_file() and not (folder / "config.json").is_file():
            return read_mapping(settings)
        config = read_mapping(folder / "config.json")
        if config.get("model_type") == "mar":
            return config.get("settings", {})
        return {}
    if layout.name == "Hugging Face VideoMAE":
        config = read_mapping(folder / "config.json")
    else:
        config = {}
    return config if config.get("model_type") == "videomae" else {}


CLASSES = "classes.json"
"""File of a result: the classes' names by number."""


def _classes_beside(path: Path, tensors: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Return the class names that stand beside weights with a classifier, as many as it has scores.

    In ``classes.json`` of a result, or in ``id2label`` of a ``config.json``, whosever it is.

    Raises:
        UserError: a file is there and cannot be read.
    """
    if "classifier.head.weight" not in tensors:
        return ()
    folder = path if path.is_dir() else path.parent
    names_given: Any = read_mapping(folder / CLASSES).get("classes")
    if names_given is None:
        labels: Any = read_mapping(folder / "config.json").get("id2label")
        if isinstance(labels, dict):
            names_given = [labels.get(str(number)) for number in range(len(labels))]
        else:
            names_given = []
    if isinstance(names_given, list):
        names = tuple(str(name) for name in names_given)
    else:
        names = ()
    if len(names) == len(tensors["classifier.head.weight"]):
        return names
    return ()


def _listed(names: Sequence[str]) -> str:
    """Return the first names and how many more there are."""
    more = len(names) - _MAX_NAMED
    return ", ".join(names[:_MAX_NAMED]) + (f" and {more} more" if more > 0 else "")


def _grouped(names: Sequence[str]) -> str:
    """Return the names, those of a part together where they are many."""
    parts: dict[str, list[str]] = {}
    for name in names:
        parts.setdefault(name.split(".")[0], []).append(name)
    return ", ".join(
        f"{part}.… ({len(own)} tensors)" if len(own) > _MAX_NAMED else ", ".join(own)
        for part, own in parts.items()
    )


def _counted(names: Sequence[str], tensors: Mapping[str, Tensor]) -> str:
    """Return how many tensors and values of each part."""
    parts: list[str] = []
    for part in sorted(
        {name.split(".")[0] for name in names}, key=["encoder", "decoder", "classifier"].index
    ):
        own = [tensors[name] for name in names if name.startswith(f"{part}.")]
        values_m = sum(prod(tensor.shape) for tensor in own) / 1e6
        parts.append(f"{part}: {len(own)} tensors, {values_m:.2f} M values")
    return "; ".join(parts)


def contents(weights: Weights) -> str:
    """Return what a checkpoint contains, one item a line.

    Its layout, parts, the settings that follow from it, and unused tensors.
    """
    by_reason: dict[str, list[str]] = {}
    for key, why in weights.unused.items():
        by_reason.setdefault(why, []).append(key)
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
    in_order = sorted(sizes.items(), key=lambda each: SETTING_PATHS.index(each[0]))
    listed = ", ".join(
        f"{path}={value}" for path, value in in_order if path.split(".")[-1] in _SIZES and value
    )
    lines = [
        f"weights    {weights.source} ({weights.layout})",
        f"has        {_counted(list(weights.tensors), weights.tensors)}",
    ]
    lines += [
        f"settings   {listed}",
        *(f"not used   {_grouped(keys)}: {why}" for why, keys in by_reason.items()),
    ]
    return printable("\n".join(lines))
