"""Studies run for real: every backend, MLflow, a killed driver, and a user's mistakes."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from commands import here as mar
from commands import loaders_of
from conftest import shared_ray, tiny_tree

from mar.config.schema import TrainingConfig
from mar.training.reports import EpochReport
from orchestration.backends import ray_tune
from orchestration.config import LaunchConfig
from orchestration.failures import FailureReason
from orchestration.studies.trial import Trial
from orchestration.tracking.run_record import RunRecord
from orchestration.tracking.store import Store
from orchestration.worker import trial_runner

STUDY = """\
title: "Tiny"
recipe: recipe.yaml
axes:
  ρ:
    50 %: {mask.ratio: 0.5}
    75 %: {mask.ratio: 0.75}
paper: {top1: {50 %: 70.97}}
"""
SEARCH = """\
title: "Tiny search"
recipe: recipe.yaml
space: {mask.ratio: {low: 0.25, high: 0.75, step: 0.25}, mask.cell: {choices: [[2, 2], [4, 4]]}}
objectives: {top1: max}
trials: 3
pruner: median
initial_points: [{mask.ratio: 0.5, mask.cell: [2, 2]}]
"""
pytestmark = pytest.mark.filterwarnings("default")  # of Ray's and MLflow's own code
MAR = [sys.executable, "-c", "from orchestration.cli.app import main; main()"]


@pytest.fixture
def workdir(tmp_path: Path, videos: Path) -> Path:
    """A folder with a study of two tiny trials."""
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tiny_tree(videos)))
    (tmp_path / "tiny.yaml").write_text(STUDY)
    (tmp_path / "search.yaml").write_text(SEARCH)
    return tmp_path


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A Ray for all tests that need one.

    What they run finds it, as a second study in one process would.
    """
    with shared_ray():
        yield


def of_ray() -> dict[int, psutil.Process]:
    processes = psutil.process_iter(["name"])
    return {
        process.pid: process
        for process in processes
        if "ray" in (process.info["name"] or "").lower()
    }


@pytest.fixture
def no_orphans() -> Iterator[None]:
    """A killed driver leaves two of Ray's agents behind."""
    before = of_ray()
    yield
    for pid, process in of_ray().items():
        if pid not in before:
            process.kill()


def trial_runs(workdir: Path, store: str = "mar_store") -> list[RunRecord]:
    records = Store(LaunchConfig(store=workdir / store)).trials()
    return sorted(records, key=lambda record: record.tags["mar.labels"])


def learnt(record: RunRecord) -> dict[str, float]:
    """The metrics that no clock measured."""
    return {
        name: value
        for name, value in record.metrics.items()
        if not name.startswith(("time/", "throughput/"))
    }


