"""Checks of a study file that need more than its schema.

Every message names the file and the line.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from mar.config.overrides import SETTING_PATHS
from mar.errors import UserError
from orchestration.studies.metrics import METRICS
from orchestration.studies.schema import BETWEEN_LABELS, StudyFile, label_parts
from orchestration.studies.trial import Study
from orchestration.studies.yaml_document import Document


def parse_study_file(document: Document) -> StudyFile:
    """Return the file's content, checked against its schema.

    An axis that is a list of values gets its values as labels.

    Raises:
        UserError: the content breaks the schema, or sets seeds in a wrong way.
    """
    content = {**document.content}
    if isinstance(content.get("axes"), dict):
        content["axes"] = {
            axis: _labelled(axis, labels, document) for axis, labels in content["axes"].items()
        }
    try:
        file = StudyFile.model_validate(content)
    except ValidationError as error:
        raise UserError(mistake_in(document, error, StudyFile)) from None
    if len(set(file.seeds)) < len(file.seeds):
        raise UserError(f"{document.location('seeds')}: seeds: each seed may be listed once")
    # The table groups runs by their seeds, so a seed must not be a label or a fixed setting.
    settings = [file.fixed, *(tree for axis in file.axes.values() for tree in axis.values())]
    if any("seed" in tree for tree in settings):
        raise UserError(f"{document.path}: the seed is set by 'seeds: [0, 1, …]', not as a setting")
    return file


def _labelled(axis: str, labels: Any, document: Document) -> Any:
    """Return an axis' labels with their settings; of a list, each value is a label."""
    # Only a list is converted: the schema refuses anything else that is not a mapping.
    if not isinstance(labels, list):
        return labels
    if axis not in SETTING_PATHS:
        near = difflib.get_close_matches(axis, SETTING_PATHS, n=1, cutoff=0.6)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(
            f"{document.location('axes', axis)}: axes.{axis}: a list of values needs a setting's "
            f"name, as mask.ratio{hint}"
        )
    return {_value_text(value): {axis: value} for value in labels}


