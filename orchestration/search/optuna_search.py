"""A search becomes an Optuna study that proposes trials.

Knows nothing of Ray: a backend takes each trial from ``OptunaSearch.next`` and reports its result
to ``OptunaSearch.finished`` or ``failed``. The study is stored in an SQLite file
(``optuna-dashboard`` opens it), so that a search that was killed resumes: it first proposes again
what it had proposed and not finished. A proposal that equals a finished run is answered without
training. Other settings, data, objectives or constraints make another search, with an Optuna study
of its own in the same file.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import TrialState

from mar.config.overrides import SettingError
from mar.config.schema import TrainingConfig
from mar.data.annotations import fingerprint
from mar.errors import Failure
from mar.model.flops import cost
from orchestration.config import sqlite_address
from orchestration.search.price_pruning import Curve, is_behind
from orchestration.search.samplers import PRICE, PRUNERS, SAMPLERS
from orchestration.search.schema import Search
from orchestration.search.warm_start import RUN, add_finished_trials, enqueue_initial_points
from orchestration.studies.identity import identity
from orchestration.studies.matching import Record, match
from orchestration.studies.metrics import METRICS, cost_figure
from orchestration.studies.trial import Trial

# TPE may propose the same infeasible or finished points without end: after this many in a row a
# point is drawn at random.
_REJECTED_IN_A_ROW = 10
_MOST_REJECTED = 1000
"""Random points that are drawn before the search fails."""
_MOST_FAILURES = 3
"""Trials that fail one after the other before the search stops: the next would fail too."""

_HAS_FIRST_POINTS = "has_first_points"
"""Attribute of a study in Optuna that has all of its initial points and warm start."""
# Attributes of a trial in Optuna. They are stored: a change makes earlier searches unreadable.
_INFEASIBLE = "infeasible"
"""The rule or constraint that the proposal breaks."""
_KEY = "key"
_AGAIN = "again"
"""The number of the trial of a killed launch that is proposed again."""
_ACCURACIES = "accuracies"
"""Validation accuracy by epoch, for ``pruner: price``."""
_PRICES = "prices"
"""The objectives that are costs."""
_COPY = "copy"
"""The proposal equals a finished run, so nothing was trained."""
UNCOUNTED = {_INFEASIBLE, RUN, _COPY}
"""Attributes of trials that this search did not train: infeasible proposals, runs of other studies,
and proposals that equal a finished run."""


@dataclass
class OptunaSearch:
    """Takes trials from Optuna and reports their results to it."""

    search: Search
    study: optuna.Study
    records: Sequence[Record]
    """Runs of all studies: a proposal that equals a finished one is not trained."""
    asked: dict[str, optuna.Trial] = field(default_factory=dict[str, optuna.Trial])
    """Trial key -> Optuna's trial, of running trials."""
    epochs: dict[str, int] = field(default_factory=dict[str, int])
    """Trial key -> epochs of the training, of each proposed trial."""
    failures: set[str] = field(default_factory=set[str])
    """Keys of trials that failed in this launch: it does not train them again."""
    failures_in_a_row: int = 0
    reached: dict[str, list[float]] = field(default_factory=dict[str, list[float]])
    """Trial key -> value of each objective, of trials that this launch finished."""
    pruned: set[str] = field(default_factory=set[str])
    """Keys of trials that were pruned."""

    def __post_init__(self) -> None:
        data = self.search.settings({}).data
        self.fingerprint = fingerprint(data)
        # A launch that was killed left these running. Optuna cannot resume a trial, so each is
        # proposed again under a new number and the old one is closed.
        for lost in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            self.study.enqueue_trial(lost.params, user_attrs={_AGAIN: lost.number})
            self.study.tell(lost.number, state=TrialState.FAIL)

    @property
    def num_done(self) -> int:
        """Trials that count: finished or pruned in this search, not in other studies."""
        states = (TrialState.COMPLETE, TrialState.PRUNED)
        # A deep copy of a thousand trials for each proposal would take long.
        counted = self.study.get_trials(deepcopy=False, states=states)
        return sum(not UNCOUNTED & each.user_attrs.keys() for each in counted)

    @property
    def num_left(self) -> int:
        """Trials that the search still has to train."""
        return max(self.search.file.trials - self.num_done, 0)

    @property
    def known(self) -> int:
        """Proposals that a finished run, of this search or of another study, answered."""
        return sum(_COPY in each.user_attrs for each in self.study.get_trials(deepcopy=False))

    def next(self) -> Trial | None:
        """Return the next trial to train.

        None: enough trials are finished or running, too many failed in a row, or every point that
        was drawn is already tried.

        Raises:
            Failure: no point of the space keeps the constraints.
        """
        rejected = 0
        # Running trials count too, or as many as run at once would be trained beyond the number.
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
                self.asked[trial.key] = asked
                self.epochs[trial.key] = trial.settings.recipe.epochs
                return trial
            if values is None:
                # TPE learns from pruned trials and their constraints, not from failed ones. If
                # infeasible proposals were failed, it would propose them again and again.
                self.study.tell(asked, state=TrialState.FAIL if trial else TrialState.PRUNED)
            else:
                # A killed launch may have trained a trial and not reported it. That one counts as
                # trained by this search; any other equal of a finished run does not.
                if _AGAIN not in asked.user_attrs:
                    asked.set_user_attr(_COPY, True)
                self.study.tell(asked, values)
            rejected += 1
            # The random point goes through ``ask`` as a proposal of its own, so that Optuna knows
            # its result.
            if rejected % _REJECTED_IN_A_ROW == 0:
                untried = self._sample_untried()
                if untried is None:
                    return None
                self.study.enqueue_trial(untried)
        return None

    def _trial(self, asked: optuna.Trial) -> Trial | None:
        """Return the proposal as a trial; none if it breaks a rule of the settings or a constraint.

        The reason is stored with the proposal.
        """
        try:
            params = suggested(asked, self.search)
            settings = self.search.settings(params)
        except SettingError as error:
            asked.set_user_attr(_INFEASIBLE, str(error))
            # A positive constraint marks the proposal as infeasible for samplers; Optuna 5
            # deprecates ``constraints_func``.
            asked.set_constraint("rules", 1.0)
            return None
        excess = self.search.excess(settings)
        # TPE ranks infeasible proposals by the sum of their positive constraints.
        for constraint, value in zip(self.search.file.constraints, excess, strict=True):
            asked.set_constraint(constraint, value)
        if any(each > 0 for each in excess):
            asked.set_user_attr(_INFEASIBLE, ", ".join(self.search.file.constraints))
            return None
        # A trial that is proposed again keeps the number it had, and so its name in MLflow.
        number = asked.user_attrs.get(_AGAIN, asked.number)
        trial = Trial({"trial": f"trial {number}"}, settings, self.fingerprint)
        asked.set_user_attr(_KEY, trial.key)
        asked.set_user_attr(_PRICES, self._prices(settings))
        return trial

    def _sample_untried(self) -> dict[str, Any] | None:
        """Draw a random point that keeps the rules and constraints and was not tried.

        Used when the sampler proposes known or infeasible points in a row. Returns none when all
        feasible points that were drawn are tried, as happens in a space of few points.

        Raises:
            Failure: no point that was drawn keeps the rules and constraints.
        """
        is_any_feasible = False
        # A study in memory, because each ``ask`` writes a trial into its study. The number of
        # trials is the seed, so that the next call draws other points.
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
        """Return the objectives of the finished run that equals a trial, if any."""
        found = match([trial], self.records)
        # ``records`` is read when the search starts, so trials of this launch are not in it.
        if trial.key in self.reached or not found:
            return self.reached.get(trial.key)
        try:
            return self.values(trial.settings, found[trial.key].metrics)
        # A version that did not log this metric wrote the run, so the trial is trained.
        except KeyError:
            return None

    def finished(self, key: str, metrics: Mapping[str, float], settings: TrainingConfig) -> None:
        """Report a trial's objectives to Optuna.

        Raises:
            Failure: the metrics lack an objective.
        """
        try:
            self.reached[key] = self.values(settings, metrics)
        except KeyError as error:
            self.failed(key)
            raise Failure(
                f"an objective was not measured: no {error.args[0]} in the metrics (memory is "
                "measured on a GPU only)"
            ) from None
        self.failures_in_a_row = 0
        self.study.tell(self.asked.pop(key), self.reached[key])

    def failed(self, key: str) -> None:
        """Report to Optuna that a trial failed; samplers do not learn from it."""
        self.failures.add(key)
        self.failures_in_a_row += 1
        self.study.tell(self.asked.pop(key), state=TrialState.FAIL)

    def should_prune(self, key: str, epoch: int, metrics: Mapping[str, float]) -> bool:
        """Whether a trial must end at this epoch; reports its validation accuracy to Optuna.

        Never true at the last epoch, after which only the test is left.
        """
        # A report after the test has the number of the last epoch again, which Optuna would ignore
        # with a warning.
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
        if self.search.file.pruner == PRICE:
            curves = self._curves(trial, {epoch: value})
            own = curves.pop(trial.number)
            quantile = self.search.file.quantile
            is_last = epoch >= self.epochs[key]
            if is_last or not is_behind(own, epoch, list(curves.values()), quantile):
                return False
            self.pruned.add(key)
            self.study.tell(self.asked.pop(key), state=TrialState.PRUNED)
            return True
        # A pruner compares in the direction of the study. Validation accuracy is better when it is
        # higher, so a study that minimizes its objective gets its negative.
        trial.report(
            value if next(iter(self.search.file.objectives.values())) == "max" else -value, epoch
        )
        if epoch >= self.epochs[key] or not trial.should_prune():
            return False
        self.pruned.add(key)
        self.study.tell(self.asked.pop(key), state=TrialState.PRUNED)
        return True

    def _curves(self, trial: optuna.Trial, reached: Mapping[int, float]) -> dict[int, Curve]:
        """Store what a trial has reached; return the curves of all trials of the search.

        They are in Optuna's storage, so that a search that is resumed knows them.
        """
        # JSON has texts as keys.
        own: dict[str, float] = dict(trial.user_attrs.get(_ACCURACIES, {}))
        own |= {str(epoch): value for epoch, value in reached.items()}
        trial.set_user_attr(_ACCURACIES, own)
        curves: dict[int, Curve] = {}
        for each in self.study.get_trials(deepcopy=False):
            accuracies = each.user_attrs.get(_ACCURACIES)
            # A killed launch's trials are proposed again, and would be counted twice.
            if accuracies and each.state != TrialState.FAIL:
                by_epoch = {int(epoch): value for epoch, value in accuracies.items()}
                curves[each.number] = Curve(each.user_attrs[_PRICES], by_epoch)
        return curves

    def _prices(self, settings: TrainingConfig) -> list[float]:
        """Return the objectives of a trial that are known before it is trained."""
        figures = cost(settings)
        sources = [METRICS[name].source for name in self.search.file.objectives]
        return [cost_figure(figures, source) for source in sources if source.startswith("cost.")]

    def values(self, settings: TrainingConfig, metrics: Mapping[str, float]) -> list[float]:
        """Return a trial's value of each objective.

        Raises:
            KeyError: its metrics lack one.
        """
        figures = cost(settings)
        values = list[float]()
        # A cost follows from the settings alone: a run need not have logged it.
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
    """Draw a value for each setting of the space whose condition holds."""
    params: dict[str, Any] = {}
    # In the file's order, so that each condition finds the values of the settings above it.
    for path, dimension in search.file.space.items():
        if search.applies(dimension, params):
            params[path] = dimension.suggested(asked, path)
    return params