def test_mlflow_remembers_the_study_its_trials_and_what_they_left(workdir: Path) -> None:
    mar(workdir, "run", "tiny.yaml", "--backend", "local")
    store = Store(LaunchConfig(store=workdir / "mar_store"))
    experiment = store.client.get_experiment_by_name("tiny")
    assert experiment
    runs = store.client.search_runs([experiment.experiment_id])
    parent = next(run for run in runs if run.data.tags["mar.kind"] == "study")
    child = next(run for run in runs if run.info.run_name == "50 % (seed 0)")
    assert (len(runs), parent.info.status) == (3, "FINISHED")
    assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert child.data.params["mask.ratio"] == "0.5"
    assert {
        "host",
        "version.torch",
        "mar.cost.gflops",
        "mar.cost.params_m",
        "mar.labels",
        "mar.seed",
    } <= child.data.tags.keys()
    assert [
        point.step for point in store.client.get_metric_history(child.info.run_id, "train/loss")
    ] == [1, 2, 3]
    files = {item.path for item in store.client.list_artifacts(child.info.run_id, "result")}
    assert files >= {
        f"result/{name}"
        for name in ("model.safetensors", "manifest.json", "predictions.csv", "settings.yaml")
    }
    assert {item.path for item in store.client.list_artifacts(parent.info.run_id, "report")} >= {
        "report/figure.png"
    }
    assert "| 50 %" in parent.data.tags["mlflow.note.content"], "the table is the description"
    assert (
        f"#/experiments/{experiment.experiment_id}/runs/" in parent.data.tags["mlflow.note.content"]
    )
    view = json.loads(
        store.client.get_experiment(experiment.experiment_id).tags["mlflow.sharedViewState.mar"]
    )
    assert {"metrics.`test/top1`", "params.`mask.ratio`"} <= set(view["selectedColumns"])
    assert "params.`clip.frames`" not in view["selectedColumns"], "only what the trials differ in"
    assert store.pages()["tiny"].endswith(f"/{experiment.experiment_id}/runs?viewStateShareKey=mar")
    versions = store.client.search_model_versions("name = 'tiny'")
    assert {version.run_id for version in versions} == {run.run_id for run in trial_runs(workdir)}
    assert float(versions[0].tags["test/num_videos"]) == 8
    gone = {"mar.folder": str(workdir.resolve() / "mar_store" / "trials" / "gone")}
    store.client.create_run(
        experiment.experiment_id, run_name="of a driver that is no more", tags=gone
    )
    moved = {"mar.folder": "/where/the/store/was/trials/x"}
    store.client.create_run(
        experiment.experiment_id, run_name="of the same, before the store was moved", tags=moved
    )
    mar(workdir, "run", "tiny.yaml", "--backend", "local")
    running = [
        run
        for run in store.client.search_runs([experiment.experiment_id])
        if run.info.status == "RUNNING"
    ]
    assert running == [], "an embedded store has no runs but its own"
    another = store.client.create_run(
        experiment.experiment_id, tags={"mar.folder": "/someone/else/trials/x"}
    ).info.run_id
    mar(
        workdir,
        "run",
        "tiny.yaml",
        "--backend",
        "local",
        "--tracking-uri",
        f"sqlite:///{workdir.resolve()}/mar_store/mlflow.db",
    )
    running = [
        run
        for run in store.client.search_runs([experiment.experiment_id])
        if run.info.status == "RUNNING"
    ]
    assert [run.info.run_id for run in running] == [another], (
        "another's runs in a common database are another's"
    )
    assert len(store.client.search_model_versions("name = 'tiny'")) == 2, (
        "a model is registered once"
    )


def test_a_finished_trials_checkpoints_go_and_the_policys_stay(workdir: Path) -> None:
    mar(workdir, "run", "tiny.yaml", "--backend", "local", "--filter", "ρ=50 %")
    mar(workdir, "run", "tiny.yaml", "--backend", "local", "--keep", "best,every=2")
    found = {record.tags["mar.labels"]: record for record in trial_runs(workdir)}
    left = {
        label: sorted(
            path.name for path in (workdir / "mar_store" / "trials" / record.key).glob("step_*")
        )
        for label, record in found.items()
    }
    gone, kept = left.values()
    assert gone == [] and "step_00000004" in kept and len(kept) <= 2, (
        "two steps an epoch, three epochs"
    )
    client = Store(LaunchConfig(store=workdir / "mar_store")).client
    for record in found.values():
        assert {item.path for item in client.list_artifacts(record.run_id, "logs")} == {
            "logs/worker0.txt"
        }


def test_a_trial_finished_in_another_study_is_not_trained_again(workdir: Path) -> None:
    mar(workdir, "run", "tiny.yaml", "--backend", "local", "--filter", "ρ=50 %")
    (workdir / "other.yaml").write_text(
        STUDY.replace("ρ:", "ratio:").replace(
            "75 %: {mask.ratio: 0.75}", "25 %: {mask.ratio: 0.25}"
        )
    )
    output = mar(workdir, "run", "other.yaml", "--backend", "local")
    assert "2 trials, 1 finished before, 1 to train" in output
    assert len(trial_runs(workdir)) == 2
    store = Store(LaunchConfig(store=workdir / "mar_store"))
    experiment = store.client.get_experiment_by_name("other")
    assert experiment
    (parent,) = store.client.search_runs([experiment.experiment_id], "tags.`mar.kind` = 'study'")
    used = json.loads(parent.data.tags["mar.runs"])
    assert sorted(used.values()) == sorted(run.run_id for run in trial_runs(workdir))
    plan = json.loads(mar(workdir, "plan", "other.yaml", "--json"))
    assert [line["state"] for line in plan] == ["have", "have"]


