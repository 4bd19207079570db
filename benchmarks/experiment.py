"""How fast the experiment around the training is: tracking, planning, read-out, search.

    python benchmarks/experiment.py [tracking] [planning] [report] [search] [--rounds N] [-o FILE]

It writes through the same public interfaces as a study does, and prints Markdown tables.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, get_args

import numpy as np
import torch
import yaml

from mar import MANIFEST, RESULT_DIR
from mar.bench.machine import this_machine
from mar.bench.run import heading
from mar.bench.tables import Table, spread, write
from mar.data.motion_verbs import MotionVerbs, make
from mar.errors import Failure
from mar.evaluation.correctness import CORRECTNESS, write_correctness
from mar.training.reports import EpochReport
from orchestration.config import LaunchConfig
from orchestration.reporting.drawing.matplotlib_figures import draw_figure
from orchestration.reporting.study_report import write_report
from orchestration.reporting.study_results import StudyResults
from orchestration.reporting.tables import table_info
from orchestration.search.optuna_search import OptunaSearch, open_search
from orchestration.search.schema import SearchFile, read_search
from orchestration.studies.loader import paper_studies, read_study
from orchestration.studies.plan import plan_trials
from orchestration.studies.trial import Study, Trial
from orchestration.tracking.embedded import serve
from orchestration.tracking.run_record import RunRecord
from orchestration.tracking.store import Store
from orchestration.tracking.tags import IDENTITY, KEY, KIND, STUDY
from orchestration.tracking.writer import Writer

EPOCHS = 100
FILLED_EPOCHS = 3
"""Logged of each run of the read-out: a table needs the last; MLflow takes minutes for a hundred of
thousands of runs."""
VIDEOS = 20_000
ROWS = 400
SEEDS = 5
_METRICS = (
    "train/loss",
    "train/lr",
    "train/classification_loss",
    "train/reconstruction_loss",
    "train/num_broken",
    "throughput/clips_per_s",
    "val/top1",
    "val/top5",
    "val/num_videos",
    "val/num_broken",
    "time/elapsed_s",
)
_FINAL = ("test/top1", "test/top5", "test/num_videos", "test/num_broken")


def tracking_table(rounds: int, command: str) -> Table:
    """Time the tracking of a trial: our writer, and a call for each metric."""
    rows: list[tuple[str, ...]] = []
    for kind in ("SQLite", "MLflow server"):
        ways: dict[str, list[float]] = {}
        with tempfile.TemporaryDirectory() as name, _launch(Path(name), kind) as launch:
            store = Store(launch)
            for number in range(rounds + 1):
                experiment = store.experiment(f"round {number}")
                for way, (log, epochs) in _WAYS.items():
                    seconds = _seconds(partial(log, store, experiment, epochs))
                    ways.setdefault(way, []).append(1e3 * seconds / _TRACKED)
        for way, times in ways.items():
            points = _WAYS[way][1] * len(_METRICS)
            rows.append(
                (
                    kind,
                    way,
                    str(_WAYS[way][1]),
                    spread(times[1:], 0),
                    f"{1e3 * points / median(times[1:]):.0f}",
                )
            )
    note = (
        f"A trial: a run with its tags, epochs of {len(_METRICS)} metrics, its end. Ray's own "
        "MLflow logger does the second, in "
        "the driver."
    )
    return Table(
        "Tracking", command, ("store", "way", "epochs", "ms a trial", "metrics/s"), rows, (note,)
    )


def planning_table(rounds: int, command: str) -> Table:
    """Time from study files to a plan: all of the paper's, and a grid of 10,000 trials."""
    rows: list[tuple[str, ...]] = []
    with tempfile.TemporaryDirectory() as name:
        large = _study_file(Path(name), 2_000)
        for title, names in (
            ("the paper's studies", paper_studies()),
            ("2,000 settings × 5 seeds", [str(large)]),
        ):
            planned = [_planned(names) for _ in range(rounds + 1)][1:]
            columns = [
                spread(column) for column in zip(*(each[:2] for each in planned), strict=True)
            ]
            rate = planned[0][2] / median([sum(each[:2]) for each in planned])
            rows.append((title, str(planned[0][2]), *columns, f"{rate:.0f}"))
    return Table(
        "Planning",
        command,
        ("what", "trials", "read and checked, s", "planned, s", "trials/s"),
        rows,
    )


