"""An object store (a real S3 server) and a tracking server, for nodes that share no disk."""

import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import pytest
import yaml
from commands import begin, end, wait_for
from commands import here as mar
from conftest import BUCKET, tiny_tree
from conftest import TINY_STUDY as STUDY
from servers import Server

from mar.errors import Failure, UserError
from orchestration.config import LaunchConfig
from orchestration.storage.object_store import ObjectStore
from orchestration.tracking.store import Store

BIN = Path(sys.executable).parent


@pytest.fixture
def workdir(tmp_path: Path, videos: Path, s3: None) -> Path:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tiny_tree(videos)))
    (tmp_path / "tiny.yaml").write_text(STUDY)
    return tmp_path


def complete_dirs(folder: Path, content: str = "weights") -> Path:
    from mar.atomic_dir import write_atomic_dir, write_text

    write_atomic_dir(folder, {"model.safetensors": lambda file: write_text(file, content)}, {})
    return folder


def test_a_folder_is_there_when_its_manifest_is(s3: None, tmp_path: Path) -> None:
    remote = ObjectStore(f"{BUCKET}/whole")
    remote.upload_dir(complete_dirs(tmp_path / "step_1"), "step_1")
    assert remote.download_dir("step_1", tmp_path / "copy")
    assert (tmp_path / "copy" / "model.safetensors").read_text() == "weights"
    (tmp_path / "other").write_text("weighty")
    remote.upload(tmp_path / "other", "step_1/model.safetensors")
    assert not remote.download_dir("step_1", tmp_path / "damaged"), "its checksum is another"
    remote.remove("step_1/manifest.json")
    assert not remote.download_dir("step_1", tmp_path / "half")
    remote.remove("step_1")
    assert remote.names("") == []