def test_tables_and_figures_come_from_mlflow_alone(workdir: Path) -> None:
    assert "no tracking store in" in mar(workdir, "table", "tiny.yaml", code=2)
    shown = mar(workdir, "run", "tiny.yaml", "--backend", "local", "--filter", "ρ=75 %")
    assert f"store    {workdir.resolve() / 'mar_store'} (new)" in shown
    assert "| 50 %" not in shown, "the terminal shows what was asked for"
    assert "| 50 %" in (workdir / "mar_store" / "reports" / "tiny" / "table.md").read_text(), (
        "the report is whole"
    )
    for path in (workdir / "mar_store" / "trials").rglob("*"):
        if path.is_file():
            path.unlink()
    lines = mar(workdir, "table", "tiny.yaml").splitlines()
    assert re.search(r"\| 50 % \| – +\| 70.97", lines[5])
    assert re.search(r"\| 75 % \| \d+\.\d\d", lines[6])
    assert "\\toprule" in mar(workdir, "table", "tiny.yaml", "--format", "tex")
    assert mar(workdir, "figure", "tiny.yaml", "-o", "f.svg").splitlines()[-1] == "f.svg"
    assert (workdir / "f.svg").stat().st_size > 1000
    assert "cannot draw a .doc file" in mar(workdir, "figure", "tiny.yaml", "-o", "f.doc", code=2)


def wait_for(condition: Callable[[], Any], timeout_s: float = 200) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.1)


@pytest.mark.usefixtures("cluster", "no_orphans")
def test_a_killed_study_resumes_without_repeating_a_trial(workdir: Path) -> None:
    arguments = [
        "run",
        "tiny.yaml",
        "recipe.epochs=20",
        "--max-concurrent-trials",
        "1",
        "--backend",
        "inline",
    ]
    store = workdir / "mar_store"
    with (workdir / "first.log").open("w") as log:
        first = subprocess.Popen([*MAR, *arguments], cwd=workdir, stdout=log, stderr=log)

    def checkpoints() -> dict[str, list[str]]:
        return {
            folder.name: sorted(path.name for path in folder.glob("step_*"))
            for folder in store.glob("trials/*")
            if not (folder / "result").is_dir()
        }

    # A thread of its own writes to MLflow: a run may come later than the trial's checkpoint.
    try:
        wait_for(
            lambda: (
                len(list(store.glob("trials/*/result"))) == 1
                and any(checkpoints().values())
                and len(trial_runs(workdir)) == 2
            )
        )
    finally:
        first.send_signal(signal.SIGKILL)
    first.wait()
    before = {record.run_id: record for record in trial_runs(workdir)}
    assert sorted(record.status for record in before.values()) == ["FINISHED", "RUNNING"]
    finished = next(record for record in before.values() if record.status == "FINISHED")
    began = Store(LaunchConfig(store=store)).client.get_run(finished.run_id).info.end_time

    output = mar(workdir, *arguments)
    assert "2 trials, 1 finished before, 1 to train" in output
    after = {record.run_id: record for record in trial_runs(workdir)}
    assert after.keys() == before.keys(), "the runs were found again, not made anew"
    assert [record.status for record in after.values()] == ["FINISHED", "FINISHED"]
    assert Store(LaunchConfig(store=store)).client.get_run(finished.run_id).info.end_time == began
    resumed = next(record for record in after.values() if record.run_id != finished.run_id)
    reader = Store(LaunchConfig(store=store))
    history = reader.client.get_metric_history(resumed.run_id, "train/loss")
    assert sorted(point.step for point in history) == list(range(1, 21)), (
        "every epoch is there, once"
    )
    assert len(reader.client.get_metric_history(resumed.run_id, "cost/gflops")) == 1
    assert len(reader.client.get_metric_history(resumed.run_id, "test/top1")) == 1
    undisturbed = mar(
        workdir,
        "run",
        "tiny.yaml",
        "recipe.epochs=20",
        "--store",
        "undisturbed",
        "--backend",
        "local",
    )
    assert "| 75 %" in undisturbed
    again = {record.tags["mar.key"]: record for record in trial_runs(workdir, "undisturbed")}
    assert learnt(again[resumed.tags["mar.key"]]) == learnt(resumed)


