"""A tiny data set of real videos, tiny settings for it, and checks of shapes in signatures."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.update(RAY_USAGE_STATS_ENABLED="0", MLFLOW_DISABLE_TELEMETRY="true", OMP_NUM_THREADS="1")

from jaxtyping import install_import_hook

_SHAPED = [
    "mar.model",
    "mar.augmentation",
    "mar.data.dataset",
    "mar.data.loaders",
    "mar.data.crops",
    "mar.evaluation.evaluator",
    "mar.training.optim",
]
install_import_hook(_SHAPED, "beartype.beartype")

import pytest
import torch

from mar.config.overrides import build, merge
from mar.config.schema import TrainingConfig
from mar.data.motion_verbs import MotionVerbs, make

torch.set_num_threads(1)
TINY_VERBS = MotionVerbs(size=32, frames=8, classes=2, train=16, validation=8)


@pytest.fixture(scope="session")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen training and eight validation mp4s of two classes."""
    folder = tmp_path_factory.mktemp("data") / "motion-verbs"
    make(folder, TINY_VERBS)
    return folder


def tiny_tree(root: Path) -> dict[str, Any]:
    """Settings of a model that trains in a second."""
    return {
        "data": {
            "format": "ssv2",
            "root": str(root),
            "videos": "videos",
            "train": "train.json",
            "val": "validation.json",
            "num_classes": 2,
        },
        "clip": {"frames": 8, "size": 16},
        "encoder": {
            "size": "custom",
            "width": 16,
            "depth": 1,
            "heads": 2,
            "tubelet": [2, 4, 4],
            "drop_path": 0.1,
        },
        "classifier": {"width": 16, "depth": 1, "heads": 2, "dropout": 0.1},
        "reconstruction": {"width": 16, "depth": 1, "heads": 2},
        "recipe": {"epochs": 3, "batch_size": 8, "warmup_epochs": 1, "precision": "fp32"},
        "evaluation": {"clips": 1, "crops": 1},
    }


TINY_STUDY = """\
title: Tiny
recipe: recipe.yaml
axes: {ρ: {50 %: {}, 75 %: {mask.ratio: 0.75}}}
table: {columns: [top1]}
"""

BUCKET = "s3://bucket"


@pytest.fixture(scope="module")
def s3() -> Iterator[None]:
    """An object store: a real S3 server, with a bucket; the environment has its address."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    there = {
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "us-east-1",
    }
    there |= {"AWS_DEFAULT_REGION": "us-east-1", "AWS_ENDPOINT_URL": f"http://{host}:{port}"}
    os.environ.update(there)
    boto3.client("s3").create_bucket(Bucket="bucket")
    yield
    server.stop()
    for name in there:
        del os.environ[name]


@pytest.fixture
def tiny(videos: Path) -> Callable[..., TrainingConfig]:
    """Tiny settings, with overrides: ``tiny({"mask.ratio": 0.75})``."""

    def settings(overrides: dict[str, Any] | None = None) -> TrainingConfig:
        return build(merge(tiny_tree(videos), overrides or {}))

    return settings


@contextmanager
def shared_ray() -> Iterator[None]:
    """A Ray for several tests: what they run finds it, as a second study in one process would."""
    from orchestration.backends.ray_env import ray_environment
    from orchestration.backends.ray_session import ray_session
    from orchestration.config import LaunchConfig

    before = dict(os.environ)
    os.environ.update(ray_environment(LaunchConfig()))
    try:
        with ray_session(LaunchConfig()):
            yield
    finally:
        # The next file's tests start Ray clusters of their own, with another environment.
        os.environ.clear()
        os.environ.update(before)


_WITH_RAY = (
    "test_backends.py",
    "test_gpu_sharing.py",
    "test_run.py",
    "test_chaos.py",
    "test_ray_cluster.py",
    "test_cluster_faults.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that wait most, for Ray's processes: the other core has the rest."""
    items.sort(key=lambda item: item.path.name not in _WITH_RAY)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Keep a file's tests together, and all those that start Ray: two would disturb each other."""
    from xdist.scheduler import LoadFileScheduling

    class OneRay(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::")[0]
            return "ray" if Path(file).name in _WITH_RAY else file

    return OneRay(config, log)
