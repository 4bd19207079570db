"""What a benchmark prints and writes: Markdown, a file for each machine and date."""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path


@dataclass(frozen=True)
class Table:
    """One part of a benchmark."""

    title: str
    command: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"## {self.title}", "", f"    {self.command}", ""]
        lines += [
            "| " + " | ".join(row) + " |"
            for row in (self.columns, ("---",) * len(self.columns), *self.rows)
        ]
        return "\n".join([*lines, "", *(f"{note}\n" for note in self.notes)])


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Return the median and, in brackets, the quartiles."""
    if len(values) < 2:
        return f"{values[0]:.{digits}f}"
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{statistics.median(values):.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def file_name(machine: str) -> str:
    """Return the name of today's file of a machine."""
    parts = re.findall(r"[a-z0-9]+", machine.lower())
    return f"bench_{date.today().isoformat()}_{'_'.join(parts)}.md"


def write(file: Path, heading: Sequence[str], tables: Sequence[Table]) -> None:
    """Write a benchmark.

    Parts of an earlier one in the same file that were not measured again stay.
    """
    parts = _parts(file.read_text(encoding="utf-8")) if file.exists() else {}
    parts |= {table.title: str(table) for table in tables}
    file.parent.mkdir(parents=True, exist_ok=True)
    text = "\n".join([*heading, "", *parts.values()]).rstrip() + "\n"
    file.write_text(text, encoding="utf-8")


def _parts(text: str) -> dict[str, str]:
    pieces = re.split(r"^(?=## )", text, flags=re.MULTILINE)[1:]
    return {piece.splitlines()[0].removeprefix("## "): piece.rstrip() + "\n" for piece in pieces}
