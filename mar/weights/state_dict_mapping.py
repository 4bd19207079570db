"""Maps the tensor names of VideoMAE, MAR's release, V-JEPA, Hugging Face and image ViTs to ours.

``mar.weights.layouts`` has the rules. Differences of content are removed after renaming: query, key
and value are joined in one matrix, a missing key bias becomes zero (``mar.model.layers``), the
embedding's convolution becomes a matrix, and a 2D embedding is inflated to 3D (section IV-B,
"Pre-training Dataset").
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mar.model.encoder import flat_conv_weight
from mar.weights.layouts import LAYOUTS, NOT_KNOWN, OURS, Layout

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Translated:
    """A checkpoint in our names."""

    layout: Layout
    tensors: dict[str, Tensor]
    unused: dict[str, str]
    """Key in the file -> why it was left out."""
    tubelet: tuple[int, int, int] | None
    """Frames, height and width of a token, from the embedding; None where that is a matrix."""


def translate(
    tensors: Tensors, inflate_frames: int, layout: Layout | None = None
) -> Translated | None:
    """Return a checkpoint's tensors under our names, in float32; None where no layout fits.

    ``layout`` is given where more than the tensors' names tells it.

    A 2D patch embedding is inflated over ``inflate_frames`` frames: it is repeated, and divided by
    their number, so that a still clip has the tokens of its image.
    """
    layout = layout or layout_of(tensors)
    if layout is None:
        return None
    renamed: dict[str, Tensor] = {}
    unused: dict[str, str] = {}
    for key, value in tensors.items():
        ours = _first(layout.rules, key)
        if ours:
            # Checkpoints in half precision: training keeps its weights in float32.
            renamed[ours] = value.float()
        else:
            reason = next(
                (why for pattern, why in layout.unused if re.fullmatch(pattern, key)), NOT_KNOWN
            )
            unused[key] = reason
    modality = renamed.pop("encoder.embed.modality", None)
    if modality is not None and "encoder.embed.bias" in renamed:
        renamed["encoder.embed.bias"] = renamed["encoder.embed.bias"] + modality.flatten()
    tubelet = None
    embedding = renamed.get("encoder.embed.weight")
    # Our own format has the ViT's embedding as a matrix, which does not show the tubelet; a
    # package's encoder may have anything by that name.
    if layout is not OURS and embedding is not None and embedding.ndim > 2:
        if embedding.ndim == 4:
            embedding = inflated(embedding, inflate_frames)
        frames, height, width = embedding.shape[2:]
        tubelet = (frames, height, width)
        renamed["encoder.embed.weight"] = flat_conv_weight(embedding)
    return Translated(layout, _joined(renamed, may_lack_biases=layout is not OURS), unused, tubelet)


def layout_of(tensors: Tensors) -> Layout | None:
    """Return the layout that the names of a checkpoint's tensors have; None where none fits."""
    found = (each for each in LAYOUTS if all(_fits(mark, tensors) for mark in each.marks))
    return next(found, None)


def inflated(weight: Float[Tensor, "D C h w"], frames: int) -> Float[Tensor, "D C t h w"]:
    """Return a 2D patch embedding inflated to ``frames`` frames (section IV-B, I3D's rule)."""
    return weight[:, :, None].expand(-1, -1, frames, -1, -1) / frames


def hugging_face_names(tensors: Tensors, tubelet: tuple[int, int, int]) -> dict[str, Tensor]:
    """Return encoder, decoder and a linear classifier under the names of Hugging Face's VideoMAE.

    Its attention has no key bias; leaving ours out changes nothing (``mar.model.layers``).
    transformers has had two names for the other two: until 5.4 ``q_bias``, and ``query.bias`` after
    that. Versions before 5.18 leave the other name out with a warning, and start from zeros. So
    both are written, and every version reads one of them; those between have a key bias, which is
    zero.
    """
    named: dict[str, Tensor] = {}
    for name, value in tensors.items():
        if name == "encoder.embed.weight":
            # Our embedding is a matrix; theirs is the kernel of a 3D convolution.
            value = value.unflatten(1, (3, *tubelet))
        if ".attn.qkv." in name:
            # One matrix of ours becomes three of theirs, so no rule for a single name does it.
            prefix = _first(_THEIRS, name.split(".attn.")[0] + ".") or ""
            kind = name.rpartition(".")[2]
            query, key, third = value.chunk(3)
            if kind == "bias":
                attention = f"{prefix}attention.attention."
                named |= {
                    f"{attention}q_bias": query,
                    f"{attention}query.bias": query.clone(),
                    f"{attention}key.bias": torch.zeros_like(key),
                    f"{attention}v_bias": third,
                    f"{attention}value.bias": third.clone(),
                }
            else:
                parts = {"query": query, "key": key, "value": third}
                named |= {
                    f"{prefix}attention.attention.{part}.weight": each
                    for part, each in parts.items()
                }
            continue
        theirs = _first(_THEIRS, name)
        assert theirs, name
        named[theirs] = value
    # Parts of a matrix are views, which ``safetensors`` refuses to save.
    return {name: value.contiguous() for name, value in named.items()}


