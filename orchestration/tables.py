"""Tables: first the numbers (``TableInfo``), then Markdown, LaTeX, HTML, CSV or JSON."""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from orchestration.quantities import QUANTITIES
from orchestration.results import Cell, Record, Row, rows
from orchestration.study import Study

MISSING = "–"


@dataclass(frozen=True)
class TableInfo:
    """All that a table shows, and nothing of how."""

    title: str
    axes: Sequence[str]
    columns: Sequence[str]
    """Quantities, by short name."""
    rows: Sequence[Row]

    @property
    def notes(self) -> list[str]:
        """What a reader must know: how many trials are missing, which videos were not counted."""
        finished, wanted = sum(row.finished for row in self.rows), sum(row.seeds for row in self.rows)
        missing = (
            [] if finished == wanted else [f"{finished} of {wanted} trials are finished; {MISSING}: not there yet."]
        )
        return missing + [note for row in self.rows for note in row.notes]


def table_info(study: Study, records: Sequence[Record]) -> TableInfo:
    """Return the study's table as it stands in MLflow."""
    return TableInfo(study.file.title, list(study.file.axes), study.file.table.columns, rows(study, records))


def to_markdown(info: TableInfo) -> str:
    """Return a Markdown table with its title."""
    text = _frame(info, best="**{}**".format, plain=lambda words: words.replace("|", "\\|"))
    lines = [f"**{info.title}**", "", text.to_markdown(index=False, disable_numparse=True)]
    return "\n".join([*lines, *(f"\n{note}" for note in info.notes)]) + "\n"


def to_latex(info: TableInfo) -> str:
    r"""Return a LaTeX ``table`` with booktabs rules; needs ``\\usepackage{booktabs}``."""
    frame = _frame(info, best="\\textbf{{{}}}".format, plain=latex_escaped)
    columns = "l" * len(info.axes) + "r" * (frame.shape[1] - len(info.axes))
    body: str = frame.to_latex(index=False, escape=False, column_format=columns)
    caption = latex_escaped(" ".join([info.title, *info.notes]))
    return f"\\begin{{table}}\n\\centering\n\\caption{{{caption}}}\n{body}\\end{{table}}\n"


def to_html(info: TableInfo) -> str:
    """Return an HTML table with its title as the caption."""
    frame = _frame(info, best="<b>{}</b>".format, plain=html.escape)
    body: str = frame.to_html(index=False, escape=False, border=0)
    start, rest = body.split("\n", 1)
    notes = "".join(f"<p>{html.escape(note)}</p>\n" for note in info.notes)
    return f"{start}\n<caption>{html.escape(info.title)}</caption>\n{rest}\n{notes}"


def to_csv(info: TableInfo) -> str:
    """Return one line for each row and quantity, unrounded."""
    return pd.DataFrame(_plain_rows(info)).to_csv(index=False)


def to_json(info: TableInfo) -> str:
    """Return the same as CSV, as JSON, with the title."""
    return json.dumps({"title": info.title, "cells": _plain_rows(info)}, indent=1, ensure_ascii=False) + "\n"


FORMATS: dict[str, Callable[[TableInfo], str]] = {
    "md": to_markdown,
    "tex": to_latex,
    "html": to_html,
    "csv": to_csv,
    "json": to_json,
}


def latex_escaped(text: str) -> str:
    """Return text that LaTeX prints as it stands."""
    specials = {symbol: f"\\{symbol}" for symbol in "&%$#_{}"} | {
        "\\": "\\textbackslash{}",
        "~": "\\textasciitilde{}",
        "^": "\\textasciicircum{}",
        "×": "$\\times$",
        "±": "$\\pm$",
        "λ": "$\\lambda$",
        "ρ": "$\\rho$",
        "Δ": "$\\Delta$",
        "–": "--",
    }
    return text.translate(str.maketrans(specials))


def cell_text(cell: Cell, digits: int, seeds: int) -> str:
    """Return "70.97", "70.97 ± 0.12" (95 % interval of the mean), "70.97 (1 of 3)" or "–"."""
    if cell.mean is None:
        return MISSING
    text = f"{cell.mean:.{digits}f}"
    if cell.half_width is not None:
        text += f" ± {cell.half_width:.{digits}f}"
    return text if cell.status == "complete" else f"{text} ({len(cell.values)} of {seeds})"


def _frame(info: TableInfo, best: Callable[[str], str], plain: Callable[[str], str]) -> pd.DataFrame:
    columns: dict[str, list[str]] = {
        plain(axis): [plain(row.labels[place]) for row in info.rows] for place, axis in enumerate(info.axes)
    }
    for name in info.columns:
        quantity = QUANTITIES[name]
        leader = _leader(info, name)
        texts: list[str] = []
        for row in info.rows:
            text = plain(cell_text(row.cells[name], quantity.digits, row.seeds))
            texts.append(best(text) if row is leader else text)
        columns[plain(quantity.title)] = texts
        printed = [row.cells[name].paper for row in info.rows]
        if any(value is not None for value in printed):
            columns[plain(f"{quantity.title}, paper")] = [
                plain(MISSING) if value is None else f"{value:g}" for value in printed
            ]
    return pd.DataFrame(columns)


def _leader(info: TableInfo, name: str) -> Row | None:
    """Return the row with the best value, if all are there, better means something and it stands alone."""
    direction = QUANTITIES[name].higher_is_better
    means = [row.cells[name].mean for row in info.rows]
    if direction is None or len(means) < 2 or None in means:
        return None
    best = (max if direction else min)(mean for mean in means if mean is not None)
    return info.rows[means.index(best)] if means.count(best) == 1 else None


def _plain_rows(info: TableInfo) -> list[dict[str, Any]]:
    return [
        {
            **dict(zip(info.axes, row.labels, strict=True)),
            "quantity": name,
            "status": row.cells[name].status,
            "mean": row.cells[name].mean,
            "half_width": row.cells[name].half_width,
            "values": list(row.cells[name].values),
            "paper": row.cells[name].paper,
        }
        for row in info.rows
        for name in info.columns
    ]
