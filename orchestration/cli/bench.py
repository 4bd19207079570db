"""``mar bench``: how fast it is here, beside its peers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from mar.errors import UserError

INNER = ("step", "inference", "loader", "fed", "augmentation", "checkpoint")
OUTER = ("tracking", "planning", "report", "search")


def bench(
    parts: Annotated[
        list[str] | None,
        typer.Argument(metavar="[PART]...", help=f"{', '.join(INNER + OUTER)}; default: all."),
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
    """Measure the training step and all around it, beside their peers; print tables and keep them in a dated file."""
    unknown = [part for part in parts or [] if part not in INNER + OUTER]
    if unknown:
        raise UserError(f"{unknown[0]}: no such part; there are {', '.join(INNER + OUTER)}")
    if videos is not None and not videos.is_dir():
        raise UserError(f"--videos {videos}: no such folder")
    import torch

    from mar.bench import run
    from mar.bench.machine import this_machine
    from mar.bench.steps import case_of
    from orchestration.diagnostics import bench as around

    case = case_of(size, ratio, clips, precision, steps)
    machine = this_machine(torch.device(case.device), precision)
    file = output or run.default_file(machine)
    for part in parts or INNER + OUTER:
        if part in INNER:
            run.measure(part, case, machine, rounds, videos, file, "mar bench")
        else:
            run.keep(
                around.PARTS[part](rounds, f"mar bench {part} --rounds {rounds}"), machine, file
            )
    print(f"written: {file}")
