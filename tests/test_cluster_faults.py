"""Several nodes on this machine, each with a raylet of its own, and what can happen to them.

Nothing is lost.
"""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator
from pathlib import Path

import boto3
import psutil
import pytest
import yaml
from commands import end_ray, ray_processes
from conftest import tiny_tree
from moto.server import ThreadedMotoServer

from orchestration.config import LaunchConfig
from orchestration.tracking.run_record import RunRecord
from orchestration.tracking.store import Store

BIN = Path(sys.executable).parent
DASHBOARD = 28265
HERE = "127.0.0.1"
NODE = ["--object-store-memory=80000000", "--disable-usage-stats"]
STUDY = """\
title: Tiny
recipe: recipe.yaml
axes: {ρ: {50 %: {}, 75 %: {mask.ratio: 0.75}}}
table: {columns: [top1]}
"""
S3_PORT = 29123
RAY = {
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
    "PATH": f"{BIN}:{os.environ['PATH']}",
}
RAY |= {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_REGION": "us-east-1"}
RAY |= {"AWS_ENDPOINT_URL": f"http://{HERE}:{S3_PORT}"}
LOSS = re.compile(r"epoch (\d+)/\d+, loss")


class Cluster:
    """A head without a place for a trial's worker, and nodes of one.

    Each in a session of its own.
    """

    def __init__(self) -> None:
        self.folder = Path(
            tempfile.mkdtemp(prefix="ray", dir="/tmp")
        )  # a socket's path has 107 characters at most
        self.nodes: list[str] = []
        self.port = 26379
        ray("get-auth-token", "--generate")
        self.start_head()

    def start_head(self) -> None:
        arguments = [
            "--head",
            f"--port={self.port}",
            f"--dashboard-host={HERE}",
            f"--dashboard-port={DASHBOARD}",
        ]
        self._start("head", [*arguments, "--num-cpus=0", f"--node-ip-address={HERE}"])

    @property
    def address(self) -> str:
        return f"{HERE}:{self.port}"

    def join(self, name: str, *before: str) -> str:
        """Start a node with one CPU, behind the command ``before``; returns its id."""
        there = set(self.alive())
        self._start(
            name,
            [f"--address={self.address}", "--num-cpus=1", f"--node-ip-address={HERE}"],
            *before,
        )
        wait_for(lambda: set(self.alive()) - there)
        (node,) = set(self.alive()) - there
        return node

    def has(self, count: int) -> list[str]:
        """Start nodes until there are so many; returns their ids."""
        while len(self.alive()) < count:
            self.join(f"node{len(self.nodes)}")
        return self.alive()

    def kill(self, name: str) -> None:
        """End all of a node's processes with SIGKILL, as if its machine had lost its power."""
        end_ray(self.folder / name)

    def loses_all_nodes(self) -> None:
        for name in [name for name in self.nodes if name != "head"]:
            self.kill(name)

    def alive(self) -> list[str]:
        output = json.loads(
            ray("list", "nodes", "--format=json", "--address", f"http://{HERE}:{DASHBOARD}")
        )
        return [
            node["node_id"]
            for node in output
            if node["state"] == "ALIVE" and not node["is_head_node"]
        ]

    def processes(self, title: str) -> list[psutil.Process]:
        found: list[psutil.Process] = []
        for process in ray_processes(self.folder):
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.cmdline()[:1] and process.cmdline()[0].startswith(title):
                    found.append(process)
        return found

    def end(self) -> None:
        end_ray(self.folder)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _start(self, name: str, arguments: list[str], *before: str) -> None:
        (self.folder / name).mkdir(exist_ok=True)
        ray("start", *arguments, *NODE, f"--temp-dir={self.folder / name}", before=before)
        self.nodes.append(name)


def ray(*arguments: str, before: tuple[str, ...] = ()) -> str:
    environment = {**os.environ, **RAY}
    done = subprocess.run(
        [*before, BIN / "ray", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def wait_for(there: Callable[[], object], timeout_s: float = 150) -> None:
    until = time.monotonic() + timeout_s
    while not there():
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.2)


@pytest.fixture(scope="module")
def cluster() -> Generator[Cluster]:
    cluster = Cluster()
    yield cluster
    cluster.end()


@pytest.fixture
def s3() -> Generator[None]:
    server = ThreadedMotoServer(HERE, S3_PORT, verbose=False)
    server.start()
    there = {
        "aws_access_key_id": "key",
        "aws_secret_access_key": "secret",
        "endpoint_url": RAY["AWS_ENDPOINT_URL"],
    }
    boto3.client("s3", region_name="us-east-1", **there).create_bucket(Bucket="bucket")
    yield
    server.stop()


@pytest.fixture
def workdir(tmp_path: Path, videos: Path) -> Path:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tiny_tree(videos)))
    (tmp_path / "tiny.yaml").write_text(STUDY)
    return tmp_path