def test_a_file_that_cannot_be_read_to_its_end_leaves_no_part_of_it(
    s3: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(source: IO[bytes], target: IO[bytes], length: int) -> None:
        target.write(source.read(10))
        raise OSError("the disk has a bad sector")

    (tmp_path / "file").write_text("more than ten bytes")
    remote = ObjectStore(f"{BUCKET}/cut")
    monkeypatch.setattr(shutil, "copyfileobj", fails)
    with pytest.raises(Failure, match="bad sector"):
        remote.upload(tmp_path / "file", "file")
    assert not remote.exists("file")


def test_what_is_no_object_store_is_said(s3: None, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"--object-store ftp://host/x: .*expected s3://bucket/folder"
    ):
        ObjectStore("ftp://host/x")
    with pytest.raises(Failure, match=r"s3://nobucket/x/y cannot be used: .*nobucket"):
        (tmp_path / "file").write_text("content")
        ObjectStore("s3://nobucket/x").upload(tmp_path / "file", "y")


def test_a_trial_goes_on_from_the_object_store_on_a_machine_with_an_empty_disk(
    workdir: Path,
) -> None:
    arguments = [
        "run",
        "tiny.yaml",
        "recipe.epochs=60",
        "--filter",
        "ρ=50 %",
        "--backend",
        "local",
        "--object-store",
        f"{BUCKET}/store",
    ]
    remote = ObjectStore(f"{BUCKET}/store")
    running = begin(workdir, *arguments)
    wait_for(
        lambda: [each for each in remote.names("trials") if len(remote.names(f"trials/{each}")) > 2]
    )
    running.send_signal(signal.SIGKILL)
    running.wait()
    (key,) = remote.names("trials")
    there = max(name for name in remote.complete_dirs(f"trials/{key}") if name.startswith("step_"))
    shutil.rmtree(workdir / "mar_store" / "trials")
    mar(workdir, *arguments, "--keep", "every=20")
    log = (workdir / "mar_store" / "trials" / key / "logs" / "worker0.txt").read_text()
    assert f"{there} downloaded from {BUCKET}/store" in log
    store = Store(LaunchConfig(store=workdir / "mar_store"))
    (record,) = store.trials()
    output = [
        (point.step, point.value)
        for point in store.client.get_metric_history(record.run_id, "train/loss")
    ]
    mar(workdir, *arguments[:-2], "--store", "undisturbed")
    other = Store(LaunchConfig(store=workdir / "undisturbed"))
    (same,) = other.trials()
    undisturbed = other.client.get_metric_history(same.run_id, "train/loss")
    assert output == [(point.step, point.value) for point in undisturbed]
    kept = {name for name in remote.names(f"trials/{key}") if name.startswith("step_")}
    every = {40, 80, 120}  # two steps an epoch; what was gone when the policy changed is gone
    assert kept == {
        f"step_{step:08d}" for step in every if step >= int(there.removeprefix("step_"))
    }
    assert not list((workdir / "mar_store" / "trials" / key).glob("step_*")), (
        "the disk is for others"
    )
    assert {"manifest.json", "model.safetensors"} <= set(remote.names(f"trials/{key}/result"))


def test_a_frame_cache_is_fetched_to_where_the_training_is(workdir: Path) -> None:
    output = mar(
        workdir,
        "data",
        "pack",
        "recipe.yaml",
        "cache",
        "--format",
        "raw",
        "--object-store",
        f"{BUCKET}/cache",
    )
    assert f"files uploaded to {BUCKET}/cache" in output
    shutil.rmtree(workdir / "cache")
    arguments = [
        "run",
        "tiny.yaml",
        "--filter",
        "ρ=50 %",
        "--backend",
        "local",
        f"data.cache={workdir / 'cache'}",
    ]
    assert "✓ 50 %" in mar(workdir, *arguments, "--cache-from", f"{BUCKET}/cache")
    assert list((workdir / "cache").glob("*.bin"))


@pytest.fixture
def server(workdir: Path) -> Iterator[Server]:
    server = Server(workdir)
    yield server
    server.kill()


@pytest.mark.cluster
def test_a_tracking_server_that_is_killed_and_comes_back_has_every_metric_once(
    workdir: Path, server: Server
) -> None:
    running = begin(
        workdir,
        "run",
        "tiny.yaml",
        "recipe.epochs=120",
        "--filter",
        "ρ=50 %",
        "--backend",
        "local",
        "--tracking-uri",
        server.address,
    )
    trials: Callable[[], list[Path]] = lambda: list(workdir.glob("mar_store/trials/*/step_*"))  # noqa: E731
    wait_for(trials)
    server.kill()
    before = max(int(path.name.removeprefix("step_")) for path in trials())
    time.sleep(12)
    assert running.poll() is None
    assert max((int(path.name.removeprefix("step_")) for path in trials()), default=999) > before, (
        "training continues"
    )
    server.start()
    assert "✓ 50 %" in end(running, 0)
    store = Store(LaunchConfig(store=workdir / "mar_store", tracking_uri=server.address))
    (record,) = store.trials()
    assert record.status == "FINISHED"
    history = store.client.get_metric_history(record.run_id, "train/loss")
    assert [point.step for point in history] == list(range(1, 121))
    assert "result/model.safetensors" in {
        item.path for item in store.client.list_artifacts(record.run_id, "result")
    }
    assert "logs/worker0.txt" in {
        item.path for item in store.client.list_artifacts(record.run_id, "logs")
    }


@pytest.mark.cluster
def test_a_tracking_server_that_is_gone_for_good_costs_no_result_and_the_table_is_printed(
    workdir: Path, server: Server
) -> None:
    arguments = ["run", "tiny.yaml", "recipe.epochs=60", "--filter", "ρ=50 %", "--backend", "local"]
    running = begin(workdir, *arguments, "--tracking-uri", server.address, "--patience-s", "3")
    wait_for(lambda: list(workdir.glob("mar_store/trials/*/step_*")))
    server.kill()
    output = end(running, 1)
    assert "Top-1 (%)" in output and "The table above is from the results in the store" in output
    assert "Traceback" not in output
    output = mar(workdir, *arguments)
    assert "Top-1 (%)" in output and "resumes at epoch" not in output, "nothing is trained again"
    assert "1 finished results" in output and "are used, not trained again" in output
