"""A table as Markdown, LaTeX, HTML, CSV or JSON."""

from __future__ import annotations

import html
import json
import re
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd

from mar.safe_text import markdown
from orchestration.reporting.csv_text import csv_text
from orchestration.reporting.paired_tests import Comparison
from orchestration.reporting.rows import Cell, Row
from orchestration.reporting.tables import ALIKE, MISSING, QUOTED, Spread, TableInfo, ranked
from orchestration.studies.metrics import METRICS

# LaTeX has commands for these capitals alone; the other Greek capitals look like Latin ones.
_CAPITALS = ("Gamma", "Delta", "Theta", "Lambda", "Xi", "Pi", "Sigma", "Phi", "Psi", "Omega")
_WIDE = 8
"""Most columns of a LaTeX table in its natural width; a wider one is scaled to the page's width."""


def to_markdown(info: TableInfo) -> str:
    """Return a Markdown table with its title."""
    # Without disable_numparse, tabulate reads texts like "70.90" as numbers and drops the last 0.
    text = _frame(info, best="**{}**".format, plain=markdown)
    lines = [
        f"**{markdown(info.title)}**",
        "",
        text.to_markdown(index=False, disable_numparse=True),
    ]
    return "\n".join([*lines, *(f"\n{markdown(note)}" for note in info.notes)]) + "\n"


def to_latex(info: TableInfo) -> str:
    r"""Return a LaTeX ``table`` with booktabs rules.

    Needs ``\\usepackage{booktabs,amssymb,graphicx}``.
    """
    frame = _frame(info, best="\\textbf{{{}}}".format, plain=latex_escaped)
    # A row that begins with "[" or "*" would be an argument of the "\\" that ends the row before.
    frame.iloc[:, 0] = [
        "{}" + text if text[:1] in ("[", "*") else text for text in frame.iloc[:, 0]
    ]
    num_text_columns = len(info.axes) - (info.pivot is not None) + len(_extra_columns(info))
    columns = "l" * num_text_columns + "r" * (frame.shape[1] - num_text_columns)
    # ``_frame`` has escaped the texts; escaping again would print its commands.
    body: str = frame.to_latex(index=False, escape=False, column_format=columns)
    if frame.shape[1] > _WIDE:
        body = f"\\resizebox{{\\linewidth}}{{!}}{{%\n{body}}}\n"
    caption = latex_escaped(
        ". ".join(sentence.rstrip(".") for sentence in [info.title, *info.notes]) + "."
    )
    # Letters, digits and signs alone: TeX reads a label before it is defined, unescaped.
    label = re.sub("[^A-Za-z0-9_.-]", "-", info.name)
    return (
        f"\\begin{{table}}\n\\centering\n\\caption{{{caption}}}\n\\label{{tab:{label}}}\n{body}"
        "\\end{table}\n"
    )


def to_html(info: TableInfo, has_caption: bool = True) -> str:
    """Return an HTML table with its title as the caption.

    A page that shows the title itself leaves the caption out.
    """
    # ``_frame`` has escaped the texts, so pandas must not escape the tags that mark the best value.
    frame = _frame(info, best="<b>{}</b>".format, plain=html.escape)
    body: str = frame.to_html(index=False, escape=False, border=0)
    # A caption must be the first element of a table; pandas writes none.
    start, rest = body.split("\n", 1)
    notes = "".join(f"<p>{html.escape(note)}</p>\n" for note in info.notes)
    if has_caption:
        caption = f"<caption>{html.escape(info.title)}</caption>\n"
    else:
        caption = ""
    return f"{start}\n{caption}{rest}\n{notes}"


def to_csv(info: TableInfo) -> str:
    """Return the table as CSV: one line for each row and metric, values unrounded."""
    return csv_text(pd.DataFrame(_plain_rows(info)))


def to_json(info: TableInfo) -> str:
    """Return the content of the CSV table as JSON, with the title."""
    return (
        json.dumps({"title": info.title, "cells": _plain_rows(info)}, indent=1, ensure_ascii=False)
        + "\n"
    )


FORMATS: dict[str, Callable[[TableInfo], str]] = {
    "md": to_markdown,
    "tex": to_latex,
    "html": to_html,
    "csv": to_csv,
    "json": to_json,
}


def latex_escaped(text: str) -> str:
    """Return text in which LaTeX's special characters are escaped, so that it prints unchanged."""
    specials = {symbol: f"\\{symbol}" for symbol in "&%$#_{}"} | {
        "\\": "\\textbackslash{}",
        "~": "\\textasciitilde{}",
        "^": "\\textasciicircum{}",
        "×": "$\\times$",
        "±": "$\\pm$",
        **{letter: f"${name}$" for letter, name in _GREEK.items()},
        **{
            "<": "$<$",
            ">": "$>$",
            "|": "$|$",
            "→": "$\\to$",
            "≥": "$\\geq$",
            "≤": "$\\leq$",
            "·": "$\\cdot$",
        },
        "–": "--",
        "−": "$-$",
        "≈": "$\\approx$",
        "†": "$\\dagger$",
        "²": "$^2$",
        "✓": "\\checkmark{}",
        "✗": "$\\times$",
    }
    return text.translate(str.maketrans(specials))


