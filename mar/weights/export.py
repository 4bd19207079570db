"""Writes weights: our own format, Hugging Face's VideoMAE, and ONNX.

The first two are folders of safetensors, ``config.json`` and a model card.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor, nn

from mar import plugins
from mar.atomic_dir import Writers, write_atomic_dir, write_text
from mar.config.overrides import without_paths
from mar.config.schema import TrainingConfig
from mar.errors import Failure, UserError
from mar.model.encoder import patchify
from mar.model.flops import cost
from mar.model.mar import MAR, num_hidden_of, split_indices
from mar.model.masking import evaluation_mask
from mar.model.pixels import IMAGENET_MEAN, IMAGENET_STD
from mar.weights.pretrained import fitting, load
from mar.weights.reading import Weights
from mar.weights.state_dict_mapping import hugging_face_names

_ONNX_TOLERANCE = 1e-3
"""The largest difference from PyTorch, relative to the largest score, or to 1 if that is larger."""
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
    frames, height, width = settings.encoder.tubelet
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
    dimensions = settings.encoder.dimensions
    decoder = settings.reconstruction
    # The names are those of ``VideoMAEConfig``. An MLP is four times as wide as its tokens.
    config = {
        "model_type": "videomae",
        "architectures": [architecture],
        "image_size": settings.clip.size,
        "num_frames": settings.clip.frames,
        "patch_size": height,
        "tubelet_size": frames,
        "hidden_size": dimensions[0],
        "num_hidden_layers": dimensions[1],
        "num_attention_heads": dimensions[2],
        "intermediate_size": 4 * dimensions[0],
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
    how = _HOW_HUGGING_FACE.format(architecture=architecture)
    card = _card(folder, weights, settings, kept, "transformers", how)
    files = {"config.json": config, "preprocessor_config.json": _processor(settings.clip.size)}
    named = hugging_face_names(kept, settings.encoder.tubelet)
    _write(folder, named, files, card)
    return [name for name in weights.tensors if name not in kept]


def _architecture(kept: Mapping[str, Tensor], pooled: bool) -> str:
    """Return the name of the class of ``transformers`` that has these parts."""
    if pooled:
        return "VideoMAEForVideoClassification"
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


class Inference(nn.Module):
    """The deployed model: from pixels to class scores, under the mask of evaluation.

    Where the mask does not see the clip, hidden tubelets are never read.
    """

    visible: Tensor
    order: Tensor

    def __init__(self, model: MAR, settings: TrainingConfig) -> None:
        super().__init__()
        self.model = model
        drawn = evaluation_mask(settings)
        self.num_hidden = num_hidden_of(drawn)
        self.sees_clip = drawn.dtype != torch.bool
        # A mask that does not see the clip is fixed in testing, so the graph has its indices as a
        # constant. Of one that does, the graph has the order, and makes the mask itself.
        if self.sees_clip:
            self.register_buffer("order", drawn)
        else:
            self.register_buffer("visible", split_indices(drawn)[0])

    def forward(self, pixels: Float[Tensor, "B C T H W"]) -> Float[Tensor, "B classes"]:
        """Return the class scores."""
        # Not ``len(pixels)``: torch.export would make the number of clips a constant.
        num_clips = pixels.shape[0]
        if self.sees_clip:
            tubelets = patchify(pixels, self.model.tubelet)
            order = self.order.expand(num_clips, -1, -1, -1)
            indices, _ = self.model.indices(order, tubelets, self.num_hidden)
        else:
            indices = self.visible.expand(num_clips, -1)
        tokens = self.model.encode(pixels, indices)
        assert self.model.classifier is not None
        return self.model.classifier(tokens, indices)


def write_onnx(file: Path, weights: Weights, settings: TrainingConfig) -> float:
    """Write the inference path to ONNX, for any number of clips at once.

    Returns:
        The largest difference of onnxruntime's class scores from PyTorch's, on two random clips;
        onnxruntime reads the file that was written.

    Raises:
        UserError: the file exists already, onnx is not installed, or the weights have no
            classifier.
    """
    if not all(find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime")):
        raise UserError(
            "ONNX needs onnx, onnxscript and onnxruntime: pip install 'mar-on-ray[onnx]'"
        )
    if file.exists():
        raise UserError(f"{file} exists already: choose another name, or remove it")
    model = MAR(settings).eval()
    if model.classifier is None:
        raise UserError(
            f"{weights.source} ({weights.layout}) has no classifier: it was pre-trained only; "
            "fine-tune it first"
        )
    load(model, weights, settings, ("encoder.", "classifier."))
    clip = settings.clip
    # Two clips and not one: torch.export treats a dimension of length 1 as a constant.
    pixels = torch.rand(
        2, 3, clip.frames, clip.size, clip.size, generator=torch.Generator().manual_seed(0)
    )
    inference = Inference(model, settings).eval()
    with torch.no_grad():
        expected = inference(pixels)
        program: Any = torch.onnx.export(
            inference,
            (pixels,),
            dynamo=True,
            verbose=False,
            input_names=["pixels"],
            output_names=["scores"],
            dynamic_shapes={"pixels": {0: torch.export.Dim("clips", min=1, max=4096)}},
            custom_translation_table={torch.ops.aten.sort.stable: _stable_sort},
        )
    # The file gets its name after it has been compared, so a wrong one is never used.
    unfinished = file.with_name(f".{file.name}.unfinished")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if weights.classes:
            # An ONNX file has no config beside it, so the names travel inside.
            program.model.metadata_props["classes"] = json.dumps(
                weights.classes, ensure_ascii=False
            )
        program.save(unfinished, external_data=False)
        difference = _onnx_difference(unfinished, pixels, expected)
        limit = _ONNX_TOLERANCE * max(1.0, expected.abs().max().item())
        # Not ``difference > limit``: a difference that is NaN must not pass.
        if not difference <= limit:
            raise Failure(
                f"onnxruntime and PyTorch differ by {difference:.1e}; {file} was not written"
            )
        unfinished.rename(file)
    except OSError as error:
        raise Failure(f"could not write {file}: {error.strerror or error}") from None
    finally:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)
    return difference


def _stable_sort(
    values: Any, *, stable: bool = True, dim: int = -1, descending: bool = False
) -> Any:
    """Return ONNX's nodes for a stable sort, which PyTorch's exporter does not know.

    ONNX's TopK of all values is one: of equal values the one of the lower index comes first.
    """
    # An optional package, which ``write_onnx`` has found.
    import onnx
    import onnxscript

    # Its functions have types of their own for what are tensors of the graph here.
    op: Any = onnxscript.opset18
    # TopK takes no small integers; those here are indices and masks.
    is_float = values.dtype is not None and values.dtype.is_floating_point()
    sortable = values if is_float else op.Cast(values, to=onnx.TensorProto.INT64)
    length = op.Reshape(op.Gather(op.Shape(values), dim, axis=0), [1])
    ordered, places = op.TopK(sortable, length, axis=dim, largest=int(descending), sorted=1)
    if not is_float:
        ordered = op.CastLike(ordered, values)
    return ordered, places


def _onnx_difference(file: Path, pixels: Tensor, expected: Tensor) -> float:
    """Return the largest difference of onnxruntime's scores from the expected ones.

    Both clips are tested at once, and the first alone, because the number of clips is dynamic.
    """
    # An optional package: nothing but this comparison needs it.
    import onnxruntime

    session: Any = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    largest: list[float] = []
    for part, wanted in ((pixels, expected), (pixels[:1], expected[:1])):
        (scores,) = session.run(None, {"pixels": part.numpy()})
        largest.append((torch.from_numpy(scores) - wanted).abs().max().item())
    # Not max(): it would drop a NaN that comes second.
    return torch.tensor(largest).max().item()


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
