"""The encoder's features of a data set, and probes of them."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch
from commands import run_mar
from sklearn.neighbors import KNeighborsClassifier

import mar
from mar.config.schema import TrainingConfig
from mar.data.annotations import read_split
from mar.errors import Failure, UserError
from mar.evaluation import features as module
from mar.evaluation.features import (
    FeatureOptions,
    Features,
    linear_probe,
    nearest_neighbours,
    read_features,
    write_features,
)
from mar.model.mar import MAR

Tiny = Callable[..., TrainingConfig]


def test_they_are_those_of_each_video_alone(tiny: Tiny, tmp_path: Path) -> None:
    settings = tiny({"evaluation.clips": 2, "evaluation.mask.per_video": True})
    torch.manual_seed(0)
    network = MAR(settings).eval()
    videos = read_split(settings.data, "val")
    for per_token in (False, True):
        folder = tmp_path / str(per_token)
        write_features(network, settings, videos, folder, {}, FeatureOptions(per_token))
        found = read_features(folder)
        assert found.videos.tolist() == list(range(len(videos)))
        assert found.labels.tolist() == [video.label for video in videos]
        model = mar.Model(network, settings, (), frozenset({"encoder"}))
        for video, values in zip(videos, found.values, strict=True):
            wanted = model.features(video.path, pooled=not per_token)
            torch.testing.assert_close(values, wanted, rtol=1e-4, atol=1e-5)


def test_an_interrupted_run_goes_on_and_other_features_are_refused(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = tiny()
    network = MAR(settings).eval()
    videos = read_split(settings.data, "train")
    monkeypatch.setattr(module, "_VIDEOS_PER_FILE", 6)
    done: list[int] = []

    def stop(count: int, _: int) -> None:
        done.append(count)
        if count == 12:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_features(network, settings, videos, tmp_path, {"of": 1}, progress=stop)
    times = {file: file.stat().st_mtime_ns for file in tmp_path.glob("*.safetensors")}
    assert len(times) == 2
    write_features(network, settings, videos, tmp_path, {"of": 1})
    assert all(file.stat().st_mtime_ns == time for file, time in times.items())
    assert read_features(tmp_path).videos.tolist() == list(range(16))
    with pytest.raises(UserError, match="features of another model, of other data or settings"):
        write_features(network, settings, videos, tmp_path, {"of": 2})


def test_the_vote_of_neighbours_is_scikit_learns() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(3, 8, generator=generator)
    labels = torch.arange(120) % 3
    values = centres[labels] + 1.5 * torch.randn(120, 8, generator=generator)
    numbers = torch.arange(120)
    train = Features(numbers[:90], labels[:90], values[:90])
    test = Features(numbers[90:], labels[90:], values[90:])
    reference = KNeighborsClassifier(
        20, metric="cosine", weights=lambda distances: np.exp((1 - distances) / 0.07)
    )
    reference.fit(values[:90].numpy(), labels[:90].numpy())
    expected = 100 * reference.score(values[90:].numpy(), labels[90:].numpy())
    assert nearest_neighbours(train, test) == pytest.approx(expected)
    assert 33 < linear_probe(train, test) <= 100


def test_the_command_writes_and_probes(tmp_path: Path, videos: Path) -> None:
    data = [f"data.root={videos}", "data.format=ssv2", "data.videos=videos", "data.num_classes=2"]
    data += ["data.train=train.json", "data.val=validation.json", "data.labels=labels.json"]
    command = ["features", "mini", *data, "evaluation.clips=1", "evaluation.crops=1"]
    printed, _ = run_mar(tmp_path, *command, "-o", "out", "--probe")
    assert "val: 8 of 8 videos" in printed
    assert "20 nearest neighbours" in printed and "linear" in printed
    again, _ = run_mar(tmp_path, *command, "-o", "out", "--probe")
    assert again == printed
    printed, _ = run_mar(tmp_path, *command, "-o", "out", "--parquet")
    assert "written out/val.parquet" in printed
    table = pandas.read_parquet(tmp_path / "out" / "val.parquet")
    found = read_features(tmp_path / "out" / "val")
    assert table["label"].tolist() == found.labels.tolist()
    assert all(table["class"]), "the names of the classes"
    assert all((videos / "videos" / name).is_file() for name in table["video"])
    assert np.array_equal(np.stack(table["feature"].tolist()), found.values.numpy())
    _, errors = run_mar(tmp_path, *command, "mask.ratio=0.75", "-o", "out", code=2)
    assert "choose another folder" in errors
    _, errors = run_mar(tmp_path, *command, "--probe", "--per-token", code=2)
    assert "leave --per-token out" in errors


def test_a_file_of_broken_videos_alone_keeps_the_others(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = tiny()
    network = MAR(settings).eval()
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video")
    videos = read_split(settings.data, "val")
    lost = [replace(video, path=broken) for video in videos[:3]]
    monkeypatch.setattr(module, "_VIDEOS_PER_FILE", 3)
    assert write_features(network, settings, [*lost, *videos], tmp_path / "some", {}) == 3
    found = read_features(tmp_path / "some")
    assert found.videos.tolist() == list(range(3, 3 + len(videos)))
    assert len(found.values) == len(videos)
    with pytest.raises(Failure, match="not one of 3 videos could be decoded"):
        write_features(network, settings, lost, tmp_path / "none", {})


def test_a_name_that_is_no_text_is_no_obstacle(tiny: Tiny, tmp_path: Path) -> None:
    settings = tiny()
    videos = read_split(settings.data, "val")[:2]
    for _ in range(2):
        description = {"videos": ["\udcff.mp4"]}
        write_features(MAR(settings).eval(), settings, videos, tmp_path, description)
