"""Weights in: read what others saved, say what fits, and load it, with nothing silently missing.

Files are opened so that nothing in them can run: safetensors, or ``torch.load(weights_only=True)``.
"""

from __future__ import annotations

import argparse
import json
import pickle
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mar.config import ENCODER_SIZES, ExperimentConfig
from mar.errors import UserError
from mar.layouts import OURS, Translated, translate
from mar.model import MAR
from mar.settings import SettingError, build, flatten, merge
from mar.sources import fetch, weight_files

EVERYTHING = ("encoder.", "decoder.", "classifier.")
"""The parts of a model, for :func:`load`."""
_WRAPPERS = ("model_state", "model", "module", "state_dict", "model_state_dict")
"""Under one of these names a checkpoint holds its tensors: MAR, VideoMAE, deepspeed, Lightning."""
_PREFIXES = ("module.", "_orig_mod.")
"""What DistributedDataParallel and torch.compile put before every name."""
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
        left = (f"{_grouped([key for key, why in self.left_over.items() if why == r])}: {r}" for r in reasons)
        lines = [
            f"weights    {weights.source} ({weights.layout})",
            f"loaded     {_counted(self.loaded, weights.tensors)}",
        ]
        lines += [f"at random  {_grouped(self.initialised)}"] if self.initialised else []
        return "\n".join([*lines, *(f"left over  {words}" for words in left)])


def read_weights(name: str, inflate_frames: int = 2) -> Weights:
    """Read a checkpoint of any known layout; ``name`` is what ``mar.sources.fetch`` takes.

    Raises:
        UserError: no such file, an unsafe or damaged file, or a layout that is not known.
    """
    path = fetch(name)
    tensors: dict[str, Tensor] = {}
    for file in weight_files(path):
        tensors |= _without_prefix(_open(file))
    folder = path if path.is_dir() else path.parent
    translated = translate(tensors, inflate_frames)
    if translated is None:
        raise UserError(
            f"{name}: not a layout that mar knows (VideoMAE, MAR, Hugging Face VideoMAE, image ViT, mar's own); "
            f"its first keys: {_listed(list(tensors))}"
        )
    layout = translated.layout.name
    if layout == "ViT":
        layout = "image ViT" if "cls_token" in tensors or _is_flat(tensors) else "VideoMAE, fine-tuned"
    kept, unused = translated.tensors, dict(translated.unused)
    if "cls_token" in tensors:
        heads = [key for key in kept if key.startswith("classifier.")]
        unused |= dict.fromkeys(heads, "an image classifier")
        kept = {key: value for key, value in kept.items() if key not in heads}
    return Weights(name, layout, kept, unused, _settings_of(translated, kept, folder))


def model_settings(weights: Weights, overrides: Mapping[str, Any] | None = None) -> ExperimentConfig:
    """Return settings whose model has the sizes of the file.

    Raises:
        SettingError: the number of heads is neither in the file, nor that of a known model, nor given.
    """
    known = {**weights.settings, **flatten(overrides or {})}
    needs = [("encoder.heads", known.get("encoder.size") == "custom")]
    needs += [("classifier.heads", "classifier.project.weight" in weights.tensors and _is_bridging(weights.tensors))]
    needs += [("reconstruction.heads", "decoder.project.weight" in weights.tensors)]
    for path, is_needed in needs:
        if is_needed and path not in known:
            raise SettingError(path, f"no file tells the number of heads: give it, as {path}=4")
    return build(merge({}, known))


def start(model: MAR, settings: ExperimentConfig) -> str:
    """Load ``encoder.weights`` as training starts: the encoder, and the decoder if it is to be pre-trained.

    Returns the report, a line each for what was loaded, initialised and left over.

    Raises:
        UserError: the checkpoint does not fit; the first keys are named.
    """
    assert settings.encoder.weights
    weights = read_weights(settings.encoder.weights, settings.encoder.tubelet[0])
    has_decoder = model.decoder is not None and settings.reconstruction.init == "pretrained"
    if has_decoder and not any(name.startswith("decoder.") for name in weights.tensors):
        raise UserError(f"encoder.weights: {weights.source} has no decoder: set reconstruction.init: random")
    parts = ("encoder.", "decoder.") if has_decoder else ("encoder.",)
    return load(model, weights, settings, parts).text(weights)