def _their_blocks(ours: str, theirs: str) -> tuple[tuple[str, str], ...]:
    parts = {
        r"attn\.proj": "attention.output.dense",
        "norm1": "layernorm_before",
        "norm2": "layernorm_after",
        r"mlp\.fc1": "intermediate.dense",
        r"mlp\.fc2": "output.dense",
    }
    named = (
        (rf"{ours}(\d+)\.{part}\.(weight|bias)", rf"{theirs}\1.{other}.\2")
        for part, other in parts.items()
    )
    # The first rule renames the prefix of a block alone, for query, key and value.
    return ((rf"{ours}(\d+)\.", rf"{theirs}\1."), *named)


_THEIRS = (
    (r"encoder\.embed\.(weight|bias)", r"videomae.embeddings.patch_embeddings.projection.\1"),
    *_their_blocks(r"encoder\.blocks\.", "videomae.encoder.layer."),
    (r"encoder\.norm\.(weight|bias)", r"videomae.layernorm.\1"),
    *_their_blocks(r"decoder\.blocks\.", "decoder.decoder_layers."),
    (r"decoder\.mask_token", "mask_token"),
    (r"decoder\.project\.weight", "encoder_to_decoder.weight"),
    (r"decoder\.(norm|head)\.(weight|bias)", r"decoder.\1.\2"),
    (r"classifier\.norm\.(weight|bias)", r"fc_norm.\1"),
    (r"classifier\.head\.(weight|bias)", r"classifier.\1"),
)


def _fits(pattern: str, tensors: Tensors) -> bool:
    return any(re.fullmatch(pattern, key) for key in tensors)


def _first(rules: tuple[tuple[str, str], ...], key: str) -> str | None:
    matches = ((re.fullmatch(pattern, key), ours) for pattern, ours in rules)
    return next((match.expand(ours) for match, ours in matches if match), None)


def _joined(renamed: dict[str, Tensor], may_lack_biases: bool) -> dict[str, Tensor]:
    """Put query, key and value into one matrix and one bias; a key without a bias has zeros.

    Where no block of a part has an attention bias, the model was made without (timm's
    ``qkv_bias=False``), and all are zero. Where only some blocks lack it, the file is incomplete:
    the tensor stays missing, and loading reports it.
    """
    joined = {
        name: value
        for name, value in renamed.items()
        if not re.search(r"\.attn\.[qkv](\.|_)", name)
    }
    # The first component of a name is the part: encoder, decoder or classifier.
    biased = {
        name.split(".")[0]
        for name in renamed
        if re.search(r"\.attn\.(qkv\.bias|[qv]_bias|[qv]\.bias)", name)
    }
    for stem in sorted({name.split(".attn.")[0] for name in renamed if ".attn." in name}):
        attention = f"{stem}.attn."
        weights = [
            renamed[key] for part in "qkv" if (key := f"{attention}{part}.weight") in renamed
        ]
        # With fewer, the file is incomplete, or has them in one matrix already.
        if len(weights) == 3:
            joined[f"{attention}qkv.weight"] = torch.cat(weights)
        # Hugging Face has both spellings of these names, by the version that wrote the file.
        query, key, value = (
            renamed.get(f"{attention}{part}_bias", renamed.get(f"{attention}{part}.bias"))
            for part in "qkv"
        )
        if query is not None and value is not None:
            joined[f"{attention}qkv.bias"] = torch.cat(
                [query, torch.zeros_like(query) if key is None else key, value]
            )
        elif (
            may_lack_biases
            and stem.split(".")[0] not in biased
            and f"{attention}qkv.weight" in joined
        ):
            weight = joined[f"{attention}qkv.weight"]
            joined[f"{attention}qkv.bias"] = torch.zeros(len(weight), dtype=weight.dtype)
    return joined
