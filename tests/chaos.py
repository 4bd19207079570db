"""Studies under random faults: their results must equal those of an undisturbed study.

``make chaos`` runs it for an hour; ``tests/test_chaos.py`` for a short while. A round is one study
in one setting: it is launched, disturbed, launched again, until it is done, and then compared with
the undisturbed one: every trial finished once, every point of every metric once and with the same
value, the same weights bit for bit, and nothing left behind (processes, shared memory, checkpoints,
unfinished files, locks). Which faults come, and when, follows from the seed; what they meet follows
from the machine's speed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import yaml
from conftest import TINY_VERBS, tiny_tree

from mar.data.motion_verbs import make
from orchestration.config import LaunchConfig
from orchestration.tracking.store import Store

BIN = Path(sys.executable).parent
_MARK = "MAR_CHAOS"
"""Environment variable of all processes of a launch: a value of its own."""
_STUDY = """\
title: Small trials
recipe: recipe.yaml
fixed: {recipe.epochs: 32}
axes:
  ρ: {50 %: {}, 75 %: {mask.ratio: 0.75}}
  λ: {0: {reconstruction.weight: 0.0}, 0.1: {}}
table: {columns: [top1]}
"""
_LAUNCH_S = 200
"""A launch that takes longer is taken to hang: undisturbed, the slowest setting takes a fifth of
it."""
_LEFT_S = 10.0
"""After so long nothing of a launch may be left."""
_LOOK_S = 0.1
_MOST_LAUNCHES = 40
_SHARE_THAT_ENDS = 0.3
"""Of the faults: those that end a launch; the next one takes ten seconds and more to start."""
_SHARE_AT_THE_START = 0.05
"""Of the faults: kills of a launch that may not train yet."""
_LONGEST_PAUSE_S = 2.0
"""Between two faults of a launch, once it trains."""
_DISK_MIB = 24
_MEASURED = ("time/", "throughput/")
"""Metrics that begin so are of the machine, not of the training."""
_FILES_WITH_TIMES = {"manifest.json", "metrics.json", "history.csv"}


class Launch:
    """One ``mar run`` and all processes that it starts."""

    def __init__(
        self, workdir: Path, arguments: Sequence[str], environment: dict[str, str]
    ) -> None:
        self.mark = f"{os.getpid()}-{time.monotonic_ns()}"
        self.workdir, self.began = workdir, time.time()
        self.known: set[psutil.Process] = set()
        self.file = workdir / "output.txt"
        with self.file.open("w") as output:
            self.process = subprocess.Popen(
                [BIN / "mar", "run", "study.yaml", *arguments],
                cwd=workdir,
                env={**os.environ, **environment, _MARK: self.mark},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def output(self) -> str:
        return self.file.read_text(errors="replace")

    def has_ended(self) -> bool:
        return self.process.poll() is not None

    def look(self) -> None:
        """Find the launch's processes: by their parents, and by the mark in their environment."""
        there = [*psutil.process_iter()]
        for process in there:
            with suppress(psutil.Error):
                if process.environ().get(_MARK) == self.mark:
                    self.known.add(process)
        parents = {process.pid for process in self.known}
        while True:
            more: set[psutil.Process] = set()
            for process in there:
                with suppress(psutil.Error):
                    if process not in self.known and process.ppid() in parents:
                        more.add(process)
            if not more:
                return
            self.known |= more
            parents |= {process.pid for process in more}

    def alive(self) -> list[psutil.Process]:
        found: list[psutil.Process] = []
        for process in self.known:
            with suppress(psutil.Error):
                if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def find(self, *titles: str) -> list[psutil.Process]:
        """Return its processes whose command line has one of these words."""
        self.look()
        found: list[psutil.Process] = []
        for process in self.alive():
            with suppress(psutil.Error):
                line = " ".join(process.cmdline())
                if any(title in line for title in titles):
                    found.append(process)
        return sorted(found, key=lambda process: process.pid)

    def sleep(self, seconds: float) -> None:
        """Wait, or until it has ended."""
        until = time.monotonic() + seconds
        while time.monotonic() < until and not self.has_ended():
            self.look()
            time.sleep(_LOOK_S)

    def wait_until_it_trains(self) -> bool:
        """Wait for the first sign of a training; false: it ended before."""
        until = time.monotonic() + _LAUNCH_S
        while not self.has_ended() and time.monotonic() < until:
            for pulse in self.workdir.glob("mar_store/trials/*/heartbeat.json"):
                with suppress(OSError):
                    if pulse.stat().st_mtime > self.began:
                        return True
            self.look()
            time.sleep(_LOOK_S)
        return False

    def end(self) -> int | None:
        """Wait for its end; returns the exit code, none: it hangs, and was ended."""
        until = time.monotonic() + _LAUNCH_S
        while not self.has_ended():
            if time.monotonic() > until:
                for process in [psutil.Process(self.process.pid), *self.alive()]:
                    with suppress(psutil.Error):
                        process.kill()
                self.process.wait()
                return None
            self.look()
            time.sleep(_LOOK_S)
        return self.process.returncode

    def left(self) -> list[str]:
        """Return what is left of it after ten seconds, and end that."""
        until = time.monotonic() + _LEFT_S
        while self.alive() and time.monotonic() < until:
            self.look()
            time.sleep(_LOOK_S)
        left_over: list[str] = []
        for process in self.alive():
            with suppress(psutil.Error):
                left_over.append(f"{process.pid} {' '.join(process.cmdline())[:100]}")
                process.kill()
        return left_over


