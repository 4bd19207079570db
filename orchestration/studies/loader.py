"""A study file becomes an ordered list of trials: labels and complete settings, before anything runs."""

from __future__ import annotations

import difflib
import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from mar import RESULTS
from mar.config.overrides import SETTING_PATHS, SettingError, build, merge, placeless
from mar.config.schema import ClassifierConfig, ExperimentConfig, MaskConfig, ReconstructionConfig
from mar.data.annotations import fingerprint
from mar.errors import UserError
from mar.safe_input import parse_yaml
from mar.weights.hub import ABSENT as WEIGHTS_ABSENT
from mar.weights.hub import fetch, is_path
from mar.weights.hub import fingerprint as weights_fingerprint
from orchestration.installation import packaged
from orchestration.studies.metrics import QUANTITIES
from orchestration.studies.names import recipe_title
from orchestration.studies.schema import BETWEEN_LABELS, FigureLayout, StudyFile, TableLayout, label_parts
from orchestration.studies.yaml_document import Document, Recipe, find

ABSENT = "absent"
"""The fingerprint while the data is not there."""


@dataclass(frozen=True)
class Trial:
    """One training of a study: its place in the table, and its complete settings."""

    labels: Mapping[str, str]
    """Axis -> label."""
    settings: ExperimentConfig
    fingerprint: str
    """Of the data's content; ``ABSENT`` while it is not there."""

    @property
    def row(self) -> str:
        """The labels of all axes, joined."""
        return BETWEEN_LABELS.join(self.labels.values())

    @property
    def name(self) -> str:
        """What people call it."""
        return f"{self.row} (seed {self.settings.seed})"

    @cached_property
    def identity(self) -> str:
        """Equal identities, equal results: all settings, the data's fingerprint in the place of its paths."""
        return identity(self.settings, self.fingerprint)

    @cached_property
    def training(self) -> str:
        """Equal trainings, equal models: trials that differ in ``evaluation`` alone are one training."""
        return training_of(self.identity)

    @property
    def lacks_weights(self) -> bool:
        """Whether it starts from pre-trained weights that are not on this machine."""
        name = self.settings.encoder.weights
        return name is not None and _weights_fingerprint(name).startswith(WEIGHTS_ABSENT)

    @cached_property
    def key(self) -> str:
        """A short hash of the identity; names the trial's folder."""
        return key_of(self.identity)


@dataclass(frozen=True)
class Study:
    """A study, resolved."""

    name: str
    """The file's name without its ending: the experiment's name in MLflow."""
    file: StudyFile
    trials: Sequence[Trial]
    path: Path | None = None
    """The study's file; none for one that was made by a program."""
    chosen: frozenset[str] | None = None
    """Keys of the trials that are to run now (``--only``); none: all."""

    @property
    def to_run(self) -> list[Trial]:
        """The trials that are to run now."""
        return [trial for trial in self.trials if self.chosen is None or trial.key in self.chosen]

    @property
    def trains(self) -> bool:
        """Whether there is anything to train: pictures of masks need no model."""
        return self.file.figure.kind != "masks"


def _of_one(path: Path, overrides: Sequence[str]) -> Study:
    """Return a study of one trial: a recipe as it is. Its name is the recipe's and its folder's."""
    settings = read_recipe(str(path), overrides)
    column = "test_reconstruction_loss" if settings.pretrains else "top1"
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
    return Study(title.replace("/", "_"), file, [trial], path)


@lru_cache
def _weights_fingerprint(name: str) -> str:
    """Look at a checkpoint once for a study: a thousand trials may start from it."""
    return weights_fingerprint(name)


def key_of(identity_line: str) -> str:
    """Return the key of the trial with an identity."""
    return hashlib.sha256(identity_line.encode()).hexdigest()[:12]


