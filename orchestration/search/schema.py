"""A search file's content: space, objectives, constraints, initial points, pruner."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError

from mar.config.overrides import SETTING_PATHS, SettingError, build, flatten, merge
from mar.config.schema import TrainingConfig
from mar.errors import UserError
from mar.model.flops import cost
from orchestration.studies.family import find_family
from orchestration.studies.metrics import METRICS, cost_figure
from orchestration.studies.recipe import parse_overrides
from orchestration.studies.validation import mistake_in
from orchestration.studies.yaml_document import Document, Recipe, find

_ROUNDING = 1e-9
"""Of a step: how far a value may be from a multiple of it, since 0.1 has no exact float."""
CONSTRAINT = re.compile(r"(\w+) (<=|>=) (\d+(?:\.\d+)?)")


class _Part(BaseModel):
    # ``extra="forbid"`` makes a misspelt key an error. It would be ignored otherwise.
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Dimension(_Part):
    """One setting of the space: a range, or choices."""

    low: float | int | None = None
    high: float | int | None = None
    step: float | int | None = None
    log: bool = False
    """Whether it is drawn uniformly in its logarithm."""
    choices: tuple[Any, ...] | None = None
    condition: dict[str, tuple[Any, ...]] = {}
    """Setting -> values: it is searched only where that setting has one of these."""

    def distribution(self) -> BaseDistribution:
        """Return its distribution in Optuna.

        Raises:
            ValueError: it has neither low and high nor choices, or has both.
        """
        if self.choices is not None and self.low is None and self.high is None:
            return CategoricalDistribution([as_text(choice) for choice in self.choices])
        if self.choices is not None or self.low is None or self.high is None:
            raise ValueError("expected low and high, or choices")
        # ``_typed`` has made the ends of a fractional setting floats before.
        if isinstance(self.low, int) and isinstance(self.high, int):
            return IntDistribution(self.low, self.high, self.log, int(self.step or 1))
        return FloatDistribution(
            float(self.low),
            float(self.high),
            self.log,
            None if self.step is None else float(self.step),
        )

    def suggested(self, asked: optuna.Trial, path: str) -> Any:
        """Draw a value.

        It is text for a choice that is a list.
        """
        kind = self.distribution()
        if isinstance(kind, CategoricalDistribution):
            return asked.suggest_categorical(path, kind.choices)
        if isinstance(kind, IntDistribution):
            return asked.suggest_int(path, kind.low, kind.high, step=kind.step, log=kind.log)
        assert isinstance(kind, FloatDistribution)
        return asked.suggest_float(path, kind.low, kind.high, step=kind.step, log=kind.log)

    def holds(self, value: Any) -> bool:
        """Whether a value lies in its range or is one of its choices."""
        kind = self.distribution()
        if isinstance(kind, CategoricalDistribution):
            return value in kind.choices
        assert isinstance(kind, IntDistribution | FloatDistribution)
        # Python's bool is an int: True would lie in a range from 0 to 1.
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not kind.low <= value <= kind.high
        ):
            return False
        if kind.step is None:
            return True
        # 0.3 / 0.1 is 2.9999999999999996: the nearest whole number of steps counts, not the floor.
        steps = (value - kind.low) / kind.step
        return abs(steps - round(steps)) < _ROUNDING


class SearchFile(_Part):
    """A search file as it is written."""

    title: str
    recipe: str
    fixed: dict[str, Any] = {}
    """Settings that differ from the recipe in all trials."""
    space: dict[str, Dimension]
    """Setting -> its range or choices. A ``condition`` may name only settings above its own."""
    objectives: dict[str, Literal["max", "min"]] = {"top1": "max"}
    """Metric -> which values are better; several objectives make a Pareto front."""
    constraints: tuple[str, ...] = ()
    """Bounds of costs that are known before training, as ``gflops <= 90``; a point that breaks one
    is never trained."""
    trials: PositiveInt = 20
    """How many trials this search trains; finished runs that it reuses do not count."""
    sampler: Literal["tpe", "nsga2", "nsga3", "gp", "qmc", "random"] = "tpe"
    seed: NonNegativeInt = 0
    """Of the sampler."""
    initial_points: tuple[dict[str, Any], ...] = ()
    """Points that are proposed first: the paper's setting, in the shipped searches."""
    pruner: Literal["none", "median", "asha", "price"] = "none"
    """Ends trials that are worse than others at the same epoch. ``median`` and ``asha``: with one
    objective. ``price``: with several, an accuracy and costs; a trial is compared with those that
    cost no more than it."""
    quantile: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.5
    """Of ``pruner: price``: a trial ends below this quantile of the others'; 0.5 is the median."""
    warm_start: bool = True
    """Whether the sampler is given the finished trials of other studies that lie in the space."""


