"""``mar weights``: look at pre-trained weights, convert and export them. Parsing and printing, nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

weights_app = typer.Typer(no_args_is_help=True, help="Look at pre-trained weights, convert and export them.")

Source = Annotated[
    str,
    typer.Argument(metavar="SRC", help="A file, a folder, organisation/model on Hugging Face, or a timm model's name."),
]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[path=value …]", help="Settings, as encoder.heads=3.")]


@weights_app.command("show")
def weights_show(source: Source, as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Print whose layout a checkpoint has, its sizes, and what the model has no use for."""
    from mar.pretrained import contents, read_weights

    weights = read_weights(source)
    if as_json:
        shapes = {name: list(tensor.shape) for name, tensor in weights.tensors.items()}
        told = {"layout": weights.layout, "settings": weights.settings, "tensors": shapes, "unused": weights.unused}
        print(json.dumps(told, indent=1, ensure_ascii=False))
        return
    print(contents(weights))


@weights_app.command("convert")
def weights_convert(
    source: Source,
    folder: Annotated[Path, typer.Argument(metavar="DST", help="Folder to make.")],
    overrides: Overrides = None,
    to: Annotated[Literal["mar", "huggingface"], typer.Option(help="Whose format.")] = "mar",
) -> None:
    """Write a checkpoint of any known layout as safetensors, config.json and a model card."""
    from mar.export import write_hugging_face, write_model
    from mar.pretrained import contents, model_settings, read_weights
    from orchestration.study import parse_overrides

    weights = read_weights(source)
    settings = model_settings(weights, parse_overrides(overrides or []))
    left = (
        write_hugging_face(folder, weights, settings) if to == "huggingface" else write_model(folder, weights, settings)
    )
    print(contents(weights))
    if left:
        print(f"left out   {len(left)} tensors that this format has no place for, the first: {left[0]}")
    print(f"written    {folder}")


@weights_app.command("export")
def weights_export(
    source: Source,
    file: Annotated[Path, typer.Argument(metavar="FILE.onnx", help="File to write.")],
    overrides: Overrides = None,
) -> None:
    """Write the inference path under the mask of evaluation to ONNX, and compare it with PyTorch."""
    from mar.export import write_onnx
    from mar.pretrained import model_settings, read_weights
    from orchestration.study import parse_overrides

    weights = read_weights(source)
    difference = write_onnx(file, weights, model_settings(weights, parse_overrides(overrides or [])))
    print(f"{file}: input pixels (clips, 3, T, H, W) from 0 to 1, output scores (clips, classes)")
    print(f"onnxruntime and PyTorch differ by at most {difference:.1e} on two random clips")
