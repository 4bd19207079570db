"""Writes weights: our own format, and Hugging Face's VideoMAE.

Both are folders of safetensors, ``config.json`` and a model card.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from mar import plugins
from mar.atomic_dir import Writers, write_atomic_dir, write_text
from mar.config.overrides import without_paths
from mar.config.schema import TrainingConfig
from mar.errors import UserError
from mar.model.flops import cost
from mar.model.mar import MAR
from mar.model.pixels import IMAGENET_MEAN, IMAGENET_STD
from mar.weights.pretrained import fitting
from mar.weights.reading import Weights
from mar.weights.state_dict_mapping import hugging_face_names

_CLASSIFIES = "VideoMAEForVideoClassification"
"""The class of ``transformers`` with a classifier."""
_CARD = """---
library_name: {library}
pipeline_tag: video-classification
tags: [masked-action-recognition, video, vit]
---
# {title}

A video ViT for Masked Action Recognition
([Qing et al., 2022](https://arxiv.org/abs/2207.11660)), converted from
`{source}` ({layout}). The licence of that source holds for these weights; mar adds nothing to it.

| | |
|---|---|
| parts | {parts} |
| encoder | {encoder}, tubelets of {tubelet} |
| clip | {frames} frames of {size} × {size} pixels, {tokens} tokens |
| visible tokens | {visible} at ρ = {ratio:.0%} |
| classes | {classes} |
| cost{as_what} | {gflops:.2f} GFLOPs a view, {params:.2f} M parameters |

{how}
"""
_HOW_OURS = """Input: RGB from 0 to 1, axes B, C, T, H, W. The model normalises it by
ImageNet's mean and deviation. One multiply-add counts one in the cost.

```
mar weights show DIR
mar weights export DIR model.onnx
mar run STUDY encoder.weights=DIR
```"""
_HOW_HUGGING_FACE = """`transformers.{architecture}.from_pretrained("DIR")`; its input is
normalised already, axes B, T, C, H, W. LayerNorm's ε is 1e-6 where its config can say so; in
`decoder.norm` and `fc_norm` it is torch's 1e-5. One multiply-add counts one in the cost."""


def write_model(folder: Path, weights: Weights, settings: TrainingConfig) -> None:
    """Write our own format; reading it back gives the same tensors and settings.

    Raises:
        UserError: the folder exists already, or the weights do not fit the settings.
        Failure: the disk refuses.
    """
    check_fit(weights, settings)
    # Paths of this machine mean nothing to whoever receives the folder, and may be private.
    config = {"model_type": "mar", "settings": without_paths(settings), **_labels(weights)}
    card = _card(folder, weights, settings, weights.tensors, "mar", _HOW_OURS)
    _write(folder, weights.tensors, {"config.json": config}, card)


def write_hugging_face(folder: Path, weights: Weights, settings: TrainingConfig) -> list[str]:
    """Write a folder for ``transformers``' VideoMAE.

    Returns:
        The names of the tensors that this format cannot hold (a bridging classifier's).

    Raises:
        UserError: the folder exists already, the weights do not fit, or tubelets are not square.
        Failure: the disk refuses.
    """
    check_fit(weights, settings)
    if settings.encoder.is_of_package:
        raise UserError(
            f"encoder.size: Hugging Face's VideoMAE is a ViT, and {settings.encoder.size} is of a "
            "package; --to mar and ONNX hold it"
        )
    if settings.encoder.positions != "computed":
        raise UserError(
            f"encoder.positions: Hugging Face's VideoMAE computes sin-cos positions, and not "
            f"{settings.encoder.positions}; --to mar and ONNX hold them"
        )
    _, height, width = settings.encoder.tubelet
    if height != width:
        raise UserError(
            f"encoder.tubelet: Hugging Face's VideoMAE has square patches, not {height} × {width}"
        )
    # transformers has one class with a classifier and one with a decoder, none with both. Its
    # classifier is ours under ``norm: pooled``; a model of that kind has no decoder.
    pooled = settings.classifier.norm == "pooled" and "classifier.head.weight" in weights.tensors
    kept = {
        name: tensor
        for name, tensor in weights.tensors.items()
        if name.startswith("encoder.") or name.startswith("classifier." if pooled else "decoder.")
    }
    architecture = _architecture(kept, pooled)
    config = _hugging_face_config(weights, settings, architecture)
    how = _HOW_HUGGING_FACE.format(architecture=architecture)
    card = _card(folder, weights, settings, kept, "transformers", how)
    files = {"config.json": config, "preprocessor_config.json": _processor(settings.clip.size)}
    named = hugging_face_names(kept, settings.encoder.tubelet)
    _write(folder, named, files, card)
    return [name for name in weights.tensors if name not in kept]


def _hugging_face_config(
    weights: Weights, settings: TrainingConfig, architecture: str
) -> dict[str, Any]:
    """Return the content of ``config.json``."""
    dimensions = settings.encoder.dimensions
    decoder = settings.reconstruction
    pooled = architecture == _CLASSIFIES
    # The names are those of ``VideoMAEConfig``. The decoder's MLP is four times as wide as its
    # tokens.
    return {
        "model_type": "videomae",
        "architectures": [architecture],
        "image_size": settings.clip.size,
        "num_frames": settings.clip.frames,
        "patch_size": settings.encoder.tubelet[1],
        "tubelet_size": settings.encoder.tubelet[0],
        "hidden_size": dimensions[0],
        "num_hidden_layers": dimensions[1],
        "num_attention_heads": dimensions[2],
        "intermediate_size": settings.encoder.mlp_width,
        "decoder_hidden_size": decoder.width,
        "decoder_num_hidden_layers": decoder.depth,
        "decoder_num_attention_heads": decoder.heads,
        "decoder_intermediate_size": 4 * decoder.width,
        "norm_pix_loss": decoder.normalize_target,
        # The ε of the official models and of ours; the default of transformers is 1e-12.
        "layer_norm_eps": 1e-6,
        "use_mean_pooling": pooled,
        # ``PretrainedConfig`` makes two labels where it is given none.
        **(_labels(weights, settings.data.num_classes) if pooled else {"id2label": {}}),
    }


def _architecture(kept: Mapping[str, Tensor], pooled: bool) -> str:
    """Return the name of the class of ``transformers`` that has these parts."""
    if pooled:
        return _CLASSIFIES
    if "decoder.project.weight" in kept:
        return "VideoMAEForPreTraining"
    return "VideoMAEModel"


def _labels(weights: Weights, num_unnamed: int = 0) -> dict[str, Any]:
    """Return the class names in the form of Hugging Face's configs.

    Where the weights have no names, ``num_unnamed`` classes get numbered ones.
    """
    names = list(weights.classes) or [f"LABEL_{number}" for number in range(num_unnamed)]
    if not names:
        return {}
    return {
        "id2label": {str(number): name for number, name in enumerate(names)},
        "label2id": {name: number for number, name in enumerate(names)},
    }


def _processor(size: int) -> dict[str, Any]:
    return {
        "image_processor_type": "VideoMAEImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": size},
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(IMAGENET_MEAN),
        "image_std": list(IMAGENET_STD),
    }


def check_fit(weights: Weights, settings: TrainingConfig) -> None:
    """Raise a UserError if a part that the file has does not fit the settings.

    Nothing is computed.
    """
    # On the meta device a model has names and shapes, but no memory.
    with torch.device("meta"):
        model = MAR(settings)
    has = {name.split(".")[0] for name in weights.tensors}
    fitting(model, weights, settings, [f"{part}." for part in has])


def _write(
    folder: Path, tensors: Mapping[str, Tensor], configs: Mapping[str, dict[str, Any]], card: str
) -> None:
    if folder.exists():
        raise UserError(f"{folder} exists already: choose another name, or remove it")
    # ``save_file`` refuses views and tensors that share memory.
    contiguous = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    writers: dict[str, Callable[[Path], None]] = {
        "model.safetensors": lambda file: save_file(contiguous, file, metadata={"format": "pt"}),
        "README.md": lambda file: write_text(file, card),
    }
    for name, config in configs.items():
        text = json.dumps(config, indent=1, ensure_ascii=False)
        # The default argument binds this round's text: a closure would see the last one.
        writers[name] = lambda file, text=text: write_text(file, text)
    checked: Writers = writers
    write_atomic_dir(folder, checked, {}, advice="Choose another folder")


def _classes_text(weights: Weights, settings: TrainingConfig) -> str:
    """Return the number of classes and their names, with Markdown's special characters escaped."""
    # Names come from a stranger's file: they could close the table or add links.
    names = [
        re.sub(r"([\\`*_\[\]<>|])", r"\\\1", " ".join(name.split())) for name in weights.classes
    ]
    if names:
        return f"{settings.data.num_classes}: {', '.join(names)}"
    return str(settings.data.num_classes)


def _card(
    folder: Path,
    weights: Weights,
    settings: TrainingConfig,
    kept: Mapping[str, Tensor],
    library: str,
    how: str,
) -> str:
    """Return the text of the model card."""
    figures = cost(settings)
    width, depth, heads = settings.encoder.dimensions
    encoder = f"{width} wide, {depth} deep, {heads} heads"
    if settings.encoder.is_of_package:
        package = plugins.origin(plugins.ENCODERS, settings.encoder.size)
        encoder = f"{settings.encoder.size} of the package {package}, {width} wide"
    parts = [
        part
        for part in ("encoder", "decoder", "classifier")
        if any(name.startswith(f"{part}.") for name in kept)
    ]
    return _CARD.format(
        library=library,
        title=folder.name,
        # The name alone: a path would reveal this machine's folders.
        source=Path(weights.source).name,
        layout=weights.layout,
        parts=", ".join(parts),
        encoder=encoder,
        tubelet=" × ".join(str(length) for length in settings.encoder.tubelet),
        frames=settings.clip.frames,
        size=settings.clip.size,
        tokens=figures.tokens,
        visible=figures.visible_tokens,
        ratio=settings.test_ratio,
        classes=_classes_text(weights, settings)
        if "classifier" in parts
        else "none: it has no classifier",
        as_what=""
        if "classifier" in parts
        else f", with a {settings.classifier.kind} classifier put on",
        gflops=figures.gflops,
        params=figures.params_m,
        how=how.replace("DIR", folder.name),
    )