def open_search(search: Search, file: Path, records: Sequence[Record]) -> OptunaSearch:
    """Open a search's Optuna study in the database ``file``.

    If it does not exist, create it with its initial points and the finished trials of other
    studies.
    """
    # Optuna logs a line for each trial otherwise, into the progress display.
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    # ``set_metric_names``, QMC and NSGA-III are experimental in Optuna.
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    file.parent.mkdir(parents=True, exist_ok=True)
    storage = optuna.storages.RDBStorage(sqlite_address(file))
    data_fingerprint = fingerprint(search.settings({}).data)
    name = search.study_name(identity(search.settings({}), data_fingerprint))
    study = optuna.create_study(
        study_name=name,
        storage=storage,
        directions=[
            "maximize" if end == "max" else "minimize" for end in search.file.objectives.values()
        ],
        load_if_exists=True,
    )
    # With the seed alone, a search that resumes would draw the same points again.
    seed = search.file.seed + len(study.get_trials(deepcopy=False))
    study.sampler = SAMPLERS[search.file.sampler](seed)
    study.pruner = PRUNERS[search.file.pruner]()
    proposer = OptunaSearch(search, study, records)
    # Not whether the study is new: a launch may have been killed after it made the study. What that
    # launch had added already is not added again.
    if not study.user_attrs.get(_HAS_FIRST_POINTS):
        study.set_metric_names([METRICS[name].title for name in search.file.objectives])
        enqueue_initial_points(study, search)
        if search.file.warm_start:
            add_finished_trials(study, search, proposer.fingerprint, records, proposer.values)
        study.set_user_attr(_HAS_FIRST_POINTS, True)
    return proposer
