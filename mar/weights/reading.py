"""Reads a checkpoint of any known layout under our names.

Files are opened so that nothing in them can run: safetensors, or ``torch.load(weights_only=True)``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mar.config.model_settings import ENCODER_SIZES
from mar.config.overrides import flatten
from mar.errors import UserError
from mar.model.positions import sin_cos_positions
from mar.safe_text import printable
from mar.weights.checkpoint_settings import (
    classes_beside,
    config_beside,
    is_flat,
    model_type_beside,
    settings_of,
)
from mar.weights.hub import fetch, weight_files
from mar.weights.layouts import OURS, V_JEPA_2, Layout
from mar.weights.safe_loading import read_tensors
from mar.weights.state_dict_mapping import layout_of, translate

MAX_NAMED = 3
"""The most names that a message lists; it counts the others."""


@dataclass(frozen=True)
class Weights:
    """A checkpoint in our names, and the settings that follow from it."""

    source: str
    layout: str
    tensors: dict[str, Tensor]
    unused: dict[str, str]
    """Key in the file -> why the model has no use for it."""
    settings: dict[str, Any]
    """Dotted settings that the file determines; ``…heads`` are missing where unknown."""
    stated: frozenset[str] = frozenset()
    """The paths of those that a config beside the weights or the embedding's shape states; values
    that are only assumed, because known models have them, are not among them."""
    classes: tuple[str, ...] = ()
    """The classes' names by number; empty where no file has them."""


def read_weights(name: str, inflate_frames: int = 2) -> Weights:
    """Read a checkpoint of any known layout; ``name`` is what ``mar.weights.hub.fetch`` takes.

    Raises:
        UserError: no such file, an unsafe or damaged file, or a layout that is not known.
    """
    path = fetch(name)
    tensors: dict[str, Tensor] = {}
    # A large model is split into shards; no key is in two of them.
    for file in weight_files(path):
        tensors |= read_tensors(file)
    # The encoder of a package may have any names: our own settings beside the file say what it is.
    # Of a ViT the names do, also where another's file lies beside such settings.
    layout = None
    size = flatten(config_beside(path, OURS)).get("encoder.size", "custom")
    if size != "custom" and size not in ENCODER_SIZES:
        layout = OURS
    layout = layout or layout_of(tensors)
    said = model_type_beside(path)
    # V-JEPA's encoder alone has the names of a VideoMAE's, but for what shows that it is one.
    if layout and layout.model_type == "videomae" and said == "vjepa2":
        layout = layout if layout.has_its_positions(tensors) else V_JEPA_2
    translated = translate(tensors, inflate_frames, layout)
    if translated is None:
        raise UserError(
            f"{name}: not a layout that mar knows (VideoMAE, MAR, V-JEPA 2, Hugging Face's of "
            "both, image ViT, mar's own); "
            f"its first keys: {listed(list(tensors))}"
        )
    _check_positions(name, translated.layout, tensors, said)
    kept = translated.tensors
    unused = dict(translated.unused)
    # Shapes do not determine the number of heads or the clip's size; this file states them.
    config = config_beside(path, translated.layout)
    if translated.layout is OURS and not config and "encoder.embed.weight" in kept:
        raise UserError(
            f"{name}: mar's own weights without their settings: positions and heads are in no "
            "tensor. Keep settings.yaml, config.json or manifest.json beside the file, as mar "
            "writes them"
        )
    # The tensors of such a model have the same shapes, so nothing else would reveal it: it
    # would load, and compute other values.
    if config.get("hidden_act", "gelu") != "gelu":
        raise UserError(
            f"{name}: its activation is {config['hidden_act']}; mar's blocks have GELU, and no "
            "other"
        )
    if translated.layout is not OURS:
        kept, unused = _without_misread_classifier(kept, unused)
    settings, stated = settings_of(translated, kept, config)
    classes = classes_beside(path, kept)
    shown = _shown_layout(translated.layout, tensors)
    return Weights(name, shown, kept, unused, settings, stated, classes)