def _value_text(value: Any) -> str:
    """Return a value as a label: text as it is, anything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value)


def mistake_in(document: Document, error: ValidationError, kind: type[BaseModel]) -> str:
    """Return a message for the first mistake in a study or search file: where, what, the remedy.

    ``kind`` is the schema that the content breaks.
    """
    found = error.errors()
    # A misspelt key is reported as missing too: the message about the unknown key helps more.
    first = next((each for each in found if each["type"] == "extra_forbidden"), found[0])
    # pydantic's messages speak of inputs and of Python's types.
    names = tuple(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    if first["type"] == "extra_forbidden":
        # The unknown key is in the file itself or in one of its parts, as ``table``.
        known = kind.model_fields
        if len(names) > 1:
            inner: Any = getattr(known.get(names[0]), "annotation", None)
            known = getattr(inner, "model_fields", {})
        near = difflib.get_close_matches(str(names[-1]) if names else "", known, n=1, cutoff=0.5)
        if near:
            hint = f"; did you mean {near[0]}?"
        elif known:
            hint = f" (there are: {', '.join(known)})"
        else:
            hint = ""
        message = f"no such key{hint}"
    elif first["type"] in ("dict_type", "model_type"):
        message = f"must be a mapping, 'name: value' line by line, not {first['input']!r}"
    elif first["type"] == "missing":
        message = "is missing"
    return f"{document.location(*names)}: {'.'.join(names)}: {message}"


def check_references(study: Study, document: Document) -> None:
    """Check what a study file names: metrics, rows, axes and labels.

    Raises:
        UserError: one of them does not exist.
    """
    _check_metrics(study.file, document)
    # Before the rows, which depend on the axis over which they are means.
    _check_axes(study, document)
    _check_rows(study, document)


def _check_metrics(file: StudyFile, document: Document) -> None:
    """Check that every named metric exists."""
    figure = file.figure
    named = [("table", name) for name in file.table.columns]
    named += [("figure", name) for name in figure.y]
    if figure.x:
        named.append(("figure", figure.x))
    named += [("paper", name) for name in file.paper]
    named += [("baselines", name) for row in file.baselines.values() for name in row]
    for part, name in named:
        if name not in METRICS:
            known = ", ".join(METRICS)
            raise UserError(
                f"{document.location(part)}: {part}: no metric {name!r} (there are: {known})"
            )
        if METRICS[name].is_ratio and file.table.reference is None:
            raise UserError(
                f"{document.location(part)}: {part}: {name} is relative to a row: set "
                "table.reference"
            )
    if figure.kind == "points" and figure.x is None:
        raise UserError(f"{document.location('figure')}: figure: kind 'points' needs x")
    # Without an effect, or bars on top of each other.
    of_points = {"x": figure.x, "group": figure.group, "lines": figure.lines, "front": figure.front}
    given = [name for name, value in of_points.items() if value]
    if figure.kind != "points" and given:
        raise UserError(
            f"{document.location('figure')}: figure: {given[0]} needs kind: points, not "
            f"{figure.kind}"
        )


def _check_rows(study: Study, document: Document) -> None:
    """Check that every named row is the row of a trial, or of a baseline where one may be meant."""
    file = study.file
    rows = sorted({trial.row for trial in study.trials})
    # A baseline is quoted from the paper: it is printed, and has no trial.
    all_rows = [*rows, *file.baselines]
    # Each with its place in the file, its name, and the rows that it may be.
    references: list[tuple[tuple[str, ...], str, list[str]]] = []
    for name, values in file.paper.items():
        references += [(("paper", name, row), row, rows) for row in values]
    references += [(("extra_columns", row), row, all_rows) for row in file.extra_columns]
    references += [(("table", "order"), row, all_rows) for row in file.table.order]
    if file.table.reference is not None:
        references.append((("table", "reference"), file.table.reference, rows))
    for claim, pairs in file.claims.items():
        references += [(("claims", claim), row, rows) for row in _sides(claim, pairs)]
    for location, row, known in references:
        if row not in known:
            raise UserError(
                f"{document.location(*location)}: {'.'.join(location[:2])}: no trial is labelled "
                f"{row!r} (there are: {', '.join(known)})"
            )


def _check_mean_over(file: StudyFile, axis: str, document: Document) -> None:
    """Check that the axis over which rows are means exists, and is not the only one."""
    location = f"{document.location('table')}: table.mean_over"
    if axis not in file.axes:
        raise UserError(f"{location}: no axis {axis!r} (there are: {', '.join(file.axes)})")
    if len(file.axes) == 1:
        raise UserError(f"{location}: a mean over the only axis leaves no rows; add an axis")


def _check_axes(study: Study, document: Document) -> None:
    """Check that every named axis exists, and that labels have the parts of their axis."""
    file = study.file
    table = file.table
    # An axis as "classifier / width" makes two columns, and each may be named alone.
    parts = [part for axis in file.axes for part in label_parts(axis, axis)]
    axes = {"table.pivot": table.pivot, "figure.group": file.figure.group}
    if table.mean_over is not None:
        _check_mean_over(file, table.mean_over, document)
        averaged = label_parts(table.mean_over, table.mean_over)
        parts = [part for part in parts if part not in averaged]
    axes |= {f"table.delta.{axis}": axis for axis in table.delta}
    for location, axis in axes.items():
        if axis is not None and axis not in parts:
            part = location.split(".")[0]
            raise UserError(
                f"{document.location(part)}: {location}: no axis {axis!r} (there are: "
                f"{', '.join(parts)})"
            )
    # A label of one part of an axis is found in the rows, where all labels are joined.
    for axis, label in table.delta.items():
        known = {trial.row.split(BETWEEN_LABELS)[parts.index(axis)] for trial in study.trials}
        if label not in known:
            raise UserError(
                f"{document.location('table')}: table.delta.{axis}: no label {label!r} (there are: "
                f"{', '.join(sorted(known))})"
            )
    # A label with fewer parts would shift the columns of its row.
    for axis, labels in file.axes.items():
        for label in labels:
            if len(label_parts(axis, label)) != len(label_parts(axis, axis)):
                raise UserError(
                    f"{document.location('axes', axis, label)}: {label!r} must have the parts of "
                    f"{axis!r}"
                )


def _sides(claim: str, pairs: Sequence[str]) -> list[str]:
    """Return the rows that a claim compares.

    Raises:
        UserError: a comparison is not two rows with " > " between them.
    """
    sides = [pair.split(" > ") for pair in pairs]
    if any(len(pair) != 2 for pair in sides):
        raise UserError(f"claims: {claim}: expected 'better row > worse row'")
    return [row for pair in sides for row in pair]
