"""What every backend must do, whatever runs its trials: one suite for all of them."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from conftest import shared_ray, tiny_tree

from mar.config.overrides import build, merge
from mar.config.schema import TrainingConfig
from mar.errors import UserError
from mar.safe_input import read_json
from mar.training.reports import EpochReport
from orchestration.backends import local, ray_tune
from orchestration.config import LaunchConfig, WorkerConfig
from orchestration.failures import FailureReason
from orchestration.storage.trial_dir import TrialDir
from orchestration.studies.trial import Trial

BACKENDS = ("local", "inline", "train")
MANY_EPOCHS = {"recipe.epochs": 40}
CLOCKS = ("time/", "throughput/")


@pytest.fixture(scope="module", autouse=True)
def ray() -> Iterator[None]:
    """One Ray for all of these tests."""
    with shared_ray():
        yield


Settings = Callable[..., TrainingConfig]


@pytest.fixture(scope="module")
def settings(videos: Path) -> Settings:
    """Tiny settings, with overrides."""

    def tiny(overrides: dict[str, Any] | None = None) -> TrainingConfig:
        return build(merge(tiny_tree(videos), overrides or {}))

    return tiny


class Events:
    """A source of trials and a callback in one: keeps what a backend reports."""

    def __init__(self, trials: list[Trial]) -> None:
        self.trials = trials
        self.ends: dict[str, str] = {}
        """Key -> how the trial ended."""
        self.order: list[str] = []
        self.waited: list[str] = []
        self.epochs: dict[str, list[EpochReport]] = {}
        self.reasons: dict[str, FailureReason] = {}
        self.pruned_key = ""
        """This trial is pruned after its first epoch."""
        self.on_epoch: Callable[[EpochReport], None] = lambda report: None
        self._waiting = iter(trials)

    def next(self) -> Trial | None:
        return next(self._waiting, None)

    def should_prune(self, key: str, epoch: int, metrics: Mapping[str, float]) -> bool:
        return key == self.pruned_key and epoch == 1

    def started(self, key: str) -> None:
        self.order.append(key)

    def epoch(self, key: str, report: EpochReport) -> None:
        self.epochs.setdefault(key, []).append(report)
        self.on_epoch(report)

    def waits(self, key: str) -> None:
        self.waited.append(key)

    def finished(self, key: str) -> None:
        self.ends[key] = "finished"

    def failed(self, key: str, reason: FailureReason) -> None:
        self.ends[key] = "failed"
        self.reasons[key] = reason

    def pruned(self, key: str) -> None:
        self.ends[key] = "pruned"

    def stopped(self, key: str) -> None:
        self.ends[key] = "stopped"

    def is_over(self) -> bool:
        return False


def module_of(backend: str) -> ModuleType:
    if backend == "local":
        return local
    return ray_tune


def launch_of(backend: str, store: Path, **worker: Any) -> LaunchConfig:
    return LaunchConfig(
        store=store,
        study="study",
        backend=backend,  # pyright: ignore[reportArgumentType]
        max_concurrent_trials=1,
        worker=WorkerConfig(**worker),
    )


def run(backend: str, launch: LaunchConfig, trials: list[Trial]) -> Events:
    events = Events(trials)
    module_of(backend).run(trials, launch, events, {})
    return events


def metrics_of(launch: LaunchConfig, trial: Trial) -> dict[str, float]:
    """The final metrics that no clock measured."""
    metrics = read_json(TrialDir(launch.trial_folder(trial.key)).metrics)
    return {name: value for name, value in metrics.items() if not name.startswith(CLOCKS)}


def trial_of(settings: TrainingConfig, label: str = "a") -> Trial:
    return Trial({"axis": label}, settings, "")


@pytest.fixture(scope="module")
def expected(settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """The metrics of the tiny training, from the plain backend."""
    launch = launch_of("local", tmp_path_factory.mktemp("expected"))
    trial = trial_of(settings())
    run("local", launch, [trial])
    return metrics_of(launch, trial)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_trial_gives_the_same_numbers_and_reports_each_epoch_and_its_test(
    backend: str, settings: Settings, expected: dict[str, float], tmp_path: Path
) -> None:
    launch = launch_of(backend, tmp_path)
    trial = trial_of(settings())
    events = run(backend, launch, [trial])
    assert events.ends == {trial.key: "finished"}
    assert metrics_of(launch, trial) == expected
    reports = events.epochs[trial.key]
    assert [(report.epoch, report.is_final) for report in reports] == [
        (1, False),
        (2, False),
        (3, False),
        (3, True),
    ]
    assert not any(report.is_replay for report in reports)
    assert reports[-1].metrics["test/top1"] == expected["test/top1"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_stop_saves_the_trial_and_the_next_launch_resumes_it_and_replays_its_epochs(
    backend: str, settings: Settings, tmp_path: Path
) -> None:
    launch = launch_of(backend, tmp_path)
    trial = trial_of(settings(MANY_EPOCHS))
    later = trial_of(settings({"mask.ratio": 0.75}), "b")
    events = Events([trial, later])

    def stop(report: EpochReport) -> None:
        launch.stop_file.parent.mkdir(parents=True, exist_ok=True)
        launch.stop_file.touch()

    events.on_epoch = stop
    module_of(backend).run(events.trials, launch, events, {})
    assert events.ends == {trial.key: "stopped"}, "and no other trial starts"
    done = TrialDir(launch.trial_folder(trial.key)).num_epochs_done()
    assert 1 <= done < 40

    launch.stop_file.unlink()
    resumed = run(backend, launch, [trial])
    assert resumed.ends == {trial.key: "finished"}
    epochs = [report.epoch for report in resumed.epochs[trial.key] if not report.is_final]
    assert epochs == [*range(1, 41)], "every epoch is reported once, the earlier ones too"
    replayed = [report.epoch for report in resumed.epochs[trial.key] if report.is_replay]
    assert replayed == [*range(1, done + 1)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_pruned_trial_ends_early_and_the_next_one_runs(
    backend: str, settings: Settings, tmp_path: Path
) -> None:
    launch = launch_of(backend, tmp_path)
    pruned = trial_of(settings(MANY_EPOCHS))
    other = trial_of(settings(), "b")
    events = Events([pruned, other])
    events.pruned_key = pruned.key
    announced: list[str] = []
    module_of(backend).run_search(events, launch, events, lambda trial: announced.append(trial.key))
    assert announced == events.order == [pruned.key, other.key]
    assert events.ends == {pruned.key: "pruned", other.key: "finished"}
    assert max(report.epoch for report in events.epochs[pruned.key]) < 40
    assert not TrialDir(launch.trial_folder(pruned.key)).is_finished


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_trial_that_fails_permanently_says_why_and_the_next_one_runs(
    backend: str, settings: Settings, tmp_path: Path
) -> None:
    launch = launch_of(backend, tmp_path)
    failing = trial_of(settings({"recipe.base_lr": 1e30, "recipe.warmup_epochs": 0}))
    other = trial_of(settings(), "b")
    events = run(backend, launch, [failing, other])
    assert events.ends == {failing.key: "failed", other.key: "finished"}
    reason = events.reasons[failing.key]
    assert reason.kind == "non_finite"
    assert "the gradient is not finite" in reason.message
    assert TrialDir(launch.trial_folder(failing.key)).read_failure() == reason


def test_two_workers_train_what_one_does(
    settings: Settings, expected: dict[str, float], tmp_path: Path
) -> None:
    launch = launch_of("train", tmp_path, workers=2)
    trial = trial_of(settings())
    events = run("train", launch, [trial])
    assert events.ends == {trial.key: "finished"}
    metrics = metrics_of(launch, trial)
    assert metrics["test/num_videos"] == expected["test/num_videos"]
    # Each worker draws its own dropout, so the numbers are near, not equal.
    assert metrics["train/loss"] == pytest.approx(expected["train/loss"], rel=0.1)


@pytest.mark.parametrize("backend", ["local", "inline"])
def test_a_backend_with_one_worker_refuses_two(
    backend: str, settings: Settings, tmp_path: Path
) -> None:
    launch = launch_of(backend, tmp_path, workers=2)
    with pytest.raises(UserError, match=f"--backend {backend} trains with one worker"):
        run(backend, launch, [trial_of(settings())])
