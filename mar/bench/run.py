"""How fast it is on this machine: step, inference, loader, augmentation, checkpoints.

Each is measured beside its peers.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from pathlib import Path

from mar.bench import data
from mar.bench.contest import contest, step_cases, table
from mar.bench.machine import Machine
from mar.bench.steps import Case
from mar.bench.tables import Table, file_name, write

Part = Callable[[Case, Machine, int, Path | None, str], Table]


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _step(case: Case, machine: Machine, rounds: int, videos: Path | None, command: str) -> Table:
    cases = step_cases(case)
    title = f"Training step, {_what(case)}"
    return table(title, command, contest(cases, machine, rounds, _say), cases, machine)


def _inference(
    case: Case, machine: Machine, rounds: int, videos: Path | None, command: str
) -> Table:
    cases = step_cases(replace(case, training=False))
    return table(
        f"Inference, {_what(case)}", command, contest(cases, machine, rounds, _say), cases, machine
    )


def _what(case: Case) -> str:
    shape = f"{case.frames} × {case.pixels}²"
    return (
        f"ViT-{case.size}, {shape}, ρ = {100 * case.ratio:g} %, {case.precision}, {case.clips} "
        "clips"
    )


PARTS: dict[str, Part] = {
    "step": _step,
    "inference": _inference,
    "loader": lambda case, machine, rounds, videos, command: data.loader_table(
        machine, rounds, videos, command
    ),
    "fed": lambda case, machine, rounds, videos, command: data.fed_table(
        case, rounds, videos, command
    ),
    "augmentation": lambda case, machine, rounds, videos, command: data.augmentation_table(
        case, machine, rounds, command
    ),
    "checkpoint": lambda case, machine, rounds, videos, command: data.checkpoint_table(
        case, rounds, command
    ),
}


def measure(
    part: str,
    case: Case,
    machine: Machine,
    rounds: int,
    videos: Path | None,
    file: Path,
    command: str,
) -> None:
    """Measure one of ``PARTS``, print it and put it into the file."""
    model = (
        f"--size {case.size} --ratio {case.ratio:g} --clips {case.clips} --precision "
        f"{case.precision}"
    )
    line = f"{command} {part} {model} --rounds {rounds} --steps {case.steps}"
    keep(PARTS[part](case, machine, rounds, videos, line), machine, file)


def keep(table: Table, machine: Machine, file: Path) -> None:
    """Print a table, and put it into the file; what else is in that stays."""
    print(table, flush=True)
    write(file, heading(machine), [table])


def default_file(machine: Machine) -> Path:
    """Return today's file of a machine, below the folder here."""
    return Path("benchmarks") / file_name(machine.name)


def heading(machine: Machine) -> list[str]:
    """Return the head of a machine's file."""
    return [
        f"# {machine.name}, {date.today().isoformat()}",
        "",
        f"{machine.versions}.",
        "",
        "Medians, and in brackets quartiles, over all rounds; a round runs every contestant in "
        "turn, each in a fresh process. "
        "Roofline: the least time of the step's operations one after another, each limited by "
        "arithmetic or by memory "
        "(inputs read once, outputs written once). Bandwidth: the same traffic over the time "
        "taken.",
    ]
