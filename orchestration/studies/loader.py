"""Reads a study file into an ordered list of trials, each with labels and complete settings.

Nothing is trained or loaded here, so that every mistake of a file is found before a launch.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mar.config.overrides import SettingError, build, merge
from mar.config.schema import TrainingConfig
from mar.data.annotations import fingerprint
from mar.errors import UserError
from mar.weights.hub import fetch
from orchestration.installation import packaged
from orchestration.studies.family import Family, find_family
from orchestration.studies.identity import weights_fingerprint
from orchestration.studies.names import recipe_title
from orchestration.studies.recipe import parse_overrides, read_recipe, touches
from orchestration.studies.schema import BETWEEN_LABELS, FigureLayout, StudyFile, TableLayout
from orchestration.studies.trial import ABSENT, Study, Trial
from orchestration.studies.validation import check_references, parse_study_file
from orchestration.studies.yaml_document import Document, Recipe, find


def _of_one(path: Path, overrides: Sequence[str]) -> Study:
    """Return a study of one trial, for a recipe; it is named after the recipe and its folder."""
    settings = read_recipe(str(path), overrides)
    if settings.pretrains:
        column = "test_reconstruction_loss"
    else:
        column = "top1"
    # A pre-training has no classifier, so it has no accuracy.
    columns = (column, *(() if settings.pretrains else ("top5",)), "gflops", "time_s")
    title = recipe_title(path)
    file = StudyFile(
        title=title,
        recipe=str(path),
        axes={"recipe": {title: {}}},
        table=TableLayout(columns=columns),
        figure=FigureLayout(y=(column,)),
    )
    trial = Trial({"recipe": title}, settings, _fingerprint(settings, {}))
    # The study's name becomes the name of a folder: a slash would make two of it.
    return Study(title.replace("/", "_"), file, [trial], path, overrides=tuple(overrides))


def read_study(name: str, overrides: Sequence[str] = (), only: Sequence[str] = ()) -> Study:
    """Read a study file and list its trials in the file's order.

    The seeds change fastest, then the last axis.

    ``overrides`` are ``path=value`` from the command line; they win over every other value of a
    setting. ``recipe=FILE`` replaces the study's recipe; a folder's name, as ``recipe=released``,
    replaces each recipe by that folder's recipe of the same name (``family.Family``).
    ``axes.AXIS.LABEL.path=value`` changes the settings of one label, ``rows.ROW.path=value`` those
    of one row. ``only`` keeps the trials with the given ``axis=label``. A recipe's file is read as
    a study of one trial.

    Raises:
        UserError: a bad file, setting, label or override; the message says where.
    """
    # The files of weights may have changed since the last study of this process was read.
    weights_fingerprint.cache_clear()
    document = Document(find(name, "study"))
    if not {"axes", "title", "recipe"} & document.content.keys() or _is_recipe(document):
        return _of_one(document.path, overrides)
    changes = parse_overrides(overrides)
    file = parse_study_file(document)
    recipes = _Recipes(document, file, changes)
    # Before the command line's values, which are meant as they are given.
    if recipes.family is not None:
        file = recipes.family.study(file)
    file = _with_changed_axes(file, changes)
    of_rows = _of_rows(file, changes)
    # The other changes apply to every trial as they are; a seed replaces the file's list of seeds.
    seeds: Sequence[Any] = file.seeds
    if "seed" in changes:
        seeds = (changes.pop("seed"),)
    fingerprints: dict[str, str] = {}
    trials: list[Trial] = []
    for labels in itertools.product(*(axis.items() for axis in file.axes.values())):
        recipe = recipes.of(labels)
        own = [(label, _without_recipe(settings)) for label, settings in labels]
        # Later wins: recipe, fixed, the axes in their order, the row, the seed, the command line.
        tree = _override(recipe.content, file.fixed, document, ("fixed",))
        for axis, (label, settings) in zip(file.axes, own, strict=True):
            tree = _override(tree, settings, document, ("axes", axis, label))
        row = BETWEEN_LABELS.join(label for label, _ in own)
        tree = _override(tree, of_rows.get(row, {}), document, ("axes",))
        named = dict(zip(file.axes, (label for label, _ in own), strict=True))
        for seed in seeds:
            merged = merge(tree, {**changes, "seed": seed})
            # The changes of the row are the command line's too.
            given = {**of_rows.get(row, {}), **changes}
            settings = _build(merged, recipe, document, own, file, given)
            content = _fingerprint(settings, fingerprints)
            trials.append(Trial(named, settings, content, file.table.mean_over))
    study = Study(document.path.stem, file, trials, document.path, overrides=tuple(overrides))
    if not trials:
        raise UserError(
            f"{document.path}: no trial in it; every axis needs a label, and seeds a seed"
        )
    # Before the filter: the file may name rows that this launch leaves out.
    check_references(study, document)
    return replace(study, trials=_select(trials, file, only))


class _Recipes:
    """Finds the recipe of each row of a study, and reads each recipe's file once.

    ``recipe=…`` of the command line, which is removed from ``changes``, replaces the recipe of
    every row, or names a folder (``recipe=released``) whose recipes of the same names replace them.
    """

    def __init__(self, document: Document, file: StudyFile, changes: dict[str, Any]) -> None:
        self.document = document
        self.default = file.recipe
        self.other: str | None = None
        self.family: Family | None = None
        self._read: dict[str, Recipe] = {}
        # Anything else under this name is no recipe: ``build`` reports it as a wrong setting.
        if isinstance(changes.get("recipe"), str):
            given: str = changes.pop("recipe")
            self.family = find_family(given)
            if self.family is None:
                self.other = given

    def of(self, labels: Sequence[tuple[str, Mapping[str, Any]]]) -> Recipe:
        """Return a row's recipe: that of its first label that names one, or else the study's."""
        name = self.default
        for _, settings in labels:
            if "recipe" in settings:
                name = settings["recipe"]
                break
        if self.other:
            name = self.other
        elif self.family:
            name = self.family.recipe(name)
        if name not in self._read:
            # A study names recipes relative to its own folder, the command line relative to the
            # working folder.
            path = name
            if not self.other:
                path = _beside(self.document, name)
            self._read[name] = Recipe(find(path, "recipe"))
        return self._read[name]


def _without_recipe(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return a label's settings without the name of a recipe, which is not a setting."""
    return {path: value for path, value in settings.items() if path != "recipe"}


