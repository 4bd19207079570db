"""What a new Optuna study has before its first proposal: initial points and finished trials."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import optuna

from mar.config.overrides import SettingError, flatten
from mar.config.schema import TrainingConfig
from orchestration.search.schema import Search, as_text
from orchestration.studies.identity import with_defaults_filled
from orchestration.studies.matching import Record
from orchestration.studies.trial import Trial

RUN = "run"
"""Attribute of a trial in Optuna that is a finished run of another study: MLflow's run id."""


def enqueue_initial_points(study: optuna.Study, search: Search) -> None:
    """Make the search file's initial points the first proposals, in the file's order."""
    for point in search.file.initial_points:
        params = {path: _value(search, path, value) for path, value in point.items()}
        study.enqueue_trial(params, skip_if_exists=True)


def add_finished_trials(
    study: optuna.Study,
    search: Search,
    data_fingerprint: str,
    records: Sequence[Record],
    objective_values: Callable[[TrainingConfig, Mapping[str, float]], list[float]],
) -> None:
    """Add the finished trials of other studies that lie in the space.

    ``objective_values`` returns a trial's value of each objective from its settings and metrics; it
    raises a KeyError if the metrics lack one.
    """
    known = {trial.user_attrs.get(RUN) for trial in study.get_trials(deepcopy=False)}
    base = flatten(json.loads(Trial({}, search.settings({}), data_fingerprint).identity))
    for record in records:
        if record.status != "FINISHED" or not record.identity or record.run_id in known:
            continue
        try:
            tree = flatten(json.loads(with_defaults_filled(record.identity)))
        # A version whose settings this one does not know wrote the identity.
        except (ValueError, KeyError):
            continue
        # A run that differs in a setting that is not searched, or in its data, is no point of the
        # space: its result would mislead the sampler.
        moved = {path for path in {*base, *tree} if base.get(path) != tree.get(path)}
        if not moved <= set(search.file.space):
            continue
        params = {path: _value(search, path, tree[path]) for path in search.file.space}
        active = _active(search, params)
        # ``create_trial`` requires a distribution for each parameter, and a value inside it.
        distributions = {path: search.file.space[path].distribution() for path in active}
        if all(search.file.space[path].holds(value) for path, value in active.items()):
            try:
                settings = search.settings(active)
                values = objective_values(settings, record.metrics)
            # The run was tested in another way, so it lacks an objective.
            except (KeyError, SettingError):
                continue
            # What breaks a constraint must not appear among the best trials.
            if any(each > 0 for each in search.excess(settings)):
                continue
            study.add_trial(
                optuna.trial.create_trial(
                    params=active,
                    distributions=distributions,
                    values=values,
                    user_attrs={RUN: record.run_id},
                )
            )


def _active(search: Search, params: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters whose condition holds; Optuna never suggests the others."""
    return {
        path: value
        for path, value in params.items()
        if search.applies(search.file.space[path], params)
    }


def _value(search: Search, path: str, value: Any) -> Any:
    """Return a setting's value as the space's distribution has it: a choice that is a list as text.

    A number of a range stays a number.
    """
    if search.file.space[path].choices is not None:
        return as_text(value)
    return value