class Servers:
    """An MLflow server, and an object store that speaks S3, in processes of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tracking_port, self.objects_port = _free_port(), _free_port()
        self.tracking: subprocess.Popen[bytes] | None = None
        self.objects = self._start(
            [BIN / "moto_server", "-p", str(self.objects_port)], "objects.txt"
        )
        self.start_tracking()
        _wait_for_port(self.objects_port)
        _wait_for_port(self.tracking_port)
        import boto3

        there = {
            "aws_access_key_id": "key",
            "aws_secret_access_key": "secret",
            "region_name": "us-east-1",
        }
        boto3.client(
            "s3", endpoint_url=f"http://127.0.0.1:{self.objects_port}", **there
        ).create_bucket(Bucket="bucket")

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.tracking_port}"

    def environment(self) -> dict[str, str]:
        return {
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.objects_port}",
        }

    def start_tracking(self) -> None:
        arguments = [
            BIN / "mlflow",
            "server",
            "--host",
            "127.0.0.1",
            "--port",
            str(self.tracking_port),
            "--workers",
            "1",
        ]
        arguments += ["--backend-store-uri", f"sqlite:///{self.folder / 'server.db'}"]
        arguments += ["--artifacts-destination", str(self.folder / "artifacts")]
        self.tracking = self._start(arguments, "tracking.txt")

    def kill_tracking(self) -> None:
        if self.tracking:
            os.killpg(self.tracking.pid, signal.SIGKILL)
            self.tracking.wait()

    def close(self) -> None:
        self.kill_tracking()
        os.killpg(self.objects.pid, signal.SIGKILL)
        self.objects.wait()

    def _start(self, arguments: list[str | Path], log: str) -> subprocess.Popen[bytes]:
        with (self.folder / log).open("a") as file:
            return subprocess.Popen(arguments, stdout=file, stderr=file, start_new_session=True)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_for_port(port: int, timeout_s: float = 120) -> None:
    until = time.monotonic() + timeout_s
    while time.monotonic() < until:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(_LOOK_S)
    raise TimeoutError(f"nothing answers on port {port}")


@dataclass
class Round:
    """One study in one setting."""

    setting: Setting
    workdir: Path
    random: random.Random
    most_faults: int
    until: float
    """Of the monotonic clock: then no more faults come, and the study is done in peace."""
    servers: Servers | None = None
    launches: int = 0
    pids: set[str] = field(default_factory=set)
    """Of all processes of its launches."""
    problems: list[str] = field(default_factory=list)

    @property
    def arguments(self) -> list[str]:
        served = (
            ["--tracking-uri", self.servers.address, "--object-store", "s3://bucket/mar"]
            if self.servers
            else []
        )
        return [
            *self.setting.arguments,
            *served,
            "--hang-timeout-s",
            "60",
            "--patience-s",
            "60",
            "--retries",
            "2",
        ]

    @property
    def store(self) -> Path:
        return self.workdir / "mar_store"

    @property
    def output(self) -> str:
        return (self.workdir / "output.txt").read_text(errors="replace")

    def problem(self, message: str) -> None:
        self.problems.append(f"{self.setting.name}: {message}")


@dataclass(frozen=True)
class Fault:
    """What is done to a study. ``act`` returns whether there was something to do it to."""

    name: str
    act: Callable[[Round, Launch], bool]
    ends: bool = False
    """Whether the launch ends with it."""


def _signalled(name: str, number: signal.Signals, ends: bool = True) -> Fault:
    def act(_: Round, launch: Launch) -> bool:
        launch.process.send_signal(number)
        return True

    return Fault(name, act, ends)


def _killed(name: str, *titles: str, ends: bool = False) -> Fault:
    def act(at: Round, launch: Launch) -> bool:
        found = launch.find(*titles)
        if not found:
            return False
        with suppress(psutil.Error):
            at.random.choice(found).kill()
        return True

    return Fault(name, act, ends)


def _paused(name: str, *titles: str) -> Fault:
    """Stop a process for some seconds, as a machine that swaps or is suspended does."""

    def act(at: Round, launch: Launch) -> bool:
        found = launch.find(*titles)
        if not found:
            return False
        process = at.random.choice(found)
        with suppress(psutil.Error):
            process.suspend()
            launch.sleep(at.random.uniform(1, 4))
            process.resume()
        return True

    return Fault(name, act)


def _stop(at: Round, launch: Launch) -> bool:
    served = ["--object-store", "s3://bucket/mar"] if at.servers else []
    environment = {**os.environ, **(at.servers.environment() if at.servers else {})}
    arguments = [BIN / "mar", "stop", "study", "--store", str(at.store), *served]
    done = subprocess.run(
        arguments, cwd=at.workdir, env=environment, capture_output=True, text=True
    )
    return done.returncode == 0


def _second_run(at: Round, launch: Launch) -> bool:
    environment = {**os.environ, **(at.servers.environment() if at.servers else {})}
    arguments = [BIN / "mar", "run", "study.yaml", *at.arguments]
    done = subprocess.run(
        arguments,
        cwd=at.workdir,
        env=environment,
        capture_output=True,
        text=True,
        timeout=_LAUNCH_S,
    )
    if launch.has_ended():  # it may have had its turn
        return False
    if done.returncode != 2 or "is being run already" not in done.stderr:
        at.problem(
            f"a second run was not refused: exit code {done.returncode}, {done.stderr[-300:]}"
        )
    return True


def _full_disk(at: Round, launch: Launch) -> bool:
    """Fill the disk that the store is on for some seconds."""
    filler = at.store / "filler"
    try:
        with filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(2**16))
    except OSError:
        pass
    launch.sleep(at.random.uniform(1, 6))
    filler.unlink()
    return True


def _tracking_killed(at: Round, launch: Launch) -> bool:
    assert at.servers
    at.servers.kill_tracking()
    launch.sleep(at.random.uniform(0, 5))
    at.servers.start_tracking()
    return True


def _objects_paused(at: Round, launch: Launch) -> bool:
    assert at.servers
    process = psutil.Process(at.servers.objects.pid)
    process.suspend()
    launch.sleep(at.random.uniform(1, 5))
    process.resume()
    return True


def _damaged(at: Round) -> bool:
    """Cut a checkpoint's file short, or flip a bit of it."""
    files = sorted(file for file in at.store.glob("trials/*/step_*/*") if file.stat().st_size)
    if not files:
        return False
    file = at.random.choice(files)
    content = bytearray(file.read_bytes())
    if at.random.random() < 0.5:
        content = content[: len(content) // 2]
    else:
        content[at.random.randrange(len(content))] ^= 1
    file.write_bytes(content)
    return True


def _lost_database(at: Round) -> bool:
    database = at.store / "mlflow.db"
    if not database.is_file():
        return False
    for file in at.store.glob("mlflow.db*"):
        file.unlink()
    return True


def _lost_notes(at: Round) -> bool:
    """Remove what a launch leaves for the next one besides checkpoints and results."""
    files = [
        *at.store.glob("trials/*/heartbeat.json"),
        *at.store.glob("trials/*/attempts.json"),
        *at.store.glob("locks/*"),
    ]
    for file in files:
        file.unlink()
    return bool(files)


_DRIVER = (
    _signalled("the launch is killed", signal.SIGKILL),
    _signalled("SIGTERM", signal.SIGTERM),
    _signalled("Ctrl-C", signal.SIGINT),
    Fault("mar stop", _stop, ends=True),
    Fault("a second mar run", _second_run),
    _paused("the launch is paused", "mar run study.yaml"),
)
_RAY_SERVERS = (
    _killed("Ray's raylet is killed", "raylet/raylet", ends=True),
    _killed("Ray's gcs is killed", "gcs_server", ends=True),
    _paused("Ray's raylet is paused", "raylet/raylet"),
    _paused("Ray's gcs is paused", "gcs_server"),
)
_LOADERS = (
    _killed("a loader process is killed", "forkserver"),
    _paused("a loader process is paused", "forkserver"),
)
_INLINE = (
    _killed("Tune's trial is killed", "ray::run_inline", "ray::ImplicitFunc"),
    _paused("Tune's trial is paused", "ray::run_inline", "ray::ImplicitFunc"),
)
_TRAIN = (
    _killed("a worker is killed", "ray::RayTrainWorker", "ray::TrainWorker"),
    _paused("a worker is paused", "ray::RayTrainWorker", "ray::TrainWorker"),
    _killed("Tune's trial is killed", "ray::PooledTrainable"),
    _killed("Ray Train's controller is killed", "ray::TrainController"),
    _killed("the trial queue is killed", "ray::TrialQueue"),
)
_DISK = (Fault("the disk is full for seconds", _full_disk),)
_SERVED = (
    Fault("MLflow's server is killed, and back", _tracking_killed),
    Fault("the object store hangs", _objects_paused),
)
_BETWEEN: dict[str, Callable[[Round], bool]] = {
    "a checkpoint is damaged": _damaged,
    "mlflow.db is deleted": _lost_database,
    "notes and locks are deleted": _lost_notes,
}


@dataclass(frozen=True)
class Setting:
    """How a study is launched, and what may happen to it."""

    name: str
    arguments: tuple[str, ...]
    faults: tuple[Fault, ...]
    workers: int = 1
    own_disk: bool = False
    served: bool = False


_INLINE_BACKEND = ("--backend", "inline")
SETTINGS = (
    Setting(
        "local",
        (
            "--backend",
            "local",
        ),
        _DRIVER,
    ),
    Setting("inline", _INLINE_BACKEND, (*_DRIVER, *_RAY_SERVERS, *_INLINE)),
    Setting("train", (), (*_DRIVER, *_RAY_SERVERS, *_TRAIN)),
    Setting(
        "local, loader processes",
        ("--backend", "local", "--loader-processes", "1"),
        (*_DRIVER, *_LOADERS),
    ),
    Setting(
        "train, two workers", ("--workers", "2"), (*_DRIVER, *_RAY_SERVERS, *_TRAIN), workers=2
    ),
    Setting(
        "local, own disk",
        (
            "--backend",
            "local",
        ),
        (*_DRIVER, *_DISK, *_DISK, *_DISK),
        own_disk=True,
    ),
    Setting(
        "inline, servers", _INLINE_BACKEND, (*_DRIVER, *_INLINE, *_SERVED, *_SERVED), served=True
    ),
    Setting("train, own disk", (), (*_DRIVER, *_TRAIN, *_DISK, *_DISK, *_DISK), own_disk=True),
)


@dataclass(frozen=True)
class Outcome:
    """What a study came to, without times."""

    points: dict[str, dict[str, list[tuple[int, float]]]]
    """Trial -> metric -> its points."""
    files: dict[str, dict[str, str]]
    """Trial -> file of its result -> SHA-256."""


@dataclass
class Tally:
    """What was done and found."""

    faults: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Setting and fault -> how often."""
    rounds: Counter[str] = field(default_factory=Counter)
    launches: Counter[str] = field(default_factory=Counter)
    seconds: Counter[str] = field(default_factory=Counter)
    points: int = 0
    problems: list[str] = field(default_factory=list)

    def table(self) -> str:
        """Return it as a Markdown table: a row a fault, a column a setting."""
        settings = [each.name for each in SETTINGS if self.rounds[each.name]]
        names = dict.fromkeys([fault for _, fault in self.faults])
        lines = [
            "| fault | " + " | ".join(settings) + " | all |",
            "|:--|" + "--:|" * (len(settings) + 1),
        ]
        for name in names:
            counts = [self.faults[setting, name] for setting in settings]
            cells = " | ".join(str(count) if count else "" for count in counts)
            lines.append(f"| {name} | {cells} | {sum(counts)} |")
        for what, counter in (
            ("**rounds**", self.rounds),
            ("launches", self.launches),
            ("minutes", self.seconds),
        ):
            counts = [counter[setting] for setting in settings]
            if what == "minutes":
                counts = [round(count / 60, 1) for count in counts]
            lines.append(f"| {what} | {' | '.join(map(str, counts))} | {round(sum(counts), 1)} |")
        total = sum(self.faults.values())
        summary = (
            f"{total} faults, {sum(self.launches.values())} launches, {sum(self.rounds.values())} "
            "studies"
        )
        lines += [
            "",
            f"{summary}; {self.points} points compared; {len(self.problems)} problems.",
            *self.problems,
        ]
        return "\n".join(lines)


def run(
    folder: Path,
    seed: int,
    seconds: float,
    settings: Sequence[Setting] = SETTINGS,
    say: Callable[[str], None] = print,
    most_rounds: int = 10**6,
    faults_a_round: int = 20,
) -> Tally:
    """Run rounds, one setting after another, until the time is up.

    What went wrong is among the tally's problems.
    """
    make(folder / "data", TINY_VERBS)
    tally, until = Tally(), time.monotonic() + seconds
    undisturbed = {
        workers: _undisturbed(folder, workers)
        for workers in sorted({setting.workers for setting in settings})
    }
    number = 0
    while time.monotonic() < until and number < most_rounds:
        setting = settings[number % len(settings)]
        if setting.own_disk and os.geteuid() != 0:  # only root may mount one
            number += 1
            continue
        began = time.monotonic()
        workdir = _make_place(folder, f"round{number}")
        at = Round(setting, workdir, random.Random(f"{seed} {number}"), faults_a_round, until)
        problems = _round(at, undisturbed[setting.workers], tally)
        tally.rounds[setting.name] += 1
        tally.seconds[setting.name] += round(time.monotonic() - began)
        tally.problems += [f"round {number}: {problem}" for problem in problems]
        say(
            f"round {number}, {setting.name}: {time.monotonic() - began:.0f} s, "
            f"{sum(tally.faults.values())} faults so far"
            + "".join(f"\n  {problem}" for problem in problems)
        )
        number += 1
    return tally


def _undisturbed(folder: Path, workers: int) -> Outcome:
    workdir = _make_place(folder, f"undisturbed{workers}")
    launch = Launch(
        workdir, ["--backend", "local"] if workers == 1 else ["--workers", str(workers)], {}
    )
    code = launch.end()
    if code != 0 or launch.left():
        raise RuntimeError(f"the undisturbed study ended with {code}: {launch.output}")
    return _outcome(workdir, None)[0]


def _make_place(folder: Path, name: str) -> Path:
    workdir = folder / name
    workdir.mkdir()
    (workdir / "recipe.yaml").write_text(yaml.safe_dump(tiny_tree(folder / "data")))
    (workdir / "study.yaml").write_text(_STUDY)
    return workdir


@contextmanager
def _disk(workdir: Path) -> Generator[None]:
    store = workdir / "mar_store"
    store.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={_DISK_MIB}m", "chaos", store], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", store], check=True)


def _round(at: Round, undisturbed: Outcome, tally: Tally) -> list[str]:
    workdir, setting = at.workdir, at.setting
    if setting.served:
        at.servers = Servers(workdir)
    try:
        if setting.own_disk:
            with _disk(workdir):
                _disturb(at, tally)
                _compare(at, undisturbed, tally)
        else:
            _disturb(at, tally)
            _compare(at, undisturbed, tally)
    finally:
        if at.servers:
            at.servers.close()
    if not at.problems:
        shutil.rmtree(workdir)
    return at.problems


def _disturb(at: Round, tally: Tally) -> None:
    """Launch and disturb the study until it is done."""
    faults, until = at.most_faults, at.until
    for _ in range(_MOST_LAUNCHES):
        launch = Launch(at.workdir, at.arguments, at.servers.environment() if at.servers else {})
        tally.launches[at.setting.name] += 1
        done: list[str] = []
        while faults and time.monotonic() < until:
            if at.random.random() < _SHARE_AT_THE_START:
                launch.sleep(at.random.uniform(0, 8))
                fault = _DRIVER[0]
            else:
                ends = at.random.random() < _SHARE_THAT_ENDS
                fault = at.random.choice([each for each in at.setting.faults if each.ends == ends])
                if not launch.wait_until_it_trains():
                    break
                launch.sleep(at.random.uniform(0, _LONGEST_PAUSE_S))
            if launch.has_ended():
                break
            is_done = fault.act(at, launch)
            if is_done:
                tally.faults[at.setting.name, fault.name] += 1
                done.append(fault.name)
                faults -= 1
            if is_done and fault.ends:
                break
        code = launch.end()
        _judge(at, launch, code, done)
        if code == 0:
            return
        if faults and time.monotonic() < until and at.random.random() < 0.3:
            name = at.random.choice([*_BETWEEN])
            if not (at.servers and name == "mlflow.db is deleted") and _BETWEEN[name](at):
                tally.faults[at.setting.name, name] += 1
                faults -= 1
    at.problem(
        f"it is not done after {_MOST_LAUNCHES} launches; the last one said: {at.output[-1500:]}"
    )


def _judge(at: Round, launch: Launch, code: int | None, done: list[str]) -> None:
    """Check how a launch ended: with a message, an expected exit code, and nothing left over."""
    output, after = launch.output, f"after {', '.join(done) or 'no fault'}"
    if code is None:
        at.problem(f"it hangs {after}: {output[-1500:]}")
    if code not in (None, 0, 1, -signal.SIGKILL):
        at.problem(f"exit code {code} {after}: {output[-1500:]}")
    if code == 1 and "mar: " not in output:
        at.problem(f"it failed without a word {after}: {output[-1500:]}")
    if code == -signal.SIGKILL and "the launch is killed" not in done:
        at.problem(f"the launch was killed by another hand {after}: {output[-500:]}")
    if "Traceback (most recent call last)" in output:
        at.problem(f"a traceback {after}: {output[-3000:]}")
    if "\ncode " in output:
        at.problem(f"a fault is called one of the code {after}: {output[-2000:]}")
    left = launch.left()
    at.pids |= {str(process.pid) for process in launch.known}
    if left:
        at.problem(f"left {after}, ended with {code}: {left}")


def _compare(at: Round, undisturbed: Outcome, tally: Tally) -> None:
    outcome, problems = _outcome(at.workdir, at.servers)
    for problem in problems:
        at.problem(problem)
    if outcome.points.keys() != undisturbed.points.keys():
        at.problem(f"trials finished: {sorted(outcome.points)}")
    for trial, metrics in outcome.points.items():
        expected = undisturbed.points.get(trial, {})
        for metric in sorted(metrics.keys() | expected.keys()):
            tally.points += len(metrics.get(metric, []))
            points, wanted = metrics.get(metric, []), expected.get(metric, [])
            if points != wanted:
                differing = [each for each in points if each not in wanted][:3]
                missing = [each for each in wanted if each not in points][:3]
                problem = f"{len(points)} points of {len(wanted)}, {differing} for {missing}"
                at.problem(f"{trial}: {metric}: {problem}")
        files, alike = outcome.files[trial], undisturbed.files.get(trial, {})
        others = sorted(
            name for name in files.keys() | alike.keys() if files.get(name) != alike.get(name)
        )
        if others:
            at.problem(f"{trial}: its result's {', '.join(others)} are others")
    kept = [
        *at.store.glob("trials/*/step_*"),
        *at.store.rglob("*.unfinished"),
        *at.store.rglob("*.downloading"),
    ]
    kept += [*at.store.glob("trials/*/pruning.json"), *at.store.glob("locks/*.stop")]
    shared = [
        file.name
        for file in Path("/dev/shm").iterdir()
        if at.pids & {*re.split(r"[-_.]", file.name)}
    ]
    if kept or shared:
        at.problem(f"left: {[str(path.relative_to(at.store)) for path in kept]} {shared}")
    with (
        sqlite3.connect(at.store / "mlflow.db")
        if not at.servers
        else sqlite3.connect(":memory:") as database
    ):
        (sound,) = database.execute("pragma integrity_check").fetchone()
        if sound != "ok":
            at.problem(f"mlflow.db: {sound}")


def _outcome(workdir: Path, servers: Servers | None) -> tuple[Outcome, list[str]]:
    """Return what a study came to, and what is wrong with its records."""
    store = Store(
        LaunchConfig(store=workdir / "mar_store", tracking_uri=servers.address if servers else None)
    )
    points: dict[str, dict[str, list[tuple[int, float]]]] = {}
    files: dict[str, dict[str, str]] = {}
    problems: list[str] = []
    for record in store.trials():
        trial = record.tags["mar.labels"]
        if record.status != "FINISHED":
            problems.append(f"{trial}: a run of it is {record.status}")
            continue
        if trial in points:
            problems.append(f"{trial}: finished twice")
        names = sorted(name for name in record.metrics if not name.startswith(_MEASURED))
        history = {name: store.client.get_metric_history(record.run_id, name) for name in names}
        points[trial] = {
            name: [(point.step, point.value) for point in each] for name, each in history.items()
        }
        result = workdir / "mar_store" / "trials" / record.key / "result"
        files[trial] = {
            file.name: hashlib.sha256(file.read_bytes()).hexdigest()
            for file in sorted(result.iterdir())
            if file.name not in _FILES_WITH_TIMES
        }
        measured: dict[str, float] = json.loads((result / "metrics.json").read_text())
        files[trial]["metrics"] = str(
            {name: measured[name] for name in sorted(measured) if not name.startswith(_MEASURED)}
        )
    return Outcome(points, files), problems


def main() -> None:
    """Run rounds for some minutes; exit code 1 if anything is not as it is promised."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--filter", nargs="*", help="settings, by name; all without it")
    parser.add_argument("-o", type=Path, help="file for the table")
    given = parser.parse_args()
    settings = [setting for setting in SETTINGS if not given.only or setting.name in given.only]
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    tally = run(
        folder, given.seed, given.minutes * 60, settings, lambda line: print(line, flush=True)
    )
    table = tally.table()
    print(f"\n{table}")
    if given.o:
        given.o.write_text(f"{table}\n")
    if tally.problems:
        print(f"the rounds with problems are kept below {folder}")
    else:
        shutil.rmtree(folder)
    sys.exit(bool(tally.problems))


if __name__ == "__main__":
    main()