def _planned(names: Sequence[str]) -> tuple[float, float, int]:
    """Return seconds to read, seconds to plan, and the trials."""
    studies: list[Study] = []
    read_s = _seconds(lambda: studies.extend(read_study(name) for name in names))
    plan_s = _seconds(lambda: [plan_trials(study, []) for study in studies])
    return read_s, plan_s, sum(len(study.trials) for study in studies)


def report_table(rounds: int, command: str, num_rows: int = ROWS) -> Table:
    """Time table, figure and report of a study of thousands of runs."""
    rows: list[tuple[str, ...]] = []
    for kind in ("SQLite", "MLflow server"):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            study = read_study(str(_study_file(folder, num_rows)))
            filled = LaunchConfig(store=folder / "store")
            fill(study, filled)
            with _launch(folder, kind) as launch:
                rows += [(kind, *row) for row in _read_out(study, launch, folder, rounds)]
    note = (
        f"{num_rows * SEEDS:,} runs in one study of {num_rows} rows × {SEEDS} seeds, each with "
        f"{FILLED_EPOCHS} epochs of "
        f"{len(_METRICS)} metrics and the predictions of {VIDEOS:,} videos; every row is compared "
        "with the reference row, "
        "video by video. The first part is in each of the others' commands once."
    )
    return Table("Read-out", command, ("store", "what", "s"), rows, (note,))


def _read_out(
    study: Study, launch: LaunchConfig, folder: Path, rounds: int
) -> list[tuple[str, str]]:
    once = [_read_once(study, launch, folder) for _ in range(rounds)]
    return [(name, spread([each[name] for each in once])) for name in once[0]]


def _read_once(study: Study, launch: LaunchConfig, folder: Path) -> dict[str, float]:
    store, records = Store(launch), list[RunRecord]()
    parts: dict[str, Callable[[], object]] = {
        "the runs": lambda: records.extend(store.trials()),
        "mar table": lambda: table_info(StudyResults.match(study, records, store.file_of)),
        "mar figure": lambda: draw_figure(
            StudyResults.match(study, records, store.file_of), folder / "figure.png"
        ),
        "mar report": lambda: write_report(
            StudyResults.match(study, records, store.file_of), folder / "report"
        ),
    }
    times = {name: _seconds(work) for name, work in parts.items()}
    return {**times, "all of it": sum(times.values())}


def search_table(rounds: int, command: str) -> Table:
    """Time proposals, each with its constraint, where 10, 100 and 1,000 trials are known.

    And the first 1,000 in a row.
    """
    rows: list[tuple[str, ...]] = []
    for sampler in get_args(SearchFile.model_fields["sampler"].annotation):
        cells: list[str] = []
        for known in (10, 100, 1_000):
            if sampler == "gp" and known == 1_000:
                cells.append("-")  # fits a Gaussian process anew for each: minutes
                continue
            with tempfile.TemporaryDirectory() as name:
                cells.append(
                    spread(
                        [
                            1e3 * each
                            for each in _proposals(sampler, known, 10 * rounds, Path(name))
                        ],
                        0,
                    )
                )
        rows.append((sampler, *cells))
    note = (
        "The paper's search (search_accuracy_and_cost.yaml: six settings, two conditional, gflops "
        "<= 90), SQLite storage."
    )
    columns = ("sampler", "ms a proposal at 10 trials", "at 100", "at 1,000")
    return Table("Search", command, columns, rows, (note,))


