"""How far one head node goes: a study of many trials on many devices, without the training.

    python benchmarks/simulated_study.py --trials 10000 --devices 1000

Real are the study, its plan, Tune's controller with our callbacks, the launch, the writer and
MLflow; Tune's actors are stubs, whose epochs end as soon as the controller asks. So the figures are
what the driver can do at most: divide by what a real study asks for. It writes
``benchmarks/simulated_study_DATE.md``.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import resource
import tempfile
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import ray
import yaml
from ray.air.execution._internal.tracked_actor import TrackedActor
from ray.tune.execution import tune_controller

from mar import RESULT_DIR
from mar.atomic_dir import write_atomic_dir, write_text
from mar.data.motion_verbs import MotionVerbs, make
from orchestration.backends.ray_env import ray_environment
from orchestration.config import LaunchConfig
from orchestration.execution import study_runner
from orchestration.execution.study_runner import run_study
from orchestration.studies.loader import read_study
from orchestration.tracking import store, writer

HERE = Path(__file__).parent
RECIPE = {
    "data": {
        "format": "ssv2",
        "videos": "videos",
        "train": "train.json",
        "val": "validation.json",
        "num_classes": 2,
    },
    "clip": {"frames": 8, "size": 16},
    "encoder": {"size": "custom", "width": 16, "depth": 1, "heads": 2, "tubelet": [2, 4, 4]},
    "recipe": {"batch_size": 8, "warmup_epochs": 1},
}


class StubActors:
    """Stands for Ray's actors: answers each request at the controller's next poll."""

    num_epochs = 10

    def __init__(self, resource_manager: object = None) -> None:
        self.events: deque[Callable[[], None]] = deque()
        self.live: dict[TrackedActor, Any] = {}
        self.state: dict[TrackedActor, tuple[dict[str, Any], int]] = {}
        self._live_actors_to_ray_actors_resources = {}
        self.num_pending_actors = 0
        self.num_actor_tasks = 0

    @property
    def num_live_actors(self) -> int:
        return len(self.live)

    num_total_actors = num_live_actors

    def add_actor(
        self, cls: object, kwargs: dict[str, Any], resource_request: Any, **on: Any
    ) -> TrackedActor:
        actor = TrackedActor(
            len(self.state) + id(kwargs), on["on_start"], on["on_stop"], on["on_error"]
        )
        self.state[actor] = (kwargs["config"], 0)
        self.live[actor] = resource_request
        self._live_actors_to_ray_actors_resources[actor] = (None, None)
        self.events.append(lambda: on["on_start"](actor))
        return actor

    def schedule_actor_task(
        self,
        tracked_actor: TrackedActor,
        method_name: str,
        args: Any = None,
        kwargs: Any = None,
        **on: Any,
    ) -> None:
        def answer() -> None:
            if tracked_actor in self.live and on.get("on_result"):
                on["on_result"](tracked_actor, self._do(tracked_actor, method_name, args))

        self.events.append(answer)

    def _do(self, actor: TrackedActor, method: str, args: Any) -> Any:
        config, epoch = self.state[actor]
        if method == "reset":
            self.state[actor] = (args[0], 0)
            return True
        if method != "train":
            return None
        self.state[actor] = (config, epoch + 1)
        metrics = {
            "train/loss": 1 / (epoch + 1),
            "val/top1": 50.0,
            "throughput/clips_per_s": 9.9,
            "time/elapsed_s": 1.0,
        }
        if epoch + 1 == self.num_epochs:
            leave_result(Path(config["spec"]["folder"]), metrics)
        output = {
            "training_iteration": epoch + 1,
            "trial_id": "",
            "done": epoch + 1 == self.num_epochs,
            "epoch": epoch + 1,
        }
        return {**metrics, **output, "config": config, "time_total_s": 1.0}

    def remove_actor(
        self, tracked_actor: TrackedActor, kill: bool = False, stop_future: Any = None
    ) -> bool:
        if self.live.pop(tracked_actor, None) is None:
            return False
        self.events.append(
            lambda: tracked_actor._on_stop(tracked_actor) if tracked_actor._on_stop else None
        )
        return True

    def next(self, timeout: float | None = None) -> bool:
        if not self.events:
            return False
        self.events.popleft()()
        return True

    def is_actor_started(self, tracked_actor: TrackedActor) -> bool:
        return tracked_actor in self.live

    def is_actor_failed(self, tracked_actor: TrackedActor) -> bool:
        return False

    def clear_actor_task_futures(self, tracked_actor: TrackedActor) -> None:
        pass

    def get_live_actors_resources(self) -> dict[str, float]:
        return {}

    def cleanup(self) -> None:
        pass


def leave_result(folder: Path, metrics: dict[str, float]) -> None:
    """What a trial leaves, but small."""
    output = json.dumps({**metrics, "test/top1": 50.0, "test/num_videos": 8.0})
    write_atomic_dir(
        folder / RESULT_DIR,
        {"metrics.json": lambda file: write_text(file, output)},
        {"metrics": metrics},
    )


class Clock:
    """Wraps functions; knows how long they took altogether, and how often."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.calls: dict[str, int] = {}

    def around(self, owner: Any, name: str, label: str) -> None:
        real = getattr(owner, name)

        def timed(*arguments: Any, **more: Any) -> Any:
            began = time.perf_counter()
            try:
                return real(*arguments, **more)
            finally:
                self.seconds[label] = self.seconds.get(label, 0.0) + time.perf_counter() - began
                self.calls[label] = self.calls.get(label, 0) + 1

        setattr(owner, name, timed)