GARBAGE = """
import gc, logging, sys, threading, time
import ray
from orchestration.backends.ray_session import stop_ray
ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
references = [ray.put(number) for number in range(10_000)]
def make_garbage():
    while references:
        cycle = [references.pop()]
        cycle.append(cycle)
        time.sleep(0.0001)
gc.set_threshold(10, 1, 1)
threading.Thread(target=make_garbage, daemon=True).start()
{"ours": stop_ray, "ray's": ray.shutdown}[sys.argv[1]]()
print("alive")
"""


def test_leaving_ray_does_not_end_the_process_over_another_threads_garbage() -> None:
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, "-c", GARBAGE, "ours"], capture_output=True, text=True, check=False
        )
        # Ray gives up where a busy machine takes too long to start it; that is not what is tested.
        if "timed out during startup" not in done.stderr:
            break
    assert (done.returncode, done.stdout) == (0, "alive\n"), done.stderr[-2000:]


def test_a_second_run_of_a_study_that_is_alive_is_refused_and_another_study_awaits_what_they_share(
    workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial_runner, "_PREDECESSOR_S", 0.5)
    with (workdir / "first.log").open("w") as log:
        arguments = ["run", "tiny.yaml", "recipe.epochs=100", "--backend", "local"]
        first = subprocess.Popen([*MAR, *arguments], cwd=workdir, stdout=log, stderr=log)
    try:
        wait_for(lambda: list(workdir.glob("mar_store/trials/*/step_*")))
        assert f"the study tiny is being run already (process {first.pid}" in mar(
            workdir, *arguments, code=2
        )
        (workdir / "same.yaml").write_text(STUDY)
        output = mar(workdir, "run", "same.yaml", *arguments[2:], "--filter", "ρ=50 %")
        assert (
            f"waiting for the study tiny (process {first.pid} on " in output
            and "✓ 50 % (seed 0)" in output
        )
        assert (
            sum(record.tags["mar.labels"] == '{"ρ": "50 %"}' for record in trial_runs(workdir)) == 2
        ), "a run of each study"
    finally:
        first.kill()
        first.wait()


@pytest.mark.usefixtures("cluster")
def test_a_trial_that_fails_is_named_and_the_others_go_on(workdir: Path) -> None:
    study = STUDY.replace(
        "{mask.ratio: 0.5}", "{mask.ratio: 0.5, recipe.base_lr: 1.0e+30, recipe.warmup_epochs: 0}"
    )
    (workdir / "tiny.yaml").write_text(study)
    output = mar(workdir, "run", "tiny.yaml", "--backend", "inline", "--retries", "0", code=1)
    assert "✗ 50 % (seed 0): the gradient is not finite" in output
    assert "non_finite 1 trials: 50 % (seed 0). A smaller recipe.base_lr" in output
    assert "1 of 2 trials failed; run the same command to resume" in output
    assert "✓ 75 % (seed 0)" in output
    assert sorted(record.status for record in trial_runs(workdir)) == ["FAILED", "FINISHED"]


@pytest.mark.usefixtures("cluster")
def test_a_damaged_checkpoint_is_passed_over_aloud_in_a_ray_worker(workdir: Path) -> None:
    arguments = [
        "run",
        "tiny.yaml",
        "--filter",
        "ρ=50 %",
        "--backend",
        "inline",
        "--keep",
        "every=1",
    ]
    mar(workdir, *arguments)
    (trial,) = (workdir / "mar_store" / "trials").iterdir()
    newest = sorted(trial.glob("step_*"))[-1]
    (newest / "model.safetensors").write_bytes(b"bits have flipped")
    shutil.rmtree(trial / "result")
    store = Store(LaunchConfig(store=workdir / "mar_store"))
    store.client.set_terminated(trial_runs(workdir)[0].run_id, "FAILED")
    assert "checkpoint not used" in mar(workdir, *arguments)


