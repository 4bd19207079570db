"""Each fault happens for real.

Nothing is lost, nothing is trained twice, and the user is told what to do.
"""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from commands import BIN, begin, end, here, loaders_of, wait_for
from conftest import TINY_STUDY as STUDY
from conftest import tiny_tree

from mar.atomic_dir import write_atomic_dir, write_text
from mar.config.schema import TrainingConfig
from mar.errors import Failure, UserError
from mar.training import checkpoint
from mar.training.loop import fit
from mar.training.reports import TrainingCallbacks
from mar.training.step import RuntimeConfig
from orchestration.config import LaunchConfig, WorkerConfig
from orchestration.execution.lock import study_lock
from orchestration.execution.status import stop
from orchestration.studies.loader import read_study
from orchestration.tracking.run_record import RunRecord
from orchestration.tracking.store import Store
from orchestration.worker import retry_policy, trial_runner
from orchestration.worker.spec import build_trial_spec

_ROOM_MIB = 13 * 1024
"""Half the batch of the test below asks for 8 GiB, the whole for 16; all else takes less than 4."""


@pytest.fixture
def workdir(tmp_path: Path, videos: Path) -> Path:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tiny_tree(videos)))
    (tmp_path / "tiny.yaml").write_text(STUDY)
    return tmp_path


def mar(workdir: Path, *arguments: str, code: int = 0) -> str:
    return end(begin(workdir, *arguments), code)


def records(workdir: Path, store: str = "mar_store") -> list[RunRecord]:
    return Store(LaunchConfig(store=workdir / store)).trials()


def losses(workdir: Path, store: str) -> dict[str, list[tuple[int, float]]]:
    client = Store(LaunchConfig(store=workdir / store)).client
    found = {record.tags["mar.labels"]: record.run_id for record in records(workdir, store)}
    return {
        label: [
            (point.step, point.value) for point in client.get_metric_history(run_id, "train/loss")
        ]
        for label, run_id in found.items()
    }


@pytest.mark.cluster
@pytest.mark.parametrize("how", ["mar stop", "SIGTERM"])
def test_a_study_that_is_stopped_saves_first_and_goes_on_as_if_nothing_had_been(
    workdir: Path, how: str
) -> None:
    arguments = ["run", "tiny.yaml", "recipe.epochs=90", "--filter", "ρ=50 %", "--backend", "local"]
    running = begin(workdir, *arguments)
    wait_for(lambda: list(workdir.glob("mar_store/trials/*/step_*")))
    if how == "mar stop":
        wait_for(lambda: list(workdir.glob("mar_store/trials/*/heartbeat.json")))
        output = here(workdir, "status")
        assert re.search(rf"running: process {running.pid} on .*, about \d+\.\d min left", output)
        assert re.search(r"50 % \(seed 0\): step \d+/180, .* clips/s, about .* \(CPU on ", output)
        assert "tiny stops as soon as its trials have saved" in here(workdir, "stop", "tiny")
    else:
        running.send_signal(signal.SIGTERM)
    assert "stopped with 1 trials unfinished; run the same command to resume" in end(running, 1)
    assert {record.status for record in records(workdir)} == {"KILLED"}
    assert "not running" in here(workdir, "status")
    if how == "SIGTERM":
        return
    here(workdir, *arguments)
    here(workdir, *arguments, "--store", "undisturbed")
    assert losses(workdir, "mar_store") == losses(workdir, "undisturbed")


def test_nobody_to_stop_is_said(workdir: Path) -> None:
    assert "the study tiny is not being run" in here(workdir, "stop", "tiny", code=2)
    assert "no tracking store in" in here(workdir, "status", code=2)


