"""How the checkpoints of others name their tensors: a list of rules for each family.

A rule goes from a pattern of their names to ours. ``mar.weights.state_dict_mapping`` applies them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

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
    positions: str = "computed"
    """``encoder.positions`` of the models with this layout."""
    shows_positions: tuple[str, ...] = ()
    """Patterns: one of them matches a key if positions are as this layout says. Other models share
    the names of its blocks, and have other positions: they would load, and compute something else.
    Empty: the names of the layout are enough."""
    model_type: str = ""
    """``model_type`` of a ``config.json`` that says of a file beside it that it has this layout's
    positions."""

    has_decoder_table: bool = False
    """Whether its stored table of positions is the decoder's, which says nothing of the encoder."""

    def has_its_positions(self, keys: Iterable[str]) -> bool:
        """Whether one of the keys shows that positions are as this layout says."""
        patterns = self.shows_positions
        return any(re.fullmatch(pattern, key) for key in keys for pattern in patterns)


_POSITIONS = "positions are computed, for any clip size"
# VideoMAE's attention has biases of query and value alone, under names that no other ViT has.
_OF_VIDEOMAE = (r".*\.attn\.[qv]_bias", r"encoder_to_(cls_)?decoder\.weight")
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

# V-JEPA's files have several models; that of the encoder is kept under the name that it has in the
# file (``mar.weights.safe_loading``). DistributedDataParallel and its own wrapper add to it.
_V_JEPA_NAME = r"(?:(?:target_|ema_)?encoder\.)?(?:module\.)?(?:backbone\.)?"
_V_JEPA_PARTS = (
    (rf"{_V_JEPA_NAME}patch_embed\.proj\.(weight|bias)", r"encoder.embed.\1"),
    *_blocks(rf"{_V_JEPA_NAME}blocks\.", "encoder.blocks."),
    (rf"{_V_JEPA_NAME}norm\.(weight|bias)", r"encoder.norm.\1"),
)
_ROTARY = "positions are computed: they turn queries and keys"
V_JEPA_2 = Layout(
    "V-JEPA 2",
    (r"(target_|ema_)encoder\..*patch_embed\.proj\.weight",),
    _V_JEPA_PARTS,
    ((r".*pos_embed", _ROTARY),),
    positions="rotary_vjepa2",
    model_type="vjepa2",
)
_V_JEPA = (
    Layout(
        "V-JEPA 2.1",
        (rf"{_V_JEPA_NAME}norms_block\.3\.weight", rf"{_V_JEPA_NAME}video_mod_embed"),
        (
            *_V_JEPA_PARTS,
            # It has a norm after four of its blocks; that of the last one is the encoder's.
            (rf"{_V_JEPA_NAME}norms_block\.3\.(weight|bias)", r"encoder.norm.\1"),
            # A vector that is added to every token of a video, as the embedding's bias is.
            (rf"{_V_JEPA_NAME}video_mod_embed", "encoder.embed.modality"),
        ),
        (
            (r".*pos_embed", _ROTARY),
            (r".*norms_block\.[0-2]\..*", "norms of tokens between the blocks"),
            (r".*(patch_embed_img\..*|img_mod_embed)", "for images"),
        ),
        positions="rotary_vjepa2_1",
        model_type="vjepa2",
    ),
    V_JEPA_2,
    Layout(
        "Hugging Face V-JEPA 2",
        (r"(?:vjepa2\.)?encoder\.embeddings\.patch_embeddings\.proj\.weight",),
        (
            (
                r"(?:vjepa2\.)?encoder\.embeddings\.patch_embeddings\.proj\.(weight|bias)",
                r"encoder.embed.\1",
            ),
            (
                # Only the first letter is kept: ``_joined`` finds the three by it.
                r"(?:vjepa2\.)?encoder\.layer\.(\d+)\.attention\.([qkv])(?:uery|ey|alue)"
                r"\.(weight|bias)",
                r"encoder.blocks.\1.attn.\2.\3",
            ),
            (
                r"(?:vjepa2\.)?encoder\.layer\.(\d+)\.attention\.proj\.(weight|bias)",
                r"encoder.blocks.\1.attn.proj.\2",
            ),
            (
                r"(?:vjepa2\.)?encoder\.layer\.(\d+)\.(norm1|norm2|mlp\.fc1|mlp\.fc2)"
                r"\.(weight|bias)",
                r"encoder.blocks.\1.\2.\3",
            ),
            (r"(?:vjepa2\.)?encoder\.layernorm\.(weight|bias)", r"encoder.norm.\1"),
        ),
        (
            (r"(?:vjepa2\.)?predictor\..*", "V-JEPA's predictor, for its pre-training"),
            (r"pooler\..*|classifier\..*", "a classifier that mar does not have"),
        ),
        positions="rotary_vjepa2",
        model_type="vjepa2",
    ),
)
OURS = Layout(
    "mar", (r"encoder\.embed\.weight",), ((r"((encoder|decoder|classifier)\..+)", r"\1"),)
)
# The order matters: marks are compared from the top. The marks of "ViT" are the least specific, and
# come last.
LAYOUTS = (
    OURS,
    *_V_JEPA,
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
        shows_positions=(*_OF_VIDEOMAE, r"cls_head\..*"),
        model_type="videomae",
        has_decoder_table=True,
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
        (
            (r"(encoder\.)?pos_embed", _POSITIONS),
            (r"clip_.*", "UMT's decoder of its teacher's features"),
        ),
        shows_positions=_OF_VIDEOMAE,
        model_type="videomae",
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
        model_type="videomae",
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
        shows_positions=_OF_VIDEOMAE,
        model_type="videomae",
    ),
)
