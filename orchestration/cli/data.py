"""``mar data``: makes, checks, shows and packs data sets. Parsing and printing, nothing else."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from mar.safe_text import printable
from orchestration.cli.options import ObjectStoreUri
from orchestration.execution.progress_bar import progress_bar
from orchestration.installation import usable_cores

data_app = typer.Typer(no_args_is_help=True, help="Make, check and pack data sets.")

RecipeName = Annotated[
    str,
    typer.Argument(metavar="RECIPE", help="A recipe file, or the name of one that ships with mar."),
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[path=value …]", help="Settings, as data.root=DIR.")
]
Processes = Annotated[
    int, typer.Option(min=1, help="Processes that decode; default: one for each core.")
]
_CORES = usable_cores()


def init(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="DIR", help="Videos: a folder for each class, perhaps below train and val."
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="Folder to write. Default: DIR's name and _recipe."),
    ] = None,
) -> None:
    """Write a recipe and lists for a folder of videos, and say what was guessed."""
    from mar.data.new_recipe import write_recipe
    from mar.data.video.files import absolute_path

    target = output or Path(f"{absolute_path(folder).name}_recipe")
    found = write_recipe(folder, target)
    print(
        printable(
            f"{len(found.classes)} classes: {', '.join(found.classes[:8])}"
            f"{', …' if len(found.classes) > 8 else ''}"
        )
    )
    how = {
        "folders": "by its own folders",
        "videos": "one video of five of each class for testing",
        "recordings": "one recording of five of each class for testing (g01 of g01_c02)",
    }
    print(
        f"{len(found.train)} training and {len(found.test)} test videos, divided "
        f"{how[found.divided_by]}"
    )
    if found.seconds is not None:
        print(f"median length {found.seconds:.1f} s at {found.fps:.1f} frames a second")
    for reason in found.broken[:3]:
        print(printable(f"broken: {reason}"))
    recipe = target / "recipe.yaml"
    frames = target / "frames"
    print(f"written {recipe} (its comments say what was guessed), train.txt, val.txt, labels.txt")
    print(f"next: mar data check {recipe}")
    print(f"      mar data pack {recipe} {frames} --short-side 54 --format raw")
    print(f"      mar run {recipe} data.cache={frames}")


@data_app.command("make")
def data_make(
    kind: Annotated[Literal["motion-verbs"], typer.Argument(help="The data set to make.")],
    folder: Annotated[Path, typer.Argument(metavar="DIR")],
    difficulty: Annotated[
        Literal["easy", "medium", "hard"],
        typer.Option(help="Sets the defaults of the other options."),
    ] = "easy",
    seed: Annotated[int, typer.Option(min=0)] = 0,
    size: Annotated[int | None, typer.Option(help="Height and width, pixels.")] = None,
    frames: Annotated[int | None, typer.Option(help="Frames in a video.")] = None,
    classes: Annotated[int | None, typer.Option(help="2 to 12, even.")] = None,
    train: Annotated[int | None, typer.Option(help="Training videos.")] = None,
    validation: Annotated[int | None, typer.Option(help="Validation videos.")] = None,
    clutter: Annotated[int | None, typer.Option(help="Objects that do not move.")] = None,
    shake: Annotated[float | None, typer.Option(help="Camera shake, share of the height.")] = None,
    motion: Annotated[
        float | None, typer.Option(help="Share of each motion that is shown; 0: pictures.")
    ] = None,
) -> None:
    """Make a set of H.264 videos whose classes differ only in motion."""
    from mar.data.motion_verbs import DIFFICULTIES, make

    given: dict[str, Any] = {
        "size": size,
        "frames": frames,
        "classes": classes,
        "train": train,
        "validation": validation,
        "clutter": clutter,
        "shake": shake,
        "motion": motion,
    }
    # Options that are not given have the value of the difficulty.
    chosen = {name: value for name, value in given.items() if value is not None}
    options = replace(DIFFICULTIES[difficulty], seed=seed, **chosen)
    with progress_bar("videos") as advance:
        made = make(folder, options, advance, _CORES)
    # ``make`` writes nothing if the folder has the same set already.
    outcome = f"is in {folder} already"
    if made:
        outcome = f"made in {folder}"
    print(
        f"{kind}: {options.train} training and {options.validation} validation videos of "
        f"{options.classes} classes {outcome}"
    )


@data_app.command("check")
def data_check(
    recipe: RecipeName,
    overrides: Overrides = None,
    processes: Processes = _CORES,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="csv file for all findings.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Read a data set as training would. Exit code 1 if training would meet a fault."""
    from mar.data.validation import check_data, report_text, write_findings
    from orchestration.studies.recipe import read_recipe

    settings = read_recipe(recipe, overrides or [])
    with progress_bar("videos") as advance:
        report = check_data(settings.data, settings.clip, processes, advance)
    if output:
        write_findings(report, output)
    if as_json:
        print(json.dumps(asdict(report), indent=1, ensure_ascii=False))
    else:
        print(report_text(report))
    # A script that prepares data can test the exit code.
    if not report.is_sound:
        sys.exit(1)