def identity(settings: ExperimentConfig, data_fingerprint: str) -> str:
    """Return one line that is equal for equal trainings: settings with the data's content instead of its place."""
    settings = canonical(settings)
    tree: dict[str, Any] = {**placeless(settings), "fingerprint": data_fingerprint, "results": RESULTS}
    if settings.evaluation.mask.ratio == settings.mask.ratio:  # the same as to leave it out
        tree["evaluation"] = {**tree["evaluation"], "mask": {**tree["evaluation"]["mask"], "ratio": None}}
    if settings.encoder.weights:
        tree["encoder"] = {**tree["encoder"], "weights": _weights_fingerprint(settings.encoder.weights)}
    return json.dumps(tree, sort_keys=True, ensure_ascii=False)


def canonical(settings: ExperimentConfig) -> ExperimentConfig:
    """Return the settings with those that do nothing at their defaults: they must not make two trainings of one.

    A linear classifier has no width; where nothing is hidden there are no cells and nothing is rebuilt; a running
    uniform mask is a running cell as large as the token grid.
    """
    changes: dict[str, Any] = {}
    kept = settings.classifier
    if kept.kind == "linear":
        linear = {"kind": "linear", "dropout": kept.dropout, "norm": kept.norm}
        changes["classifier"] = ClassifierConfig.model_validate(linear)
    if not settings.reconstructs:
        changes["reconstruction"] = ReconstructionConfig(weight=0.0)
    mask, plain = settings.mask, MaskConfig()
    if not mask.ratio and not settings.test_ratio:
        changes["mask"] = MaskConfig(ratio=0.0)
    elif (mask.strategy, mask.motion, mask.spatial, mask.temporal) == ("uniform", *_RUNNING):
        changes["mask"] = plain.model_copy(update={"ratio": mask.ratio, "cell": settings.grid[1:]})
    return settings.model_copy(update=changes)


_RUNNING = (MaskConfig().motion, MaskConfig().spatial, MaskConfig().temporal)


def training_of(identity_line: str) -> str:
    """Return the part of an identity that a training depends on: all but how it is tested."""
    tree: dict[str, Any] = json.loads(identity_line)
    tree.pop("evaluation")
    if not tree["mask"]["ratio"]:  # then the mask is of testing alone
        tree["mask"] = {"ratio": 0.0}
    return json.dumps(tree, sort_keys=True, ensure_ascii=False)


def completed(identity_line: str, data_fingerprint: str | None = None, weights: str | None = None) -> str:
    """Return an identity that an earlier version wrote, with the settings it did not know yet at their defaults.

    ``data_fingerprint`` is put in the place of its own: where the data is not at hand, settings alone must do. So
    is the name of the pre-trained ``weights``: where they are not at hand, their name must do.
    """
    tree: dict[str, Any] = json.loads(identity_line)
    own, results = tree.pop("fingerprint"), tree.pop("results", 1)
    if weights:
        tree["encoder"]["weights"] = f"{WEIGHTS_ABSENT}{weights}"
    line = json.loads(identity(build(tree), data_fingerprint or own))
    return json.dumps({**line, "results": results}, sort_keys=True, ensure_ascii=False)


