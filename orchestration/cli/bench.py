"""``mar bench``: how fast it is here, beside its peers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from mar.errors import UserError

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
        int | None, typer.Option(min=1, help="Of a step. Default: 2 on the CPU, 32 on a GPU.")
    ] = None,
    precision: Annotated[Literal["bf16", "fp32"], typer.Option()] = "bf16",
    rounds: Annotated[int, typer.Option(min=1, help="Each runs every contestant in turn.")] = 2,
    steps: Annotated[int | None, typer.Option(min=1, help="Timed in each round.")] = None,
    videos: Annotated[
        Path | None, typer.Option(help="Videos for the loader; default: some are made.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="Default: below benchmarks/, by machine and date."),
    ] = None,
) -> None:
    """Measure the training step and all around it, beside their peers.

    Print tables and keep them in a dated file.
    """
    unknown = [part for part in parts or [] if part not in PARTS]
    if unknown:
        raise UserError(f"{unknown[0]}: no such part; there are {', '.join(PARTS)}")
    if videos is not None and not videos.is_dir():
        raise UserError(f"--videos {videos}: no such folder")
    import torch

    from mar.bench import run
    from mar.bench.machine import this_machine
    from mar.bench.steps import case_of

    case = case_of(size, ratio, clips, precision, steps)
    machine = this_machine(torch.device(case.device), precision)
    file = output or run.default_file(machine)
    for part in parts or PARTS:
        run.measure(part, case, machine, rounds, videos, file, "mar bench")
    print(f"written: {file}")
