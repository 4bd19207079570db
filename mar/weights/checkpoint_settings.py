"""Derives settings from a checkpoint: from its tensors' shapes and the files beside it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from mar import MANIFEST
from mar.config.model_settings import ENCODER_SIZES
from mar.config.overrides import flatten
from mar.weights.layouts import OURS, Layout
from mar.weights.safe_loading import read_mapping
from mar.weights.state_dict_mapping import Translated

BLOCK_PATTERN = re.compile(r"(^|\.)(blocks|layer|layers|decoder_layers)\.\d+\.")


STATED_SETTINGS = ("encoder.tubelet", "encoder.heads", "classifier.heads", "reconstruction.heads")
"""Settings that shapes do not determine; where the file states them, ours must agree."""


# Width -> heads of published models. Shapes do not determine the heads, and few files state them:
# for another width the user must give them.
_KNOWN_CLASSIFIER_HEADS = {512: 4}


_KNOWN_DECODER_HEADS = {192: 3, 384: 6, 512: 8}


SIZES = (
    "size", "width", "depth", "heads", "tubelet", "mlp_ratio", "positions", "kind", "norm",
    "num_classes", "frames",
)  # fmt: skip
"""Last parts of the settings that a message lists: those that shape a model."""


def stated_heads(settings: Mapping[str, Any]) -> int | None:
    """Return the encoder's heads, of a named size too; None where no file states them."""
    size = settings.get("encoder.size")
    if size in ENCODER_SIZES:
        return ENCODER_SIZES[size][2]
    return settings.get("encoder.heads")


def is_flat(tensors: Mapping[str, Tensor]) -> bool:
    """Whether the patch embedding is of images: it has no time axis."""
    return tensors["patch_embed.proj.weight"].ndim == 4


def is_bridging(tensors: Mapping[str, Tensor]) -> bool:
    """Whether the classifier is a bridging one: it has transformer blocks."""
    return "classifier.blocks.0.attn.qkv.weight" in tensors


def _depth(tensors: Mapping[str, Tensor], prefix: str) -> int:
    """Return the number of blocks of a part."""
    # "encoder.blocks.11.norm1.weight": the third component is the block's number.
    return len({name.split(".")[2] for name in tensors if name.startswith(f"{prefix}.blocks.")})


def settings_of(
    translated: Translated, tensors: Mapping[str, Tensor], config: Mapping[str, Any]
) -> tuple[dict[str, Any], frozenset[str]]:
    """Return the dotted settings of a checkpoint, and the paths of those that it states.

    They come from the settings saved beside the weights, or from the sizes of the tensors.
    """
    # Our own format has all settings beside the weights: nothing needs to be derived.
    if translated.layout is OURS and config:
        known = {path: value for path, value in flatten(config).items() if value is not None}
        # A named size has no width, depth and heads among its settings, but it states its heads.
        return known, frozenset(known) | {"encoder.heads"}
    # Without an encoder there is no width to derive from.
    if "encoder.embed.weight" not in tensors:
        return {}, frozenset()
    width = len(tensors["encoder.embed.weight"])
    depth = _depth(tensors, "encoder")
    sizes = {(each[0], each[1]): (name, each[2]) for name, each in ENCODER_SIZES.items()}
    heads: int | None = config.get("num_attention_heads")
    # Many models have this width and depth: a named size fits if the heads agree or are not stated.
    known: dict[str, Any] = {
        "encoder.size": "custom",
        "encoder.width": width,
        "encoder.depth": depth,
    }
    if (width, depth) in sizes and heads in (None, sizes[width, depth][1]):
        known = {"encoder.size": sizes[width, depth][0]}
    stated_settings: dict[str, Any] = {
        "encoder.heads": heads if known["encoder.size"] == "custom" else None
    }
    stated_settings |= {"encoder.tubelet": list(translated.tubelet) if translated.tubelet else None}
    # Hugging Face's names, VideoMAE's and V-JEPA's; where there is no such config these are None,
    # and are dropped below.
    stated_settings |= {
        "clip.size": config.get("image_size", config.get("crop_size")),
        "clip.frames": config.get("num_frames", config.get("frames_per_clip")),
    }
    hidden = tensors.get("encoder.blocks.0.mlp.fc1.weight")
    if hidden is not None and len(hidden) != 4 * width:
        known["encoder.mlp_ratio"] = len(hidden) / width
    if translated.layout.positions != "computed":
        stated_settings["encoder.positions"] = translated.layout.positions
    stated_settings |= {"reconstruction.normalize_target": config.get("norm_pix_loss")}
    known |= _classifier_settings(tensors) | _decoder_settings(tensors)
    if "decoder.project.weight" in tensors:
        stated_settings["reconstruction.heads"] = config.get("decoder_num_attention_heads")
    stated = {path: value for path, value in stated_settings.items() if value is not None}
    if heads is None:
        return known | stated, frozenset(stated)
    return known | stated, frozenset(stated) | {"encoder.heads"}