def _is_recipe(document: Document) -> bool:
    """Whether a file is a recipe and not a study."""
    # Both have a key ``recipe``: the name of a file in a study, a group of settings in a recipe.
    content = document.content
    return not {"axes", "title"} & content.keys() and not isinstance(content.get("recipe"), str)


def paper_studies() -> list[str]:
    """Return the shipped files of the paper's tables and figures, in the paper's order."""
    files = [
        file
        for kind in ("table", "figure")
        for file in packaged("search_spaces").glob(f"{kind}*.yaml")
    ]
    # By numbers, not by text: table10 comes after table9.
    order = {str(file): re.findall(r"^([a-z]+)(\d+)([a-z]?)", file.stem)[0] for file in files}
    return sorted(
        order, key=lambda file: (order[file][0] == "figure", int(order[file][1]), order[file][2])
    )


def _with_changed_axes(file: StudyFile, changes: dict[str, Any]) -> StudyFile:
    """Apply the command line's ``axes.AXIS.LABEL.path`` to that label; remove them from changes."""
    axes = {axis: dict(labels) for axis, labels in file.axes.items()}
    for path in [path for path in changes if path.startswith("axes.")]:
        candidates = [
            (axis, label)
            for axis in axes
            for label in axes[axis]
            if path.startswith(f"axes.{axis}.{label}.")
        ]
        if not candidates:
            raise UserError(f"{path}: the study has no such axis and label ({', '.join(axes)})")
        # A label may have a dot, as "0.5", so several labels may fit: the longest is meant.
        axis, label = max(candidates, key=lambda location: len(location[1]))
        axes[axis][label] = {
            **axes[axis][label],
            path.removeprefix(f"axes.{axis}.{label}."): changes.pop(path),
        }
    return file.model_copy(update={"axes": axes})


