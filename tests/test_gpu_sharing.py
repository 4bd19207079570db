"""Several trials on one GPU: declared to Ray, and not there."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
import ray
from conftest import shared_ray, tiny_tree
from test_backends import Events, metrics_of, trial_of

import mar.model.mar as model_module
from mar.config.overrides import build, merge
from mar.errors import UserError
from orchestration.backends import gpu_sharing, inline, local, ray_tune, worker_pool
from orchestration.backends.gpu_sharing import larger_share, max_concurrent_trials, share_of
from orchestration.config import LaunchConfig, WorkerConfig
from orchestration.studies.trial import Trial
from orchestration.worker import trial_runner
from orchestration.worker.spec import build_trial_spec


@pytest.fixture(scope="module", autouse=True)
def one_gpu() -> Iterator[None]:
    """A Ray with one declared GPU."""
    init: Any = ray.init

    def with_gpu(*arguments: Any, **options: Any) -> Any:
        return init(*arguments, **options, num_gpus=1)

    ray.init = with_gpu
    try:
        with shared_ray():
            yield
    finally:
        ray.init = init


def launch_of(store: Path, *, trials_per_gpu: str | None = None, **worker: Any) -> LaunchConfig:
    return LaunchConfig(
        store=store,
        study="study",
        backend="inline",
        trials_per_gpu=trials_per_gpu,
        worker=WorkerConfig(**worker),
    )


def tiny_trials(videos: Path, count: int, **changes: Any) -> list[Trial]:
    return [
        trial_of(build(merge(tiny_tree(videos), {"seed": seed, **changes})), str(seed))
        for seed in range(count)
    ]


class Running(Events):
    """Counts how many trials run at a time, from their first epochs to their ends."""

    def __init__(self, trials: list[Trial]) -> None:
        super().__init__(trials)
        self.most = 0

    def started(self, key: str) -> None:
        super().started(key)
        self.most = max(self.most, len(set(self.order) - self.ends.keys()))


def test_eight_trials_run_by_quarters_of_a_gpu_and_give_the_same_numbers(
    videos: Path, tmp_path: Path
) -> None:
    trials = tiny_trials(videos, 8)
    launch = launch_of(tmp_path / "shared", gpus_per_worker=0.25, cpus_per_worker=0.25)
    events = Running(trials)
    ray_tune.run(trials, launch, events, {})
    assert set(events.ends.values()) == {"finished"}
    assert len(events.ends) == 8
    assert events.most == 4
    alone = LaunchConfig(store=tmp_path / "alone", study="study", backend="local")
    local.run(trials[:1], alone, Events(trials), {})
    assert metrics_of(launch, trials[0]) == metrics_of(alone, trials[0])


@pytest.mark.parametrize(
    ("options", "most"),
    [
        ({"gpus_per_worker": 0.25, "cpus_per_worker": 0.25}, 4),
        # A third, in Ray's ten-thousandths, fits three times.
        ({"trials_per_gpu": "3", "cpus_per_worker": 0.1}, 3),
        ({"trials_per_gpu": "10", "cpus_per_worker": 0.1}, 10),
        # The cores are the scarcer resource.
        ({"trials_per_gpu": "8", "cpus_per_worker": 1.0}, None),
        ({"gpus_per_worker": 1.0, "cpus_per_worker": 0.5}, 1),
        ({"gpus_per_worker": 0.6, "cpus_per_worker": 0.1}, 1),
        ({"gpus_per_worker": 0.0, "cpus_per_worker": 0.5}, None),
    ],
)
def test_as_many_trials_run_as_shares_and_cores_allow(
    options: dict[str, Any], most: int | None, tmp_path: Path
) -> None:
    launch = launch_of(tmp_path, **options)
    if most is None:
        most = int(ray.cluster_resources()["CPU"] / launch.worker.cpus_per_worker)
    assert max_concurrent_trials(launch, share_of(launch, []).gpus) == most


def test_auto_divides_the_memory_by_what_the_largest_needs(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small, large = tiny_trials(videos, 2)
    # As many operations for each clip, and twice as many clips in a step.
    recipe = large.settings.recipe.model_copy(update={"batch_size": 16})
    large = trial_of(large.settings.model_copy(update={"recipe": recipe}), "large")
    asked: list[tuple[Trial, int]] = []

    def measure(trial: Trial, clips: int, _: Path) -> tuple[float, float]:
        asked.append((trial, clips))
        return 5.0, 24.0

    monkeypatch.setattr(gpu_sharing, "_measure", measure)
    share = share_of(launch_of(tmp_path, trials_per_gpu="auto"), [small, large])
    # 0.9 × 24 GiB by 5 GiB and the context's 0.6 GiB.
    assert share.gpus == pytest.approx(1 / 3, abs=1e-4)
    assert f"trials per GPU: 3 (the largest, {large.name}, needs 5.0 of 24.0 GiB)" == share.message
    share_of(launch_of(tmp_path, trials_per_gpu="auto", max_microbatch_clips=8), [large, small])
    assert asked == [(large, 16), (large, 8)]


def test_auto_says_that_it_cannot_measure_a_gpu_that_is_not_there(
    videos: Path, tmp_path: Path
) -> None:
    share = share_of(launch_of(tmp_path, trials_per_gpu="auto"), tiny_trials(videos, 1))
    assert share.gpus == 1.0
    assert share.message == "trials per GPU: 1 (auto: memory cannot be measured on this device)"


def test_a_trial_without_room_beside_others_gets_a_larger_share_and_its_own_steps(
    videos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    trials = tiny_trials(videos, 2)
    real = inline.run_inline

    def hungry(config: dict[str, Any]) -> None:
        from mar.model import mar as inside

        forward = inside.MAR.forward
        if config["spec"]["gpus_per_worker"] < 0.5 and config["spec"]["settings"]["seed"] == 1:

            def full(*_: Any) -> Any:
                raise MemoryError("CUDA out of memory")

            inside.MAR.forward = full
        try:
            real(config)
        finally:
            inside.MAR.forward = forward

    # By value: Ray's processes do not have the tests' folder.
    cloudpickle.register_pickle_by_value(__import__(__name__))
    monkeypatch.setattr(inline, "run_inline", hungry)
    launch = launch_of(tmp_path, gpus_per_worker=0.25, cpus_per_worker=0.25)
    events = Events(trials)
    ray_tune.run(trials, launch, events, {})
    assert events.ends == {trial.key: "finished" for trial in trials}
    assert events.order.count(trials[1].key) == 2
    assert events.order.count(trials[0].key) == 1
    said = f"no room beside others on a GPU: 0.5 of one each for {trials[1].name}"
    assert said in capsys.readouterr().err
    folder = launch.trial_folder(trials[1].key)
    assert not (folder / "microbatch.json").exists(), "its batch was not divided"


def test_a_study_that_is_stopped_starts_no_trial_again_that_waits_for_room(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trials = tiny_trials(videos, 2)
    launch = launch_of(tmp_path, gpus_per_worker=0.25)
    launch.stop_file.parent.mkdir(parents=True)

    def crowded(*_: Any) -> list[Trial]:
        launch.stop_file.touch()
        return trials

    monkeypatch.setattr(ray_tune, "_run", crowded)
    events = Events(trials)
    ray_tune.run(trials, launch, events, {})
    assert events.ends == {trial.key: "stopped" for trial in trials}


def test_trials_that_need_a_larger_share_again_are_not_forgotten_in_a_search(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a search the second round ends at its first crowded trial; the other one still waits."""
    trials = tiny_trials(videos, 2)
    shares: list[tuple[float, list[str]]] = []

    def run(next_trial: Any, source: Any, launch: Any, share: Any, *_: Any) -> list[Trial]:
        started: list[Trial] = []
        while (trial := next_trial()) is not None:
            started.append(trial)
            if share.gpus == 0.5:
                break
        shares.append((share.gpus, [trial.key for trial in started]))
        return started if share.gpus < 1 else []

    monkeypatch.setattr(ray_tune, "_run", run)
    events = Events(trials)
    launch = launch_of(tmp_path, gpus_per_worker=0.25, cpus_per_worker=0.1)
    ray_tune.run_search(events, launch, events, lambda trial: None)
    keys = [trial.key for trial in trials]
    assert shares == [(0.25, keys), (0.5, keys[:1]), (1.0, keys)]