def read_study(name: str, overrides: Sequence[str] = (), only: Sequence[str] = ()) -> Study:
    """Read a study file and list its trials in the order of the file: last axis fastest, then seeds.

    ``overrides`` are ``path=value`` from the command line, the last word on every setting; ``recipe=FILE``
    puts another recipe under the study (a folder's name, as ``recipe=released``: that folder's of the same names), and
    ``axes.AXIS.LABEL.path=value`` changes one label's own settings, ``rows.ROW.path=value`` those of one row. ``only`` keeps the trials with the given ``axis=label``. A recipe's file is
    read as a study of one trial.

    Raises:
        UserError: a bad file, setting, label or override; the message says where.
    """
    _weights_fingerprint.cache_clear()
    document = Document(find(name, "study"))
    if not {"axes", "title", "recipe"} & document.content.keys() or _is_recipe(document):
        return _of_one(document.path, overrides)
    changes = parse_overrides(overrides)
    file = _with_changed_axes(_checked(document), changes)
    of_rows = _of_rows(file, changes)
    another = changes.pop("recipe") if isinstance(changes.get("recipe"), str) else None
    family = another if another and (packaged("search_spaces") / "recipes" / another).is_dir() else None
    another = None if family else another
    recipes: dict[str, Recipe] = {}
    seeds = (changes.pop("seed"),) if "seed" in changes else file.seeds
    fingerprints: dict[str, str] = {}
    trials: list[Trial] = []
    for labels in itertools.product(*(axis.items() for axis in file.axes.values())):
        own = [(label, {path: value for path, value in tree.items() if path != "recipe"}) for label, tree in labels]
        name = another or next((tree["recipe"] for _, tree in labels if "recipe" in tree), file.recipe)
        name = in_family(name, family) if family else name
        recipe = recipes.get(name) or Recipe(find(name if another else _beside(document, name), "recipe"))
        recipes[name] = recipe
        tree = _override(recipe.content, file.fixed, document, ("fixed",))
        for axis, (label, settings) in zip(file.axes, own, strict=True):
            tree = _override(tree, settings, document, ("axes", axis, label))
        row = BETWEEN_LABELS.join(label for label, _ in own)
        tree = _override(tree, of_rows.get(row, {}), document, ("axes",))
        for seed in seeds:
            settings = _build(merge(tree, {**changes, "seed": seed}), recipe, document, own, file, changes)
            named = dict(zip(file.axes, (label for label, _ in own), strict=True))
            trials.append(Trial(named, settings, _fingerprint(settings, fingerprints)))
    study = Study(document.path.stem, file, trials, document.path)
    if not trials:
        raise UserError(f"{document.path}: no trial in it; every axis needs a label, and seeds a seed")
    _check_quantities(study, document)
    return replace(study, trials=_select(trials, file, only))


def _is_recipe(document: Document) -> bool:
    """Whether a file has a recipe's settings: ``recipe`` is a study's recipe where it is text, else a branch of settings."""
    content = document.content
    return not {"axes", "title"} & content.keys() and not isinstance(content.get("recipe"), str)


def paper_studies() -> list[str]:
    """Return the files of the paper's tables and figures that ship with mar, in the paper's order."""
    files = [file for kind in ("table", "figure") for file in packaged("search_spaces").glob(f"{kind}*.yaml")]
    order = {str(file): re.findall(r"^([a-z]+)(\d+)([a-z]?)", file.stem)[0] for file in files}
    return sorted(order, key=lambda file: (order[file][0] == "figure", int(order[file][1]), order[file][2]))


def read_recipe(name: str, overrides: Sequence[str] = ()) -> ExperimentConfig:
    """Read a recipe file and apply ``path=value`` overrides."""
    recipe = Recipe(find(name, "recipe"))
    if {"axes", "space"} & recipe.content.keys():
        what = "a search" if "space" in recipe.content else "a study"
        raise UserError(
            f"{recipe.documents[-1].path} is {what}, not a recipe; its settings are in {recipe.content.get('recipe')}"
        )
    changes = parse_overrides(overrides)
    try:
        return build(merge(recipe.content, changes))
    except SettingError as error:
        place = "" if _touches(error.path, changes) else f"{recipe.place_of_setting(error.path)}: "
        raise UserError(f"{place}{error}") from None