def _proposals(sampler: str, known: int, count: int, folder: Path) -> list[float]:
    """Return seconds of each of some proposals, where so many trials are known."""
    make(folder / "data", MotionVerbs(size=32, frames=8, classes=2, train=16, validation=8))
    data = {
        "root": folder / "data",
        "videos": "videos",
        "train": "train.json",
        "val": "validation.json",
    }
    shared = [
        f"trials={known + count}",
        "encoder.weights=null",
        "data.labels=null",
        *(f"data.{name}={value}" for name, value in data.items()),
    ]
    search = read_search("search_accuracy_and_cost", [f"sampler={sampler}", *shared])
    random = read_search("search_accuracy_and_cost", ["sampler=random", *shared])
    rng = np.random.default_rng(0)

    def finish_trial(by: OptunaSearch, trial: Trial) -> None:
        by.finished(trial.key, {"test/top1": float(rng.uniform(40, 70))}, trial.settings)

    first = open_search(random, folder / "search.db", [])
    while first.num_done < known and (trial := first.next()):
        finish_trial(first, trial)
    asking = open_search(search, folder / "search.db", [])
    times: list[float] = []
    for _ in range(count):
        started = time.perf_counter()
        trial = asking.next()
        times.append(time.perf_counter() - started)
        if trial is None:
            raise Failure(f"{sampler}: the space is used up")
        finish_trial(asking, trial)
    return times


def _batched(store: Store, experiment: str, epochs: int) -> None:
    writer = Writer(store)
    for number in range(_TRACKED):
        key = f"trial {number}"
        writer.open(
            key, lambda key=key: store.run(experiment, key, {"mar.key": key}, {"mar.kind": "trial"})
        )
        for epoch in range(1, epochs + 1):
            writer.log_metrics(key, epoch, dict.fromkeys(_METRICS, 1.0))
        writer.end(key, "FINISHED")
    writer.close()


def _one_by_one(store: Store, experiment: str, epochs: int) -> None:
    for number in range(_TRACKED):
        run_id = store.run(
            experiment, f"peer {number}", {"mar.key": f"peer {number}"}, {"mar.kind": "trial"}
        )
        for epoch in range(1, epochs + 1):
            for name in _METRICS:
                store.client.log_metric(run_id, name, 1.0, step=epoch)
        store.client.set_terminated(run_id, "FINISHED")


_TRACKED = 4
"""Trials."""
_WAYS: Mapping[str, tuple[Callable[[Store, str, int], None], int]] = {
    "ours: in batches": (_batched, EPOCHS),
    "a call for each metric": (_one_by_one, 3),  # a hundred epochs would take a server minutes
}
"""How it is logged, and how many epochs."""


