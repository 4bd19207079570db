"""The one writer: in order, in batches, and through an outage of the store."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE

from mar.errors import Failure
from orchestration.config import LaunchConfig
from orchestration.tracking.store import Store
from orchestration.tracking.tags import FOLDER
from orchestration.tracking.writer import Writer


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(LaunchConfig(store=tmp_path / "store"))


@pytest.fixture
def writer(store: Store) -> Iterator[Writer]:
    experiment = store.experiment("study's name")
    writer = Writer(store, patience_s=1.0)
    writer.open(
        "a", lambda: store.run(experiment, "trial a", {"mar.kind": "trial", "mar.key": "a"}, {})
    )
    yield writer
    writer._abandoned.set()


def break_for(writer: Writer, monkeypatch: pytest.MonkeyPatch, name: str, times: int) -> None:
    """Let a call of MLflow's client fail so many times, then work again."""
    real, left = getattr(writer.client, name), [times]

    def call(*args: object, **kwargs: object) -> object:
        if left[0]:
            left[0] -= 1
            raise MlflowException("the server went away")
        return real(*args, **kwargs)

    monkeypatch.setattr(writer.client, name, call)


CALLS = ["create_run", "log_batch", "log_artifacts", "set_terminated", "get_metric_history"]


@pytest.mark.parametrize("call", CALLS)
def test_a_store_that_was_away_gets_everything_once(
    store: Store, writer: Writer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, call: str
) -> None:
    break_for(writer, monkeypatch, call, times=1)
    (tmp_path / "result").mkdir()
    (tmp_path / "result" / "metrics.json").write_text("{}")
    for epoch in (1, 2, 2, 3):
        writer.log_metrics("a", epoch, {"train/loss": 1.0 / epoch})
    writer.artifacts("a", tmp_path / "result", "result")
    writer.end("a", "FINISHED")
    writer.close()
    (run,) = store.trials()
    assert run.status == "FINISHED"
    history = store.client.get_metric_history(run.run_id, "train/loss")
    assert [(point.step, point.value) for point in history] == [(1, 1.0), (2, 0.5), (3, 1 / 3)]
    assert [item.path for item in store.client.list_artifacts(run.run_id, "result")] == [
        "result/metrics.json"
    ]


def test_a_run_is_never_finished_before_all_of_it_is_written(
    store: Store, writer: Writer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    break_for(writer, monkeypatch, "log_artifacts", times=10_000)
    writer.artifacts("a", tmp_path, "result")
    writer.end("a", "FINISHED")
    with pytest.raises(Failure, match=r"the server went away.*the same command resumes"):
        writer.close()
    assert [run.status for run in store.trials()] == ["RUNNING"]


def test_epochs_that_an_earlier_launch_logged_are_not_logged_again(
    store: Store, writer: Writer
) -> None:
    writer.log_metrics("a", 1, {"train/loss": 1.0})
    writer.log_metrics("a", 2, {"train/loss": 0.5})
    writer.close()
    later = Writer(store)
    later.open(
        "a", lambda: store.run(store.experiment("study's name"), "trial a", {"mar.key": "a"}, {})
    )
    for epoch in (1, 2, 3):
        later.log_metrics("a", epoch, {"train/loss": 0.25})
    later.close()
    (run,) = store.trials()
    history = store.client.get_metric_history(run.run_id, "train/loss")
    assert [(point.step, point.value) for point in history] == [(1, 1.0), (2, 0.5), (3, 0.25)]


def test_an_experiment_that_was_deleted_in_the_browser_comes_back(store: Store) -> None:
    identifier = store.experiment("study")
    store.client.delete_experiment(identifier)
    assert store.experiment("study") == identifier
    store.run(identifier, "trial", {"mar.kind": "trial"}, {})


def test_runs_on_every_page_of_a_store_are_read(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = store.experiment("many")
    for number in range(3):
        store.run(experiment, f"study {number}", {"mar.kind": "study"}, {"mar.expected": "1"})
        store.run(
            experiment,
            f"trial {number}",
            {"mar.kind": "trial", "mar.key": str(number)},
            {FOLDER: str(store.launch.store.resolve() / "trials" / str(number))},
        )
    search = store.client.search_runs

    def one_at_a_time(ids: list[str], query: str, max_results: int, page_token: str | None) -> Any:
        return search(ids, query, max_results=1, page_token=page_token)

    monkeypatch.setattr(store.client, "search_runs", one_at_a_time)
    assert {record.key for record in store.trials()} == {"0", "1", "2"}
    assert store.close_stale(experiment) == 3


def test_a_store_that_is_no_database_is_named(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_text("not a database at all" * 100)
    with pytest.raises(Failure, match=r"the tracking store sqlite.*mlflow\.db cannot be used"):
        Store(LaunchConfig(store=tmp_path))


def test_what_mlflow_refuses_for_good_is_left_out_and_said_and_the_rest_is_written(
    store: Store, writer: Writer, capsys: pytest.CaptureFixture[str]
) -> None:
    writer.tag("a", "x" * 5000, "a name that is too long")
    writer.tag("a", "after", "it")
    writer.end("a", "FINISHED")
    writer.close()
    (run,) = store.trials()
    assert run.status == "FINISHED" and run.tags["after"] == "it"
    assert "MLflow refuses something for good" in capsys.readouterr().err


def test_points_that_are_refused_do_not_hold_back_those_of_other_runs(
    store: Store, writer: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = store.experiment("study's name")
    writer.open(
        "b", lambda: store.run(experiment, "trial b", {"mar.kind": "trial", "mar.key": "b"}, {})
    )
    real = writer.client.log_batch

    def log_batch(run_id: str, metrics: Any = (), **more: Any) -> None:
        if any(point.key == "bad" for point in metrics):
            raise MlflowException("Invalid metric", error_code=INVALID_PARAMETER_VALUE)
        real(run_id, metrics=metrics, **more)

    monkeypatch.setattr(writer.client, "log_batch", log_batch)
    writer.log_metrics("a", 1, {"bad": 1.0, "train/loss": 2.0})
    writer.log_metrics("b", 1, {"train/loss": 3.0})
    writer.close()
    logged = {run.key: run.metrics for run in store.trials()}
    assert logged["a"]["train/loss"] == 2.0 and "bad" not in logged["a"]
    assert logged["b"]["train/loss"] == 3.0
