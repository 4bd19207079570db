"""The page of ``mar cost --paper``: the paper's printed GFLOPs and parameters beside ours."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from mar.config.overrides import build, merge
from mar.model.flops import cost
from orchestration.installation import packaged
from orchestration.studies.yaml_document import Document

_HEAD = """# What the models cost: the paper's figures and ours

Made by `mar cost --paper -o docs/cost.md`, from the settings of each row alone. One multiply-add
counts one, a LayerNorm five for each value; the patch embedding is counted on all tokens, the
reconstruction branch not at all (`mar/model/flops.py`). The paper prints two decimals in Tables II
to VII and whole numbers in XI and XII, and rounds parameters up. "Δ" is ours less the paper's.

The memory that Table V prints depends on the device: `mar cost RECIPE --memory` measures it, and
nothing is copied here.
"""


# Ours has more decimals than the paper's two, so that a difference in rounding is visible.
_FORMS = {
    "GFLOPs, paper": ".2f",
    "GFLOPs, ours": ".4f",
    "Δ": "+.4f",
    "Param (M), paper": ".0f",
    "Param (M), ours": ".2f",
}


@dataclass(frozen=True)
class PaperRow:
    """One row of a table of the paper that prints a cost."""

    table: str
    row: str
    settings: dict[str, Any]
    gflops: float | int | None
    """As printed: a float has two decimals, an int is a whole number."""
    params_m: float | None


def paper_rows() -> list[PaperRow]:
    """Return the rows of the paper's tables that print a cost of MAR or VideoMAE.

    Tables II, III c, VI, VII, XI and XII.
    """
    document = Document(packaged("search_spaces") / "paper" / "cost.yaml")
    return [
        PaperRow(
            table, row, stated.get("settings", {}), stated.get("gflops"), stated.get("params_m")
        )
        for table, rows in document.content.items()
        for row, stated in rows.items()
    ]


def cost_frame() -> pd.DataFrame:
    """Return the paper's figures beside ours, with one line for each row of the paper."""
    lines: list[dict[str, Any]] = []
    for row in paper_rows():
        ours = cost(build(merge({}, row.settings)))
        line: dict[str, Any] = {"table": row.table, "row": row.row, "GFLOPs, paper": row.gflops}
        line |= {"GFLOPs, ours": ours.gflops, "Δ": None, "agrees": None}
        # The cost of "D.S. 2x" is not readable in our copy of the paper (``cost.yaml``).
        if row.gflops is not None:
            line |= {"Δ": ours.gflops - row.gflops, "agrees": _agrees(ours.gflops, row.gflops)}
        lines.append(line | {"Param (M), paper": row.params_m, "Param (M), ours": ours.params_m})
    # As objects: pandas would turn a whole number into a float beside a missing value.
    return pd.DataFrame(lines, dtype=object)


def _agrees(ours: float, printed: float | int) -> str:
    """Return how our figure agrees with the printed one: ``rounded``, ``within 0.01`` or ``no``."""
    # Tables XI and XII print whole numbers.
    if isinstance(printed, int):
        return "rounded" if round(ours) == printed else "no"
    return "within 0.01" if abs(ours - printed) <= 0.01 else "no"


def write_page(file: Path | None) -> str:
    """Return the page as Markdown, and write it if a file is given."""
    text = _HEAD
    for table, rows in cost_frame().groupby("table", sort=False):
        part = rows.drop(columns="table")
        for name, form in _FORMS.items():
            part[name] = [_printed(value, form) for value in rows[name]]
        text += (
            f"\n## {table}\n\n{part.fillna('–').to_markdown(index=False, disable_numparse=True)}\n"
        )
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    return text


def _printed(value: Any, form: str) -> str:
    """Return a value in its column's format; a dash if it is missing."""
    # NaN is the only value that differs from itself.
    if value is None or value != value:
        return "–"
    if isinstance(value, int):
        return str(value)
    return format(value, form)