# LaTeX has no command named as these two letters are: final sigma, and omicron, which looks like a
# Latin o. Unicode spells lambda without its b.
_GREEK = {
    chr(code): f"\\{unicodedata.name(chr(code)).split()[-1].lower().replace('lamda', 'lambda')}"
    for code in range(ord("α"), ord("ω") + 1)
    if chr(code) not in "ςο"
} | {letter: f"\\{name}" for letter, name in zip("ΓΔΘΛΞΠΣΦΨΩ", _CAPITALS, strict=True)}


def cell_text(
    cell: Cell, digits: int, seeds: int, spread: Spread = "interval", is_number_said: bool = False
) -> str:
    """Return "70.97", "70.97 ± 0.12", "70.97 [70.90, 71.05]" (a range), "70.97 (1 of 3)" or "–".

    The number of trainings follows, as in "(n = 3)", unless ``is_number_said``: then a note gives
    it for the whole table.
    """
    if cell.mean is None:
        return MISSING
    text = f"{cell.mean:.{digits}f}"
    if len(cell.values) > 1:
        text += _spread_text(cell, digits, spread)
        if cell.status == "complete" and not is_number_said:
            text += f" (n = {seeds})"
    if cell.status == "complete":
        return text
    return f"{text} ({len(cell.values)} of {seeds})"


def _spread_text(cell: Cell, digits: int, spread: Spread) -> str:
    if spread == "range":
        return f" [{min(cell.values):.{digits}f}, {max(cell.values):.{digits}f}]"
    if spread == "interval":
        reach = cell.half_width
    else:
        reach = cell.deviation
    return f" ± {reach:.{digits}f}"


def _frame(
    info: TableInfo, best: Callable[[str], str], plain: Callable[[str], str]
) -> pd.DataFrame:
    """Return the table as text.

    Its columns are the labels, the extra columns, and for each metric our value, the paper's and
    the difference. ``plain`` escapes a text for the format, ``best`` marks the best value.
    """
    lines, heads = _lines(info)
    # The cells of a line have the same labels but for the pivot: any row of the line has them.
    firsts = [next(row for row in line if row is not None) for line in lines]
    columns = _text_columns(info, firsts, plain)
    for name in info.columns:
        metric = METRICS[name]
        leader = _leader(info, name)
        for column, head in enumerate([""] if _is_same_across(lines, name) else heads):
            rows_of = [line[column] for line in lines]
            if not head:
                title = metric.title
            else:
                # The table's title names the metric if there is only one.
                if len(info.columns) == 1:
                    title = head
                else:
                    title = f"{metric.title}, {head}"
            columns.append(
                (title, [_text(info, row, name, leader, best, plain) for row in rows_of])
            )
            columns += [
                (key, [plain(text) for text in texts]) for key, texts in _beside(rows_of, name)
            ]
            if name == "top1":
                columns += _top1_columns(info, rows_of, head, plain)
    # Titles may be equal ("paper" of several metrics), which a dict of columns cannot have: the
    # frame is made with numbers, and titled afterwards.
    frame = pd.DataFrame({column: texts for column, (_, texts) in enumerate(columns)})
    frame.columns = [plain(title) for title, _ in columns]
    return frame


def _text_columns(
    info: TableInfo, firsts: Sequence[Row], plain: Callable[[str], str]
) -> list[tuple[str, list[str]]]:
    """Return the label columns, except the pivot's, and the extra columns."""
    columns: list[tuple[str, list[str]]] = []
    for column, axis in enumerate(info.axes):
        if column != info.pivot:
            columns.append(
                (
                    axis,
                    [
                        row.labels[column] + f" {QUOTED}" * (row.is_quoted and not column)
                        for row in firsts
                    ],
                )
            )
    columns += [
        (name, [row.extra_columns.get(name, "") for row in firsts]) for name in _extra_columns(info)
    ]
    return [(title, [plain(text) for text in texts]) for title, texts in columns]


def _top1_columns(
    info: TableInfo, rows_of: Sequence[Row | None], head: str, plain: Callable[[str], str]
) -> list[tuple[str, list[str]]]:
    """Return the columns beside a column of top-1: the comparison with the reference, the gains.

    ``head`` is the label above the column; with a pivot axis each of its labels has a column.
    """
    of_head = f", {head}" if head else ""
    columns: list[tuple[str, list[str]]] = []
    if info.comparisons:
        gaps = [info.comparisons.get(row.label) if row else None for row in rows_of]
        texts = [_gap(gap) if gap else "" for gap in gaps]
        columns.append((f"to {info.reference}{of_head}", [plain(text) for text in texts]))
    if info.delta:
        ours = [_gain(info, row, lambda cell: cell.mean) if row else "" for row in rows_of]
        papers = [_gain(info, row, lambda cell: cell.paper) if row else "" for row in rows_of]
        columns.append((f"Δ{of_head}", [plain(text) for text in ours]))
        columns.append((f"Δ, paper{of_head}", [plain(text) for text in papers]))
    return columns


