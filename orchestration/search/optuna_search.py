"""A search becomes an Optuna study that proposes trials.

Knows nothing of Ray: whoever trains asks ``Proposer.next`` for a trial and tells it what came of
it. The study is kept in an SQLite file (``optuna-dashboard`` opens it), so that a search that was
killed resumes: what it had proposed and not finished is proposed again first, and a proposal that
some finished run equals is answered without training. Other settings, data, objectives or
constraints are another search, with an Optuna study of its own in the same file.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import TrialState

from mar.config.overrides import SettingError, flatten
from mar.config.schema import TrainingConfig
from mar.data.annotations import fingerprint
from mar.errors import Failure
from mar.model.flops import cost
from orchestration.config import sqlite_address
from orchestration.search.schema import Search, as_text
from orchestration.studies.identity import identity, with_defaults_filled
from orchestration.studies.matching import Record, match
from orchestration.studies.metrics import METRICS, cost_figure
from orchestration.studies.trial import Trial

_REJECTED_IN_A_ROW = 10
_MOST_REJECTED = 1000
"""Points that are drawn blindly before the search is given up."""
_MOST_FAILURES = 3
"""Trials that fail one after the other before the search stops: the next would too."""
_INFEASIBLE = "infeasible"
_KEY = "key"
_RUN = "run"
_AGAIN = "again"
_COPY = "copy"
UNCOUNTED = {_INFEASIBLE, _RUN, _COPY}
"""What marks a trial of the Optuna study that this search did not train: broken rules, others'
runs, equals of others."""


@dataclass
class OptunaSearch:
    """Asks Optuna for trials and tells it what came of them."""

    search: Search
    study: optuna.Study
    records: Sequence[Record]
    """Finished runs of all studies: what equals one is not trained."""
    asked: dict[str, optuna.Trial] = field(default_factory=dict[str, optuna.Trial])
    """By key, of trials under way."""
    epochs: dict[str, int] = field(default_factory=dict[str, int])
    """By key, of each trial that was proposed."""
    failures: set[str] = field(default_factory=set[str])
    """Keys of trials that failed in this launch: they are not tried again in it."""
    failures_in_a_row: int = 0
    reached: dict[str, list[float]] = field(default_factory=dict[str, list[float]])
    """By key, of trials that this launch finished."""
    pruned: set[str] = field(default_factory=set[str])
    """Keys of trials that were ended early."""

    def __post_init__(self) -> None:
        data = self.search.settings({}).data
        self.fingerprint = fingerprint(data)
        for lost in self.study.get_trials(
            deepcopy=False, states=(TrialState.RUNNING,)
        ):  # a killed launch proposed it
            self.study.enqueue_trial(lost.params, user_attrs={_AGAIN: lost.number})
            self.study.tell(lost.number, state=TrialState.FAIL)

    @property
    def num_done(self) -> int:
        """Trials that count: finished or ended early; those of other studies do not."""
        states = (TrialState.COMPLETE, TrialState.PRUNED)
        counted = self.study.get_trials(deepcopy=False, states=states)
        return sum(not UNCOUNTED & each.user_attrs.keys() for each in counted)

    @property
    def num_left(self) -> int:
        """Trials that it still wants."""
        return max(self.search.file.trials - self.num_done, 0)

    @property
    def known(self) -> int:
        """Proposals that a finished run, of this search or of another study, answered."""
        return sum(_COPY in each.user_attrs for each in self.study.get_trials(deepcopy=False))

    def next(self) -> Trial | None:
        """Return the next trial to train.

        None: there are enough, finished or under way, or nothing is left to try.

        Raises:
            Failure: no point of the space keeps the constraints.
        """
        rejected = 0
        while (
            self.num_done + len(self.asked) < self.search.file.trials
            and self.failures_in_a_row < _MOST_FAILURES
        ):
            asked = self.study.ask()
            trial = self._trial(asked)
            values = self._reached(trial) if trial else None
            if (
                trial
                and values is None
                and trial.key not in self.asked.keys() | self.failures | self.pruned
            ):
                self.asked[trial.key], self.epochs[trial.key] = asked, trial.settings.recipe.epochs
                return trial
            if values is None:
                self.study.tell(asked, state=TrialState.FAIL if trial else TrialState.PRUNED)
            else:  # a trial that a killed launch had trained, and not told of, counts
                if _AGAIN not in asked.user_attrs:
                    asked.set_user_attr(_COPY, True)
                self.study.tell(asked, values)
            rejected += 1
            if rejected % _REJECTED_IN_A_ROW == 0:
                untried = self._sample_untried()
                if untried is None:
                    return None
                self.study.enqueue_trial(untried)
        return None

    def _trial(self, asked: optuna.Trial) -> Trial | None:
        """Return the proposal as a trial.

        None: it breaks a rule of the settings, or a constraint.
        """
        try:
            params = suggested(asked, self.search)
            settings = self.search.settings(params)
        except SettingError as error:
            asked.set_user_attr(_INFEASIBLE, str(error))
            asked.set_constraint("rules", 1.0)
            return None
        excess = self.search.excess(settings)
        for constraint, value in zip(self.search.file.constraints, excess, strict=True):
            asked.set_constraint(constraint, value)
        if any(each > 0 for each in excess):
            asked.set_user_attr(_INFEASIBLE, ", ".join(self.search.file.constraints))
            return None
        number = asked.user_attrs.get(_AGAIN, asked.number)
        trial = Trial({"trial": f"trial {number}"}, settings, self.fingerprint)
        asked.set_user_attr(_KEY, trial.key)
        return trial

    def _sample_untried(self) -> dict[str, Any] | None:
        """Draw a new point that keeps the rules and constraints, without Optuna.

        For when Optuna proposes known or infeasible points in a row.

        Returns none when all that are drawn were tried, as happens in a space of few points.

        Raises:
            Failure: none keeps them.
        """
        is_any_feasible = False
        blind = optuna.create_study(
            sampler=optuna.samplers.RandomSampler(seed=len(self.study.get_trials(deepcopy=False)))
        )
        for _ in range(_MOST_REJECTED):
            asked = blind.ask()
            with suppress(SettingError):
                params = suggested(asked, self.search)
                settings = self.search.settings(params)
                if any(each > 0 for each in self.search.excess(settings)):
                    continue
                is_any_feasible = True
                trial = Trial({}, settings, self.fingerprint)
                is_new = trial.key not in self.asked.keys() | self.failures | self.pruned
                if is_new and self._reached(trial) is None:
                    return params
        if is_any_feasible:
            return None
        raise Failure(
            f"of {_MOST_REJECTED} points of the space none keeps "
            f"{', '.join(self.search.file.constraints) or 'the rules'}"
        )

    def _reached(self, trial: Trial) -> list[float] | None:
        """Return what a proposal's equal reached, in this launch or before.

        None: nobody trained it.
        """
        found = match([trial], self.records)
        if trial.key in self.reached or not found:
            return self.reached.get(trial.key)
        try:
            return self.values(trial.settings, found[trial.key].metrics)
        except KeyError:  # a version before this metric wrote it
            return None

    def finished(self, key: str, metrics: Mapping[str, float], settings: TrainingConfig) -> None:
        """Tell Optuna what a trial reached.

        Raises:
            Failure: the metrics lack a objective.
        """
        try:
            self.reached[key] = self.values(settings, metrics)
        except KeyError as error:
            self.failed(key)
            raise Failure(
                f"a objective was not measured: there is no {error.args[0]} (memory needs a GPU)"
            ) from None
        self.failures_in_a_row = 0
        self.study.tell(self.asked.pop(key), self.reached[key])

    def failed(self, key: str) -> None:
        """Tell Optuna that there is nothing to learn from a trial."""
        self.failures.add(key)
        self.failures_in_a_row += 1
        self.study.tell(self.asked.pop(key), state=TrialState.FAIL)

    def should_prune(self, key: str, epoch: int, metrics: Mapping[str, float]) -> bool:
        """Whether a trial is to be ended at this epoch.

        Optuna is told of its validation accuracy either way.

        It is not at the last one: what is left is the test.
        """
        is_tested = any(name.startswith("test/") for name in metrics)
        if (
            self.search.file.pruner == "none"
            or is_tested
            or "val/top1" not in metrics
            or key not in self.asked
        ):
            return False
        trial = self.asked[key]
        value = metrics["val/top1"]
        trial.report(
            value if next(iter(self.search.file.objectives.values())) == "max" else -value, epoch
        )
        if epoch >= self.epochs[key] or not trial.should_prune():
            return False
        self.pruned.add(key)
        self.study.tell(self.asked.pop(key), state=TrialState.PRUNED)
        return True

    def values(self, settings: TrainingConfig, metrics: Mapping[str, float]) -> list[float]:
        """Return a trial's value of each objective.

        Raises:
            KeyError: its metrics lack one.
        """
        figures = cost(settings)
        values = list[float]()
        for name in self.search.file.objectives:
            metric = METRICS[name]
            is_cost = metric.source.startswith("cost.")
            if is_cost:
                value = cost_figure(figures, metric.source)
            else:
                value = metrics[metric.source]
            values.append(metric.scale * value + metric.offset)
        return values


def suggested(asked: optuna.Trial, search: Search) -> dict[str, Any]:
    """Draw each setting of the space that applies, in the file's order."""
    params: dict[str, Any] = {}
    for path, dimension in search.file.space.items():
        if search.applies(dimension, params):
            params[path] = dimension.suggested(asked, path)
    return params