def _classifier_settings(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the settings of the classifier that these tensors make."""
    if "classifier.head.weight" not in tensors:
        return {}
    known: dict[str, Any] = {"data.num_classes": len(tensors["classifier.head.weight"])}
    if is_bridging(tensors):
        width = len(tensors["classifier.project.weight"])
        known |= {"classifier.kind": "bridging", "classifier.width": width}
        known |= {"classifier.depth": _depth(tensors, "classifier")}
        if width in _KNOWN_CLASSIFIER_HEADS:
            known["classifier.heads"] = _KNOWN_CLASSIFIER_HEADS[width]
        return known
    # Projected, but without blocks: an MLP.
    if "classifier.project.weight" in tensors:
        return known | {
            "classifier.kind": "mlp",
            "classifier.width": len(tensors["classifier.project.weight"]),
        }
    known["classifier.kind"] = "linear"
    # A norm of the averaged tokens is VideoMAE's fine-tuned model, which sees all tokens.
    if "classifier.norm.weight" in tensors:
        known["classifier.norm"] = "pooled"
        known |= {"mask.ratio": 0.0, "reconstruction.weight": 0.0}
    else:
        known["classifier.norm"] = "tokens"
    return known


def _decoder_settings(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the settings of the decoder that these tensors make."""
    if "decoder.project.weight" not in tensors:
        return {}
    width = len(tensors["decoder.project.weight"])
    known = {"reconstruction.width": width, "reconstruction.depth": _depth(tensors, "decoder")}
    if width in _KNOWN_DECODER_HEADS:
        known["reconstruction.heads"] = _KNOWN_DECODER_HEADS[width]
    return known


def config_beside(path: Path, layout: Layout) -> dict[str, Any]:
    """Return Hugging Face's config, or our settings, if they are beside weights of that layout.

    Raises:
        UserError: the file exists and cannot be read.
    """
    folder = path if path.is_dir() else path.parent
    if layout is OURS:
        # A trial's result has its settings in YAML; ``mar weights convert`` writes a config.json.
        settings = folder / "settings.yaml"
        if settings.is_file() and not (folder / "config.json").is_file():
            return read_mapping(settings)
        # A checkpoint of a training has them in its manifest.
        if (folder / MANIFEST).is_file() and not (folder / "config.json").is_file():
            return read_mapping(folder / MANIFEST).get("settings", {})
        config = read_mapping(folder / "config.json")
        if config.get("model_type") == "mar":
            return config.get("settings", {})
        return {}
    if not layout.name.startswith("Hugging Face"):
        return {}
    config = read_mapping(folder / "config.json")
    # A file may lie beside the config of another model, whose heads would be wrong for it.
    return config if config.get("model_type") == layout.model_type else {}


def model_type_beside(path: Path) -> str:
    """Return ``model_type`` of the ``config.json`` beside weights; empty where there is none.

    Raises:
        UserError: the file exists and cannot be read.
    """
    folder = path if path.is_dir() else path.parent
    return str(read_mapping(folder / "config.json").get("model_type", ""))


CLASSES = "classes.json"
"""The file of a result with the classes' names by number."""


def classes_beside(path: Path, tensors: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Return the class names from the files beside weights that have a classifier.

    They are in ``classes.json`` of a result, or in ``id2label`` of a ``config.json`` of any model.
    The result is empty if their number is not the classifier's number of scores.

    Raises:
        UserError: a file exists and cannot be read.
    """
    if "classifier.head.weight" not in tensors:
        return ()
    folder = path if path.is_dir() else path.parent
    names_given: Any = read_mapping(folder / CLASSES).get("classes")
    if names_given is None:
        labels: Any = read_mapping(folder / "config.json").get("id2label")
        if isinstance(labels, dict):
            # JSON has no numbers as keys: Hugging Face writes them as text.
            names_given = [labels.get(str(number)) for number in range(len(labels))]
        else:
            names_given = []
    if isinstance(names_given, list):
        names = tuple(str(name) for name in names_given)
    else:
        names = ()
    # Names of another data set would be given to the wrong classes.
    if len(names) == len(tensors["classifier.head.weight"]):
        return names
    return ()