def study_file(folder: Path, trials: int) -> Path:
    make(folder / "data", MotionVerbs(size=32, frames=8, classes=2, train=16, validation=8))
    recipe = {**RECIPE, "data": {**RECIPE["data"], "root": str(folder / "data")}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    rates = {
        f"{number}": {"recipe.base_lr": 1e-4 * (1 + number)} for number in range(-(-trials // 10))
    }
    study = {
        "title": "Simulated",
        "recipe": "recipe.yaml",
        "axes": {"rate": rates},
        "seeds": [*range(10)],
    }
    (folder / "simulated.yaml").write_text(
        yaml.safe_dump({**study, "table": {"columns": ["top1"]}}, allow_unicode=True)
    )
    return folder / "simulated.yaml"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=10_000)
    parser.add_argument("--devices", type=int, default=1_000)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--tracking-uri", help="an MLflow server; default: SQLite")
    args = parser.parse_args()
    clock, StubActors.num_epochs = Clock(), args.epochs
    tune_controller.RayActorManager = StubActors
    client = store.MlflowClient
    for name in (
        "create_run",
        "search_runs",
        "log_batch",
        "log_artifacts",
        "set_terminated",
        "set_tag",
        "log_artifact",
    ):
        clock.around(client, name, f"MLflow {name}")
    clock.around(store.Store, "register", "MLflow model versions")
    clock.around(tune_controller.TuneController, "step", "Tune's controller, our callbacks in it")
    clock.around(tune_controller.TuneController, "checkpoint", "Tune's own snapshot")
    clock.around(writer.Writer, "flush", "waiting for MLflow at the end")
    clock.around(study_runner, "train_missing", "from the first trial to the last")
    launch = LaunchConfig(backend="inline", tracking_uri=args.tracking_uri)
    os.environ.update(ray_environment(launch), TUNE_MAX_PENDING_TRIALS_PG=str(args.devices))
    ray.init(
        num_cpus=args.devices,
        include_dashboard=False,
        logging_level=logging.ERROR,
        object_store_memory=200 * 2**20,
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        launch = replace(launch, store=folder / "store")
        began = time.perf_counter()
        study = read_study(
            str(study_file(folder, args.trials)), [f"recipe.epochs={args.epochs}"], []
        )
        read_s = time.perf_counter() - began
        run_study(study, launch)
        wall_s = time.perf_counter() - began
        database_mib = (
            (folder / "store" / "mlflow.db").stat().st_size / 2**20
            if not args.tracking_uri
            else 0.0
        )
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    lines = [
        f"# A simulated study of {len(study.trials):,} trials on {args.devices:,} devices, "
        f"{time.strftime('%Y-%m-%d')}",
        "",
        f"`python benchmarks/simulated_study.py --trials {args.trials} --devices {args.devices} "
        f"--epochs {args.epochs}`"
        f"; {platform.processor() or platform.machine()}, {psutil.cpu_count()} cores; Python "
        f"{platform.python_version()}, "
        f"Ray {version('ray')}, MLflow {version('mlflow')}, "
        f"{'a server' if args.tracking_uri else 'SQLite'}.",
        "",
        f"{wall_s:.0f} s in all, {len(study.trials) / wall_s:.1f} trials/s, "
        f"{len(study.trials) * args.epochs / wall_s:.0f} "
        f"epochs/s; driver's peak memory {peak_mib:.0f} MiB; database {database_mib:.0f} MiB; "
        f"study read in {read_s:.1f} s.",
        "",
        "| what | calls | seconds | ms a call |",
        "|:--|--:|--:|--:|",
        *(
            f"| {label} | {clock.calls[label]:,} | {seconds:.1f} | "
            f"{1000 * seconds / clock.calls[label]:.2f} |"
            for label, seconds in sorted(clock.seconds.items(), key=lambda item: -item[1])
        ),
        "",
    ]
    text = "\n".join(lines)
    print(text)
    (HERE / f"simulated_study_{time.strftime('%Y-%m-%d')}_{args.trials}.md").write_text(text)


if __name__ == "__main__":
    main()