def _is_same_across(lines: Sequence[Sequence[Row | None]], name: str) -> bool:
    """Whether a metric is the same in all pivot columns of each line; then one column shows it."""
    cells = [[row.cells[name] if row else None for row in line] for line in lines]
    return len(cells[0]) > 1 and all(cell == line[0] and cell for line in cells for cell in line)


def _extra_columns(info: TableInfo) -> list[str]:
    """Return the names of the columns of text about the rows."""
    return list(dict.fromkeys(name for row in info.rows for name in row.extra_columns))


def _gap(comparison: Comparison) -> str:
    alike = "" if comparison.is_significant else f" {ALIKE}"
    return f"{comparison.difference:+.2f} [{comparison.low:+.2f}, {comparison.high:+.2f}]{alike}"


def _lines(info: TableInfo) -> tuple[list[list[Row | None]], list[str]]:
    """Return the rows of each printed line, and the label above each of its columns.

    Without a pivot axis each line has one row, and the label is empty. A row that the study does
    not have is None.
    """
    pivot = info.pivot
    if pivot is None:
        return [[row] for row in info.rows], [""]
    # The order of the study: dict.fromkeys keeps it, a set would not.
    heads = list(dict.fromkeys(row.labels[pivot] for row in info.rows))
    lines: dict[tuple[str, ...], list[Row | None]] = {}
    for row in info.rows:
        rest = (*row.labels[:pivot], *row.labels[pivot + 1 :])
        lines.setdefault(rest, [None] * len(heads))[heads.index(row.labels[pivot])] = row
    return list(lines.values()), heads


def _text(
    info: TableInfo,
    row: Row | None,
    name: str,
    leader: Row | None,
    best: Callable[[str], str],
    plain: Callable[[str], str],
) -> str:
    # A quoted row has only the paper's values, which have a column of their own.
    if row is None or row.is_quoted:
        return ""
    cell = row.cells[name]
    spread = info.spread_of(len(cell.values))
    text = plain(
        cell_text(cell, METRICS[name].digits, row.seeds, spread, info.common_seeds is not None)
    )
    return best(text) if row is leader else text


def _beside(rows_of: Sequence[Row | None], name: str) -> list[tuple[str, list[str]]]:
    """Return the column of the paper's values and, for accuracies, of ours minus the paper's."""
    cells = [row.cells[name] if row else None for row in rows_of]
    if not any(cell and cell.paper is not None for cell in cells):
        return []
    papers = [None if cell is None else cell.paper for cell in cells]
    # As many decimals as the paper's most precise value in this column.
    digits = max(len(f"{value:g}".partition(".")[2]) for value in papers if value is not None)
    printed = [MISSING if value is None else f"{value:.{digits}f}" for value in papers]
    pairs = [(cell.mean, cell.paper) if cell else (None, None) for cell in cells]
    gaps = [
        MISSING if ours is None or paper is None else f"{ours - paper:+.2f}"
        for ours, paper in pairs
    ]
    is_accuracy = name in ("top1", "top5") and any(gap != MISSING for gap in gaps)
    return [("paper", printed), *([("− paper", gaps)] if is_accuracy else [])]


def _gain(info: TableInfo, row: Row, value: Callable[[Cell], float | None]) -> str:
    """Return a row's gain in top-1 over the row with the reference label and equal other labels."""
    assert info.delta
    column, label = info.delta
    reference = (*row.labels[:column], label, *row.labels[column + 1 :])
    base = next((other for other in info.rows if tuple(other.labels) == reference), None)
    ours = value(row.cells["top1"])
    theirs = value(base.cells["top1"]) if base else None
    if base is row or ours is None or theirs is None:
        return MISSING
    return f"{ours - theirs:+.2f}"


def _leader(info: TableInfo, name: str) -> Row | None:
    """Return the row with the best value of a metric, which is printed bold.

    None if a row is missing, no direction is better, or the best row does not differ significantly
    from the next.
    """
    ordered = ranked(info.rows, name)
    if len(ordered) < 2 or not info.is_significant.get(name, True):
        return None
    # Of two equal values neither is the best.
    is_alone = ordered[0].cells[name].mean != ordered[1].cells[name].mean
    return ordered[0] if is_alone else None


def _plain_rows(info: TableInfo) -> list[dict[str, Any]]:
    return [
        {
            **dict(zip(info.axes, row.labels, strict=True)),
            "metric": name,
            "status": row.cells[name].status,
            "mean": row.cells[name].mean,
            "half_width": row.cells[name].half_width,
            "values": list(row.cells[name].values),
            "paper": row.cells[name].paper,
        }
        for row in info.rows
        for name in info.columns
    ]