@dataclass(frozen=True)
class Search:
    """A search file, resolved."""

    name: str
    file: SearchFile
    tree: Mapping[str, Any]
    """The settings that all trials share."""
    whole: Mapping[str, Any]
    """The same with all defaults, by dotted path."""
    path: Path
    """The search's file."""

    def study_name(self, base: str) -> str:
        """Return the name of the search's Optuna study.

        It differs for other settings, data, objectives or constraints. ``base`` is the identity of
        the settings that all trials share.
        """
        # The number of trials, sampler and seed are left out: more trials with another sampler
        # extend the same search.
        included = self.file.model_dump(mode="json", include={"space", "objectives", "constraints"})
        digest = hashlib.sha256(json.dumps([base, included], sort_keys=True).encode()).hexdigest()
        return f"{self.name}-{digest[:6]}"

    def applies(self, dimension: Dimension, params: Mapping[str, Any]) -> bool:
        """Whether a setting is searched where others have the values ``params``."""
        # A condition may name a setting that is not in the space: the recipe's value counts.
        so_far = {**self.whole, **{path: from_text(value) for path, value in params.items()}}
        return all(so_far.get(other) in values for other, values in dimension.condition.items())

    def settings(self, params: Mapping[str, Any]) -> TrainingConfig:
        """Return the settings of a point.

        Raises:
            SettingError: they break a rule.
        """
        return build(merge(self.tree, {path: from_text(value) for path, value in params.items()}))

    def excess(self, settings: TrainingConfig) -> list[float]:
        """Return the excess over each constraint's bound; 0 or less where it is kept."""
        figures = cost(settings)
        found = list[float]()
        for constraint in self.file.constraints:
            parsed = CONSTRAINT.fullmatch(constraint)
            # ``_check`` has refused every other text.
            assert parsed
            value = cost_figure(figures, METRICS[parsed[1]].source)
            bound = float(parsed[3])
            found.append(value - bound if parsed[2] == "<=" else bound - value)
        return found


def read_search(name: str, overrides: Sequence[str] = ()) -> Search:
    """Read a search file.

    Raises:
        UserError: a bad file, setting, metric or constraint; the message names file and line.
    """
    document = Document(find(name, "study"))
    try:
        file = SearchFile.model_validate(document.content)
    except ValidationError as error:
        raise UserError(mistake_in(document, error, SearchFile)) from None
    # These two are keys of the search file, not settings of a training. They are checked apart from
    # the file, so that an error names the command line and not a line of the file.
    changes = parse_overrides(overrides)
    own = {name: changes.pop(name) for name in ("trials", "sampler") if name in changes}
    try:
        file = SearchFile.model_validate({**document.content, **own})
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{first['loc'][0]}={own[str(first['loc'][0])]}: {first['msg']}") from None
    # A recipe on the command line is a file, or a folder's name as ``released``: that folder's
    # recipe of the same name.
    recipe = str(changes.pop("recipe", ""))
    near = document.path.parent / file.recipe
    name = str(near) if near.is_file() else file.recipe
    if recipe:
        family = find_family(recipe)
        name = family.recipe(name) if family else recipe
    base = Recipe(find(name, "recipe"))
    # Later wins: recipe, fixed, the command line.
    try:
        tree = merge(merge(base.content, file.fixed), changes)
        whole = flatten(build(tree).model_dump(mode="json"))
    except SettingError as error:
        if error.path in changes:
            location = ""
        else:
            location = f"{document.location('fixed')}: "
        raise UserError(f"{location}{error}") from None
    file = file.model_copy(update={"space": _typed(file.space, whole)})
    _check(file, document)
    return Search(document.path.stem, file, tree, whole, document.path)


def _typed(space: Mapping[str, Dimension], whole: Mapping[str, Any]) -> dict[str, Dimension]:
    """Return the space with floats for the ends of each range whose setting is a float.

    YAML reads ``low: 0, high: 1`` of λ as integers, which would be two points and not a range.
    """
    typed: dict[str, Dimension] = {}
    for path, dimension in space.items():
        ends = {
            name: float(value)
            for name in ("low", "high")
            if (value := getattr(dimension, name)) is not None
        }
        if isinstance(whole.get(path), float):
            typed[path] = dimension.model_copy(update=ends)
        else:
            typed[path] = dimension
    return typed


