"""From the runs that MLflow remembers to the cells of a table: seeds, mean, interval, complete or partial."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache
from typing import Literal, Protocol, TypeVar

from mar.model.flops import Cost, cost
from orchestration.studies.loader import ABSENT, Study, Trial, completed, training_of
from orchestration.studies.metrics import QUANTITIES
from orchestration.studies.schema import BETWEEN_LABELS, label_parts

CONFIDENCE = 0.95


class Record(Protocol):
    """What is needed of a run; ``tracking.RunRecord`` is one."""

    @property
    def run_id(self) -> str:
        """MLflow's id."""
        ...

    @property
    def status(self) -> str:
        """MLflow's word: FINISHED, RUNNING, FAILED or KILLED."""
        ...

    @property
    def metrics(self) -> Mapping[str, float]:
        """The last value of each."""
        ...

    @property
    def identity(self) -> str:
        """Which training it is (``study.identity``)."""
        ...

    @property
    def has_model(self) -> bool:
        """Whether its result has a model: it was trained, not tested again."""
        ...

    @property
    def weights(self) -> str | None:
        """The name of the pre-trained weights it started from, if any."""
        ...


AnyRecord = TypeVar("AnyRecord", bound=Record)


@dataclass(frozen=True)
class Cell:
    """One quantity of one row."""

    status: Literal["complete", "partial", "missing", "quoted"]
    """Of its seeds, all, some or none are there; ``quoted``: there is only what the paper says of another method."""
    values: tuple[float, ...] = ()
    """By seed."""
    paper: float | None = None
    """What the paper printed."""

    @property
    def mean(self) -> float | None:
        """The mean over seeds; none while nothing is there."""
        return sum(self.values) / len(self.values) if self.values else None

    @property
    def half_width(self) -> float | None:
        """Half the 95 % confidence interval of the mean (Student's t); none with fewer than two seeds."""
        if len(self.values) < 2:
            return None
        return statistics.stdev(self.values) / len(self.values) ** 0.5 * _quantile(len(self.values) - 1)

    @property
    def deviation(self) -> float | None:
        """The standard deviation over seeds; none with fewer than two."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None


@cache
def _quantile(freedom: int) -> float:
    from scipy import stats  # slow to import, and a plan needs no interval

    return float(stats.t.ppf((1 + CONFIDENCE) / 2, freedom))


@dataclass(frozen=True)
class Row:
    """One setting of a study, over its seeds."""

    labels: tuple[str, ...]
    """One for each axis."""
    cells: Mapping[str, Cell]
    """By quantity."""
    seeds: int
    finished: int
    notes: tuple[str, ...] = ()
    """What a reader must know of its numbers."""
    about: Mapping[str, str] = field(default_factory=dict[str, str])
    """Column of words -> what stands there."""
    is_quoted: bool = False
    """Whether it is another method's, quoted by the paper and never run here."""

    @property
    def label(self) -> str:
        """The labels of all axes, joined."""
        return BETWEEN_LABELS.join(part for part in self.labels if part)


def match(trials: Sequence[Trial], records: Sequence[AnyRecord]) -> dict[str, AnyRecord]:
    """Return, by trial key, the newest finished run with the trial's settings, of whatever study.

    A run logged before a setting existed matches if the trial leaves that setting at its default. Where the data
    is not at hand, its fingerprint is unknown, and the settings alone decide: a table needs no videos. So it is with
    pre-trained weights, and their name.
    """
    return _match(trials, records, lambda line: line)


def match_training(trials: Sequence[Trial], records: Sequence[AnyRecord]) -> dict[str, AnyRecord]:
    """Return, by trial key, a finished run of the same training, tested in whatever way."""
    return _match(trials, [record for record in records if record.has_model], training_of)