class Running:
    """``mar run`` of the study's first trial in the background."""

    def __init__(self, cluster: Cluster, workdir: Path, *arguments: str, epochs: int) -> None:
        self.workdir, self.log = workdir, workdir / "out.txt"
        given = [
            "run",
            "tiny.yaml",
            f"recipe.epochs={epochs}",
            "--filter",
            "ρ=50 %",
            "--store",
            str(workdir / "store"),
        ]
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [BIN / "mar", *given, "--address", cluster.address, *arguments],
                cwd=workdir,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **RAY},
            )

    def done(self) -> int:
        """The last epoch that was told."""
        return max((int(number) for number in LOSS.findall(self.log.read_text())), default=0)

    def gets_on(self, epochs: int = 3) -> None:
        """Wait until it has trained so many more epochs than now."""
        now = self.done()
        wait_for(lambda: self.done() >= now + epochs or self.process.poll() is not None)
        assert self.process.poll() is None, self.log.read_text()

    def ends_well(self) -> str:
        self.process.wait(timeout=560)
        assert self.process.returncode == 0, self.log.read_text()
        return self.log.read_text()


def trial_of(workdir: Path) -> RunRecord:
    (record,) = Store(LaunchConfig(store=workdir / "store")).trials()
    return record


def losses_of(workdir: Path) -> list[tuple[int, float]]:
    client = Store(LaunchConfig(store=workdir / "store")).client
    return [
        (point.step, point.value)
        for point in client.get_metric_history(trial_of(workdir).run_id, "train/loss")
    ]


def undisturbed(workdir: Path, epochs: int) -> list[tuple[int, float]]:
    other = workdir / "undisturbed"
    other.mkdir()
    for name in ("recipe.yaml", "tiny.yaml"):
        shutil.copy(workdir / name, other)
    arguments = [
        "run",
        "tiny.yaml",
        f"recipe.epochs={epochs}",
        "--filter",
        "ρ=50 %",
        "--backend",
        "local",
        "--store",
        "store",
    ]
    subprocess.run(
        [BIN / "mar", *arguments], cwd=other, check=True, capture_output=True, timeout=250
    )
    return losses_of(other)


def test_a_trials_worker_and_then_its_driver_are_killed_and_no_loss_differs(
    cluster: Cluster, workdir: Path
) -> None:
    cluster.has(1)
    running = Running(cluster, workdir, "--retries", "2", epochs=30)
    running.gets_on()
    (worker,) = cluster.processes("ray::RayTrainWorker")
    worker.kill()
    running.gets_on()
    (driver,) = cluster.processes("ray::PooledTrainable")
    driver.kill()
    running.ends_well()
    assert losses_of(workdir) == undisturbed(workdir, 30)


@pytest.mark.cluster
def test_a_node_that_is_to_go_has_its_trial_saved_at_once_and_that_is_no_failure(
    cluster: Cluster, workdir: Path
) -> None:
    cluster.loses_all_nodes()
    node = cluster.join("spot")
    running = Running(cluster, workdir, "--retries", "0", epochs=40)
    running.gets_on()
    reason = [
        "--reason",
        "DRAIN_NODE_REASON_PREEMPTION",
        "--reason-message",
        "spot",
        "--deadline-remaining-seconds",
        "8",
    ]
    ray("drain-node", "--address", cluster.address, "--node-id", node, *reason)
    log = next(workdir.glob("store/trials/*/logs/worker0.txt"))
    wait_for(lambda: "a node of this trial is being preempted: saving at step" in log.read_text())
    cluster.kill("spot")
    cluster.join("another")
    running.ends_well()
    assert losses_of(workdir) == undisturbed(workdir, 40)


