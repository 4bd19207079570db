"""The command ``mar`` and its verbs: parsing and printing, nothing else.

Imports only what parsing needs; each verb imports its own, so that ``mar --help`` and ``mar plan`` are quick.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from mar.errors import Failure, UserError
from orchestration.cli.bench import bench
from orchestration.cli.data import data_app
from orchestration.cli.jobs import jobs_app, status, stop_study, submit
from orchestration.cli.options import DEFAULT_STORE, AsJson, Output, Overrides, RecipeName, StoreFolder, TrackingUri
from orchestration.cli.studies import figure, plan, report, run, table
from orchestration.cli.weights import evaluate, predict, reconstruct, weights_app
from orchestration.secrets import without_secrets

if TYPE_CHECKING:
    from orchestration.tracking.store import Store

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
app.add_typer(data_app, name="data")
app.add_typer(weights_app, name="weights")
app.add_typer(jobs_app, name="jobs")
app.command()(status)
app.command("stop")(stop_study)
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(submit)


def main() -> NoReturn:
    """Run the command; exit 0 done, 1 failed, 2 the user's mistake."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure:  # a terminal in the C locale must not stop a study over the × of "2 × 2"
            reconfigure(encoding="utf-8", errors="replace")
    try:
        app()
    except UserError as error:
        _end(str(error), 2)
    except Failure as error:
        _end(str(error), 1)
    except BrokenPipeError:
        sys.exit(1)
    except OSError as error:
        _end(str(error), 1)
    sys.exit(0)


def _links(address: str, store: Store) -> list[str]:
    return [f"  {study:<34} {address}{page}" for study, page in store.pages().items()]


def _end(words: str, code: int) -> NoReturn:
    print(f"mar: {without_secrets(words)}", file=sys.stderr)
    sys.exit(code)


for verb in (run, plan, table, figure, report, evaluate, predict, reconstruct, bench):
    app.command()(verb)


@app.command()
def show(recipe: RecipeName, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Print a recipe's settings, all of them, resolved."""
    import yaml

    from orchestration.studies.loader import read_recipe

    tree = read_recipe(recipe, overrides or []).model_dump(mode="json")
    text = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, default_flow_style=None)
    print(json.dumps(tree, indent=1, ensure_ascii=False) if as_json else text.rstrip())


@app.command()
def diff(
    first: RecipeName,
    second: Annotated[str, typer.Argument(metavar="RECIPE", help="The other recipe.")],
    as_json: AsJson = False,
) -> None:
    """Name every setting in which two recipes differ, and the reason the recipes give."""
    from orchestration.studies.diff import differences

    found = differences(first, second)
    if as_json:
        print(json.dumps([vars(each) for each in found], indent=1, ensure_ascii=False))
        return
    width = max((len(each.setting) for each in found), default=0)
    values = [(f"{each.first}", f"{each.second}") for each in found]
    widths = [max((len(pair[side]) for pair in values), default=0) for side in (0, 1)]
    for each, (one, other) in zip(found, values, strict=True):
        print(f"{each.setting:<{width}}  {one:>{widths[0]}}  {other:>{widths[1]}}  {each.reason}".rstrip())
    print(f"{len(found)} settings differ" if found else "equal: no setting differs")


@app.command()
def cost(
    recipe: Annotated[str | None, typer.Argument(metavar="RECIPE", help="A recipe file or name.")] = None,
    overrides: Overrides = None,
    memory: Annotated[bool, typer.Option("--memory", help="Also train a few steps on the CUDA device here.")] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Clips in a step, for --memory.")] = 1,
    paper: Annotated[bool, typer.Option("--paper", help="The paper's figures beside ours; needs no recipe.")] = False,
    output: Output = None,
    as_json: AsJson = False,
) -> None:
    """Print GFLOPs in the paper's convention, parameters, tokens, and peak training memory."""
    if paper and (recipe or memory):
        raise UserError("cost: --paper goes without a recipe and without --memory")
    if output and not paper:
        raise UserError("cost: -o is for the page that --paper makes; a recipe's cost is printed")
    if paper:
        from orchestration.reporting.paper_costs import cost_frame, write_page

        text = write_page(output)
        print(cost_frame().to_json(orient="records", indent=1, force_ascii=False) if as_json else output or text)
        return
    if recipe is None:
        raise UserError("cost: which recipe? (or --paper, for the paper's figures beside ours)")
    from dataclasses import asdict

    from mar.model.flops import cost as cost_of
    from orchestration.studies.loader import read_recipe

    settings = read_recipe(recipe, overrides or [])
    figures: dict[str, float | int] = asdict(cost_of(settings))
    units = {"gflops": "GFLOPs a view, inference", "train_gflops": "GFLOPs a clip, training step"}
    units |= {"params_m": "M parameters", "train_params_m": "M parameters with the reconstruction branch"}
    units |= {"tokens": "tokens a clip", "visible_tokens": "visible tokens a clip, in testing"}
    if memory:
        from mar.training.memory import peak_training_memory_gib

        figures["peak_training_gib"] = peak_training_memory_gib(settings, batch_size)
        units["peak_training_gib"] = f"GiB at the peak of training, {batch_size} clips a step, measured here"
    lines = (
        f"{value:>10.2f}  {units[name]}" if isinstance(value, float) else f"{value:>10d}  {units[name]}"
        for name, value in figures.items()
    )
    print(json.dumps(figures, indent=1) if as_json else "\n".join(lines))


