"""``mar bench``: measures how fast this machine trains, in comparison with peers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from mar.errors import UserError

# Spelled here and not imported: ``mar.bench`` loads PyTorch.
PARTS = ("step", "inference", "loader", "fed", "augmentation", "checkpoint")


def bench(
    parts: Annotated[
        list[str] | None,
        typer.Argument(metavar="[PART]...", help=f"{', '.join(PARTS)}; default: all."),
    ] = None,
    size: Annotated[
        str, typer.Option(help="The encoder: tiny, small, base, large, huge.")
    ] = "base",
    ratio: Annotated[float, typer.Option(min=0, max=0.99, help="Mask ratio ρ.")] = 0.5,
    clips: Annotated[
        int | None, typer.Option(min=1, help="Clips in a step. Default: 2 on the CPU, 32 on a GPU.")
    ] = None,
    precision: Annotated[Literal["bf16", "fp32"], typer.Option()] = "bf16",
    rounds: Annotated[
        int, typer.Option(min=1, help="Rounds; each measures every contestant in turn.")
    ] = 2,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Steps that are timed in each round.")
    ] = None,
    videos: Annotated[
        Path | None, typer.Option(help="Folder of videos for the loader. Default: some are made.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            help="File to write. Default: in benchmarks/, named by machine and date.",
        ),
    ] = None,
) -> None:
    """Measure the training step and what surrounds it, in comparison with peers.

    Prints tables, and writes them to a dated file.
    """
    # Before PyTorch is loaded, so that a mistake is reported at once.
    unknown = [part for part in parts or [] if part not in PARTS]
    if unknown:
        raise UserError(f"{unknown[0]}: no such part; there are {', '.join(PARTS)}")
    if videos is not None and not videos.is_dir():
        raise UserError(f"--videos {videos}: no such folder")
    # Not at the top: ``mar --help`` must not wait for PyTorch.
    import torch

    from mar.bench import run
    from mar.bench.machine import this_machine
    from mar.bench.steps import case_of

    case = case_of(size, ratio, clips, precision, steps)
    machine = this_machine(torch.device(case.device), precision)
    file = output or run.default_file(machine)
    # Each part adds its table to the file, so that an interrupted run keeps what it measured.
    for part in parts or PARTS:
        run.measure(part, case, machine, rounds, videos, file, "mar bench")
    print(f"written: {file}")