@pytest.mark.parametrize("divides", [False, True])
def test_a_trial_divides_its_batch_only_where_no_larger_share_comes(
    divides: bool, videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> Any:
        raise MemoryError("CUDA out of memory")

    monkeypatch.setattr(model_module.MAR, "forward", full)
    (trial,) = tiny_trials(videos, 1)
    spec = build_trial_spec(trial, launch_of(tmp_path), 0.25, divides_batch=divides)
    reason = trial_runner.train(spec.to_json(), lambda report: None)
    assert reason is not None and reason.kind == "memory"
    assert spec.trial_dir.microbatch.exists() == divides


def test_a_share_grows_to_a_whole_gpu_as_long_as_it_fits(tmp_path: Path) -> None:
    launch = launch_of(tmp_path, gpus_per_worker=0.25, cpus_per_worker=0.1)
    share = share_of(launch, [])
    assert (share.gpus, share.divides_batch) == (0.25, False)
    share = larger_share(launch, share)
    assert (share.gpus, share.divides_batch) == (0.5, False)
    share = larger_share(launch, share)
    assert (share.gpus, share.divides_batch) == (1.0, True)
    # Four workers of a half each would need two GPUs.
    launch = launch_of(tmp_path, workers=4, gpus_per_worker=0.25, cpus_per_worker=0.1)
    share = larger_share(launch, share_of(launch, []))
    assert (share.gpus, share.divides_batch) == (0.25, True)


def test_workers_of_one_trial_on_one_gpu_are_joined_by_gloo(videos: Path, tmp_path: Path) -> None:
    (trial,) = tiny_trials(videos, 1)
    for gpus, backend in ((0.5, "gloo"), (1.0, "nccl")):
        launch = launch_of(tmp_path, workers=2, gpus_per_worker=gpus)
        trainer: Any = worker_pool._trainer(build_trial_spec(trial, launch, gpus), None)
        assert trainer.backend_config.backend == backend


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gpus_per_worker": 1.5}, "a fraction must be less than one GPU"),
        ({"gpus_per_worker": float("inf")}, "a fraction must be less than one GPU"),
        ({"trials_per_gpu": "many"}, "expected a number from 1 to 100, or auto"),
        ({"trials_per_gpu": "0"}, "expected a number from 1 to 100, or auto"),
        ({"trials_per_gpu": "2", "gpus_per_worker": 0.5}, "give one of the two"),
        ({"cpus_per_worker": 0.0}, "less than 0.01"),
    ],
)
def test_shares_that_mean_nothing_are_refused(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        launch_of(tmp_path, **options)


def test_sharing_a_gpu_of_a_cluster_without_one_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0})
    with pytest.raises(UserError, match="--trials-per-gpu 2: the cluster has no GPU"):
        share_of(launch_of(tmp_path, trials_per_gpu="2"), [])
    assert share_of(launch_of(tmp_path), []).gpus == 0.0