@app.command()
def mask(
    recipe: RecipeName,
    overrides: Overrides = None,
    output: Output = None,
    clips: Annotated[int, typer.Option(min=0, help="Masks drawn as in training.")] = 3,
    as_json: AsJson = False,
) -> None:
    """Draw a recipe's masks, as in Figs. 3 and 4; with --json print them, 1 where hidden."""
    from mar.visualization.masks_and_clips import draw_masks, example_masks
    from orchestration.studies.loader import read_recipe

    settings = read_recipe(recipe, overrides or [])
    masks = example_masks(settings, clips)
    if as_json:
        print(json.dumps({name: hidden.int().tolist() for name, hidden in masks.items()}))
        return
    chosen, file = settings.mask, output or Path("mask.png")
    draw_masks(masks, f"{chosen.strategy} {chosen.motion}, {chosen.ratio:.0%} hidden (dark)", file)
    print(file)


@app.command()
def ui(
    store: StoreFolder = DEFAULT_STORE,
    tracking_uri: TrackingUri = None,
    port: Annotated[int, typer.Option(min=1, max=65535)] = 5000,
) -> None:
    """Open MLflow on the embedded store, for this machine only (loopback)."""
    import subprocess

    from orchestration.config import LaunchConfig
    from orchestration.tracking.store import Store, serve

    launch = LaunchConfig(store=store, tracking_uri=tracking_uri)
    if tracking_uri is None and not (store / "mlflow.db").is_file():
        raise UserError(f"--store {store}: no tracking store there yet; `mar run quickstart` makes one")
    if tracking_uri and tracking_uri.startswith("http"):
        links = _links(without_secrets(tracking_uri), Store(launch))
        print(f"the store is a server already: open {without_secrets(tracking_uri)}", *links, sep="\n")
        return
    address = f"http://127.0.0.1:{port}"
    print(f"MLflow at {address} (stop with Ctrl-C)", *_links(address, Store(launch)), sep="\n", flush=True)
    command, environment = serve(launch, port)
    sys.exit(subprocess.call([sys.executable, "-m", *command], env=environment))  # noqa: S603


@app.command()
def recover(store: StoreFolder = DEFAULT_STORE, tracking_uri: TrackingUri = None) -> None:
    """Write runs into MLflow for finished results whose database was lost. Exit code 1 if a result is damaged."""
    from orchestration.config import LaunchConfig
    from orchestration.execution.recover import recover as recover_store

    found = recover_store(LaunchConfig(store=store, tracking_uri=tracking_uri))
    for name in found.names:
        print(f"recovered  {name}")
    for damage in found.damaged:
        print(f"damaged    {damage}")
    print(f"{len(found.names)} recovered, {found.num_known} known before, {len(found.damaged)} damaged")
    if found.damaged:
        sys.exit(1)


@app.command()
def doctor(store: StoreFolder = DEFAULT_STORE, tracking_uri: TrackingUri = None, as_json: AsJson = False) -> None:
    """Try what mar needs here: devices, decoders, Ray, the tracking store. Exit code 1 if something does not work."""
    from orchestration.config import LaunchConfig
    from orchestration.diagnostics.doctor import examine

    findings = examine(LaunchConfig(store=store, tracking_uri=tracking_uri))
    if as_json:
        print(json.dumps([vars(finding) for finding in findings], indent=1))
    else:
        for finding in findings:
            print(f"{'ok  ' if finding.works else 'FAIL'}  {finding.name:<15} {finding.words}")
    if not all(finding.works for finding in findings):
        sys.exit(1)
