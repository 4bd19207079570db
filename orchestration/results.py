"""From the runs that MLflow remembers to the cells of a table: seeds, mean, interval, complete or partial."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from mar.cost import Cost, cost
from orchestration.study import Study, Trial, completed

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Quantity:
    """A column: where its value comes from and how it is printed."""

    title: str
    source: str
    """A metric's name, or ``cost.`` and a field of ``mar.cost.Cost``."""
    digits: int = 2
    higher_is_better: bool | None = None


QUANTITIES = {
    "top1": Quantity("Top-1 (%)", "test/top1", higher_is_better=True),
    "top5": Quantity("Top-5 (%)", "test/top5", higher_is_better=True),
    "shuffled_top1": Quantity("Top-1, shuffled frames (%)", "test/top1_shuffled_frames"),
    "gflops": Quantity("GFLOPs", "cost.gflops", digits=4),
    "params": Quantity("Param (M)", "cost.params_m"),
    "loss": Quantity("Loss", "train/loss", digits=4, higher_is_better=False),
    "reconstruction_loss": Quantity("L_r", "train/reconstruction_loss", digits=4, higher_is_better=False),
    "clips_per_s": Quantity("Clips/s", "throughput/clips_per_s", digits=1, higher_is_better=True),
    "time_s": Quantity("Training time (s)", "time/elapsed_s", digits=0, higher_is_better=False),
}
"""The quantities a study's table and figure may name."""


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


@dataclass(frozen=True)
class Cell:
    """One quantity of one row."""

    status: Literal["complete", "partial", "missing"]
    """Of its seeds, all, some or none are there."""
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
        from scipy import stats  # slow to import, and a plan needs no interval

        error = float(stats.sem(self.values))
        return error * float(stats.t.ppf((1 + CONFIDENCE) / 2, len(self.values) - 1))


@dataclass(frozen=True)
class Row:
    """One setting of a study, over its seeds."""

    label: str
    cells: Mapping[str, Cell]
    """By quantity."""
    seeds: int
    finished: int


def match(trials: Sequence[Trial], records: Sequence[Record]) -> dict[str, Record]:
    """Return, by trial key, the newest finished run with the trial's settings, of whatever study.

    A run logged before a setting existed matches if the trial leaves that setting at its default.
    """
    finished = [record for record in records if record.status == "FINISHED" and record.identity]
    exact: dict[str, Record] = {}
    for record in reversed(finished):
        exact[record.identity] = record
    found = {trial.key: exact[trial.identity] for trial in trials if trial.identity in exact}
    missing = {trial.identity: trial.key for trial in trials if trial.key not in found}
    if missing:
        for record in finished:
            key = missing.get(_completed(record.identity))
            if key is not None:
                found.setdefault(key, record)
    return found


def _completed(identity_line: str) -> str:
    try:
        return completed(identity_line)
    except (ValueError, KeyError):  # written by a version whose settings this one does not understand
        return ""


def rows(study: Study, records: Sequence[Record]) -> list[Row]:
    """Return the study's rows in its order, with every quantity of its table and figure."""
    found = match(study.trials, records)
    figure = study.file.figure
    wanted: list[str] = [*study.file.table.columns, *figure.y, *([figure.x] if figure.x else [])]
    grouped: dict[str, list[Trial]] = {}
    for trial in study.trials:
        grouped.setdefault(trial.row, []).append(trial)
    return [
        Row(
            label,
            {name: _cell(study, label, name, trials, found) for name in wanted},
            len(trials),
            sum(trial.key in found for trial in trials),
        )
        for label, trials in grouped.items()
    ]


def _cell(study: Study, label: str, name: str, trials: Sequence[Trial], found: Mapping[str, Record]) -> Cell:
    paper = {str(row): value for row, value in study.file.paper.get(name, {}).items()}.get(label)
    source = QUANTITIES[name].source
    if source.startswith("cost."):
        return Cell("complete", (cost_figure(cost(trials[0].settings), source),), paper)
    runs = [found[trial.key] for trial in trials if trial.key in found]
    values = tuple(run.metrics[source] for run in runs if source in run.metrics)
    if len(values) == len(trials):
        return Cell("complete", values, paper)
    return Cell("partial" if values else "missing", values, paper)


def cost_figure(figures: Cost, source: str) -> float:
    """Return the figure that ``cost.NAME`` means."""
    return float(getattr(figures, source.removeprefix("cost.")))