def load(model: MAR, weights: Weights, settings: ExperimentConfig, parts: Sequence[str]) -> Loaded:
    """Load the parts of a model whose names begin so.

    Raises:
        UserError: see :func:`fitting`.
    """
    names, ours = fitting(model, weights, settings, parts), model.state_dict()
    model.load_state_dict({name: weights.tensors[name] for name in names}, strict=False)
    left_over = {name: "not asked for" if name in ours else "not of this model" for name in weights.tensors}
    left_over = {name: why for name, why in left_over.items() if name not in names}
    return Loaded(names, tuple(name for name in ours if name not in names), weights.unused | left_over)


def fitting(model: MAR, weights: Weights, settings: ExperimentConfig, parts: Sequence[str]) -> tuple[str, ...]:
    """Return the tensors of those parts; every one must be in the file and fit.

    One may be missing: the encoder's last norm, which fine-tuned VideoMAE models do not have.

    Raises:
        UserError: tensors are missing or of other shapes; the first are named, and the settings that would fit.
    """
    ours = model.state_dict()
    wanted = [name for name in ours if name.startswith(tuple(parts))]
    there = [name for name in wanted if name in weights.tensors]
    missing = [name for name in wanted if name not in weights.tensors and not name.startswith("encoder.norm.")]
    misfits = [name for name in there if weights.tensors[name].shape != ours[name].shape]
    if missing or misfits:
        words = [f"missing: {_listed(missing)}"] if missing else []
        if misfits:
            shapes = weights.tensors[misfits[0]].shape, ours[misfits[0]].shape
            theirs, own = (" × ".join(str(length) for length in shape) for shape in shapes)
            words.append(f"other shapes: {_listed(misfits)} (the first is {theirs} in the file, {own} in the model)")
        advice = _advice(weights, settings)
        raise UserError(f"{weights.source} ({weights.layout}) does not fit. {'; '.join(words)}{advice}")
    return tuple(there)


def _advice(weights: Weights, settings: ExperimentConfig) -> str:
    here = flatten(settings.model_dump(mode="json"))
    sizes = {path: value for path, value in weights.settings.items() if path.split(".")[1] in _SIZES}
    other = {path: value for path, value in sizes.items() if here[path] != value and path.startswith(tuple(_BRANCH_OF))}
    return f". The file has {', '.join(f'{key}={value}' for key, value in other.items())}" if other else ""


def _open(file: Path) -> dict[str, Tensor]:
    """Return the tensors of one file."""
    if file.suffix == ".safetensors":
        try:
            return load_file(file)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file}: not a whole safetensors file: {error}") from None
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # VideoMAE keeps its arguments; plain data
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        named = re.search(r"GLOBAL (\S+)|(?i:unsupported class|unrecognized|can only) .*", str(error))
        if not named:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise UserError(f"{file}: not a whole PyTorch checkpoint: {reason}") from None
        reason = f"it would call {named.group(1)}" if named.group(1) else named.group()
        raise UserError(
            f"{file}: refused, because opening it could run code: {reason}. If you trust where it comes from, open it "
            "apart from here and save its tensors alone, as safetensors"
        ) from None
    return _tensors(content, file)


