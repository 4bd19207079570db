"""Maps the tensor names of VideoMAE, MAR's release, Hugging Face and image ViTs to ours.

Each layout is a list of rules, from a pattern of its names to ours. Differences of content are
removed after renaming: query, key and value are joined in one matrix, a missing key bias becomes
zero (``mar.model.layers``), the embedding's convolution becomes a matrix, and a 2D embedding is
inflated to 3D (section IV-B, "Pre-training Dataset").
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mar.model.encoder import flat_conv_weight

Tensors = Mapping[str, Tensor]
NOT_KNOWN = "not known"
"""The reason why a key was left out that no rule matches."""


@dataclass(frozen=True)
class Layout:
    """How one family of checkpoints names its tensors."""

    name: str
    marks: tuple[str, ...]
    """Patterns: a checkpoint has this layout if each of them matches one of its keys."""
    rules: tuple[tuple[str, str], ...]
    """(pattern of a whole key, our name); the first pattern that matches is used."""
    unused: tuple[tuple[str, str], ...] = ()
    """(pattern of a whole key, why the model has no use for it)."""
    shows_positions: tuple[str, ...] = ()
    """Patterns: one of them matches a key if the model's positions are added to its tokens, as
    VideoMAE's are. Other models share the names of their blocks, and turn queries and keys by the
    positions instead (V-JEPA): they would load, and compute something else. Empty: the names of the
    layout are enough."""

    def is_sure_of_positions(self, keys: Iterable[str]) -> bool:
        """Whether a checkpoint with these keys has positions as this layout says."""
        patterns = self.shows_positions
        if not patterns:
            return True
        return any(re.fullmatch(pattern, key) for key in keys for pattern in patterns)


@dataclass(frozen=True)
class Translated:
    """A checkpoint in our names."""

    layout: Layout
    tensors: dict[str, Tensor]
    unused: dict[str, str]
    """Key in the file -> why it was left out."""
    tubelet: tuple[int, int, int] | None
    """Frames, height and width of a token, from the embedding; None where that is a matrix."""


_POSITIONS = "positions are computed, for any clip size"
# VideoMAE's attention has biases of query and value alone, under names that no other ViT has.
_OF_VIDEOMAE = (r".*pos_embed", r".*\.attn\.[qv]_bias", r"encoder_to_(cls_)?decoder\.weight")
# VideoMAE, MAR's release and timm share these names. Regular expressions have braces of their own,
# so ``{old}`` and ``{new}`` are replaced and not formatted.
_TORCH_BLOCK = (
    (
        r"{old}(\d+)\.(norm1|norm2|mlp\.fc1|mlp\.fc2|attn\.proj|attn\.qkv)\.(weight|bias)",
        r"{new}\1.\2.\3",
    ),
    # VideoMAE has no key bias, so it has these two in place of one bias for all three.
    (r"{old}(\d+)\.attn\.(q_bias|v_bias)", r"{new}\1.attn.\2"),
)


def _blocks(old: str, new: str) -> tuple[tuple[str, str], ...]:
    return tuple(
        (pattern.replace("{old}", old), ours.replace("{new}", new))
        for pattern, ours in _TORCH_BLOCK
    )


def _hugging_face_blocks(old: str, new: str) -> tuple[tuple[str, str], ...]:
    parts = {
        r"attention\.output\.dense": "attn.proj",
        "layernorm_before": "norm1",
        "layernorm_after": "norm2",
        r"intermediate\.dense": "mlp.fc1",
        r"output\.dense": "mlp.fc2",
    }
    return (
        (
            # Only the first letter is kept: ``_joined`` finds the three by it.
            rf"{old}(\d+)\.attention\.attention\.([qkv])(?:uery|ey|alue)\.(weight|bias)",
            rf"{new}\1.attn.\2.\3",
        ),
        (rf"{old}(\d+)\.attention\.attention\.([qv])_bias", rf"{new}\1.attn.\2_bias"),
        *(
            (rf"{old}(\d+)\.{theirs}\.(weight|bias)", rf"{new}\1.{ours}.\2")
            for theirs, ours in parts.items()
        ),
    )


_DECODER = (
    (r"mask_token", "decoder.mask_token"),
    (r"encoder_to_decoder\.weight", "decoder.project.weight"),
    *_blocks(r"decoder\.blocks\.", "decoder.blocks."),
    (r"decoder\.(norm|head)\.(weight|bias)", r"decoder.\1.\2"),
)

OURS = Layout(
    "mar", (r"encoder\.embed\.weight",), ((r"((encoder|decoder|classifier)\..+)", r"\1"),)
)
# The order matters: marks are compared from the top. The marks of "ViT" are the least specific, and
# come last.
LAYOUTS = (
    OURS,
    Layout(
        "MAR release",
        (r"backbone\.patch_embed\.proj\.weight",),
        (
            (r"backbone\.patch_embed\.proj\.(weight|bias)", r"encoder.embed.\1"),
            *_blocks(r"backbone\.blocks\.", "encoder.blocks."),
            (r"backbone\.norm\.(weight|bias)", r"encoder.norm.\1"),
            *_DECODER,
            # The bridging classifier (section III-C): the release names its parts as no ViT does.
            (r"encoder_to_cls_decoder\.weight", "classifier.project.weight"),
            (r"cls_head\.blocks\.(\d+)\.norm\.(weight|bias)", r"classifier.blocks.\1.norm1.\2"),
            (r"cls_head\.blocks\.(\d+)\.norm_ffn\.(weight|bias)", r"classifier.blocks.\1.norm2.\2"),
            (
                r"cls_head\.blocks\.(\d+)\.attn\.to_qkv\.(weight|bias)",
                r"classifier.blocks.\1.attn.qkv.\2",
            ),
            (
                r"cls_head\.blocks\.(\d+)\.attn\.proj\.(weight|bias)",
                r"classifier.blocks.\1.attn.proj.\2",
            ),
            (
                # 0 and 3 are the linear layers of a Sequential; the others have no weights.
                r"cls_head\.blocks\.(\d+)\.ffn\.net\.0\.(weight|bias)",
                r"classifier.blocks.\1.mlp.fc1.\2",
            ),
            (
                r"cls_head\.blocks\.(\d+)\.ffn\.net\.3\.(weight|bias)",
                r"classifier.blocks.\1.mlp.fc2.\2",
            ),
            (r"cls_head\.(norm|head)\.(weight|bias)", r"classifier.\1.\2"),
        ),
        (
            (r"mean|std", "the pixels' mean and deviation are ImageNet's"),
            (r"pos_embed", _POSITIONS),
            (r"cls_head\.mask_token", "the released model does not use it"),
        ),
        (*_OF_VIDEOMAE, r"cls_head\..*"),
    ),
    Layout(
        "VideoMAE, pre-trained",
        (r"encoder\.patch_embed\.proj\.weight",),
        (
            (r"encoder\.patch_embed\.proj\.(weight|bias)", r"encoder.embed.\1"),
            *_blocks(r"encoder\.blocks\.", "encoder.blocks."),
            (r"encoder\.norm\.(weight|bias)", r"encoder.norm.\1"),
            *_DECODER,
        ),
        ((r"(encoder\.)?pos_embed", _POSITIONS),),
        _OF_VIDEOMAE,
    ),
    Layout(
        "Hugging Face VideoMAE",
        (r"(?:videomae\.)?embeddings\.patch_embeddings\.projection\.weight",),
        (
            (
                r"(?:videomae\.)?embeddings\.patch_embeddings\.projection\.(weight|bias)",
                r"encoder.embed.\1",
            ),
            *_hugging_face_blocks(r"(?:videomae\.)?encoder\.layer\.", "encoder.blocks."),
            (r"(?:videomae\.)?layernorm\.(weight|bias)", r"encoder.norm.\1"),
            *_hugging_face_blocks(r"decoder\.decoder_layers\.", "decoder.blocks."),
            *_DECODER,
            (r"fc_norm\.(weight|bias)", r"classifier.norm.\1"),
            (r"classifier\.(weight|bias)", r"classifier.head.\1"),
        ),
        ((r".*position_embeddings", _POSITIONS),),
    ),
    Layout(
        # VideoMAE's fine-tuned models, and image models of timm and MAE.
        "ViT",
        (r"patch_embed\.proj\.weight", r"blocks\.0\.attn\.qkv\.weight"),
        (
            (r"patch_embed\.proj\.(weight|bias)", r"encoder.embed.\1"),
            *_blocks(r"blocks\.", "encoder.blocks."),
            (r"norm\.(weight|bias)", r"encoder.norm.\1"),
            (r"fc_norm\.(weight|bias)", r"classifier.norm.\1"),
            (r"head\.(weight|bias)", r"classifier.head.\1"),
        ),
        (
            (r"pos_embed", _POSITIONS),
            (r"cls_token", "MAR has no class token"),
            (r"mask_token|decoder_.*", "a decoder of image patches"),
        ),
        _OF_VIDEOMAE,
    ),
)


def translate(
    tensors: Tensors, inflate_frames: int, layout: Layout | None = None
) -> Translated | None:
    """Return a checkpoint's tensors under our names, in float32; None where no layout fits.

    ``layout`` is given where more than the tensors' names tells it.

    A 2D patch embedding is inflated over ``inflate_frames`` frames: it is repeated, and divided by
    their number, so that a still clip has the tokens of its image.
    """
    found = (each for each in LAYOUTS if all(_fits(mark, tensors) for mark in each.marks))
    layout = layout or next(found, None)
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
    tubelet = None
    embedding = renamed.get("encoder.embed.weight")
    # Our own format has the ViT's embedding as a matrix, which does not show the tubelet; a
    # package's encoder may have anything by that name.
    if layout is not OURS and embedding is not None and embedding.ndim > 2:
        if embedding.ndim == 4:
            embedding = inflated(embedding, inflate_frames)
        else:
            embedding = embedding
        frames, height, width = embedding.shape[2:]
        tubelet = (frames, height, width)
        renamed["encoder.embed.weight"] = flat_conv_weight(embedding)
    return Translated(layout, _joined(renamed, may_lack_biases=layout is not OURS), unused, tubelet)


def inflated(weight: Float[Tensor, "D C h w"], frames: int) -> Float[Tensor, "D C t h w"]:
    """Return a 2D patch embedding inflated to ``frames`` frames (section IV-B, I3D's rule)."""
    return weight[:, :, None].expand(-1, -1, frames, -1, -1) / frames


def hugging_face_names(tensors: Tensors, tubelet: tuple[int, int, int]) -> dict[str, Tensor]:
    """Return encoder, decoder and a linear classifier under the names of Hugging Face's VideoMAE.

    Its attention has no key bias; leaving ours out changes nothing (``mar.model.layers``).
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
                named |= {
                    f"{prefix}attention.attention.q_bias": query,
                    f"{prefix}attention.attention.v_bias": third,
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