def recipe_tree(name: str) -> dict[str, Any]:
    """Return what a recipe's files say, nested, without the defaults."""
    return Recipe(find(name, "recipe")).content


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """Return dotted paths and YAML values of ``path=value`` words."""
    changes: dict[str, Any] = {}
    for word in overrides:
        path, equals, text = word.partition("=")
        if word.startswith(("axes.", "rows.")):  # a label may have an equals sign
            ends = [place for place in range(len(word)) if word[place] == "=" and _SETTING.search(word[:place])]
            path, text = (word[: ends[0]], word[ends[0] + 1 :]) if ends else (path, text)
        if not equals or not path:
            raise UserError(f"{word!r}: expected path=value, as in mask.ratio=0.75")
        try:
            changes[path] = parse_yaml(text)[0]
        except yaml.YAMLError as error:
            reason = getattr(error, "problem", None) or "not valid YAML"
            raise UserError(f"{path}={text}: {reason}") from None
    return changes


_SETTING = re.compile(rf"\.(?:{'|'.join(re.escape(path) for path in SETTING_PATHS)}|recipe)$")


def _checked(document: Document) -> StudyFile:
    content = {**document.content}
    if isinstance(content.get("axes"), dict):
        content["axes"] = {axis: _labelled(axis, labels, document) for axis, labels in content["axes"].items()}
    try:
        file = StudyFile.model_validate(content)
    except ValidationError as error:
        raise UserError(mistake_in(document, error, StudyFile)) from None
    if len(set(file.seeds)) < len(file.seeds):
        raise UserError(f"{document.place('seeds')}: seeds: each may stand there once")
    settings = [file.fixed, *(tree for axis in file.axes.values() for tree in axis.values())]
    if any("seed" in tree for tree in settings):
        raise UserError(f"{document.path}: the seed is set by 'seeds: [0, 1, …]', not as a setting")
    return file


def _labelled(axis: str, labels: Any, document: Document) -> Any:
    """Return an axis' labels; of a setting whose values are listed, the values are the labels."""
    if not isinstance(labels, list):
        return labels
    if axis not in SETTING_PATHS:
        near = difflib.get_close_matches(axis, SETTING_PATHS, n=1, cutoff=0.6)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(
            f"{document.place('axes', axis)}: axes.{axis}: a list of values needs a setting's name, as mask.ratio{hint}"
        )
    return {_value_text(value): {axis: value} for value in labels}


def _value_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def mistake_in(document: Document, error: ValidationError, kind: type[BaseModel]) -> str:
    """Return where a study or search file is wrong, what is, and which key was meant, perhaps."""
    found = error.errors()
    first = next(
        (each for each in found if each["type"] == "extra_forbidden"), found[0]
    )  # a misspelt key is missing too
    names = tuple(str(part) for part in first["loc"])
    words = first["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    if first["type"] == "extra_forbidden":
        known = kind.model_fields
        if len(names) > 1:
            inner: Any = getattr(known.get(names[0]), "annotation", None)
            known = getattr(inner, "model_fields", {})
        near = difflib.get_close_matches(str(names[-1]) if names else "", known, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]}?" if near else f" (there are: {', '.join(known)})" if known else ""
        words = f"no such key{hint}"
    elif first["type"] in ("dict_type", "model_type"):
        words = f"must be a mapping, 'name: value' line by line, not {first['input']!r}"
    elif first["type"] == "missing":
        words = "is missing"
    return f"{document.place(*names)}: {'.'.join(names)}: {words}"


def in_family(recipe: str, family: str) -> str:
    """Return the recipe of the same name in another folder (``recipe=released`` for ``recipes/paper``), or itself."""
    near = packaged("search_spaces") / "recipes" / family / Path(recipe).name
    return str(near) if near.is_file() else recipe


def _with_changed_axes(file: StudyFile, changes: dict[str, Any]) -> StudyFile:
    """Take ``axes.AXIS.LABEL.path`` out of the command line's changes: they are one label's own settings."""
    axes = {axis: dict(labels) for axis, labels in file.axes.items()}
    for path in [path for path in changes if path.startswith("axes.")]:
        places = [(axis, label) for axis in axes for label in axes[axis] if path.startswith(f"axes.{axis}.{label}.")]
        if not places:
            raise UserError(f"{path}: the study has no such axis and label ({', '.join(axes)})")
        axis, label = max(places, key=lambda place: len(place[1]))
        axes[axis][label] = {**axes[axis][label], path.removeprefix(f"axes.{axis}.{label}."): changes.pop(path)}
    return file.model_copy(update={"axes": axes})