def _tensors(content: Any, file: Path) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint, out of their wrapping."""
    if isinstance(content, Mapping):
        wrapped = next((content[key] for key in _WRAPPERS if isinstance(content.get(key), Mapping)), content)
        found = {str(key): value for key, value in wrapped.items() if isinstance(value, Tensor)}
        if found:
            return found
    raise UserError(f"{file}: no tensors in it, by name or under {', '.join(_WRAPPERS)}")


def _without_prefix(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    for prefix in _PREFIXES:
        if all(key.startswith(prefix) for key in tensors):
            tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
    return tensors


def _is_flat(tensors: Mapping[str, Tensor]) -> bool:
    return tensors["patch_embed.proj.weight"].ndim == 4


def _is_bridging(tensors: Mapping[str, Tensor]) -> bool:
    return "classifier.blocks.0.attn.qkv.weight" in tensors


def _depth(tensors: Mapping[str, Tensor], prefix: str) -> int:
    return len({name.split(".")[2] for name in tensors if name.startswith(f"{prefix}.blocks.")})


def _settings_of(translated: Translated, tensors: Mapping[str, Tensor], folder: Path) -> dict[str, Any]:
    """Return dotted settings: those saved beside the weights, and the sizes of the tensors."""
    config = _config_beside(folder)
    if translated.layout is OURS and config:
        return flatten(config)
    width, depth = len(tensors["encoder.embed.weight"]), _depth(tensors, "encoder")
    sizes = {(each[0], each[1]): (name, each[2]) for name, each in ENCODER_SIZES.items()}
    heads: int | None = config.get("num_attention_heads")
    known: dict[str, Any] = {"encoder.size": "custom", "encoder.width": width, "encoder.depth": depth}
    known |= {"encoder.heads": heads} if heads else {}
    if (width, depth) in sizes and heads in (None, sizes[width, depth][1]):
        known = {"encoder.size": sizes[width, depth][0]}
    if translated.tubelet:
        known["encoder.tubelet"] = list(translated.tubelet)
    if "image_size" in config and "num_frames" in config:
        known |= {"clip.size": config["image_size"], "clip.frames": config["num_frames"]}
    known |= _classifier_settings(tensors) | _decoder_settings(tensors, config.get("decoder_num_attention_heads"))
    known |= {"reconstruction.normalize_target": config["norm_pix_loss"]} if "norm_pix_loss" in config else {}
    return known


def _classifier_settings(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    if "classifier.head.weight" not in tensors:
        return {}
    known: dict[str, Any] = {"data.num_classes": len(tensors["classifier.head.weight"])}
    if _is_bridging(tensors):
        width = len(tensors["classifier.project.weight"])
        known |= {"classifier.kind": "bridging", "classifier.width": width}
        known |= {"classifier.depth": _depth(tensors, "classifier")}
        return known | ({"classifier.heads": heads} if (heads := _KNOWN_CLASSIFIER_HEADS.get(width)) else {})
    if "classifier.project.weight" in tensors:
        return known | {"classifier.kind": "mlp", "classifier.width": len(tensors["classifier.project.weight"])}
    pooled = "classifier.norm.weight" in tensors
    sees_all = {"mask.ratio": 0.0, "reconstruction.weight": 0.0} if pooled else {}  # as VideoMAE is fine-tuned
    return known | {"classifier.kind": "linear", "classifier.norm": "pooled" if pooled else "tokens"} | sees_all


def _decoder_settings(tensors: Mapping[str, Tensor], heads: int | None) -> dict[str, Any]:
    if "decoder.project.weight" not in tensors:
        return {}
    width = len(tensors["decoder.project.weight"])
    known = {"reconstruction.width": width, "reconstruction.depth": _depth(tensors, "decoder")}
    heads = heads or _KNOWN_DECODER_HEADS.get(width)
    return known | ({"reconstruction.heads": heads} if heads else {})


def _config_beside(folder: Path) -> dict[str, Any]:
    """Return Hugging Face's config, or our settings, where there are any beside the weights."""
    config, settings = folder / "config.json", folder / "settings.yaml"
    if config.is_file():
        content: dict[str, Any] = json.loads(config.read_text(encoding="utf-8"))
        return content.get("settings", content)
    if settings.is_file():
        return yaml.safe_load(settings.read_text(encoding="utf-8"))
    return {}


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
        f"{part}.… ({len(own)} tensors)" if len(own) > _MAX_NAMED else ", ".join(own) for part, own in parts.items()
    )


def _counted(names: Sequence[str], tensors: Mapping[str, Tensor]) -> str:
    """Return how many tensors and values of each part."""
    words: list[str] = []
    for part in sorted({name.split(".")[0] for name in names}, key=["encoder", "decoder", "classifier"].index):
        own = [tensors[name] for name in names if name.startswith(f"{part}.")]
        values_m = sum(prod(tensor.shape) for tensor in own) / 1e6
        words.append(f"{part}: {len(own)} tensors, {values_m:.2f} M values")
    return "; ".join(words)


def contents(weights: Weights) -> str:
    """Return what a checkpoint has, a line each: layout, parts, settings that follow from it, what is of no use."""
    by_reason: dict[str, list[str]] = {}
    for key, why in weights.unused.items():
        by_reason.setdefault(why, []).append(key)
    branches = [branch for branch, part in _BRANCH_OF.items() if any(name.startswith(part) for name in weights.tensors)]
    sizes = {path: value for path, value in weights.settings.items() if path.startswith((*branches, "clip."))}
    told = ", ".join(f"{path}={value}" for path, value in sizes.items() if path.split(".")[1] in _SIZES and value)
    lines = [
        f"weights    {weights.source} ({weights.layout})",
        f"has        {_counted(list(weights.tensors), weights.tensors)}",
    ]
    return "\n".join(
        [*lines, f"settings   {told}", *(f"not used   {_grouped(keys)}: {why}" for why, keys in by_reason.items())]
    )