@pytest.mark.usefixtures("cluster")
def test_a_worker_that_hangs_is_started_again_by_ray_and_its_trial_ends_well(workdir: Path) -> None:
    def logs() -> str:
        return "".join(
            file.read_text() for file in workdir.glob("mar_store/trials/*/logs/worker0.txt")
        )

    def hang() -> None:
        wait_for(lambda: list(workdir.glob("mar_store/trials/*/step_*")))
        stuck = loaders_of(psutil.Process())
        for loader in stuck:  # as one that waits for a disk that does not answer
            loader.suspend()
        wait_for(lambda: "no progress for 8 s" in logs())
        for loader in stuck:
            loader.kill()

    hanging = threading.Thread(target=hang)
    hanging.start()
    arguments = ["--backend", "inline", "--loader-processes", "1", "--hang-timeout-s", "8"]
    output = mar(workdir, "run", "tiny.yaml", "recipe.epochs=60", "--filter", "ρ=50 %", *arguments)
    hanging.join()
    assert "✓ 50 % (seed 0)" in output
    assert logs().count("worker 0 of 1 on") == 2 and "most recent call first" in logs(), (
        "with the stacks of all threads"
    )


@pytest.mark.usefixtures("cluster")
def test_a_search_runs_through_tune_and_goes_on(workdir: Path) -> None:
    output = mar(workdir, "run", "search.yaml", "--backend", "inline")
    assert "3 trials finished, 0 ended early" in output
    runs = trial_runs(workdir)
    assert {run.status for run in runs} == {"FINISHED"}
    assert 2 <= len(runs) <= 3, "what is proposed twice is trained once"
    assert (workdir / "mar_store" / "reports" / "search" / "best.yaml").is_file()
    again = mar(workdir, "run", "search.yaml", "--backend", "local")
    assert "3 trials wanted, 3 finished" in again
    more = mar(workdir, "run", "search.yaml", "trials=4", "--backend", "local")
    assert "4 trials wanted, 3 finished" in more
    assert {run.run_id for run in runs} <= {run.run_id for run in trial_runs(workdir)}


class _EndsTheSecond:
    """Proposes three trials; ends the second after its first epoch. Hears what becomes of each."""

    def __init__(self, tiny: Callable[..., TrainingConfig]) -> None:
        epochs = [2, 500, 3]
        self.trials = [Trial({}, tiny({"recipe.epochs": each}), "") for each in epochs]
        self.waiting = iter(self.trials)
        self.epochs: list[tuple[str, int]] = []
        self.output: dict[str, str] = {}

    def next(self) -> Trial | None:
        return next(self.waiting, None)

    def should_prune(self, key: str, epoch: int, metrics: Mapping[str, float]) -> bool:
        return key == self.trials[1].key and epoch == 1

    def started(self, key: str) -> None:
        self.output[key] = "started"

    def epoch(self, key: str, report: EpochReport) -> None:
        self.epochs.append((key, report.epoch))

    def finished(self, key: str) -> None:
        self.output[key] = "finished"

    def failed(self, key: str, reason: FailureReason) -> None:
        self.output[key] = reason.message

    def pruned(self, key: str) -> None:
        self.output[key] = "pruned"

    def stopped(self, key: str) -> None:
        self.output[key] = "stopped"

    def is_over(self) -> bool:
        return False


