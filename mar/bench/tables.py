"""The tables of a benchmark, in Markdown: one file for each machine and date."""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path


@dataclass(frozen=True)
class Table:
    """One part of a benchmark; ``str`` gives it in Markdown."""

    title: str
    command: str
    """The command that measures this part again."""
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Return the table in Markdown: title, command, cells, notes."""
        lines = [f"## {self.title}", "", f"    {self.command}", ""]
        rule = ("---",) * len(self.columns)
        lines += ["| " + " | ".join(row) + " |" for row in (self.columns, rule, *self.rows)]
        return "\n".join([*lines, "", *(f"{note}\n" for note in self.notes)])


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Return the median and, in brackets, the quartiles."""
    # One value has no quartiles.
    if len(values) < 2:
        return f"{values[0]:.{digits}f}"
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{statistics.median(values):.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def file_name(machine: str) -> str:
    """Return the name of today's benchmark file of a machine."""
    # A machine's name can have characters that a file's name cannot.
    parts = re.findall(r"[a-z0-9]+", machine.lower())
    return f"bench_{date.today().isoformat()}_{'_'.join(parts)}.md"


def write(file: Path, heading: Sequence[str], tables: Sequence[Table]) -> None:
    """Write tables to a file; the file's other tables are kept.

    A table replaces the one of the same title. So the parts of a benchmark can be measured one by
    one into the same file.
    """
    parts: dict[str, str] = {}
    if file.exists():
        parts = _parts(file.read_text(encoding="utf-8"))
    # A dict keeps the position of a title that it has, so a table is replaced in its place.
    parts |= {table.title: str(table) for table in tables}
    file.parent.mkdir(parents=True, exist_ok=True)
    text = "\n".join([*heading, "", *parts.values()]).rstrip() + "\n"
    file.write_text(text, encoding="utf-8")


def _parts(text: str) -> dict[str, str]:
    """Return the tables of a benchmark file: title -> Markdown."""
    # What comes before the first title is the heading, which is written anew.
    pieces = re.split(r"^(?=## )", text, flags=re.MULTILINE)[1:]
    return {piece.splitlines()[0].removeprefix("## "): piece.rstrip() + "\n" for piece in pieces}