def _of_rows(file: StudyFile, changes: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Take ``rows.ROW.path`` out of the command line's changes: they are settings of one row alone."""
    rows = [BETWEEN_LABELS.join(labels) for labels in itertools.product(*file.axes.values())]
    found: dict[str, dict[str, Any]] = {}
    for path in [path for path in changes if path.startswith("rows.")]:
        row = max((row for row in rows if path.startswith(f"rows.{row}.")), key=len, default=None)
        if row is None:
            raise UserError(f"{path}: the study has no such row (it has: {', '.join(rows)})")
        found.setdefault(row, {})[path.removeprefix(f"rows.{row}.")] = changes.pop(path)
    return found


def _beside(document: Document, recipe: str) -> str:
    """A study names its recipe relative to itself, or one that ships with mar."""
    near = document.path.parent / recipe
    if near.is_file():
        return str(near)
    try:
        return str(find(recipe, "recipe"))
    except UserError as error:
        raise UserError(f"{document.place('recipe')}: recipe: {error}") from None


def _override(
    tree: dict[str, Any], settings: Mapping[str, Any], document: Document, place: tuple[str, ...]
) -> dict[str, Any]:
    try:
        return merge(tree, settings)
    except SettingError as error:
        raise UserError(f"{document.place(*place)}: {error}") from None


def _touches(path: str, changes: Mapping[str, Any]) -> bool:
    """Whether one of the changes is to this setting, to something in it, or to the branch it is in."""
    return any(change == path or change.startswith(f"{path}.") or path.startswith(f"{change}.") for change in changes)


def _build(
    tree: Mapping[str, Any],
    recipe: Recipe,
    document: Document,
    labels: Sequence[tuple[str, Mapping[str, Any]]],
    file: StudyFile,
    changes: Mapping[str, Any],
) -> ExperimentConfig:
    try:
        return build(tree)
    except SettingError as error:
        if _touches(error.path, changes):
            raise UserError(str(error)) from None
        for axis, (label, settings) in zip(file.axes, labels, strict=True):
            if error.path and _touches(error.path, settings):
                raise UserError(f"{document.place('axes', axis, label)}: {axis} = {label}: {error}") from None
        if error.path and _touches(error.path, file.fixed):
            raise UserError(f"{document.place('fixed')}: {error}") from None
        raise UserError(f"{recipe.place_of_setting(error.path)}: {error}") from None


def _fingerprint(settings: ExperimentConfig, known: dict[str, str]) -> str:
    data = settings.data
    place = data.model_dump_json()
    if place not in known:
        known[place] = fingerprint(data) if Path(data.root).is_dir() and any(Path(data.root).iterdir()) else ABSENT
    return known[place]


def _check_quantities(study: Study, document: Document) -> None:
    """Every quantity must be known, and every label that stands for a row must be one's."""
    file, rows = study.file, sorted({trial.row for trial in study.trials})
    table, figure = file.table, file.figure
    named = [("table", name) for name in table.columns] + [("figure", name) for name in figure.y]
    named += [("figure", figure.x)] if figure.x else []
    named += [("paper", name) for name in file.paper]
    named += [("quoted", name) for row in file.quoted.values() for name in row]
    for part, name in named:
        if name not in QUANTITIES:
            known = ", ".join(QUANTITIES)
            raise UserError(f"{document.place(part)}: {part}: no quantity {name!r} (there are: {known})")
    if figure.kind == "points" and figure.x is None:
        raise UserError(f"{document.place('figure')}: figure: kind 'points' needs x")
    places = [(("paper", name, row), row, rows) for name, values in file.paper.items() for row in values]
    all_rows = [*rows, *file.quoted]
    places += [(("about", row), row, all_rows) for row in file.about]
    places += [(("table", "order"), row, all_rows) for row in table.order]
    places += [(("table", "reference"), row, rows) for row in [table.reference] if row is not None]
    places += [(("claims", words), row, rows) for words, pairs in file.claims.items() for row in _sides(words, pairs)]
    for place, row, known in places:
        if row not in known:
            words = f"{'.'.join(place[:2])}: no trial is labelled {row!r} (there are: {', '.join(known)})"
            raise UserError(f"{document.place(*place)}: {words}")
    parts = [part for axis in file.axes for part in label_parts(axis, axis)]
    axes = {"table.across": table.across, "figure.group": figure.group}
    axes |= {f"table.delta.{axis}": axis for axis in table.delta}
    for place, axis in axes.items():
        if axis is not None and axis not in parts:
            part = place.split(".")[0]
            raise UserError(f"{document.place(part)}: {place}: no axis {axis!r} (there are: {', '.join(parts)})")
    for axis, label in table.delta.items():
        known = {each.split(BETWEEN_LABELS)[parts.index(axis)] for each in rows}
        if label not in known:
            words = f"table.delta.{axis}: no label {label!r} (there are: {', '.join(sorted(known))})"
            raise UserError(f"{document.place('table')}: {words}")
    for axis, labels in file.axes.items():
        for label in labels:
            if len(label_parts(axis, label)) != len(label_parts(axis, axis)):
                raise UserError(f"{document.place('axes', axis, label)}: {label!r} must have the parts of {axis!r}")


def _sides(words: str, pairs: Sequence[str]) -> list[str]:
    """Return the rows that a claim compares."""
    sides = [pair.split(" > ") for pair in pairs]
    if any(len(pair) != 2 for pair in sides):
        raise UserError(f"claims: {words}: expected 'better row > worse row'")
    return [row for pair in sides for row in pair]


def _select(trials: list[Trial], file: StudyFile, only: Sequence[str]) -> list[Trial]:
    """Keep the trials with one of the given labels on each axis that is given."""
    wanted: dict[str, list[str]] = {}
    for word in only:
        axis, equals, label = word.partition("=")
        if not equals or axis not in file.axes:
            raise UserError(f"--only {word}: expected axis=label with an axis of the study ({', '.join(file.axes)})")
        if label not in file.axes[axis]:
            known = ", ".join(file.axes[axis])
            raise UserError(f"--only {word}: the axis {axis} has no label {label!r} (it has: {known})")
        wanted.setdefault(axis, []).append(label)
    return [trial for trial in trials if all(trial.labels[axis] in labels for axis, labels in wanted.items())]


def absolute_paths(settings: ExperimentConfig) -> ExperimentConfig:
    """Return the settings with absolute paths to data and weights, for workers whose working folder is another."""
    data, encoder, weights = settings.data, settings.encoder, settings.encoder.weights
    cache = str(Path(data.cache).resolve()) if data.cache else None
    data = data.model_copy(update={"root": str(Path(data.root).resolve()), "cache": cache})
    if weights and is_path(weights):
        encoder = encoder.model_copy(update={"weights": str(Path(weights).expanduser().resolve())})
    return settings.model_copy(update={"data": data, "encoder": encoder})


def fetch_weights(study: Study) -> None:
    """Have the pre-trained weights of all trials on this machine, downloading those that have a hub's name.

    Call it before any trial's identity is asked for: an identity has the weights' content in it.

    Raises:
        UserError: a file is not there, or cannot be downloaded.
    """
    _weights_fingerprint.cache_clear()
    for name in sorted({trial.settings.encoder.weights or "" for trial in study.trials} - {""}):
        try:
            fetch(name)
        except UserError as error:
            raise UserError(f"encoder.weights: {error}") from None
