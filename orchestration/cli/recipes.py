"""The verbs for recipes: settings, show, diff, cost, mask."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Annotated

import typer

from mar.errors import UserError
from orchestration.cli.options import AsJson, Output, Overrides, RecipeName


def show(
    recipe: Annotated[
        str | None,
        typer.Argument(metavar="[RECIPE]", help="A recipe; none: list what ships with mar."),
    ] = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Print all settings of a recipe, with its defaults; or list the studies and recipes."""
    import yaml

    from orchestration.studies.recipe import read_recipe
    from orchestration.studies.yaml_document import shipped

    if recipe is None:
        names = shipped()
        if as_json:
            print(json.dumps(names, indent=1, ensure_ascii=False))
            return
        width = max(map(len, names)) + 2
        for name, meaning in names.items():
            print(f"{name:<{width}}{meaning}")
        print("\nA recipe of yours may start from one of these: extends: recipes/real_clips.yaml")
        return
    tree = read_recipe(recipe, overrides or []).model_dump(mode="json")
    # In the schema's order, which keeps related settings together.
    text = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, default_flow_style=None)
    if as_json:
        print(json.dumps(tree, indent=1, ensure_ascii=False))
    else:
        print(text.rstrip())


def settings(
    path: Annotated[
        str,
        typer.Argument(metavar="[PATH]", help="A setting or branch, as mask or mask.ratio."),
    ] = "",
    as_json: AsJson = False,
) -> None:
    """Explain the settings of a recipe: what each means, its type, default and source."""
    from dataclasses import asdict

    from mar.config.reference import settings_below

    found = settings_below(path)
    if as_json:
        print(json.dumps([asdict(each) for each in found], indent=1, ensure_ascii=False))
        return
    for each in found:
        print(f"{each.path} = {each.default}    ({each.type})")
        print(textwrap.fill(each.meaning, 96, initial_indent="    ", subsequent_indent="    "))


def diff(
    first: RecipeName,
    second: Annotated[str, typer.Argument(metavar="RECIPE", help="The other recipe.")],
    as_json: AsJson = False,
) -> None:
    """Name every setting in which two recipes differ, and the reason that the recipes give."""
    from orchestration.studies.diff import differences

    found = differences(first, second)
    if as_json:
        print(json.dumps([vars(each) for each in found], indent=1, ensure_ascii=False))
        return
    # Columns as wide as their widest value; equal recipes have none (``default``).
    width = max((len(each.setting) for each in found), default=0)
    # The values as text, to know the width of their columns.
    values = [(f"{each.first}", f"{each.second}") for each in found]
    widths = [max((len(pair[side]) for pair in values), default=0) for side in (0, 1)]
    for each, (one, other) in zip(found, values, strict=True):
        columns = (f"{each.setting:<{width}}", f"{one:>{widths[0]}}", f"{other:>{widths[1]}}")
        # Not every difference has a reason: such a line would end in spaces.
        print("  ".join([*columns, each.reason]).rstrip())
    if found:
        print(f"{len(found)} settings differ")
    else:
        print("equal: no setting differs")