@pytest.mark.usefixtures("cluster")
def test_workers_go_from_trial_to_trial_also_from_one_that_a_search_ended_early(
    tmp_path: Path, tiny: Callable[..., TrainingConfig]
) -> None:
    source = _EndsTheSecond(tiny)
    launch = LaunchConfig(store=tmp_path / "mar_store", backend="train", max_concurrent_trials=1)
    ray_tune.run_search(source, launch, source, lambda trial: None)
    first, ended, last = (trial.key for trial in source.trials)
    assert source.output == {
        first: "finished",
        ended: "pruned",
        last: "finished",
    }
    assert (ended, 1) in source.epochs
    assert not (launch.trial_folder(ended) / "result").exists()
    assert "left at step" in (launch.trial_folder(ended) / "failure.json").read_text()
    logs = [
        (launch.trial_folder(trial.key) / "logs" / "worker0.txt").read_text()
        for trial in source.trials
    ]
    assert len({re.findall(r"process (\d+)", log)[0] for log in logs}) == 1


MISTAKES: list[tuple[list[str], int, str]] = [
    (["run", "absent"], 2, "no study 'absent': neither a file nor one that ships with mar ("),
    (
        ["run", "tiny.yaml", "mask.ration=0.5"],
        2,
        "mask.ration: no such setting; did you mean mask.ratio?",
    ),
    (["run", "tiny.yaml", "data.root=nowhere"], 2, "data.root: the folder nowhere does not exist"),
    (["run", "tiny.yaml", "--filter", "ρ=60 %"], 2, "the axis ρ has no label '60 %'"),
    (
        ["run", "tiny.yaml", "--backend", "local", "--workers", "2"],
        2,
        "--backend local trains with one worker",
    ),
    (
        ["run", "tiny.yaml", "--workers", "64"],
        2,
        "--workers 64: a trial asks for 64 CPU, the cluster has",
    ),
    (
        ["run", "tiny.yaml", "--backend", "local", "recipe.batch_size=99"],
        2,
        "recipe.batch_size: 99 is more than the 16",
    ),
    (
        ["run", "tiny.yaml", "--backend", "local", "--store", "/proc/store"],
        1,
        "the store /proc/store cannot be written",
    ),
    (
        ["table", "tiny.yaml", "--tracking-uri", "http://127.0.0.1:9"],
        1,
        "the tracking store http://127.0.0.1:9 cannot",
    ),
    (
        ["run", "tiny.yaml", "--tracking-uri", "http://127.0.0.1:9"],
        1,
        "the tracking store http://127.0.0.1:9 cannot",
    ),
    (
        ["run", "tiny.yaml", "--backend", "inline", "--workers", "2"],
        2,
        "--backend inline trains with one worker",
    ),
    (
        ["figure", "tiny.yaml", "-o", "/proc/f.png", "--tracking-uri", "sqlite:///here.db"],
        1,
        "/proc/f.png",
    ),
    (
        ["run", "tiny.yaml", "--budget", "1h", "--backend", "local"],
        2,
        "--budget: the device-hours cannot be estimated",
    ),
    (["run", "tiny.yaml", "--budget", "soon"], 2, "--budget soon: expected device-hours, as 200h"),
    (
        ["plan", "tiny.yaml", "--device", "mine=-4"],
        2,
        "--device mine=-4: expected NAME=GFLOPS_PER_S",
    ),
    (["plan", "tiny.yaml", "--price-per-h", "2"], 2, "--price-per-h: of which device?"),
    (
        ["run", "tiny.yaml", "--keep", "newest"],
        2,
        "--keep newest: expected last=N, best, every=N (epochs)",
    ),
    (
        ["run", "tiny.yaml", "--min-workers", "3", "--workers", "2"],
        2,
        "--min-workers 3: more than --workers 2",
    ),
    (
        ["run", "tiny.yaml", "--object-store", "bucket"],
        2,
        "--object-store bucket: expected s3://bucket/folder",
    ),
    (
        ["run", "tiny.yaml", "--cache-from", "s3://bucket/cache"],
        2,
        "--cache-from: to where? Give data.cache=DIR too",
    ),
    (["plan"], 2, "which study? (a file, a name that ships with mar, or --all)"),
    (
        ["run", "search.yaml", "--filter", "ρ=50 %"],
        2,
        "search.yaml is a search: --filter, --budget and --order are for studies",
    ),
    (["table", "search.yaml"], 2, "search.yaml is a search, not a study"),
    (["plan", "tiny.yaml", "--all"], 2, "tiny.yaml: a study or --all, not both"),
    (["show", "absent"], 2, "no recipe 'absent'"),
    (["cost", "recipe.yaml", "mask.ratio=2"], 2, "mask.ratio: must be less than 1, not 2"),
    (["mask", "recipe.yaml", "-o", "mask.doc"], 2, "cannot draw a .doc file"),
    (["ui", "--store", "nowhere"], 2, "--store nowhere: no tracking store there yet"),
    (
        ["data", "make", "motion-verbs", "set", "--classes", "3"],
        2,
        "classes: must be even, from 2 to 12, not 3",
    ),
]


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    MISTAKES,
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_users_mistake_is_answered_with_its_place_and_remedy(
    workdir: Path, arguments: list[str], code: int, message: str
) -> None:
    assert message in mar(workdir, *arguments, code=code)
    if (workdir / "mar_store" / "mlflow.db").is_file():
        client = Store(LaunchConfig(store=workdir / "mar_store")).client
        experiments = [experiment.experiment_id for experiment in client.search_experiments()]
        assert "RUNNING" not in {run.info.status for run in client.search_runs(experiments)}


