"""The verb for pre-trained weights: mar weights.

Parsing and printing, nothing else.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Annotated, Literal

import typer

from mar.errors import UserError
from mar.safe_text import printable
from orchestration.cli.options import DEFAULT_STORE, StoreFolder

weights_app = typer.Typer(
    no_args_is_help=True, help="Look at pre-trained weights, convert and export them."
)

WeightsSource = Annotated[
    str,
    typer.Argument(
        metavar="SRC",
        help=(
            "A file, a folder, organisation/model[@revision] on Hugging Face, "
            "hub:organisation/model/file, or a timm model's name."
        ),
    ),
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[path=value …]", help="Settings, as encoder.heads=3.")
]


@weights_app.command("show")
def weights_show(
    source: WeightsSource,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print a checkpoint's layout and sizes, and the tensors that the model does not use."""
    from mar.weights.pretrained import contents
    from mar.weights.reading import read_weights

    weights = read_weights(source)
    # Shapes, not values: a model has millions of them.
    if as_json:
        shapes = {name: list(tensor.shape) for name, tensor in weights.tensors.items()}
        payload = {
            "layout": weights.layout,
            "settings": weights.settings,
            "tensors": shapes,
            "unused": weights.unused,
        }
        print(json.dumps(payload, indent=1, ensure_ascii=False))
        return
    print(contents(weights))


@weights_app.command("list")
def weights_list(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print pre-trained weights that mar is known to read: where they are, their licence, a recipe.

    Nothing is downloaded.
    """
    from mar.weights.known_weights import known_weights

    every = known_weights()
    if as_json:
        print(json.dumps([each.model_dump() for each in every], indent=1, ensure_ascii=False))
        return
    for each in every:
        print(each.name)
        epochs = f", {each.epochs} epochs" if each.epochs else ""
        lines = {
            "model": each.model,
            "from": each.address,
            "data": f"{each.data}{epochs}",
            "accuracy": each.accuracy,
            "licence": each.licence,
            "settings": each.settings,
            "recipe": each.recipe,
            "checked": each.checked,
        }
        for label, text in lines.items():
            if text:
                print(f"  {label:<10} {text}")


@weights_app.command("convert")
def weights_convert(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SRC",
            help=(
                "As for mar weights show; or a recipe file (.yaml), for the model that was "
                "trained by it in --store."
            ),
        ),
    ],
    folder: Annotated[Path, typer.Argument(metavar="DST", help="Folder to write.")],
    overrides: Overrides = None,
    to: Annotated[Literal["mar", "huggingface"], typer.Option(help="Format of the files.")] = "mar",
    store: StoreFolder = DEFAULT_STORE,
) -> None:
    """Write a checkpoint of any known layout as safetensors, config.json and a model card."""
    _convert(source, folder, overrides, to, store)
    print(f"written    {folder}")


@weights_app.command("push")
def weights_push(
    source: Annotated[str, typer.Argument(metavar="SRC", help="As for mar weights convert.")],
    name: Annotated[
        str, typer.Argument(metavar="OWNER/NAME", help="Repository on the hub; made if missing.")
    ],
    overrides: Overrides = None,
    to: Annotated[Literal["mar", "huggingface"], typer.Option(help="Format of the files.")] = "mar",
    public: Annotated[
        bool, typer.Option("--public", help="Make a new repository public; else it is private.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Write the files, say what would be sent, stop.")
    ] = False,
    store: StoreFolder = DEFAULT_STORE,
) -> None:
    """Upload a checkpoint to Hugging Face (or the hub at HF_ENDPOINT), with a model card."""
    from mar.weights.push import check_target, hub_address, listing, push

    check_target(name)
    with tempfile.TemporaryDirectory() as parent:
        # The card has the folder's name as its title.
        folder = Path(parent) / name.rpartition("/")[2]
        _convert(source, folder, overrides, to, store)
        for file, size in listing(folder):
            print(f"file       {file}, {size / 2**20:.2f} MiB")
        if dry_run:
            print(f"not sent   to {hub_address()}/{name}: --dry-run")
            return
        print(f"sent       {push(folder, name, public)}")


def _convert(
    source: str,
    folder: Path,
    overrides: list[str] | None,
    to: Literal["mar", "huggingface"],
    store: Path,
) -> None:
    """Write a checkpoint to a folder, and print what it has."""
    from mar.weights.export import write_hugging_face, write_model
    from mar.weights.pretrained import contents, model_settings
    from mar.weights.reading import read_weights
    from orchestration.studies.recipe import parse_overrides

    if source.endswith(".yaml"):
        source = str(_trained_by(source, store))
    weights = read_weights(source)
    settings = model_settings(weights, parse_overrides(overrides or []))
    # transformers' VideoMAE has no modules for a bridging classifier's tensors.
    left_out: list[str] = []
    if to == "huggingface":
        left_out = write_hugging_face(folder, weights, settings)
    else:
        write_model(folder, weights, settings)
    print(contents(weights))
    # A name comes from the checkpoint: it may contain the escape codes of a terminal.
    if left_out:
        print(
            f"left out   {len(left_out)} tensors that this format cannot hold, the first: "
            f"{printable(left_out[0])}"
        )


def _trained_by(recipe: str, store: Path) -> Path:
    """Return the result folder of a recipe's training.

    Raises:
        UserError: the file is not a recipe, or the store has no finished training of it.
    """
    from mar import MANIFEST, RESULT_DIR
    from orchestration.stored_results import best_result
    from orchestration.studies.loader import read_study

    study = read_study(recipe)
    if len(study.trials) > 1:
        raise UserError(f"{recipe} is a study of {len(study.trials)} trials; name a recipe")
    result = store / "trials" / study.trials[0].key / RESULT_DIR
    # The manifest is written last: without it the training has not finished.
    if (result / MANIFEST).is_file():
        return result
    # A training of an earlier version has a folder of another name: its run in MLflow is found.
    return best_result(recipe, store=store)


@weights_app.command("export")
def weights_export(
    source: WeightsSource,
    file: Annotated[Path, typer.Argument(metavar="FILE.onnx", help="File to write.")],
    overrides: Overrides = None,
) -> None:
    """Write the inference path under the evaluation mask to ONNX, and compare it with PyTorch."""
    from mar.weights.onnx_export import write_onnx
    from mar.weights.pretrained import model_settings
    from mar.weights.reading import read_weights
    from orchestration.studies.recipe import parse_overrides

    weights = read_weights(source)
    # ``write_onnx`` runs the written model in onnxruntime, and compares it with PyTorch.
    difference = write_onnx(
        file, weights, model_settings(weights, parse_overrides(overrides or []))
    )
    print(f"{file}: input pixels (clips, 3, T, H, W) from 0 to 1, output scores (clips, classes)")
    print(f"onnxruntime and PyTorch differ by at most {difference:.1e} on two random clips")
