"""``recipes/released`` gives the model the pixels, frames and starts that the release gives it.

The rules are those that are known of the released code, written here with PyTorch's own functions.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mar.augmentation.augment import augmented, draw_step
from mar.config.input_settings import ClipConfig
from mar.config.overrides import SettingError, build, merge
from mar.config.schema import TrainingConfig
from mar.data.annotations import read_split
from mar.data.crops import random_box
from mar.data.dataset import EvaluationClips, TrainingClips
from mar.data.decoders import decode_with, write_video
from mar.data.sampling import evaluation_frames, training_frames
from mar.model.mar import MAR
from mar.rng import Stream
from mar.rng import rng as stream
from orchestration.studies.diff import differences
from orchestration.studies.recipe import read_recipe

Settings = Callable[..., TrainingConfig]
RELEASED = {
    "clip.antialias": False,
    "clip.round_frames": True,
    "evaluation.crop_from": "resized",
    "augment.randaugment_interpolation": "bicubic",
    "encoder.init": "torch",
}


@pytest.fixture
def film(tmp_path: Path) -> tuple[dict[str, Any], np.ndarray]:
    """A video of 90 x 130 pixels in a data set of its own, and its frames."""
    from skimage import data as photos

    photo = photos.astronaut()
    frames = np.stack([photo[20 + n : 110 + n, 150 + 2 * n : 280 + 2 * n] for n in range(40)])
    write_video(tmp_path / "a.mp4", frames, crf="12")
    (tmp_path / "list.txt").write_text("a.mp4 0\n" * 8)
    data = {
        "format": "list",
        "root": str(tmp_path),
        "videos": ".",
        "train": "list.txt",
        "val": "list.txt",
    }
    return data, decode_with("pyav", tmp_path / "a.mp4")


def settings_for(tiny: Settings, data: dict[str, Any], overrides: dict[str, Any]) -> TrainingConfig:
    base = {"data": data, "clip": {"size": 48, "frames": 8}, "encoder": {"tubelet": [2, 12, 12]}}
    tree = merge(merge(tiny().model_dump(mode="json"), base), {**RELEASED, **overrides})
    return build(tree)


@pytest.mark.parametrize("crops", [1, 3])
def test_test_views_are_resized_and_then_cut_at_whole_pixels(
    tiny: Settings, film: tuple[dict[str, Any], np.ndarray], crops: int
) -> None:
    data, frames = film
    settings = settings_for(tiny, data, {"evaluation.segment_frames": "ends"})
    clips = EvaluationClips(settings, read_split(settings.data, "val"), 2, crops, shuffled=False)
    views = clips[0].clips.float()
    size = 48
    edges = np.linspace(0, len(frames), 9)
    for number, edge in enumerate((edges[:-1], edges[1:])):
        chosen = frames[np.clip(np.round(edge), 0, len(frames) - 1).astype(int)]
        pixels = torch.from_numpy(chosen).permute(0, 3, 1, 2).float()
        resized = F.interpolate(
            pixels, size=(size, int(130 / 90 * size)), mode="bilinear", align_corners=False
        )
        long = resized.shape[3]
        starts = (0, (long - size) // 2, long - size) if crops == 3 else ((long - size) // 2,)
        for crop, left in enumerate(starts):
            expected = resized[..., left : left + size].permute(0, 2, 3, 1)
            difference = (views[number * crops + crop] - expected).abs()
            assert difference.max() <= 0.51, "ours are whole levels"


def test_training_crops_are_resized_without_antialiasing(
    tiny: Settings, film: tuple[dict[str, Any], np.ndarray]
) -> None:
    data, frames = film
    settings = settings_for(tiny, data, {})
    sample = TrainingClips(settings, read_split(settings.data, "train"))[3, 5]
    rng = stream(settings.seed, Stream.CLIP, 5, 3)
    numbers = training_frames(settings.clip, len(frames), None, rng)
    top, left, height, width = random_box(90, 130, settings, rng)
    cut = (
        torch.from_numpy(frames[numbers][:, top : top + height, left : left + width])
        .permute(0, 3, 1, 2)
        .float()
    )
    expected = F.interpolate(cut, size=(48, 48), mode="bilinear", align_corners=False).permute(
        0, 2, 3, 1
    )
    assert (sample.clips[0].float() - expected).abs().max() <= 0.51


def test_on_kinetics_whole_frames_are_augmented_and_then_cut(
    tiny: Settings, film: tuple[dict[str, Any], np.ndarray]
) -> None:
    data, _ = film
    overrides = {
        "augment.randaugment": "rand-m9-mstd0.5-inc1",
        "augment.randaugment_before_crop": True,
    }
    settings = settings_for(tiny, data, overrides)
    dataset = TrainingClips(settings, read_split(settings.data, "train"))
    plain = TrainingClips(settings_for(tiny, data, {}), read_split(settings.data, "train"))
    changed = [
        not torch.equal(dataset[0, epoch].clips, plain[0, epoch].clips) for epoch in range(24)
    ]
    assert 8 <= sum(changed) < 24, "each of two operations is applied in half of the cases"
    step = draw_step(settings, 0)
    assert all(not chain for chain in step.operations), "not a second time, on the device"
    clips = torch.zeros(settings.recipe.batch_size, 8, 48, 48, 3, dtype=torch.uint8)
    pixels, _ = augmented(clips, torch.zeros(len(clips), dtype=torch.long), step, settings)
    assert pixels.abs().max() == 0


def test_training_frames_are_rounded() -> None:
    for seed in range(20):
        numbers = training_frames(
            ClipConfig(round_frames=True), 50, None, np.random.default_rng(seed)
        )
        drawn = np.linspace(0, 50, 17)[:-1] + np.random.default_rng(seed).random(16) * 50 / 16
        np.testing.assert_array_equal(numbers, np.minimum(np.round(drawn), 49))


def test_videomaes_own_test_frames() -> None:
    clip = ClipConfig()
    tick = 40 / 16
    both = sorted(
        [int(tick * x) for x in range(16)] + [int(tick / 2 + tick * x) for x in range(16)]
    )
    first, second = evaluation_frames(clip, 40, 25.0, 2, "videomae")
    assert first.tolist() == both[0::2] and second.tolist() == both[1::2]
    (alone,) = evaluation_frames(clip, 40, 25.0, 1, "videomae")
    assert alone.tolist() == both[0::2]
    dense = ClipConfig(sampling="dense")
    strided = list(range(0, 300, 4))
    for number, found in enumerate(evaluation_frames(dense, 300, 30.0, 5, "videomae")):
        start = int(number * max((len(strided) - 16) / 4, 0))
        assert found.tolist() == strided[start : start + 16]
    short = evaluation_frames(dense, 10, 30.0, 5, "videomae")
    assert all(found.max() <= 9 and len(found) == 16 for found in short)


def test_videomaes_test_has_no_third_clip_of_segments() -> None:
    evaluation = {"evaluation.segment_frames": "videomae", "evaluation.clips": 3}
    with pytest.raises(SettingError, match=r"evaluation\.clips: 3 .* at most two"):
        build(merge({}, evaluation))
    build(merge({}, {**evaluation, "clip.sampling": "dense"}))


def test_the_patch_embedding_and_the_decoders_projection_start_as_pytorch_makes_them(
    tiny: Settings,
) -> None:
    torch.manual_seed(0)
    model = MAR(tiny({"encoder.init": "torch"}))
    assert model.decoder
    embed, project = model.encoder.embed, model.decoder.project
    for layer in (embed, project):
        bound = layer.in_features**-0.5
        assert 0.9 * bound < layer.weight.abs().max() <= bound
    assert embed.bias.abs().max() > 0
    convolution = nn.Conv3d(3, embed.out_features, (2, 4, 4), stride=(2, 4, 4))
    assert convolution.weight.abs().max() <= embed.in_features**-0.5, (
        "PyTorch's bound of the released convolution"
    )
    other = MAR(tiny())
    assert other.encoder.embed.bias.abs().max() == 0


@pytest.mark.parametrize("name", ["ssv2_vit_b", "ssv2_vit_l", "k400_vit_b", "k400_vit_l"])
def test_the_released_recipes_have_these_settings_and_the_difference_says_why(name: str) -> None:
    tree = read_recipe(f"released/{name}").model_dump(mode="json")
    assert tree["clip"]["antialias"] is False
    assert tree["evaluation"]["crop_from"] == "resized"
    assert tree["augment"]["randaugment_interpolation"] == "bicubic"
    assert tree["encoder"]["init"] == "torch"
    assert tree["augment"]["randaugment_before_crop"] == name.startswith("k400")
    assert tree["clip"]["round_frames"] == name.startswith("ssv2")
    named = {each.setting: each.reason for each in differences(f"paper/{name}", f"released/{name}")}
    assert all(
        named[setting] for setting in ("clip.antialias", "evaluation.crop_from", "encoder.init")
    ), json.dumps(named)