def _check(file: SearchFile, document: Document) -> None:
    """Check what the schema cannot: names of settings and metrics, and which keys go together.

    Raises:
        UserError: the message names file and line.
    """
    if not file.space or not file.objectives:
        raise UserError(f"{document.path}: a search needs a space and objectives")
    _check_space(file, document)
    for name in file.objectives:
        if name not in METRICS:
            raise UserError(
                f"{document.location('objectives')}: no metric {name!r} (there are: "
                f"{', '.join(METRICS)})"
            )
    _check_constraints(file, document)
    _check_initial_points(file, document)
    _check_pruner(file, document)


def _check_pruner(file: SearchFile, document: Document) -> None:
    """Check that the pruner can compare trials by these objectives."""
    location = document.location("pruner")
    if file.pruner == "price":
        others = {name: end for name, end in file.objectives.items() if name != "top1"}
        measured = [
            name
            for name, end in others.items()
            if end != "min" or not METRICS[name].source.startswith("cost.")
        ]
        if file.objectives.get("top1") != "max" or measured:
            raise UserError(
                f"{location}: pruner: 'price' compares top1 (max) at costs that are known before "
                f"training (min); {', '.join(measured) or 'top1'} does not fit"
            )
    # Optuna's ``Trial.should_prune`` raises NotImplementedError with several objectives.
    elif file.pruner != "none" and len(file.objectives) > 1:
        raise UserError(
            f"{location}: pruner: {file.pruner} needs one objective, there are "
            f"{len(file.objectives)}; for several: price"
        )


def _check_space(file: SearchFile, document: Document) -> None:
    """Check the settings that are searched, their ranges and their conditions."""
    above: set[str] = set()
    for path, dimension in file.space.items():
        if path not in SETTING_PATHS or path == "seed":
            raise UserError(
                f"{document.location('space', path)}: {path}: no such setting to search"
            )
        # A dimension's low, high and choices are checked by building its distribution.
        try:
            dimension.distribution()
        except ValueError as error:
            raise UserError(f"{document.location('space', path)}: {path}: {error}") from None
        # Settings are drawn in the file's order: one that follows has no value yet.
        for other in dimension.condition:
            if other not in SETTING_PATHS or (other in file.space and other not in above):
                if other in file.space:
                    reason = "stands below it"
                else:
                    reason = "no such setting"
                raise UserError(
                    f"{document.location('space', path, 'condition')}: {path}: condition: "
                    f"{other}: {reason}"
                )
        above.add(path)


def _check_constraints(file: SearchFile, document: Document) -> None:
    """Check that every constraint bounds a cost."""
    for constraint in file.constraints:
        # The value must be known before training. An unknown name is treated as ``top1``, which is
        # not a cost.
        parsed = CONSTRAINT.fullmatch(constraint)
        if not parsed or not METRICS.get(parsed[1], METRICS["top1"]).source.startswith("cost."):
            known = ", ".join(
                name for name, each in METRICS.items() if each.source.startswith("cost.")
            )
            raise UserError(
                f"{document.location('constraints')}: {constraint!r}: expected a cost and a "
                f"bound, as 'gflops <= 90' ({known})"
            )


def _check_initial_points(file: SearchFile, document: Document) -> None:
    """Check that every initial point lies in the space."""
    for number, point in enumerate(file.initial_points):
        # Optuna's ``enqueue_trial`` accepts any point: it ignores a setting that is not in the
        # space, and uses a value out of range with a warning only.
        unknown = set(point) - set(file.space)
        if unknown:
            raise UserError(
                f"{document.location('initial_points')}: initial point {number + 1}: "
                f"{', '.join(sorted(unknown))} "
                "is not in the space"
            )
        for path, value in point.items():
            if not file.space[path].holds(as_text(value)):
                raise UserError(
                    f"{document.location('initial_points')}: initial point {number + 1}: {path} "
                    f"cannot be {value!r}"
                )


def as_text(value: Any) -> Any:
    """Return a choice as Optuna stores it: a list as JSON text, a scalar unchanged."""
    # ``CategoricalDistribution`` warns about choices other than None, booleans, numbers and text.
    if isinstance(value, (list, tuple)):
        return json.dumps(list(value))
    return value


def from_text(value: Any) -> Any:
    """Return the value that Optuna's choice stands for; the inverse of ``as_text``."""
    if isinstance(value, str) and value.startswith("["):
        return json.loads(value)
    return value