def _of_rows(file: StudyFile, changes: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Remove the command line's ``rows.ROW.path`` from changes; return them by row."""
    rows = [BETWEEN_LABELS.join(labels) for labels in itertools.product(*file.axes.values())]
    found: dict[str, dict[str, Any]] = {}
    for path in [path for path in changes if path.startswith("rows.")]:
        # The longest row that fits, as with labels: a row may be the beginning of another.
        row = max((row for row in rows if path.startswith(f"rows.{row}.")), key=len, default=None)
        if row is None:
            raise UserError(f"{path}: the study has no such row (it has: {', '.join(rows)})")
        found.setdefault(row, {})[path.removeprefix(f"rows.{row}.")] = changes.pop(path)
    return found


def _beside(document: Document, recipe: str) -> str:
    """Return the path of a study's recipe: relative to the study's file, or shipped with mar."""
    near = document.path.parent / recipe
    if near.is_file():
        return str(near)
    try:
        return str(find(recipe, "recipe"))
    except UserError as error:
        raise UserError(f"{document.location('recipe')}: recipe: {error}") from None


def _override(
    tree: dict[str, Any], settings: Mapping[str, Any], document: Document, location: tuple[str, ...]
) -> dict[str, Any]:
    """Merge settings into a tree; an error names the entry of the file that they are from."""
    try:
        return merge(tree, settings)
    except SettingError as error:
        raise UserError(f"{document.location(*location)}: {error}") from None


def _build(
    tree: Mapping[str, Any],
    recipe: Recipe,
    document: Document,
    labels: Sequence[tuple[str, Mapping[str, Any]]],
    file: StudyFile,
    changes: Mapping[str, Any],
) -> TrainingConfig:
    """Build a trial's settings; an error names the place where the wrong setting was written."""
    try:
        return build(tree)
    except SettingError as error:
        # From the source that wins to the one that is overridden: the command line, the labels of
        # the axes, ``fixed``, the recipe.
        if touches(error.path, changes):
            raise UserError(str(error)) from None
        for axis, (label, settings) in zip(file.axes, labels, strict=True):
            if error.path and touches(error.path, settings):
                raise UserError(
                    f"{document.location('axes', axis, label)}: {axis} = {label}: {error}"
                ) from None
        if error.path and touches(error.path, file.fixed):
            raise UserError(f"{document.location('fixed')}: {error}") from None
        raise UserError(f"{recipe.location_of_setting(error.path)}: {error}") from None


def _fingerprint(settings: TrainingConfig, known: dict[str, str]) -> str:
    """Return the fingerprint of the data; ``ABSENT`` if its folder is missing or empty."""
    data = settings.data
    # Trials that share their data share its fingerprint, which reads all annotations.
    location = data.model_dump_json()
    if location not in known:
        # ``annotations.check_root`` refuses an empty folder too.
        if Path(data.root).is_dir() and any(Path(data.root).iterdir()):
            known[location] = fingerprint(data)
        else:
            known[location] = ABSENT
    return known[location]


def _select(trials: list[Trial], file: StudyFile, only: Sequence[str]) -> list[Trial]:
    """Keep the trials with one of the given labels on each axis that is given."""
    wanted: dict[str, list[str]] = {}
    for word in only:
        axis, equals, label = word.partition("=")
        if not equals or axis not in file.axes:
            raise UserError(
                f"--filter {word}: expected axis=label with an axis of the study "
                f"({', '.join(file.axes)})"
            )
        if label not in file.axes[axis]:
            known = ", ".join(file.axes[axis])
            raise UserError(
                f"--filter {word}: the axis {axis} has no label {label!r} (it has: {known})"
            )
        wanted.setdefault(axis, []).append(label)
    return [
        trial
        for trial in trials
        if all(trial.labels[axis] in labels for axis, labels in wanted.items())
    ]


def fetch_weights(study: Study) -> None:
    """Download the pre-trained weights that have a hub's name, for all trials that are to run.

    Call it before any trial's ``identity`` is read, because an identity has the weights' content.

    Raises:
        UserError: a file does not exist or cannot be downloaded.
    """
    # It may have cached that these weights are absent.
    weights_fingerprint.cache_clear()
    for name in sorted({trial.settings.encoder.weights or "" for trial in study.to_run} - {""}):
        try:
            fetch(name)
        except UserError as error:
            raise UserError(f"encoder.weights: {error}") from None
