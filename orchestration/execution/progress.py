"""How a launch looks while it runs: a live table in a terminal, a line an epoch elsewhere."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

from rich.console import Console, ConsoleRenderable, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from mar.safe_text import printable
from orchestration.studies.trial import Trial

_ROWS = 24
"""A study of more trials shows those that run or failed."""
_MARKS = {"queued": "·", "running": "▶", "done": "✓", "failed": "✗"}


@dataclass
class _State:
    trial: Trial
    status: str = "queued"
    epoch: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    began: float = 0.0
    start_s: float = 0.0


class LiveProgress:
    """The state of a launch, told by events, shown as a table."""

    def __init__(self, trials: list[Trial], have: int, console: Console) -> None:
        self.states = {trial.key: _State(trial) for trial in trials}
        self.have, self.console = have, console
        self.widest = 1
        self.live = Live(
            console=console, get_renderable=self.table, refresh_per_second=2, transient=True
        )
        self.is_live = console.is_terminal

    def __enter__(self) -> LiveProgress:
        if self.is_live:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.is_live:
            self.live.stop()

    def started(self, trial: Trial, epochs_done: int = 0) -> None:
        """A trial runs; of its epochs so many were finished in earlier launches."""
        state = self.states[trial.key]
        state.status, state.began = "running", time.monotonic()
        state.epoch = epochs_done
        self.widest = max(self.widest, self.counts()["running"])
        word = (
            f"resumes at epoch {epochs_done + 1}/{trial.settings.recipe.epochs}"
            if epochs_done
            else "started"
        )
        if epochs_done >= trial.settings.recipe.epochs:
            word = "resumes with its test"
        self._line(f"▶ {trial.name}: {word}   [{self.summary()}]")

    def epoch(self, trial: Trial, epoch: int, metrics: dict[str, float]) -> None:
        """It finished an epoch."""
        state = self.states[trial.key]
        if "time/elapsed_s" not in state.metrics:
            state.start_s = max(
                0.0, time.monotonic() - state.began - metrics.get("time/elapsed_s", 0.0)
            )
        state.epoch, state.metrics = epoch, {**state.metrics, **metrics}
        if "test/num_videos" not in metrics:
            self._line(f"  {trial.name}: {self._figures(state)}   [{self.summary()}]")

    def finished(self, trial: Trial, metrics: dict[str, float]) -> None:
        """It is done."""
        state = self.states[trial.key]
        state.status, state.metrics = "done", metrics
        accuracy = f"top-1 {metrics['test/top1']:.2f} %" if "test/top1" in metrics else ""
        result = accuracy or f"L_r {_figure(metrics, 'test/reconstruction_loss', '.4f')}"
        self._line(f"✓ {trial.name}: {result}   [{self.summary()}]")

    def failed(self, trial: Trial, reason: str) -> None:
        """It was given up."""
        state = self.states[trial.key]
        state.status = "failed"
        self.console.print(Text(f"✗ {trial.name}: {reason}", style="red"), soft_wrap=True)

    def announce(self, trial: Trial) -> None:
        """A trial that was not listed is to come."""
        self.states[trial.key] = _State(trial)

    def pruned(self, trial: Trial, message: str) -> None:
        """It was ended early, on purpose."""
        self.states[trial.key].status = "done"
        self._line(f"◼ {trial.name}: {message}   [{self.summary()}]")

    def message(self, trial: Trial, message: str) -> None:
        """It has a message for a person."""
        self.console.print(
            Text(printable(f"! {trial.name}: {message}"), style="yellow"), soft_wrap=True
        )

    def counts(self) -> dict[str, int]:
        """Return how many trials are in which state; those finished in earlier launches count as done."""
        states = [
            state.status for state in tuple(self.states.values())
        ]  # the live view has a thread of its own
        counted = {
            status: states.count(status) for status in ("done", "running", "queued", "failed")
        }
        return {**counted, "done": counted["done"] + self.have}

    def summary(self) -> str:
        """Return the counts and the time left, in words."""
        counts, left = self.counts(), self.seconds_left()
        parts = [
            f"{count} {status}" for status, count in counts.items() if count or status != "failed"
        ]
        return ", ".join(parts) + (f", about {_duration(left)} left" if left is not None else "")

    def seconds_left(self) -> float | None:
        """Return the estimated seconds to the end; none before the first epoch is done.

        A queued trial is taken to need what the running ones need, starting included, as many at a time as ever ran.
        """
        running = [
            state
            for state in tuple(self.states.values())
            if state.status == "running" and state.epoch and "time/elapsed_s" in state.metrics
        ]
        if not running:
            return None
        per_epoch = [state.metrics["time/elapsed_s"] / state.epoch for state in running]
        epochs = [state.trial.settings.recipe.epochs for state in running]
        left = max(
            pace * (all_ - state.epoch)
            for pace, all_, state in zip(per_epoch, epochs, running, strict=True)
        )
        whole = sum(pace * all_ for pace, all_ in zip(per_epoch, epochs, strict=True)) / len(
            running
        )
        start = sum(state.start_s for state in running) / len(running)
        return left + math.ceil(self.counts()["queued"] / self.widest) * (whole + start)

    def table(self) -> ConsoleRenderable:
        """Return the live view."""
        table = Table(box=None, pad_edge=False)
        for heading in ("", "trial", "epoch", "", "loss", "top-1 (%)", "clips/s"):
            table.add_column(heading, justify="left" if heading in ("", "trial") else "right")
        shown = list(self.states.values())
        if len(shown) > _ROWS:
            shown = [state for state in shown if state.status in ("running", "failed")][:_ROWS]
        for state in shown:
            epochs, metrics = state.trial.settings.recipe.epochs, state.metrics
            table.add_row(
                _MARKS[state.status],
                Text(printable(state.trial.name)),
                f"{state.epoch}/{epochs}",
                ProgressBar(epochs, state.epoch, width=16),
                _figure(metrics, "train/loss", ".4f"),
                _figure(metrics, "test/top1" if "test/top1" in metrics else "val/top1", ".2f"),
                _figure(metrics, "throughput/clips_per_s", ".0f"),
            )
        return Group(table, Text(self.summary(), style="bold"))

    def _figures(self, state: _State) -> str:
        metrics = state.metrics
        return (
            f"epoch {state.epoch}/{state.trial.settings.recipe.epochs}, loss {_figure(metrics, 'train/loss', '.4f')}, "
            f"top-1 {_figure(metrics, 'val/top1', '.2f')} %, {_figure(metrics, 'throughput/clips_per_s', '.0f')} clips/s"
        )

    def _line(self, message: str) -> None:
        if not self.is_live:
            self.console.print(printable(message), soft_wrap=True, highlight=False, markup=False)


def _figure(metrics: dict[str, float], name: str, form: str) -> str:
    return format(metrics[name], form) if name in metrics else "–"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"