def open_search(search: Search, file: Path, records: Sequence[Record]) -> OptunaSearch:
    """Open a search's Optuna study below the store.

    Makes it, with its initial points and what is known, if there is none.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.simplefilter(
        "ignore", optuna.exceptions.ExperimentalWarning
    )  # names of objectives, some samplers
    file.parent.mkdir(parents=True, exist_ok=True)
    storage = optuna.storages.RDBStorage(sqlite_address(file))
    data_fingerprint = fingerprint(search.settings({}).data)
    name = search.study_name(identity(search.settings({}), data_fingerprint))
    is_new = name not in optuna.get_all_study_names(storage)
    study = optuna.create_study(
        study_name=name,
        storage=storage,
        directions=[
            "maximize" if end == "max" else "minimize" for end in search.file.objectives.values()
        ],
        load_if_exists=True,
    )
    seed = search.file.seed + len(
        study.get_trials(deepcopy=False)
    )  # a search that goes on must not draw the same again
    study.sampler = _SAMPLERS[search.file.sampler](seed)
    study.pruner = _PRUNERS[search.file.pruner]()
    proposer = OptunaSearch(search, study, records)
    if is_new:
        study.set_metric_names([METRICS[name].title for name in search.file.objectives])
        for point in search.file.initial_points:
            study.enqueue_trial(
                {path: _value(search, path, value) for path, value in point.items()}
            )
        if search.file.warm_start:
            _offer_known(proposer, records)
    return proposer


_SAMPLERS: dict[str, Callable[[int], optuna.samplers.BaseSampler]] = {
    "tpe": lambda seed: optuna.samplers.TPESampler(seed=seed),
    "nsga2": lambda seed: optuna.samplers.NSGAIISampler(seed=seed),
    "nsga3": lambda seed: optuna.samplers.NSGAIIISampler(seed=seed),
    "gp": lambda seed: optuna.samplers.GPSampler(seed=seed),
    "qmc": lambda seed: optuna.samplers.QMCSampler(seed=seed),
    "random": lambda seed: optuna.samplers.RandomSampler(seed=seed),
}
_PRUNERS: dict[str, Callable[[], optuna.pruners.BasePruner]] = {
    "none": optuna.pruners.NopPruner,
    "median": lambda: optuna.pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=1),
    "asha": lambda: optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=3),
}


def _offer_known(proposer: OptunaSearch, records: Sequence[Record]) -> None:
    """Add the finished trials of other studies that lie in the space."""
    search = proposer.search
    base = flatten(json.loads(Trial({}, search.settings({}), proposer.fingerprint).identity))
    for record in records:
        if record.status != "FINISHED" or not record.identity:
            continue
        try:
            tree = flatten(json.loads(with_defaults_filled(record.identity)))
        except (
            ValueError,
            KeyError,
        ):  # written by a version whose settings this one does not understand
            continue
        moved = {path for path in {*base, *tree} if base.get(path) != tree.get(path)}
        if not moved <= set(search.file.space):
            continue
        params = {path: _value(search, path, tree[path]) for path in search.file.space}
        active = _active(search, params)
        distributions = {path: search.file.space[path].distribution() for path in active}
        if all(search.file.space[path].holds(value) for path, value in active.items()):
            try:
                settings = search.settings(active)
                values = proposer.values(settings, record.metrics)
            except (KeyError, SettingError):  # it was tested in another way
                continue
            if any(each > 0 for each in search.excess(settings)):
                continue
            proposer.study.add_trial(
                optuna.trial.create_trial(
                    params=active,
                    distributions=distributions,
                    values=values,
                    user_attrs={_RUN: record.run_id},
                )
            )


def _active(search: Search, params: Mapping[str, Any]) -> dict[str, Any]:
    return {
        path: value
        for path, value in params.items()
        if search.applies(search.file.space[path], params)
    }


def _value(search: Search, path: str, value: Any) -> Any:
    if search.file.space[path].choices is not None:
        return as_text(value)
    return value