@data_app.command("show")
def data_show(
    recipe: RecipeName,
    overrides: Overrides = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="Picture to write.")] = Path(
        "clips.png"
    ),
    clips: Annotated[int, typer.Option(min=1, help="Number of clips.")] = 16,
    frames: Annotated[int, typer.Option(min=1, help="Number of frames of each clip.")] = 3,
) -> None:
    """Draw clips as training sees them: cropped, augmented, mixed, with their labels."""
    from mar.visualization.masks_and_clips import draw_clips
    from orchestration.studies.recipe import read_recipe

    draw_clips(read_recipe(recipe, overrides or []), clips, frames, output)
    print(output)


@data_app.command("pack")
def data_pack(
    recipe: RecipeName,
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="DIR", help="Folder of the cache; a study uses it with data.cache=DIR."
        ),
    ],
    overrides: Overrides = None,
    kind: Annotated[
        Literal["jpeg", "raw"], typer.Option("--format", help="JPEG is small, raw is quick.")
    ] = "jpeg",
    short_side: Annotated[
        int, typer.Option(min=16, help="Shorter side, pixels; smaller videos keep their size.")
    ] = 256,
    quality: Annotated[int, typer.Option(min=1, max=100, help="Quality of JPEG.")] = 90,
    processes: Processes = _CORES,
    verify: Annotated[
        bool, typer.Option("--verify", help="Compare every shard with its checksum.")
    ] = False,
    object_store: ObjectStoreUri = None,
) -> None:
    """Write each video's frames once, in a small size, for all trials to read.

    If it was stopped, the same command resumes.
    """
    from mar.data.cache_index import Packing
    from mar.data.frame_cache import pack
    from mar.data.frame_cache import verify as damaged_shards
    from mar.errors import Failure
    from orchestration.studies.recipe import read_recipe

    data = read_recipe(recipe, overrides or []).data
    with progress_bar("videos") as advance:
        # The number of videos that an earlier call had packed.
        before = pack(data, folder, Packing(kind, short_side, quality), processes, advance)
    _print_cache(folder, before)
    # Before an upload: a damaged shard must not reach the other nodes.
    if verify:
        with progress_bar("shards") as advance:
            damaged = damaged_shards(folder, advance)
        if damaged:
            raise Failure(
                f"{folder}: damaged: {', '.join(damaged)}; remove them and their .json, and pack "
                "again"
            )
        print("every shard is unchanged")
    if object_store:
        from orchestration.storage.object_store import open_object_store
        from orchestration.storage.trial_sync import push_cache

        uploaded = push_cache(open_object_store(object_store), folder)
        print(
            f"{uploaded} files uploaded to {object_store}; "
            f"mar run … data.cache=DIR --cache-from {object_store}"
        )


def _print_cache(folder: Path, num_before: int) -> None:
    """Print what a frame cache contains; ``num_before`` videos were packed by earlier calls."""
    from mar.data.cache_index import Index

    # From the index and not from this call: an earlier call may have packed some of the videos.
    entries = [entry for _, entry in Index(folder).entries.values()]
    # The shards alone: the index beside them is small.
    size_gib = sum(file.stat().st_size for file in folder.glob("*.bin")) / 2**30
    broken = [entry.name for entry in entries if entry.broken]
    print(
        f"{folder}: {len(entries)} videos ({num_before} were there), "
        f"{sum(entry.num_frames for entry in entries)} frames, {size_gib:.2f} GiB"
    )
    # Training treats them as ``data.broken`` says.
    if broken:
        print(f"{len(broken)} gave no frames, the first: {printable(broken[0])}")
