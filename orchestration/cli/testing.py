"""The verbs that run a model over a data set: evaluate, features.

Parsing and printing, nothing else.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mar.errors import UserError
from orchestration.cli.options import Overrides

if TYPE_CHECKING:
    from mar.inference import Model

ModelWeights = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="Weights of any layout: a trial's result folder, a file …"
    ),
]
TestRecipe = Annotated[
    str | None,
    typer.Option("--recipe", help="Recipe whose data, clip, mask and evaluation settings to take."),
]
_TEST_SETTINGS = ("data", "clip", "mask", "evaluation")
"""Groups of settings that are taken from ``--recipe``; the model has the others."""


def evaluate(
    model: ModelWeights,
    overrides: Overrides = None,
    recipe: TestRecipe = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="csv file for the predictions.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Test a model on a data set's validation split, with all views; nothing is trained."""
    from mar.data.annotations import read_split
    from mar.distributed import default_device
    from mar.evaluation.evaluator import Evaluator, write_predictions
    from mar.weights.pretrained import read_model

    settings, trained, _ = read_model(model, {}, _changes(recipe, overrides))
    videos = read_split(settings.data, "val")
    device = default_device()
    views = settings.evaluation
    evaluator = Evaluator(settings, videos, device, clips=views.clips, crops=views.crops)
    predictions = evaluator(trained.to(device))
    metrics = predictions.metrics("test")
    if output:
        write_predictions(predictions, videos, output)
    if as_json:
        print(json.dumps(metrics, indent=1))
        return
    summary = (
        f"top-1 {metrics['test/top1']:.2f} %, top-5 {metrics['test/top5']:.2f} % of "
        f"{len(predictions.labels)} videos ({views.clips} clips × {views.crops} crops, "
        f"{settings.test_ratio:.0%} hidden)"
    )
    # A broken video has no prediction, so the percentages are of the others.
    if predictions.broken:
        summary += f"; {len(predictions.broken)} more could not be decoded"
    print(summary)


def features(
    model: ModelWeights,
    overrides: Overrides = None,
    recipe: TestRecipe = None,
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Folder to write: train and val below it.")
    ] = Path("features"),
    per_token: Annotated[
        bool, typer.Option("--per-token", help="All tokens of all views, not their mean.")
    ] = False,
    probe: Annotated[
        bool, typer.Option("--probe", help="Also classify: by 20 neighbours, and linearly.")
    ] = False,
    parquet: Annotated[
        bool, typer.Option("--parquet", help="Also write a Parquet file for each split.")
    ] = False,
    loader_processes: Annotated[int, typer.Option(min=0, help="Processes that decode.")] = 0,
) -> None:
    """Write the encoder's features of a data set; run again, it goes on where it was ended."""
    from mar.config.overrides import without_paths
    from mar.data.annotations import class_names, fingerprint, read_split
    from mar.evaluation.features import FeatureOptions, write_features, write_parquet
    from mar.weights.hub import fingerprint as weights_fingerprint

    for option, is_given in (("--probe", probe), ("--parquet", parquet)):
        if is_given and per_token:
            raise UserError(f"features: {option} is of pooled features; leave --per-token out")
    trained = _encoder(model, _changes(recipe, overrides))
    settings = trained.settings
    for split in ("train", "val"):
        videos = read_split(settings.data, split)
        description = {
            "weights": weights_fingerprint(model),
            "data": fingerprint(settings.data),
            "settings": without_paths(settings),
            "split": split,
            "videos": [video.name for video in videos],
        }
        broken = write_features(
            trained.network,
            settings,
            videos,
            output / split,
            description,
            FeatureOptions(per_token=per_token, loader_processes=loader_processes),
            progress=lambda done, count, split=split: print(f"{split}: {done} of {count} videos"),
        )
        if broken:
            print(f"{split}: {broken} videos could not be decoded")
        if parquet:
            print(f"written {write_parquet(output / split, videos, class_names(settings.data))}")
    print(f"written {output} (features_*.safetensors, features.json)")
    if probe:
        _print_probes(output)


def _changes(recipe: str | None, overrides: list[str] | None) -> dict[str, Any]:
    """Return the settings that replace a model's own, by path: a recipe's, then the overrides."""
    from mar.config.overrides import flatten
    from orchestration.studies.recipe import parse_overrides, recipe_tree

    shared: dict[str, Any] = {}
    if recipe:
        tree = recipe_tree(recipe)
        shared = {name: tree[name] for name in _TEST_SETTINGS if name in tree}
    return {**flatten(shared), **flatten(parse_overrides(overrides or []))}


def _encoder(name: str, changes: dict[str, Any]) -> Model:
    """Return a model with its encoder alone: the data may have other classes than it knows.

    Raises:
        UserError: the file has no encoder.
    """
    from dataclasses import replace

    from mar.distributed import default_device
    from mar.inference import Model
    from mar.weights.reading import read_weights

    weights = read_weights(name)
    tensors = {key: value for key, value in weights.tensors.items() if key.startswith("encoder.")}
    if not tensors:
        raise UserError(f"{name} ({weights.layout}): no encoder in it")
    # Pairs of classes to swap are for training, and may be none of this data.
    trained = Model.of(replace(weights, tensors=tensors), {"augment.flip_swaps": [], **changes})
    return trained.to(default_device())


def _print_probes(folder: Path) -> None:
    from mar.evaluation.features import linear_probe, nearest_neighbours, read_features

    train = read_features(folder / "train")
    val = read_features(folder / "val")
    print(f"20 nearest neighbours  {nearest_neighbours(train, val):.2f} %")
    print(f"linear                 {linear_probe(train, val):.2f} %")