def test_a_loss_that_is_not_finite_stops_its_trial_before_the_step(workdir: Path) -> None:
    (workdir / "tiny.yaml").write_text(
        STUDY.replace("{mask.ratio: 0.75}", "{recipe.base_lr: 1.0e+30, recipe.clip_grad: null}")
    )
    output = here(workdir, "run", "tiny.yaml", "--backend", "local", "--retry-non-finite", code=1)
    assert "✓ 50 % (seed 0)" in output, "the other trial is not touched"
    assert output.count("resuming from the last checkpoint") == 1, "as was asked for"
    assert (
        "the gradient is not finite at or before step" in output
        and "recipe.base_lr=1e+30" in output
    )
    assert "non_finite 1 trials: 75 % (seed 0). A smaller recipe.base_lr" in output
    (failed,) = [record for record in records(workdir) if record.status == "FAILED"]
    assert failed.tags["mar.failure_kind"] == "non_finite"


def test_a_step_with_a_gradient_that_is_not_finite_changes_no_weight(
    tiny: Callable[..., TrainingConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mar.training import epoch

    kept: list[tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]] = []
    step = epoch.train_step

    def spoiled_third(training: Any, batch: Any) -> torch.Tensor:
        if training.progress.step == 2:
            training.model.classifier.head.bias.register_hook(lambda gradient: gradient * torch.nan)
        before = {name: value.clone() for name, value in training.model.state_dict().items()}
        sums = step(training, batch)
        kept.append(
            (before, {name: value.clone() for name, value in training.model.state_dict().items()})
        )
        return sums

    monkeypatch.setattr(epoch, "train_step", spoiled_third)
    with pytest.raises(Failure, match="not finite at or before step 3") as caught:
        fit(tiny(), tmp_path, RuntimeConfig(torch.device("cpu")), TrainingCallbacks())
    assert caught.value.kind == "non_finite"
    (moved_from, moved_to), (before, after) = kept[1:]
    assert any(not torch.equal(moved_from[name], moved_to[name]) for name in moved_from)
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.cluster
def test_out_of_memory_goes_on_in_smaller_passes_with_the_same_batch(
    workdir: Path, videos: Path
) -> None:
    tree = tiny_tree(videos)
    tree["recipe"] |= {"batch_size": 16, "epochs": 1, "warmup_epochs": 0}
    tree["encoder"]["drop_path"] = tree["classifier"]["dropout"] = 0.0
    (workdir / "recipe.yaml").write_text(yaml.safe_dump(tree))
    script = """
import resource, sys, torch
from mar.model.mar import MAR
from orchestration.cli.app import main
forward = MAR.forward
def hungry(self, pixels, *rest):
    if self.training:  # a GiB a clip is asked for, and not used
        torch.empty(len(pixels) * 2**30, dtype=torch.uint8)
    return forward(self, pixels, *rest)
if {room}:
    MAR.forward = hungry
    resource.setrlimit(resource.RLIMIT_DATA, ({room} * 2**20, resource.RLIM_INFINITY))
sys.argv = ['mar', 'run', 'tiny.yaml', '--filter', 'ρ=50 %', '--backend', 'local']
sys.argv += ['--retries', '3', '--store', 's{room}']
main()
"""
    outputs = {}
    for room in (0, _ROOM_MIB):
        done = subprocess.run(
            [sys.executable, "-c", script.format(room=room)],
            cwd=workdir,
            capture_output=True,
            text=True,
            timeout=200,
        )
        outputs[room] = done.stdout + done.stderr
        assert done.returncode == 0, outputs[room]
    assert re.search(
        r"out of memory: .*resuming from the last checkpoint in micro-batches of \d clips",
        outputs[_ROOM_MIB],
    )
    (record,), (whole,) = records(workdir, f"s{_ROOM_MIB}"), records(workdir, "s0")
    assert (
        record.tags["mar.microbatch_clips"] in ("8", "4", "2")
        and "max_clips_per_pass" not in whole.tags
    )
    assert record.metrics["train/loss"] == pytest.approx(whole.metrics["train/loss"], rel=1e-5), (
        "the same batch"
    )


@pytest.mark.cluster
def test_a_worker_that_hangs_is_ended_and_its_stacks_are_kept(workdir: Path) -> None:
    arguments = ["run", "tiny.yaml", "recipe.epochs=60", "--filter", "ρ=50 %", "--backend", "local"]
    running = begin(workdir, *arguments, "--loader-processes", "1", "--hang-timeout-s", "8")
    wait_for(lambda: list(workdir.glob("mar_store/trials/*/step_*")))
    stuck = loaders_of(psutil.Process(running.pid))
    for loader in stuck:  # as one that waits for a disk that does not answer
        loader.suspend()
    running.wait(timeout=100)
    for loader in stuck:
        loader.kill()
    output = end(running, 1)
    assert "mar: no progress for 8 s" in output and "resumes from the last checkpoint" in output
    log = next(workdir.glob("mar_store/trials/*/logs/worker0.txt")).read_text()
    assert (
        "no progress for 8 s" in log and "Thread 0x" in log and "most recent call first" in log
    ), output
    assert "✓ 50 % (seed 0)" in mar(workdir, *arguments)


def test_a_loader_process_that_is_killed_costs_no_step(workdir: Path) -> None:
    arguments = ["run", "tiny.yaml", "recipe.epochs=60", "--filter", "ρ=50 %", "--backend", "local"]
    running = begin(workdir, *arguments, "--loader-processes", "1")
    wait_for(lambda: list(workdir.glob("mar_store/trials/*/step_*")))
    for loader in loaders_of(psutil.Process(running.pid)):  # of training and of testing
        loader.kill()
    assert "resuming from the last checkpoint" in end(
        running, 0
    )  # lost in the middle of a batch, or between two
    here(workdir, *arguments, "--store", "undisturbed")
    assert losses(workdir, "mar_store") == losses(workdir, "undisturbed")


def test_helpers_of_a_trainer_that_is_killed_end_and_whoever_reads_its_output_goes_on(
    workdir: Path,
) -> None:
    running = begin(
        workdir,
        "run",
        "tiny.yaml",
        "recipe.epochs=4000",
        "--backend",
        "local",
        "--loader-processes",
        "2",
    )
    wait_for(lambda: list(workdir.glob("mar_store/trials/*/step_*")))
    trainer = psutil.Process(running.pid)
    wait_for(
        lambda: len(trainer.children(recursive=True)) >= 4
    )  # loaders, what forks them, and what tracks their resources
    helpers = trainer.children(recursive=True)
    running.kill()
    running.communicate(timeout=10)  # reads until nobody has the pipe open
    gone, alive = psutil.wait_procs(helpers, timeout=10)
    assert gone and not alive


def test_loader_processes_of_one_purpose_end_before_those_of_the_next_begin(workdir: Path) -> None:
    """Training, validation, testing, and testing with shuffled frames have two each."""
    running = begin(
        workdir,
        "run",
        "tiny.yaml",
        "--filter",
        "ρ=50 %",
        "--backend",
        "local",
        "--loader-processes",
        "2",
    )
    most, trainer = 0, psutil.Process(running.pid)
    while running.poll() is None:
        with suppress(psutil.Error):
            servers = [
                each for each in trainer.children() if "forkserver" in " ".join(each.cmdline())
            ]
            most = max([most, *(len(server.children()) for server in servers)])
        time.sleep(0.02)
    end(running, 0)
    assert 2 <= most <= 4


@pytest.mark.skipif(os.geteuid() != 0, reason="a /dev/shm of its own is mounted for it")
def test_too_little_shared_memory_for_loader_processes_is_said_at_once_with_the_remedy(
    workdir: Path,
) -> None:
    line = shlex.join(
        [
            str(BIN / "mar"),
            "run",
            "tiny.yaml",
            "--filter",
            "ρ=50 %",
            "--backend",
            "local",
            "--loader-processes",
            "2",
        ]
    )
    line += " clip.size=64 encoder.tubelet=[2,16,16]"
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", f"mount -t tmpfs -o size=200k tmpfs /dev/shm && {line}"],
        cwd=workdir,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "/dev/shm, through which loader processes send clips, is too small" in done.stdout
    assert "--loader-processes 0" in done.stdout and "--shm-size" in done.stdout


@pytest.mark.cluster
@pytest.mark.parametrize("lost", ["ray::TrainController", "ray::TrialQueue"])
def test_what_ray_runs_beside_a_trials_workers_is_lost_and_the_trial_goes_on(
    workdir: Path, lost: str
) -> None:
    running = begin(
        workdir,
        "run",
        "tiny.yaml",
        "recipe.epochs=60",
        "--filter",
        "ρ=50 %",
        "--workers",
        "2",
        "--retries",
        "1",
    )
    wait_for(lambda: list(workdir.glob("mar_store/trials/*/step_*")))
    (process,) = [
        each
        for each in psutil.process_iter()
        if each.cmdline() and each.cmdline()[0].startswith(lost)
    ]
    process.kill()
    assert "✓ 50 % (seed 0)" in end(running, 0), "the workers' place was free again"


@pytest.mark.skipif(os.geteuid() != 0, reason="a disk of its own is mounted for it")
def test_a_disk_that_is_full_stops_the_trial_with_its_checkpoint_and_room_lets_it_go_on(
    workdir: Path,
) -> None:
    disk = workdir / "mar_store" / "trials"
    disk.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=500k", "disk", disk], check=True)
    arguments = [
        "run",
        "tiny.yaml",
        "recipe.epochs=8",
        "--filter",
        "ρ=50 %",
        "--backend",
        "local",
        "--keep",
        "last=99",
        "--patience-s",
        "2",
    ]
    try:
        output = here(workdir, *arguments, code=1)
        assert (
            "the disk is full" in output and "disk     1 trials: 50 % (seed 0). Make room" in output
        )
        assert list(disk.glob("*/step_*")) and not list(disk.glob("*/.step_*")), (
            "what was whole is there, nothing else"
        )
        subprocess.run(["mount", "-o", "remount,size=50m", disk], check=True)
        assert "✓ 50 % (seed 0)" in here(workdir, *arguments)
        here(workdir, *arguments, "--store", "undisturbed")
        assert losses(workdir, "mar_store") == losses(workdir, "undisturbed")
    finally:
        subprocess.run(
            ["umount", "--lazy", disk], check=True
        )  # a process that ends may hold it a moment


def test_a_kill_between_a_checkpoints_data_and_its_manifest_leaves_the_one_before(
    tiny: Callable[..., TrainingConfig], tmp_path: Path
) -> None:
    fit(tiny(), tmp_path, RuntimeConfig(torch.device("cpu")), TrainingCallbacks())
    there = sorted(path.name for path in tmp_path.glob("step_*"))
    child = os.fork()
    if not child:

        def killed(file: Path) -> None:
            write_text(file, "half")
            os.kill(os.getpid(), signal.SIGKILL)

        write_atomic_dir(tmp_path / "step_00000099", {"model.safetensors": killed}, {})
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert (tmp_path / ".step_00000099.unfinished").is_dir(), "it was in the middle of it"
    found = checkpoint.latest(tmp_path, tiny(), pytest.fail)
    assert found and found.path.name == there[-1]


def test_a_webhook_hears_how_a_study_ended(workdir: Path) -> None:
    heard: list[dict[str, Any]] = []

    class Hook(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            heard.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Hook)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    here(
        workdir,
        "run",
        "tiny.yaml",
        "--filter",
        "ρ=50 %",
        "--backend",
        "local",
        "--webhook",
        f"http://127.0.0.1:{server.server_port}",
    )
    server.shutdown()
    assert [(each["study"], each["state"]) for each in heard] == [("tiny", "finished")]
    output = mar(
        workdir,
        "run",
        "tiny.yaml",
        "--filter",
        "ρ=50 %",
        "--backend",
        "local",
        "--webhook",
        "http://127.0.0.1:9/SECRET",
    )
    assert "--webhook: the message was not delivered" in output and "SECRET" not in output


@pytest.mark.parametrize("is_full", [False, True])
def test_retries_are_counted_once_whoever_tries_again(
    workdir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_full: bool
) -> None:
    """Ray starts a lost process again, which must not begin to count anew.

    And a count that cannot be kept ends too.
    """
    begun: list[int] = []

    def lost(*_: object) -> None:
        begun.append(1)
        raise Failure("a loader process was lost", "worker_lost")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(trial_runner, "fit", lost)
    if is_full:
        monkeypatch.setattr(retry_policy, "atomic_write", full)
    trial = read_study(str(workdir / "tiny.yaml")).trials[0]
    launch = LaunchConfig(store=tmp_path / "store", backend="local", worker=WorkerConfig(retries=2))
    spec = build_trial_spec(trial, launch, 0).to_json()
    assert trial_runner.train(spec, lambda *_: None)
    assert len(begun) == 3, "the first and two retries"
    assert trial_runner.train(spec, lambda *_: None)
    assert len(begun) == (6 if is_full else 4), (
        "what Ray starts again is not tried three times more"
    )


def test_two_first_launches_on_a_new_store_at_once_both_end_well(workdir: Path) -> None:
    """Each made the database's tables, and one of the two ended on "duplicate column name"."""
    (workdir / "other.yaml").write_text(STUDY.replace("50 %: {}", "60 %: {mask.ratio: 0.625}"))
    arguments = ["recipe.epochs=1", "recipe.warmup_epochs=0", "--backend", "local"]
    both = [begin(workdir, "run", name, *arguments) for name in ("tiny.yaml", "other.yaml")]
    looking = [begin(workdir, "status") for _ in range(2)]
    outputs = [end(running, 0) for running in both]
    for each in looking:
        output = each.communicate(timeout=200)[0]
        assert each.returncode in (0, 2) and "Traceback" not in output, output
    assert all("Top-1 (%)" in output for output in outputs)
    assert len({record.key for record in records(workdir)}) == 3, "75 % is trained once"


_KILLED_BEFORE_PRUNING = """
import os, signal, sys
from orchestration.execution import recorder
from orchestration.cli.app import main
recorder.prune = lambda folder, policy: os.kill(os.getpid(), signal.SIGKILL)
sys.argv = ["mar", "run", "tiny.yaml", "--filter", "ρ=50 %", "--backend", "local"]
main()
"""


def test_checkpoints_of_a_trial_whose_launch_was_killed_before_it_cleared_them_go_at_the_next(
    workdir: Path,
) -> None:
    killed = subprocess.run(
        [sys.executable, "-c", _KILLED_BEFORE_PRUNING], cwd=workdir, capture_output=True, text=True
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert list(workdir.glob("mar_store/trials/*/step_*"))
    assert "1 finished before, 0 to train" in here(
        workdir, "run", "tiny.yaml", "--filter", "ρ=50 %", "--backend", "local"
    )
    assert not list(workdir.glob("mar_store/trials/*/step_*"))


def test_a_row_that_is_only_tested_logs_what_it_measured_once(workdir: Path) -> None:
    study = STUDY.replace("75 %: {mask.ratio: 0.75}", "twice: {evaluation.clips: 2}")
    (workdir / "tiny.yaml").write_text(study)
    here(
        workdir,
        "run",
        "tiny.yaml",
        "recipe.epochs=1",
        "recipe.warmup_epochs=0",
        "--backend",
        "local",
    )
    client = Store(LaunchConfig(store=workdir / "mar_store")).client
    found = records(workdir)
    assert sorted(record.has_model for record in found) == [False, True]
    for record in found:
        assert [point.step for point in client.get_metric_history(record.run_id, "test/top1")] == [
            1
        ]


def test_who_looks_whether_a_study_runs_keeps_none_from_starting(workdir: Path) -> None:
    """Of 3,169 starts 573 were refused while ``mar status`` looked without a pause."""
    study = read_study(str(workdir / "tiny.yaml"), [])
    launch = LaunchConfig(store=workdir / "mar_store", study=study.name)
    over, looks = threading.Event(), list[int]()

    def look() -> None:
        while not over.is_set():
            with suppress(UserError):
                stop(launch)
            looks.append(1)

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        for _ in range(200):
            with study_lock(study, launch):
                pass
    finally:
        over.set()
        watcher.join()
    assert len(looks) > 200