@pytest.mark.cluster
def test_a_trial_goes_on_with_fewer_workers_and_grows_again(
    cluster: Cluster, workdir: Path
) -> None:
    cluster.has(1)
    cluster.join("third")
    running = Running(
        cluster, workdir, "--workers", "2", "--min-workers", "1", "--resize-s", "5", epochs=600
    )
    running.gets_on()
    log = next(workdir.glob("store/trials/*/logs/worker0.txt"))

    def sizes() -> list[str]:
        return re.findall(r"worker 0 of (\d)", log.read_text())

    wait_for(lambda: sizes()[-1] == "2")  # it may begin with one
    running.gets_on()
    cluster.kill("third")
    wait_for(lambda: sizes()[-1] == "1")
    running.gets_on()
    cluster.join("fourth")
    wait_for(lambda: sizes()[-1] == "2")
    running.gets_on()
    subprocess.run([BIN / "mar", "stop", "tiny", "--store", workdir / "store"], check=True)
    assert running.process.wait(timeout=120) == 1, running.log.read_text()
    assert trial_of(workdir).status == "KILLED"
    epochs = [epoch for epoch, _ in losses_of(workdir)]
    assert epochs == list(range(1, len(epochs) + 1)), "each once"
    progress = json.loads(max(workdir.glob("store/trials/*/step_*/manifest.json")).read_text())[
        "progress"
    ]
    assert progress["step"] // 2 == len(progress["history"]), (
        "as many steps an epoch as ever: the batch is the same"
    )


@pytest.mark.cluster
def test_a_head_that_is_lost_with_all_that_ran_on_it_loses_no_epoch(
    cluster: Cluster, workdir: Path
) -> None:
    cluster.has(1)
    running = Running(cluster, workdir, epochs=40)
    running.gets_on()
    running.process.kill()  # what the head's machine ran: the launch too
    cluster.kill("head")
    cluster.port += (
        1  # its raylets live on for a minute, and Ray takes them for a head that is there
    )
    cluster.start_head()
    cluster.join("fifth")
    Running(cluster, workdir, epochs=40).ends_well()
    assert losses_of(workdir) == undisturbed(workdir, 40)


@pytest.mark.cluster
def test_nodes_that_share_no_disk_train_together_and_another_goes_on_for_one(
    cluster: Cluster, workdir: Path, s3: None
) -> None:
    (workdir / "store").mkdir()
    own_disk = [
        "unshare",
        "--mount",
        "bash",
        "-c",
        f'mount -t tmpfs none {workdir}/store && exec "$@"',
        "--",
    ]
    cluster.loses_all_nodes()
    cluster.join("sixth", *own_disk)
    cluster.join("seventh", *own_disk)
    arguments = ["--workers", "2", "--retries", "3", "--object-store", "s3://bucket/store"]
    running = Running(cluster, workdir, *arguments, epochs=60)
    running.gets_on()
    assert not list(workdir.glob("store/trials/*/step_*")), "its disk is another"
    stop = ["stop", "tiny", "--store", workdir / "store", "--object-store", "s3://bucket/store"]
    subprocess.run([BIN / "mar", *stop], check=True, env={**os.environ, **RAY})
    assert running.process.wait(timeout=120) == 1, running.log.read_text()
    running = Running(cluster, workdir, *arguments, epochs=60)  # no node's disk remembers that wish
    running.gets_on()
    cluster.kill("sixth")
    cluster.join("eighth", *own_disk)
    running.ends_well()
    assert [epoch for epoch, _ in losses_of(workdir)] == list(range(1, 61))
    assert {path.name for path in workdir.glob("store/trials/*/logs/*")} == {
        "worker0.txt",
        "worker1.txt",
    }
