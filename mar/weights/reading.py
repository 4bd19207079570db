"""Reads a checkpoint of any known layout under our names.

Files are opened so that nothing in them can run: safetensors, or ``torch.load(weights_only=True)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mar.config.model_settings import ENCODER_SIZES
from mar.config.overrides import flatten
from mar.errors import UserError
from mar.weights.checkpoint_settings import (
    classes_beside,
    config_beside,
    is_flat,
    is_said_to_be_videomae,
    settings_of,
)
from mar.weights.hub import fetch, weight_files
from mar.weights.safe_loading import read_tensors
from mar.weights.state_dict_mapping import OURS, translate

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
    translated = translate(tensors, inflate_frames, layout)
    if translated is None:
        raise UserError(
            f"{name}: not a layout that mar knows (VideoMAE, MAR, Hugging Face VideoMAE, image "
            "ViT, mar's own); "
            f"its first keys: {listed(list(tensors))}"
        )
    is_sure = translated.layout.is_sure_of_positions(tensors) or is_said_to_be_videomae(path)
    if not is_sure:
        raise UserError(
            f"{name}: its names are those of {translated.layout.name}, but it says nothing of its "
            "positions. mar adds sin-cos positions to the tokens; a model with others, as V-JEPA "
            "with rotary ones, has the same names and would compute something else. If its "
            'positions are VideoMAE\'s, say so: a config.json with {"model_type": "videomae"} '
            "beside the file"
        )
    layout = translated.layout.name
    kept = translated.tensors
    unused = dict(translated.unused)
    # Shapes do not determine the number of heads or the clip's size; this file states them.
    config = config_beside(path, translated.layout)
    # Both kinds use timm's names. Only image models have a class token or a 2D patch
    # embedding.
    if layout == "ViT":
        if "cls_token" in tensors or is_flat(tensors):
            layout = "image ViT"
        else:
            layout = "VideoMAE, fine-tuned"
    # The tensors of such a model have the same shapes, so nothing else would reveal it: it
    # would load, and compute other values.
    if config.get("hidden_act", "gelu") != "gelu":
        raise UserError(
            f"{name}: its activation is {config['hidden_act']}; mar's blocks have GELU, and no "
            "other"
        )
    # Hugging Face's VideoMAE without ``use_mean_pooling`` classifies the first token after the
    # encoder's norm. Ours averages all tokens, so that head would give wrong scores.
    reads_first = (
        "classifier.head.weight" in kept
        and "encoder.norm.weight" in kept
        and translated.layout is not OURS
    )
    if reads_first and "classifier.project.weight" not in kept:
        heads = [key for key in kept if key.startswith("classifier.")]
        unused |= dict.fromkeys(heads, "its classifier reads the first token, and ours the average")
        kept = {key: value for key, value in kept.items() if key not in heads}
    settings, stated = settings_of(translated, kept, config)
    return Weights(name, layout, kept, unused, settings, stated, classes_beside(path, kept))


def listed(names: Sequence[str]) -> str:
    """Return the first names and how many more there are."""
    more = len(names) - MAX_NAMED
    return ", ".join(names[:MAX_NAMED]) + (f" and {more} more" if more > 0 else "")
