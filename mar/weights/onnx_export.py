"""Writes the inference path of a model to ONNX, and compares it with PyTorch."""

from __future__ import annotations

import json
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mar.config.schema import TrainingConfig
from mar.errors import Failure, UserError
from mar.model.encoder import patchify
from mar.model.mar import MAR, num_hidden_of, split_indices
from mar.model.masking import evaluation_mask
from mar.weights.pretrained import load
from mar.weights.reading import Weights

_ONNX_TOLERANCE = 1e-3
"""The largest difference from PyTorch, relative to the largest score, or to 1 if that is larger."""


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
        program = _onnx_program(inference, pixels)
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


def _onnx_program(inference: Inference, pixels: Float[Tensor, "B C T H W"]) -> Any:
    """Return the ONNX program of a model, for any number of clips."""
    return torch.onnx.export(
        inference,
        (pixels,),
        dynamo=True,
        verbose=False,
        input_names=["pixels"],
        output_names=["scores"],
        dynamic_shapes={"pixels": {0: torch.export.Dim("clips", min=1, max=4096)}},
        custom_translation_table={torch.ops.aten.sort.stable: _stable_sort},
    )


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
    ordered, indices = op.TopK(sortable, length, axis=dim, largest=int(descending), sorted=1)
    if not is_float:
        ordered = op.CastLike(ordered, values)
    return ordered, indices


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