def _shown_layout(layout: Layout, tensors: Mapping[str, Tensor]) -> str:
    """Return the name of a checkpoint's layout for people."""
    if layout.name != "ViT":
        return layout.name
    # Both kinds use timm's names. Only image models have a class token or a 2D patch embedding.
    if "cls_token" in tensors or is_flat(tensors):
        return "image ViT"
    return "VideoMAE, fine-tuned"


def _without_misread_classifier(
    kept: dict[str, Tensor], unused: dict[str, str]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Leave out a classifier of others that would give wrong scores; returns both, changed.

    Hugging Face's VideoMAE without ``use_mean_pooling`` classifies the first token after the
    encoder's norm. Ours averages all tokens.
    """
    has_norm = "encoder.norm.weight" in kept
    is_bridging_classifier = "classifier.project.weight" in kept
    if not has_norm or is_bridging_classifier or "classifier.head.weight" not in kept:
        return kept, unused
    heads = [key for key in kept if key.startswith("classifier.")]
    reason = "its classifier reads the first token, and ours the average"
    rest = {key: value for key, value in kept.items() if key not in heads}
    return rest, unused | dict.fromkeys(heads, reason)


def _check_positions(name: str, layout: Layout, tensors: Mapping[str, Tensor], said: str) -> None:
    """Check that a checkpoint's positions are those of the layout that its names have.

    Positions are in few files, and no shape depends on them: with others the model would load, and
    compute something else. ``said`` is what the ``config.json`` beside the file says it is.

    Raises:
        UserError: they are others, or the file says nothing of them.
    """
    is_image = "patch_embed.proj.weight" in tensors and is_flat(tensors)
    # The positions of an image say nothing of a video's, and are replaced; our own files have their
    # settings beside them.
    if is_image or layout is OURS:
        return
    endings = ("pos_embed", "position_embeddings")
    table = next((value for key, value in tensors.items() if key.endswith(endings)), None)
    if layout.has_decoder_table:
        table = None
    is_said = said != "" and said == layout.model_type
    if layout.positions != "computed":
        # Its rotations are no tensors; the V-JEPA before it had a table.
        if table is None or is_said:
            return
        raise UserError(
            f"{name}: its names are those of {layout.name}, but it has a table of positions, as "
            "V-JEPA (1) has, whose positions mar does not have. If it is V-JEPA 2 with rotary "
            'positions, say so: a config.json with {"model_type": "vjepa2"} beside the file'
        )
    if table is not None and not _is_sin_cos(table):
        raise UserError(
            f"{name}: it has a table of positions ({' × '.join(map(str, table.shape))}) that is "
            "not the sin-cos table that mar adds to the tokens: it would compute something else"
        )
    if table is not None or is_said or layout.has_its_positions(tensors):
        return
    if said:
        raise UserError(
            f"{name}: its names are those of {layout.name}, and the config.json beside it says "
            f"that it is a {printable(said)}, which mar does not read"
        )
    if not layout.shows_positions:
        return
    raise UserError(
        f"{name}: its names are those of {layout.name}, but it says nothing of its positions. mar "
        "adds sin-cos positions to the tokens; a model with others, as V-JEPA with rotary ones, "
        "has the same names and would compute something else. Say what it is in a config.json "
        'beside the file: {"model_type": "videomae"} for the positions of VideoMAE, '
        '{"model_type": "vjepa2"} for those of V-JEPA 2'
    )


def _is_sin_cos(table: Tensor) -> bool:
    """Whether a stored table of positions is the one that mar computes."""
    if table.ndim < 2:
        return False
    rows = table.flatten(0, -2).float()
    # Half precision has three digits.
    return torch.allclose(rows, sin_cos_positions(*rows.shape), atol=2e-3)


def listed(names: Sequence[str]) -> str:
    """Return the first names and how many more there are."""
    more = len(names) - MAX_NAMED
    return ", ".join(names[:MAX_NAMED]) + (f" and {more} more" if more > 0 else "")
