"""Shows a launch while it runs: a live table in a terminal, a line per epoch elsewhere."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from rich.console import Console, ConsoleRenderable, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from mar.safe_text import printable
from mar.training.reports import EpochReport
from orchestration.studies.trial import Trial

_ROWS = 24
"""Rows of the table; of a study with more trials, only those that run or failed are shown."""
_MARKS = {"queued": "·", "running": "▶", "done": "✓", "failed": "✗"}


@dataclass
class _State:
    trial: Trial
    status: str = "queued"
    epoch: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    began: float = 0.0
    start_s: float = 0.0
    """Seconds from the trial's start to its first step: starting processes, loading libraries."""

    @property
    def epochs(self) -> int:
        """Epochs of the whole training."""
        return self.trial.settings.recipe.epochs


class LiveProgress:
    """Keeps the state of a launch from its events, and shows it as a table or as lines."""

    def __init__(self, trials: list[Trial], num_finished: int, console: Console) -> None:
        self.states = {trial.key: _State(trial) for trial in trials}
        self.num_finished = num_finished
        """Trials that were finished in earlier launches."""
        self.console = console
        # At least one: ``seconds_left`` divides by it.
        self.most_at_once = 1
        # Transient: at the end the table gives way to the study's results.
        self.live = Live(
            console=console, get_renderable=self.table, refresh_per_second=2, transient=True
        )
        # In a file or a job's log a table that is drawn again and again cannot be read.
        self.is_live = console.is_terminal

    def __enter__(self) -> LiveProgress:
        if self.is_live:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.is_live:
            self.live.stop()

    def started(self, trial: Trial, epochs_done: int = 0) -> None:
        """Show that a trial runs; ``epochs_done`` were finished in earlier launches."""
        state = self.states[trial.key]
        state.status = "running"
        state.began = time.monotonic()
        state.epoch = epochs_done
        self.most_at_once = max(self.most_at_once, self.counts()["running"])
        event = "started"
        if epochs_done >= state.epochs:
            event = "resumes with its test"
        elif epochs_done:
            event = f"resumes at epoch {epochs_done + 1}/{state.epochs}"
        self._line(f"▶ {trial.name}: {event}   [{self.summary()}]")

    def waits(self, trial: Trial) -> None:
        """Show that a trial waits to be started again, with more of a GPU."""
        self.states[trial.key].status = "queued"

    def epoch(self, trial: Trial, report: EpochReport) -> None:
        """Show an epoch that a trial finished, or its test."""
        state = self.states[trial.key]
        # Only at the first epoch: what the trial's own clock has not counted was its start.
        if "time/elapsed_s" not in state.metrics:
            trained_s = report.metrics.get("time/elapsed_s", 0.0)
            state.start_s = max(0.0, time.monotonic() - state.began - trained_s)
        state.epoch = report.epoch
        # A new dict, not an update: the display's thread may be reading the old one.
        state.metrics = {**state.metrics, **report.metrics}
        if not report.is_final:
            shown = self._metrics_text(state, report.metrics)
            self._line(f"  {trial.name}: {shown}   [{self.summary()}]")

    def finished(self, trial: Trial, metrics: dict[str, float]) -> None:
        """Show that a trial is done."""
        state = self.states[trial.key]
        state.status = "done"
        state.metrics = metrics
        result = f"L_r {_metric(metrics, 'test/reconstruction_loss', '.4f')}"
        if "test/top1" in metrics:
            result = f"top-1 {metrics['test/top1']:.2f} %"
        self._line(f"✓ {trial.name}: {result}   [{self.summary()}]")

    def failed(self, trial: Trial, reason: str) -> None:
        """Show that a trial failed permanently, and why."""
        self.states[trial.key].status = "failed"
        # Above the live table too: a failure must stay readable when the table is gone.
        self.console.print(Text(f"✗ {trial.name}: {reason}", style="red"), soft_wrap=True)

    def announce(self, trial: Trial) -> None:
        """Add a trial that was not listed at the start: a search proposed it."""
        self.states[trial.key] = _State(trial)

    def pruned(self, trial: Trial, message: str) -> None:
        """Show that a trial was pruned."""
        self.states[trial.key].status = "done"
        self._line(f"◼ {trial.name}: {message}   [{self.summary()}]")

    def message(self, trial: Trial, message: str) -> None:
        """Show a message of a trial."""
        text = Text(printable(f"· {trial.name}: {message}"), style="dim")
        self.console.print(text, soft_wrap=True)

    def counts(self) -> dict[str, int]:
        """Return how many trials are in each state.

        Those finished in earlier launches count as done.
        """
        # A copy: the live display runs in its own thread, and ``announce`` may add a trial.
        states = [state.status for state in tuple(self.states.values())]
        counts = {
            status: states.count(status) for status in ("done", "running", "queued", "failed")
        }
        counts["done"] += self.num_finished
        return counts

    def summary(self) -> str:
        """Return the counts and the estimated time left."""
        # Zero failed trials are left out; the other counts are shown even at zero.
        parts: list[str] = []
        for status, count in self.counts().items():
            if count or status != "failed":
                parts.append(f"{count} {status}")
        left_s = self.seconds_left()
        if left_s is not None:
            parts.append(f"about {_duration(left_s)} left")
        return ", ".join(parts)

    def seconds_left(self) -> float | None:
        """Return the estimated seconds to the end; none before the first epoch is done.

        The estimate assumes that a queued trial takes as long as the running ones, its start
        included, and that as many trials run at a time as ever did in this launch.
        """
        running = [
            state
            for state in tuple(self.states.values())
            if state.status == "running" and state.epoch and "time/elapsed_s" in state.metrics
        ]
        if not running:
            return None
        left_s: list[float] = []
        whole_s: list[float] = []
        for state in running:
            epoch_s = state.metrics["time/elapsed_s"] / state.epoch
            left_s.append(epoch_s * (state.epochs - state.epoch))
            whole_s.append(epoch_s * state.epochs + state.start_s)
        # The queued trials run in rounds; each takes as long as the mean of the running trials.
        rounds = math.ceil(self.counts()["queued"] / self.most_at_once)
        return max(left_s) + rounds * sum(whole_s) / len(whole_s)

    def table(self) -> ConsoleRenderable:
        """Return the live table."""
        table = Table(box=None, pad_edge=False)
        for heading in ("", "trial"):
            table.add_column(heading, justify="left")
        for heading in ("epoch", "", "loss", "top-1 (%)", "clips/s"):
            table.add_column(heading, justify="right")
        shown = list(self.states.values())
        if len(shown) > _ROWS:
            shown = [state for state in shown if state.status in ("running", "failed")][:_ROWS]
        for state in shown:
            # The test's value replaces the last epoch's, once there is one.
            top1 = "val/top1"
            if "test/top1" in state.metrics:
                top1 = "test/top1"
            table.add_row(
                _MARKS[state.status],
                Text(printable(state.trial.name)),
                f"{state.epoch}/{state.epochs}",
                ProgressBar(state.epochs, state.epoch, width=16),
                _metric(state.metrics, "train/loss", ".4f"),
                _metric(state.metrics, top1, ".2f"),
                _metric(state.metrics, "throughput/clips_per_s", ".0f"),
            )
        return Group(table, Text(self.summary(), style="bold"))

    def _metrics_text(self, state: _State, metrics: Mapping[str, float]) -> str:
        """Return an epoch's own metrics; not every epoch has a validation."""
        parts = [
            f"epoch {state.epoch}/{state.epochs}",
            f"loss {_metric(metrics, 'train/loss', '.4f')}",
        ]
        if "val/top1" in metrics:
            parts.append(f"top-1 {metrics['val/top1']:.2f} %")
        parts.append(f"{_metric(metrics, 'throughput/clips_per_s', '.0f')} clips/s")
        return ", ".join(parts)

    def _line(self, message: str) -> None:
        # In a terminal the table shows all of this. No markup: names may contain brackets.
        if not self.is_live:
            self.console.print(printable(message), soft_wrap=True, highlight=False, markup=False)


def _metric(metrics: Mapping[str, float], name: str, form: str) -> str:
    if name not in metrics:
        return "–"
    return format(metrics[name], form)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {rest:02} s"
