"""Benchmarks of the step, inference, loader, augmentation and checkpoints, beside their peers."""

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
"""Measures one part: case, machine, rounds, folder of videos and command -> table."""


def _print_progress(message: str) -> None:
    """Print a message that reports progress."""
    # Standard output has the tables alone.
    print(message, file=sys.stderr, flush=True)


def _step(case: Case, machine: Machine, rounds: int, videos: Path | None, command: str) -> Table:
    return _contest_table("Training step", case, machine, rounds, command)


def _inference(
    case: Case, machine: Machine, rounds: int, videos: Path | None, command: str
) -> Table:
    return _contest_table("Inference", replace(case, training=False), machine, rounds, command)


def _contest_table(title: str, case: Case, machine: Machine, rounds: int, command: str) -> Table:
    """Compare the contestants of a case."""
    # The first case is ours, the reference for the other rows.
    cases = step_cases(case)
    results = contest(cases, machine, rounds, _print_progress)
    return table(f"{title}, {_description(case)}", command, results, cases, machine)


def _description(case: Case) -> str:
    """Return what the title of a table says of its case."""
    shape = f"{case.frames} × {case.pixels}²"
    ratio = f"ρ = {100 * case.ratio:g} %"
    return f"ViT-{case.size}, {shape}, {ratio}, {case.precision}, {case.clips} clips"


def _loader(case: Case, machine: Machine, rounds: int, videos: Path | None, command: str) -> Table:
    return data.loader_table(machine, rounds, videos, command)


def _fed(case: Case, machine: Machine, rounds: int, videos: Path | None, command: str) -> Table:
    return data.fed_table(case, rounds, videos, command)


def _augmentation(
    case: Case, machine: Machine, rounds: int, videos: Path | None, command: str
) -> Table:
    return data.augmentation_table(case, machine, rounds, command)


def _checkpoint(
    case: Case, machine: Machine, rounds: int, videos: Path | None, command: str
) -> Table:
    return data.checkpoint_table(case, rounds, command)


# All parts take the same arguments, so that one table of functions serves the command.
# The names are those of ``mar bench``, which lists them without importing torch.
PARTS: dict[str, Part] = {
    "step": _step,
    "inference": _inference,
    "loader": _loader,
    "fed": _fed,
    "augmentation": _augmentation,
    "checkpoint": _checkpoint,
}
"""The parts of the benchmark, in the order in which they run."""


def measure(
    part: str,
    case: Case,
    machine: Machine,
    rounds: int,
    videos: Path | None,
    file: Path,
    command: str,
) -> None:
    """Measure one of ``PARTS``, print its table and write it to the file."""
    # The command states the model's options even where they are defaults: some defaults depend on
    # the machine.
    model = f"--size {case.size} --ratio {case.ratio:g} --clips {case.clips}"
    options = f"{model} --precision {case.precision} --rounds {rounds} --steps {case.steps}"
    keep(PARTS[part](case, machine, rounds, videos, f"{command} {part} {options}"), machine, file)


def keep(table: Table, machine: Machine, file: Path) -> None:
    """Print a table and write it to the file; the file's other tables are kept."""
    print(table, flush=True)
    write(file, heading(machine), [table])


def default_file(machine: Machine) -> Path:
    """Return today's file of a machine, below the current folder."""
    return Path("benchmarks") / file_name(machine.name)


def heading(machine: Machine) -> list[str]:
    """Return the first lines of a machine's file: its name, the date, versions and conventions."""
    conventions = (
        "Medians, and in brackets quartiles, over all rounds; a round runs every contestant in "
        "turn, each in a fresh process. "
        "Roofline: the least time of the step's operations one after another, each limited by "
        "arithmetic or by memory (inputs read once, outputs written once). "
        "Bandwidth: the same traffic over the time taken."
    )
    return [
        f"# {machine.name}, {date.today().isoformat()}",
        "",
        f"{machine.versions}.",
        "",
        conventions,
    ]