def test_a_video_that_is_no_video_stops_its_trial_and_is_named(workdir: Path) -> None:
    (workdir / "data").mkdir()
    (workdir / "data" / "a.mp4").write_text("<html>not found</html>")
    (workdir / "data" / "list.txt").write_text("a.mp4 0\n" * 8)
    recipe = tiny_tree(workdir / "data")
    recipe["data"] = {
        "root": str(workdir / "data"),
        "train": "list.txt",
        "val": "list.txt",
        "num_classes": 2,
    }
    (workdir / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    output = mar(workdir, "run", "tiny.yaml", "--backend", "local", code=1)
    assert "a.mp4: not a video that can be decoded" in output
    assert "data.broken: skip" in output
    (workdir / "data" / "list.txt").write_text("a.mp4\n")
    assert "list.txt:1: expected a path and a class number" in mar(
        workdir, "run", "tiny.yaml", "--backend", "local", code=2
    )


@pytest.mark.usefixtures("cluster")
def test_the_small_verbs_print_what_they_promise(workdir: Path) -> None:
    shown = yaml.safe_load(mar(workdir, "show", "recipe.yaml", "mask.ratio=0.75"))
    assert shown["mask"]["ratio"] == 0.75
    assert json.loads(mar(workdir, "show", "recipe.yaml", "--json"))["encoder"]["width"] == 16
    listed = json.loads(mar(workdir, "show", "--json"))
    assert listed["table4_cell_size"].startswith("Table IV")
    assert "real clips" in listed["recipes/real_clips"]
    assert json.loads(mar(workdir, "cost", "recipe.yaml", "--json"))["tokens"] == 64
    assert "GFLOPs a view" in mar(workdir, "cost", "recipe.yaml")
    masks = json.loads(mar(workdir, "mask", "recipe.yaml", "--json", "--clips", "1"))
    assert masks["evaluation"][0][0] == [1, 1, 1, 1]
    assert mar(workdir, "mask", "recipe.yaml", "-o", "m.png").strip() == "m.png"
    assert (workdir / "m.png").read_bytes().startswith(b"\x89PNG")
    report = json.loads(mar(workdir, "doctor", "--json"))
    assert {finding["name"]: finding["works"] for finding in report} == dict.fromkeys(
        [
            "python",
            "packages",
            "devices",
            "decord",
            "torchcodec",
            "pyav",
            "ray",
            "tracking store",
            "disk",
        ],
        True,
    )


def test_a_home_that_cannot_be_written_and_a_long_temporary_folder_keep_no_ray_from_starting(
    tmp_path: Path,
) -> None:
    """In a process of its own: Ray reads both when it is loaded."""
    long = tmp_path / ("x" * 90)
    long.mkdir()
    program = (
        "from orchestration.backends.ray_session import describe_cluster; print(describe_cluster())"
    )
    environment = {
        **os.environ,
        "HOME": "/proc/nohome",
        "TMPDIR": str(long),
        "RAY_ADDRESS": "127.0.0.1:9",
    }
    environment |= {"http_proxy": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "a task ran" in done.stdout


_KEYS = {
    "AWS_ACCESS_KEY_ID": "AKIDOFTHETEST",
    "AWS_SECRET_ACCESS_KEY": "SECRETOFTHETEST",
    "AWS_SESSION_TOKEN": "STOFTHETEST",
}


def test_a_private_ray_listens_on_loopback_alone_and_its_logs_have_no_keys_of_a_cloud(
    workdir: Path,
) -> None:
    """Whole clusters were taken over through Ray's open ports (CVE-2023-48022)."""
    temporary = workdir / "t"
    temporary.mkdir()
    environment = {**os.environ, **_KEYS, "TMPDIR": str(temporary)}
    arguments = ["run", "tiny.yaml", "--filter", "ρ=50 %", "--backend", "inline"]
    with (workdir / "output.txt").open("w") as output:
        running = subprocess.Popen(
            [*MAR, *arguments], cwd=workdir, env=environment, stdout=output, stderr=output
        )
    seen: set[str] = set()
    while running.poll() is None:
        tree = [psutil.Process(running.pid), *psutil.Process(running.pid).children(recursive=True)]
        for process in tree:
            with suppress(psutil.Error):
                listening = [
                    each
                    for each in process.net_connections("inet")
                    if each.status == psutil.CONN_LISTEN
                ]
                seen |= {each.laddr.ip.removeprefix("::ffff:") for each in listening}
        time.sleep(0.2)
    assert running.returncode == 0, (workdir / "output.txt").read_text()
    assert seen == {"127.0.0.1"}
    private = next(
        folder for folder in (temporary, Path("/tmp")) if (folder / f"mar-{os.getuid()}").is_dir()
    )
    folder = private / f"mar-{os.getuid()}"
    assert folder.stat().st_mode & 0o777 == 0o700
    session = max((folder / "ray").glob("session_2*"), key=lambda each: each.stat().st_mtime)
    logs = [file for file in session.rglob("*") if file.is_file()]
    assert len(logs) > 5
    for file in [*logs, *workdir.glob("mar_store/**/*.*")]:
        if file.is_file():
            content = file.read_bytes()
            assert not [name for name, value in _KEYS.items() if value.encode() in content], file


def begin(workdir: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*MAR, *arguments], cwd=workdir, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def end(process: subprocess.Popen[str], code: int) -> str:
    output = process.communicate(timeout=200)[0]
    assert process.returncode == code, output
    return output


@pytest.mark.parametrize(
    ("backend", "number"),
    [
        ("--backend=inline", signal.SIGTERM),
        pytest.param("--backend=train", signal.SIGINT, marks=pytest.mark.cluster),
    ],
)
def test_with_ray_a_signal_is_a_gentle_stop_and_the_trial_resumes_where_it_was(
    workdir: Path, backend: str, number: signal.Signals
) -> None:
    arguments = ["run", "tiny.yaml", "recipe.epochs=400", "--filter", "ρ=50 %", backend]
    running = begin(workdir, *arguments)
    wait_for(lambda: list(workdir.glob("mar_store/trials/*/step_*")))
    running.send_signal(number)
    output = end(running, 1)
    assert "stopping: the running trials are saving" in output
    assert "stopped with 1 trials unfinished; run the same command to resume" in output
    saved = max(
        int(path.name.removeprefix("step_")) for path in workdir.glob("mar_store/trials/*/step_*")
    )
    running = begin(workdir, *arguments)
    wait_for(
        lambda: (
            f"step_{saved:08d}"
            not in {path.name for path in workdir.glob("mar_store/trials/*/step_*")}
        )
    )
    running.send_signal(number)
    output = end(running, 1)
    resumed = re.search(r"resumes at epoch (\d+)/400", output)
    assert resumed and int(resumed[1]) in (saved // 2, saved // 2 + 1)
    assert f"epoch {int(resumed[1]) - 1}/400, loss" not in output, "nothing is told again"