def cost(
    recipe: Annotated[
        str | None, typer.Argument(metavar="RECIPE", help="A recipe file or name.")
    ] = None,
    overrides: Overrides = None,
    memory: Annotated[
        bool, typer.Option("--memory", help="Also train a few steps on the CUDA device here.")
    ] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Clips in a step, for --memory.")] = 1,
    paper: Annotated[
        bool,
        typer.Option("--paper", help="Compare the paper's figures with ours; needs no recipe."),
    ] = False,
    output: Output = None,
    as_json: AsJson = False,
) -> None:
    """Print GFLOPs in the paper's convention, parameters, tokens, and peak training memory."""
    # Two commands in one: the costs of a recipe, and the page of all costs in the paper.
    if paper and (recipe or memory):
        raise UserError("cost: --paper takes no recipe and no --memory; leave them out")
    if output and not paper:
        raise UserError("cost: -o is for the page that --paper makes; a recipe's cost is printed")
    if paper:
        _print_paper_costs(output, as_json)
        return
    if recipe is None:
        raise UserError(
            "cost: which recipe? (or --paper, to compare the paper's figures with ours)"
        )
    from dataclasses import asdict

    from mar.model.flops import cost as cost_of
    from orchestration.studies.recipe import read_recipe

    settings = read_recipe(recipe, overrides or [])
    figures: dict[str, float | int] = asdict(cost_of(settings))
    units = dict(_UNITS)
    # Measured, not computed: it depends on the device and on PyTorch's allocator.
    if memory:
        from mar.training.memory import peak_training_memory_gib

        figures["peak_training_gib"] = peak_training_memory_gib(settings, batch_size)
        units["peak_training_gib"] = (
            f"GiB at the peak of training, {batch_size} clips a step, measured here"
        )
    if as_json:
        print(json.dumps(figures, indent=1))
        return
    for name, value in figures.items():
        # Numbers of tokens are integers; the others are rounded.
        digits = 0
        if isinstance(value, float):
            digits = 2
        print(f"{value:>10.{digits}f}  {units[name]}")


# The keys are the fields of ``mar.model.flops.Cost``, in the order in which they are printed.
_UNITS = {
    "gflops": "GFLOPs a view, inference",
    "train_gflops": "GFLOPs a clip, training step",
    "params_m": "M parameters",
    "train_params_m": "M parameters with the reconstruction branch",
    "tokens": "tokens a clip",
    "visible_tokens": "visible tokens a clip, in testing",
}


def _print_paper_costs(output: Path | None, as_json: bool) -> None:
    """Print the paper's costs beside ours; with ``output``, write a page with them."""
    from orchestration.reporting.paper_costs import cost_frame, write_page

    text = write_page(output)
    if as_json:
        print(cost_frame().to_json(orient="records", indent=1, force_ascii=False))
    else:
        print(output or text)


def mask(
    recipe: RecipeName,
    overrides: Overrides = None,
    output: Output = None,
    clips: Annotated[int, typer.Option(min=0, help="Number of random masks, as in training.")] = 3,
    video: Annotated[
        Path | None,
        typer.Option(help="Draw over the frames of a video; needed by masks that see the clip."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Draw a recipe's masks, as in Figs. 3 and 4; with --json print them, 1 for a hidden token."""
    from mar.model.mar import MAR
    from mar.visualization.masks_and_clips import draw_masks, example_masks, middle_clip
    from mar.weights.pretrained import load
    from mar.weights.reading import read_weights
    from orchestration.studies.recipe import read_recipe

    settings = read_recipe(recipe, overrides or [])
    pixels = None
    if video is not None:
        pixels = middle_clip(settings, video)
    elif settings.mask.sees_clip and (settings.mask.hides or settings.test_ratio):
        raise UserError(f"mask: {settings.mask.strategy} sees the clip: which? Give --video FILE")
    network = None
    if settings.mask.sees_embeddings:
        network = MAR(settings)
        if settings.encoder.weights:
            load(network, read_weights(settings.encoder.weights), settings, ("encoder.",))
    masks = example_masks(settings, clips, pixels, network)
    if as_json:
        print(json.dumps({name: hidden.int().tolist() for name, hidden in masks.items()}))
        return
    chosen = settings.mask
    file = output or Path("mask.png")
    what = f"{chosen.strategy} {chosen.motion}"
    if chosen.sees_clip:
        what = chosen.strategy
        if chosen.strategy == "cell":
            what += f", {chosen.content:.0%} by {chosen.choice}"
        if chosen.keep == "least":
            what += " (least)"
    hidden = " or ".join(f"{each.first_ratio:.0%}" for each in chosen.in_training)
    draw_masks(masks, f"{what}, {hidden} hidden (dark)", file, pixels)
    print(file)
