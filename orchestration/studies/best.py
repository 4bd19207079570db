"""Which finished trial of a study or search is the best."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from orchestration.studies.matching import AnyRecord
from orchestration.studies.metrics import METRICS
from orchestration.studies.trial import Study


def best_of_study(study: Study, runs: Mapping[str, AnyRecord]) -> AnyRecord | None:
    """Return a study's best run; none if no run has a value, or no column says what is better.

    The first column of its table that is measured and has a better direction decides, as ``top1``.
    ``runs`` are the finished runs by their trials' keys.
    """
    for name in study.file.table.columns:
        metric = METRICS[name]
        # Costs are known without a training: they do not say which model is good.
        is_measured = "/" in metric.source
        if metric.higher_is_better is not None and is_measured:
            # In the study's order: of equal values the first is the best.
            ordered = [runs[trial.key] for trial in study.trials if trial.key in runs]
            return best_by(name, metric.higher_is_better, ordered)
    return None


def best_by(name: str, is_max: bool, runs: Iterable[AnyRecord]) -> AnyRecord | None:
    """Return the run with the best value of a metric; none if no run has a value."""
    source = METRICS[name].source
    # ``error`` is 100 minus what is logged.
    sign = METRICS[name].scale if is_max else -METRICS[name].scale
    measured = [run for run in runs if source in run.metrics]
    return max(measured, key=lambda run: sign * run.metrics[source], default=None)
