"""What a search file may say: space, goals, constraints, start points, early stopping."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt, ValidationError

from mar.config import ExperimentConfig
from mar.cost import cost
from mar.errors import UserError
from mar.settings import SETTING_PATHS, SettingError, build, merge
from orchestration.files import Document, Recipe, find
from orchestration.quantities import QUANTITIES
from orchestration.results import cost_figure
from orchestration.study import parse_overrides

_ROUNDING = 1e-9
CONSTRAINT = re.compile(r"(\w+) (<=|>=) (\d+(?:\.\d+)?)")


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Dimension(_Part):
    """One setting that is searched: a range, or choices."""

    low: float | int | None = None
    high: float | int | None = None
    step: float | int | None = None
    log: bool = False
    """Drawn uniformly in its logarithm."""
    choices: tuple[Any, ...] | None = None
    when: dict[str, tuple[Any, ...]] = {}
    """Setting -> values: it is searched only where that setting has one of these."""

    def distribution(self) -> BaseDistribution:
        """Return it as Optuna has it; raises ValueError if it is neither a range nor choices."""
        if self.choices is not None and self.low is None and self.high is None:
            return CategoricalDistribution([as_text(choice) for choice in self.choices])
        if self.choices is not None or self.low is None or self.high is None:
            raise ValueError("expected low and high, or choices")
        if isinstance(self.low, int) and isinstance(self.high, int):
            return IntDistribution(self.low, self.high, self.log, int(self.step or 1))
        return FloatDistribution(
            float(self.low), float(self.high), self.log, None if self.step is None else float(self.step)
        )

    def suggested(self, asked: optuna.Trial, path: str) -> Any:
        """Draw a value."""
        kind = self.distribution()
        if isinstance(kind, CategoricalDistribution):
            return asked.suggest_categorical(path, kind.choices)
        if isinstance(kind, IntDistribution):
            return asked.suggest_int(path, kind.low, kind.high, step=kind.step, log=kind.log)
        assert isinstance(kind, FloatDistribution)
        return asked.suggest_float(path, kind.low, kind.high, step=kind.step, log=kind.log)

    def holds(self, value: Any) -> bool:
        """Whether a value lies in it."""
        kind = self.distribution()
        if isinstance(kind, CategoricalDistribution):
            return value in kind.choices
        assert isinstance(kind, IntDistribution | FloatDistribution)
        if isinstance(value, bool) or not isinstance(value, int | float) or not kind.low <= value <= kind.high:
            return False
        return kind.step is None or abs((value - kind.low) / kind.step % 1) < _ROUNDING


class SearchFile(_Part):
    """A search as it is written."""

    title: str
    recipe: str
    fixed: dict[str, Any] = {}
    """Settings that differ from the recipe in all trials."""
    space: dict[str, Dimension]
    """Setting -> what it may be; in this order, so that ``when`` looks at what is above."""
    goals: dict[str, Literal["max", "min"]] = {"top1": "max"}
    """Quantity -> its better end; several goals make a Pareto front."""
    constraints: tuple[str, ...] = ()
    """As ``gflops <= 90``: costs that are known before training; what breaks one is never trained."""
    trials: PositiveInt = 20
    """How many are trained (or found trained)."""
    sampler: Literal["tpe", "nsga2", "nsga3", "gp", "qmc", "random"] = "tpe"
    seed: NonNegativeInt = 0
    """Of the sampler."""
    start: tuple[dict[str, Any], ...] = ()
    """Points to begin with: the paper's setting first."""
    stopper: Literal["none", "median", "asha"] = "none"
    """Ends a trial early that is worse than others were at the same epoch; with one goal only."""
    prior: bool = True
    """Offer the finished trials of other studies that lie in the space as what is known."""


@dataclass(frozen=True)
class Search:
    """A search file, resolved."""

    name: str
    file: SearchFile
    tree: Mapping[str, Any]
    """The settings that all trials share."""

    def settings(self, params: Mapping[str, Any]) -> ExperimentConfig:
        """Return the settings of a point; raises a SettingError if they break a rule."""
        return build(merge(self.tree, {path: from_text(value) for path, value in params.items()}))

    def excess(self, settings: ExperimentConfig) -> list[float]:
        """Return by how much each constraint is broken; none is where all are 0 or less."""
        figures, found = cost(settings), list[float]()
        for words in self.file.constraints:
            told = CONSTRAINT.fullmatch(words)
            assert told
            value, bound = cost_figure(figures, QUANTITIES[told[1]].source), float(told[3])
            found.append(value - bound if told[2] == "<=" else bound - value)
        return found


def read_search(name: str, overrides: Sequence[str] = ()) -> Search:
    """Read a search file.

    Raises:
        UserError: a bad file, setting, quantity or constraint; the message says where.
    """
    document = Document(find(name, "study"))
    try:
        file = SearchFile.model_validate(document.content)
    except ValidationError as error:
        first = error.errors()[0]
        place = [str(part) for part in first["loc"]]
        raise UserError(f"{document.place(*place)}: {'.'.join(place)}: {first['msg']}") from None
    changes = parse_overrides(overrides)
    file = file.model_copy(update={name: changes.pop(name) for name in ("trials", "sampler") if name in changes})
    recipe = changes.pop("recipe", None)
    near = document.path.parent / file.recipe
    base = Recipe(find(recipe or (str(near) if near.is_file() else file.recipe), "recipe"))
    try:
        tree = merge(merge(base.content, file.fixed), changes)
        build(tree)
    except SettingError as error:
        raise UserError(f"{document.place('fixed')}: {error}") from None
    _check(file, document)
    return Search(document.path.stem, file, tree)


def _check(file: SearchFile, document: Document) -> None:
    for path, dimension in file.space.items():
        if path not in SETTING_PATHS:
            raise UserError(f"{document.place('space', path)}: {path}: no such setting")
        try:
            dimension.distribution()
        except ValueError as error:
            raise UserError(f"{document.place('space', path)}: {path}: {error}") from None
    for name in file.goals:
        if name not in QUANTITIES:
            raise UserError(f"{document.place('goals')}: no quantity {name!r} (there are: {', '.join(QUANTITIES)})")
    for words in file.constraints:
        told = CONSTRAINT.fullmatch(words)
        if not told or not QUANTITIES.get(told[1], QUANTITIES["top1"]).source.startswith("cost."):
            known = ", ".join(name for name, each in QUANTITIES.items() if each.source.startswith("cost."))
            raise UserError(
                f"{document.place('constraints')}: {words!r}: expected a cost and a bound, as 'gflops <= 90' ({known})"
            )
    for number, point in enumerate(file.start):
        unknown = set(point) - set(file.space)
        if unknown:
            raise UserError(
                f"{document.place('start')}: start {number + 1}: {', '.join(sorted(unknown))} is not in the space"
            )
    if file.stopper != "none" and len(file.goals) > 1:
        raise UserError(
            f"{document.place('stopper')}: stopper: an early end needs one goal, there are {len(file.goals)}"
        )


def as_text(value: Any) -> Any:
    """Return a choice as Optuna keeps it: a scalar as it is, a list as JSON."""
    return json.dumps(list(value)) if isinstance(value, (list, tuple)) else value


def from_text(value: Any) -> Any:
    """Return what a choice stands for."""
    return json.loads(value) if isinstance(value, str) and value.startswith("[") else value
