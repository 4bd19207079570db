"""A real Ray cluster of two nodes on this machine: jobs, workers on both nodes, Slurm."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator
from pathlib import Path

import psutil
import pytest
import yaml
from commands import end_ray
from conftest import tiny_tree
from servers import Server

from orchestration.cli.app import main
from orchestration.config import LaunchConfig
from orchestration.tracking.run_record import RunRecord
from orchestration.tracking.store import Store

pytestmark = pytest.mark.cluster
ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
DASHBOARD, PORT = 28265, 26379
ADDRESS = f"http://127.0.0.1:{DASHBOARD}"
NODE = ["--object-store-memory=80000000", "--disable-usage-stats", "--node-ip-address=127.0.0.1"]
STUDY = """\
title: Tiny
recipe: recipe.yaml
axes: {ρ: {50 %: {}, 75 %: {mask.ratio: 0.75}}}
table: {columns: [top1]}
"""
RAY = {
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
    "PATH": f"{BIN}:{os.environ['PATH']}",
}


def ray(*arguments: str, **more: str) -> str:
    environment = {**os.environ, **RAY, **more}
    done = subprocess.run(
        [BIN / "ray", *arguments], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def join(folder: Path) -> None:
    """Start another node, with a folder of its own as on a machine of its own."""
    folder.mkdir()
    ray("start", f"--address=127.0.0.1:{PORT}", "--num-cpus=1", *NODE, f"--temp-dir={folder}")


@pytest.fixture(scope="module")
def cluster() -> Generator[Path]:
    """A head without CPUs for trials and a node of two, each with its own raylet.

    The folder of their sessions.
    """
    short = Path(
        tempfile.mkdtemp(prefix="ray", dir="/tmp")
    )  # a socket's path has 107 characters at most
    ray("get-auth-token", "--generate")
    head = [
        f"--port={PORT}",
        "--dashboard-host=127.0.0.1",
        f"--dashboard-port={DASHBOARD}",
        "--num-cpus=1",
    ]
    ray("start", "--head", *head, *NODE, f"--temp-dir={short}")
    join(short / "second")
    yield short
    end_ray(short)
    shutil.rmtree(short, ignore_errors=True)


@pytest.fixture
def workdir(tmp_path: Path, videos: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tiny_tree(videos)))
    (tmp_path / "tiny.yaml").write_text(STUDY)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def mar(workdir: Path, *arguments: str, code: int = 0) -> str:
    done = subprocess.run(
        [BIN / "mar", *arguments], cwd=workdir, capture_output=True, text=True, timeout=560
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_rays_own_launcher_of_a_slurm_job_runs_a_command_over_its_node(tmp_path: Path) -> None:
    """What ``study.sbatch`` asks of each node, on this one, with Slurm's names."""
    for name, script in {"scontrol": "echo 127.0.0.1", "srun": 'shift; exec "$@"'}.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{script}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "mar").write_text(
        '#!/bin/bash\necho "mar $*"\nexec python -c "import ray; ray.init(\'$4\', '
        "log_to_driver=False); print(len(ray.nodes()), 'node')\"\n"
    )
    (tmp_path / "mar").chmod(0o755)
    script = (
        (ROOT / "cluster/slurm/study.sbatch")
        .read_text()
        .replace('PATH="$root/.venv/bin', f'PATH="{tmp_path}')
    )
    (tmp_path / "job").write_text(script)
    there = {
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_JOB_NODELIST": "node",
        "SLURM_JOB_ID": "4711",
        "SLURM_NNODES": "1",
    }
    short = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # a socket's path has 107 characters at most
    path = f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {
        **os.environ,
        **there,
        "PATH": path,
        "SLURM_CPUS_PER_TASK": "1",
        "RAY_TMPDIR": short,
    }
    done = subprocess.run(
        ["bash", tmp_path / "job", "quickstart", "--filter", "ρ=50 %"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (
        f"mar run quickstart --address 127.0.0.1:24711 --store {tmp_path}/mar_store --filter ρ=50 %"
        in done.stdout
    )
    assert "1 node" in done.stdout, "the study's process is in the cluster that was started for it"


def trial_of(workdir: Path) -> RunRecord:
    (record,) = Store(LaunchConfig(store=workdir / "store")).trials()
    return record


def epochs_of(workdir: Path) -> list[int]:
    client = Store(LaunchConfig(store=workdir / "store")).client
    return [
        point.step for point in client.get_metric_history(trial_of(workdir).run_id, "train/loss")
    ]


def test_a_second_submission_joins_the_first_and_leaving_ends_nothing(
    cluster: Path, workdir: Path
) -> None:
    arguments = [
        "submit",
        "tiny.yaml",
        "--filter",
        "ρ=75 %",
        "--backend",
        "inline",
        "--store",
        str(workdir / "store"),
    ]
    job = mar(workdir, *arguments, "--address", ADDRESS, "--detach").split()[0]
    assert f"{job} is queued or running already: joined" in mar(
        workdir, *arguments, "--address", ADDRESS, "--detach"
    )
    log = mar(workdir, "jobs", "follow", job, "--address", ADDRESS)
    assert "| 75 % " in log and "1 trials, 0 finished before, 1 to train" in log
    (found,) = [
        each
        for each in json.loads(mar(workdir, "jobs", "list", "--address", ADDRESS, "--json"))
        if each["job_id"] == job
    ]
    assert found["status"] == "SUCCEEDED"
    assert trial_of(workdir).tags.get("mlflow.source.git.commit"), "the packed code has its commit"


@pytest.fixture
def server(workdir: Path) -> Generator[Server]:
    server = Server(workdir, str(workdir / "artifacts"))
    yield server
    server.kill()


def commands_for_a_cluster() -> list[tuple[str, str]]:
    """Each different `mar submit` and `mar run … --address auto` of the cluster files."""
    found: dict[str, str] = {}
    for path in sorted((ROOT / "cluster").rglob("*")):
        if path.is_file():
            for line in re.findall(
                r"mar submit [^`|\n]*/\S.*|mar run .*--address auto.*", path.read_text()
            ):
                found.setdefault(line.strip(), str(path.relative_to(ROOT)))
    return [(file, line) for line, file in found.items()]


@pytest.mark.parametrize(("file", "line"), commands_for_a_cluster())
def test_the_commands_of_the_cluster_files_run_as_they_stand(
    cluster: Path, workdir: Path, videos: Path, server: Server, file: str, line: str
) -> None:
    """Only the paths are this machine's, and the model a tiny one."""
    here = {
        "/mar/store": f"{workdir}/store",
        "http://127.0.0.1:8265": ADDRESS,
        "http://mlflow:5000": server.address,
    }
    here |= {"/mar/data/motion-verbs": str(videos), "/mar/data/ssv2": str(videos)}
    for there, instead in here.items():
        line = line.replace(there, instead)
    arguments = shlex.split(line)[1:]
    tiny = yaml.safe_load((workdir / "recipe.yaml").read_text())
    small = [
        f"{group}.{name}={value}"
        for group, values in tiny.items()
        if group != "data"
        for name, value in values.items()
    ]
    small += [
        f"data.{name}={tiny['data'][name]}"
        for name in ("format", "videos", "train", "val", "num_classes")
    ]
    small += [
        "data.labels=null",
        "encoder.weights=null",
        "augment.flip_swaps=[]",
        "clip.size=56",
    ]  # 14 × 14 tokens, which every cell of Table IV divides
    only = ["--filter", "ρ=50 %"] if arguments[1] == "quickstart" else ["--filter", "r × q=2 × 2"]
    environment = {
        **os.environ,
        "RAY_ADDRESS": f"127.0.0.1:{PORT}",
    }  # as in a job, where "auto" is its own cluster
    done = subprocess.run(
        [BIN / "mar", *arguments, *small, *only, "--backend", "inline"],
        cwd=workdir,
        env=environment,
        capture_output=True,
        text=True,
        timeout=560,
    )
    assert done.returncode == 0, f"{file}: {done.stdout}{done.stderr}"
    assert "0 finished before, 1 to train" in done.stdout
    assert list((workdir / "store/trials").glob("*/result/model.safetensors"))


def test_a_trial_trains_on_two_nodes_and_goes_on_after_one_is_killed_and_another_joins(
    cluster: Path, workdir: Path
) -> None:
    arguments = [
        "run",
        "tiny.yaml",
        "recipe.epochs=60",
        "--filter",
        "ρ=50 %",
        "--workers",
        "2",
        "--retries",
        "3",
    ]
    arguments += ["--store", str(workdir / "store"), "--address", f"127.0.0.1:{PORT}"]
    running = subprocess.Popen(
        [BIN / "mar", *arguments],
        cwd=workdir,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    wait_for(lambda: len(list(workdir.glob("store/trials/*/step_*"))) > 1)
    raylets = raylets_of(cluster)
    assert len(raylets) == 2
    assert {parent for parent in parents("ray::RayTrainWorker") if parent in raylets} == set(
        raylets
    ), "one on each"
    done = len(
        json.loads(sorted(workdir.glob("store/trials/*/step_*/manifest.json"))[-1].read_text())[
            "progress"
        ]["history"]
    )
    os.kill(raylets[-1], signal.SIGKILL)
    join(cluster / "third")
    output = running.communicate(timeout=560)[0]
    assert running.returncode == 0, output
    assert 0 < done < 60
    assert epochs_of(workdir) == list(range(1, 61)), "each epoch once"


def raylets_of(cluster: Path) -> list[int]:
    """The processes of this cluster's raylets, the head's first."""
    found = [process for process in psutil.process_iter(["cmdline"]) if process.info["cmdline"]]
    raylets = [process for process in found if process.info["cmdline"][0].endswith("raylet/raylet")]
    return sorted(
        each.pid for each in raylets if any(str(cluster) in word for word in each.info["cmdline"])
    )


def parents(title: str) -> set[int]:
    """The parents of the processes that are called so."""
    found = [
        process for process in psutil.process_iter(["cmdline", "ppid"]) if process.info["cmdline"]
    ]
    return {
        process.info["ppid"] for process in found if process.info["cmdline"][0].startswith(title)
    }


def wait_for(there: Callable[[], object], timeout_s: float = 150) -> None:
    until = time.monotonic() + timeout_s
    while not there():
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.2)


def test_a_mistake_is_told_before_anything_is_submitted(
    cluster: Path, workdir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def output(*arguments: str) -> str:
        with pytest.raises(SystemExit) as ended:
            sys.argv = ["mar", *arguments]
            main()
        assert ended.value.code == 2
        return capsys.readouterr().err

    there = ["--address", ADDRESS, "--store", "/store"]
    assert "mask.ration: no such setting" in output("submit", "tiny.yaml", "mask.ration=1", *there)
    assert "No such option" in output("submit", "tiny.yaml", "--worker", "2", *there)
    assert "--store mar_store: on a cluster it must be absolute" in output(
        "submit", "tiny.yaml", "--address", ADDRESS
    )
    assert "data.root=nearby: on a cluster" in output(
        "submit", "tiny.yaml", "data.root=nearby", *there
    )
    # a private Ray of the tests that follow in this process must not hear that there is a token to
    # use
    assert "no dashboard answers there" in mar(
        workdir, "jobs", "list", "--address", "http://127.0.0.1:9", code=2
    )
    assert "expected the dashboard's address" in mar(
        workdir, "jobs", "list", "--address", "127.0.0.1:8265", code=2
    )
    assert "no job 'mar-x'" in mar(workdir, "jobs", "follow", "mar-x", "--address", ADDRESS, code=2)


@pytest.fixture
def elsewhere(tmp_path: Path) -> Generator[str]:
    """The address of a network namespace of our own, on which Ray asks for no token."""
    if os.geteuid() != 0 or not shutil.which("ip"):
        pytest.skip("a network namespace takes root and iproute2")
    for line in (
        "netns add mar-open",
        "link add mar-here type veth peer name mar-there netns mar-open",
        "addr add 10.213.7.1/30 dev mar-here",
        "link set mar-here up",
        "-n mar-open addr add 10.213.7.2/30 dev mar-there",
        "-n mar-open link set mar-there up",
        "-n mar-open link set lo up",
    ):
        subprocess.run(["ip", *line.split()], check=True)
    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")
    arguments = [
        "--head",
        "--dashboard-host=10.213.7.2",
        "--dashboard-port=8265",
        "--node-ip-address=10.213.7.2",
    ]
    inside = ["ip", "netns", "exec", "mar-open"]
    open_to_all = {**os.environ, **RAY, "RAY_AUTH_MODE": "disabled"}
    more = [
        "--num-cpus=1",
        "--object-store-memory=80000000",
        "--disable-usage-stats",
        f"--temp-dir={folder}",
    ]
    subprocess.run(
        [*inside, BIN / "ray", "start", *arguments, *more],
        env=open_to_all,
        check=True,
        capture_output=True,
    )
    yield "http://10.213.7.2:8265"
    end_ray(folder)
    subprocess.run(["ip", "netns", "del", "mar-open"], check=True)
    shutil.rmtree(folder, ignore_errors=True)


def test_a_cluster_elsewhere_that_asks_for_no_token_is_refused_unless_told_otherwise(
    elsewhere: str, workdir: Path
) -> None:
    refused = mar(
        workdir,
        "submit",
        "quickstart",
        "data.root=/data",
        "--store",
        "/store",
        "--address",
        elsewhere,
        code=2,
    )
    assert "this cluster answers without a token" in refused and "CVE-2023-48022" in refused
    assert "no jobs of mar submit" in mar(
        workdir, "jobs", "list", "--address", elsewhere, "--allow-unauthenticated"
    )
