"""How fast it is on this machine: the step, inference, loader, augmentation and checkpoints, beside their peers."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path

import torch

from mar.bench import data
from mar.bench.contest import contest, step_cases, table
from mar.bench.machine import Machine, this_machine
from mar.bench.steps import Case
from mar.bench.tables import Table, file_name, write
from mar.errors import UserError

Part = Callable[[Case, Machine, int, Path | None, str], Table]


def _say(words: str) -> None:
    print(words, file=sys.stderr, flush=True)


def _step(case: Case, machine: Machine, rounds: int, videos: Path | None, command: str) -> Table:
    cases = step_cases(case)
    title = f"Training step, {_what(case)}"
    return table(title, command, contest(cases, machine, rounds, _say), cases, machine)


def _inference(case: Case, machine: Machine, rounds: int, videos: Path | None, command: str) -> Table:
    cases = step_cases(replace(case, training=False))
    return table(f"Inference, {_what(case)}", command, contest(cases, machine, rounds, _say), cases, machine)


def _what(case: Case) -> str:
    shape = f"{case.frames} × {case.pixels}²"
    return f"ViT-{case.size}, {shape}, ρ = {100 * case.ratio:g} %, {case.precision}, {case.clips} clips"


PARTS: dict[str, Part] = {
    "step": _step,
    "inference": _inference,
    "loader": lambda case, machine, rounds, videos, command: data.loader_table(case, machine, rounds, videos, command),
    "fed": lambda case, machine, rounds, videos, command: data.fed_table(case, rounds, videos, command),
    "augmentation": lambda case, machine, rounds, videos, command: data.augmentation_table(
        case, machine, rounds, command
    ),
    "checkpoint": lambda case, machine, rounds, videos, command: data.checkpoint_table(case, rounds, command),
}


def run(parts: Sequence[str], case: Case, rounds: int, videos: Path | None, output: Path | None, command: str) -> Path:
    """Measure some parts (none: all), print each when it is there, and write them into a file; returns that.

    Raises:
        UserError: there is no such part, or one cannot be measured here.
    """
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        raise UserError(f"{unknown[0]}: no such part; there are {', '.join(PARTS)}")
    machine = this_machine(torch.device(case.device), case.precision)
    file = output or Path("benchmarks") / file_name(machine.name)
    for part in parts or PARTS:
        line = f"{command} {part} --size {case.size} --ratio {case.ratio:g} --clips {case.clips} --precision {case.precision}"
        found = PARTS[part](case, machine, rounds, videos, f"{line} --rounds {rounds} --steps {case.steps}")
        print(found)
        write(file, heading(machine), [found])
    return file


def heading(machine: Machine) -> list[str]:
    """Return the head of a machine's file."""
    return [
        f"# {machine.name}, {date.today().isoformat()}",
        "",
        f"{machine.versions}.",
        "",
        machine.convention,
        "",
        "Medians, and in brackets quartiles, over all rounds; a round runs every contestant in turn, each in a fresh process. "
        "Roofline: the least time of the step's operations one after another, each limited by arithmetic or by memory "
        "(inputs read once, outputs written once). Bandwidth: the same traffic over the time taken.",
    ]