def _match(trials: Sequence[Trial], records: Sequence[AnyRecord], part: Callable[[str], str]) -> dict[str, AnyRecord]:
    """Match trials and records by a part of their identities."""
    finished = [record for record in records if record.status == "FINISHED" and record.identity]
    exact = {part(record.identity): record for record in reversed(finished)}
    found = {trial.key: exact[part(trial.identity)] for trial in trials if part(trial.identity) in exact}
    missing: dict[str, list[Trial]] = {}
    for trial in trials:
        if trial.key not in found:
            missing.setdefault(part(trial.identity), []).append(trial)
    is_anywhere = any(trial.fingerprint == ABSENT for each in missing.values() for trial in each)
    for record in finished if missing else []:
        for data in (None, ABSENT) if is_anywhere else (None,):
            for weights in {None, record.weights}:
                line = _completed(record.identity, data, weights)
                for trial in missing.get(part(line), []) if line else []:
                    found.setdefault(trial.key, record)
    return found


@lru_cache(maxsize=2**15)  # a search asks for every proposal
def _completed(identity_line: str, data_fingerprint: str | None, weights: str | None) -> str:
    try:
        return completed(identity_line, data_fingerprint, weights)
    except (ValueError, KeyError):  # written by a version whose settings this one does not understand
        return ""


def rows(study: Study, records: Sequence[Record]) -> list[Row]:
    """Return the study's rows in its order, with every quantity of its table, its figure and its report."""
    found = match(study.trials, records)
    figure = study.file.figure
    wanted = {*study.file.table.columns, *figure.y, *([figure.x] if figure.x else []), "top1", "shuffled_top1"}
    grouped: dict[tuple[str, ...], list[Trial]] = {}
    for trial in study.trials:
        grouped.setdefault(tuple(trial.labels.values()), []).append(trial)
    about = study.file.about
    ours = [
        Row(
            tuple(part for each in zip(study.file.axes, labels, strict=True) for part in label_parts(*each)),
            {name: _cell(study, name, trials, found) for name in wanted},
            len(trials),
            sum(trial.key in found for trial in trials),
            _notes(trials, found),
            about.get(trials[0].row, {}),
        )
        for labels, trials in grouped.items()
    ]
    quoted = [
        Row(
            _padded(label.split(BETWEEN_LABELS), len(axis_parts(study))),
            {name: Cell("quoted", (), values.get(name)) for name in wanted},
            0,
            0,
            (),
            about.get(label, {}),
            is_quoted=True,
        )
        for label, values in study.file.quoted.items()
    ]
    order = {label: place for place, label in enumerate(study.file.table.order)}
    return sorted([*quoted, *ours], key=lambda row: order.get(row.label, len(order)))


def _padded(parts: list[str], length: int) -> tuple[str, ...]:
    return (*parts, *[""] * (length - len(parts)))[:length]


def axis_parts(study: Study) -> list[str]:
    """Return the names of the label columns: an axis may have several."""
    return [part for axis in study.file.axes for part in label_parts(axis, axis)]


def _notes(trials: Sequence[Trial], found: Mapping[str, Record]) -> tuple[str, ...]:
    """Accuracy is over the videos that could be decoded: say so where some could not."""
    broken = {
        (int(metrics["test/num_broken"]), int(metrics["test/num_videos"]))
        for metrics in (found[trial.key].metrics for trial in trials if trial.key in found)
        if metrics.get("test/num_broken")
    }
    row = trials[0].row
    return tuple(f"{row}: over {whole} videos; {lost} more could not be decoded." for lost, whole in sorted(broken))


def _cell(study: Study, name: str, trials: Sequence[Trial], found: Mapping[str, Record]) -> Cell:
    paper = study.file.paper.get(name, {}).get(trials[0].row)
    quantity = QUANTITIES[name]
    source = quantity.source
    if source == "views":
        views = trials[0].settings.evaluation
        return Cell("complete", (float(views.crops * views.clips),), paper)
    if source.startswith("cost."):
        return Cell("complete", (cost_figure(cost(trials[0].settings), source),), paper)
    runs = [found[trial.key] for trial in trials if trial.key in found]
    values = tuple(quantity.scale * run.metrics[source] + quantity.offset for run in runs if source in run.metrics)
    if len(values) == len(trials):
        return Cell("complete", values, paper)
    return Cell("partial" if values else "missing", values, paper)


def cost_figure(figures: Cost, source: str) -> float:
    """Return the figure that ``cost.NAME`` means."""
    return float(getattr(figures, source.removeprefix("cost.")))