def _study_file(folder: Path, num_rows: int) -> Path:
    if not (folder / "data").exists():
        make(folder / "data", MotionVerbs(size=32, frames=8, classes=2, train=16, validation=8))
    data = {
        "format": "ssv2",
        "videos": "videos",
        "train": "train.json",
        "val": "validation.json",
        "num_classes": 2,
    }
    recipe = {
        "data": {**data, "root": str(folder / "data")},
        "clip": {"frames": 8, "size": 16},
        "encoder": {"size": "custom", "width": 16, "depth": 1, "heads": 2, "tubelet": [2, 4, 4]},
        "recipe": {"epochs": EPOCHS, "batch_size": 8},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    rates = {f"{number}": {"recipe.base_lr": 1e-4 * (1 + number)} for number in range(num_rows)}
    study = {
        "title": "Many runs",
        "recipe": "recipe.yaml",
        "axes": {"rate": rates},
        "seeds": [*range(SEEDS)],
        "table": {"columns": ["top1", "top5", "gflops"], "reference": "0"},
        "figure": {"kind": "points", "x": "time_s", "y": ["top1"]},
    }
    file = folder / "many_runs.yaml"
    file.write_text(yaml.safe_dump(study, allow_unicode=True), encoding="utf-8")
    return file


def fill(study: Study, launch: LaunchConfig) -> None:
    """Log a finished run of each trial into a store, without training it."""
    store = Store(launch)
    experiment = store.experiment(study.name)
    rng = np.random.default_rng(0)
    names = [f"{number:06d}.webm" for number in range(VIDEOS)]
    labels = rng.integers(2, size=VIDEOS)
    base = rng.random(VIDEOS) < 0.6
    shared = launch.store / "shared"
    shared.mkdir()
    writer = Writer(store)
    for trial in study.trials:
        correct = base ^ (rng.random(VIDEOS) < 0.1)
        top1 = 100 * float(correct.mean())
        curve = top1 * (1 - np.exp(-np.arange(1, EPOCHS + 1) / 20))
        tags = {IDENTITY: trial.identity, STUDY: study.name}
        find = {KIND: "trial", KEY: trial.key}
        name = trial.name
        writer.open(trial.key, partial(store.run, experiment, name, find, tags))
        for epoch in range(1, FILLED_EPOCHS + 1):
            metrics = dict.fromkeys(_METRICS, 1.0)
            metrics["val/top1"] = float(curve[epoch - 1])
            writer.log_report(trial.key, EpochReport(epoch, metrics))
        final = {**dict.fromkeys(_FINAL, 90.0), "test/top1": top1}
        writer.log_report(trial.key, EpochReport(FILLED_EPOCHS, final, is_final=True))
        writer.end(trial.key, "FINISHED")
        _leave(launch.trial_folder(trial.key) / RESULT_DIR, shared, correct, names, labels, curve)
    writer.close()


def _leave(
    result: Path, shared: Path, right: Any, names: Sequence[str], labels: Any, curve: Any
) -> None:
    """Leave what a trial leaves.

    Predictions are of two megabytes, so one file stands for all of them.
    """
    result.mkdir(parents=True)
    predictions = shared / "predictions.csv"
    if not predictions.exists():
        with predictions.open("w", newline="", encoding="utf-8") as output:
            writer = csv.writer(output)
            writer.writerow(
                [
                    "video",
                    "label",
                    "probability_of_label",
                    "class_1",
                    "probability_1",
                    "class_2",
                    "probability_2",
                ]
            )
            for name, label, is_right in zip(names, labels.tolist(), right.tolist(), strict=True):
                writer.writerow(
                    [
                        name,
                        label,
                        "0.600000",
                        label if is_right else 1 - label,
                        "0.600000",
                        0,
                        "0.400000",
                    ]
                )
    os.link(predictions, result / "predictions.csv")
    write_correctness(right, names, result / CORRECTNESS)
    lines = [
        f"{epoch},1.0,{value:.6f},1.0,2.0\n" for epoch, value in enumerate(curve.tolist(), start=1)
    ]
    (result / "history.csv").write_text(
        "epoch,train/loss,val/top1,train/lr,time/elapsed_s\n" + "".join(lines), encoding="utf-8"
    )
    (result / MANIFEST).write_text(json.dumps({}), encoding="utf-8")


@contextmanager
def _launch(folder: Path, kind: str) -> Generator[LaunchConfig]:
    """Give an embedded store below ``folder``, or a server over it."""
    embedded = LaunchConfig(store=folder / "store")
    if kind == "SQLite":
        yield embedded
        return
    Store(embedded)  # makes the database
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    command, environment = serve(embedded, port)
    with subprocess.Popen(
        [sys.executable, "-m", *command],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as server:
        try:
            _wait_for(f"http://127.0.0.1:{port}/health")
            yield replace(embedded, tracking_uri=f"http://127.0.0.1:{port}")
        finally:
            server.terminate()


def _wait_for(address: str) -> None:
    for _ in range(120):
        try:
            urllib.request.urlopen(address, timeout=2).close()  # noqa: S310
            return
        except OSError:
            time.sleep(0.5)
    raise Failure("the MLflow server that was to be measured did not start")


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


PARTS: Mapping[str, Callable[[int, str], Table]] = {
    "tracking": tracking_table,
    "planning": planning_table,
    "report": report_table,
    "search": search_table,
}


def main() -> None:
    """Measure the parts, print their tables, and perhaps write them to a file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART", default=[*PARTS])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    machine = this_machine(torch.device("cpu"), "fp32")
    for part in args.parts:
        command = f"python benchmarks/experiment.py {part} --rounds {args.rounds}"
        table = PARTS[part](args.rounds, command)
        print(table)
        if args.output:
            write(args.output, heading(machine), [table])


if __name__ == "__main__":
    main()
