"""Each operation against timm's on the same image, and what is drawn against what timm draws."""

import random
from collections import Counter
from typing import Any

import numpy as np
import pytest
import timm.data.auto_augment as reference
import torch
from PIL import Image
from scipy import stats
from skimage import data as photos

from mar.augmentation.randaugment import ARGUMENTS, OPERATIONS, draw_operations, rand_augment
from mar.config.randaugment_policy import RandAugmentPolicy

FILL = (124, 116, 104)
EXACT = {
    "Invert",
    "PosterizeIncreasing",
    "SolarizeIncreasing",
    "SolarizeAdd",
    "Equalize",
    "AutoContrast",
}
MOVING = {"Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel"}
IMAGES = {
    "photo": photos.astronaut()[50:274, 100:340],
    "dark": photos.astronaut()[300:420, 0:100] // 3 + 20,
    "flat": np.full((40, 56, 3), 77, dtype=np.uint8),
}


def timms(name: str, image: np.ndarray, argument: float, resample: str = "BILINEAR") -> np.ndarray:
    picture = Image.fromarray(image)
    value = int(argument) if name in ("SolarizeIncreasing", "SolarizeAdd") else argument
    value = (
        max(1, int(argument)) if name == "PosterizeIncreasing" else value
    )  # PIL refuses to keep no bit
    arguments = () if name in ("AutoContrast", "Equalize", "Invert") else (value,)
    options = {"fillcolor": FILL, "resample": Image.Resampling[resample]}
    return np.asarray(reference.NAME_TO_OP[name](picture, *arguments, **options))


def ours(
    name: str, images: list[np.ndarray], argument: float, interpolation: Any = "bilinear"
) -> np.ndarray:
    """The operation on a clip of these frames."""
    pixels = torch.from_numpy(np.stack(images)).permute(3, 0, 1, 2)[None].float() / 255
    done = rand_augment(pixels, [[(name, argument)]], interpolation)
    return (done[0].permute(1, 2, 3, 0) * 255).round().numpy().astype(np.uint8)


@pytest.mark.parametrize("image", IMAGES)
@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_does_to_each_frame_what_timm_does_to_an_image(name: str, image: str) -> None:
    frames = [IMAGES[image], IMAGES[image][::-1].copy()]
    for level in (0.0, 0.3, 0.77, 1.0):
        for sign in (-1.0, 1.0):
            argument = ARGUMENTS[name](level, sign) if name in ARGUMENTS else 0.0
            expected = np.stack([timms(name, frame, argument) for frame in frames]).astype(int)
            difference = np.abs(ours(name, frames, argument).astype(int) - expected)
            if name in EXACT:
                assert difference.max() == 0, (level, sign)
            elif name in MOVING:
                assert np.mean(difference > 1) < 0.005, (
                    level,
                    sign,
                )  # a pixel at the edge may fall on the other side
            else:
                assert difference.max() <= 1, (level, sign)


@pytest.mark.parametrize("name", sorted(MOVING))
def test_what_moves_pixels_is_bicubic_as_pils_where_the_settings_say_so(name: str) -> None:
    frame = IMAGES["photo"]
    for level, sign in ((0.3, 1.0), (0.77, -1.0), (1.0, 1.0)):
        argument = ARGUMENTS[name](level, sign)
        expected = timms(name, frame, argument, "BICUBIC").astype(int)
        difference = np.abs(ours(name, [frame], argument, "bicubic")[0].astype(int) - expected)
        assert np.mean(difference > 1) < 0.005, (level, sign)
        bilinear = np.abs(ours(name, [frame], argument)[0].astype(int) - expected)
        assert bilinear.mean() >= 3 * difference.mean()  # equal where pixels move by whole ones


def test_clips_of_a_batch_are_augmented_each_in_its_own_way() -> None:
    pixels = torch.rand(3, 3, 2, 16, 16, generator=torch.Generator().manual_seed(0))
    chains = [[("Invert", 0.0), ("Rotate", 20.0)], [], [("Rotate", -10.0), ("Invert", 0.0)]]
    together = rand_augment(pixels, chains)
    for clip, chain in enumerate(chains):
        assert torch.equal(together[clip], rand_augment(pixels[clip : clip + 1], [chain])[0])
    assert (together[1] - pixels[1]).abs().max() <= 0.5 / 255


@pytest.mark.parametrize(
    "text", ["rand-m9-mstd0.5-inc1", "rand-m7-n4-mstd0.5-inc1", "rand-m5-inc1"]
)
def test_what_is_drawn_is_distributed_as_timms(text: str) -> None:
    policy, num_clips = RandAugmentPolicy.parse(text), 4000
    drawn = draw_operations(policy, num_clips, np.random.default_rng(0))
    theirs = timm_draws(text, num_clips)
    assert np.mean([len(chain) for chain in drawn]) == pytest.approx(
        policy.operations / 2, rel=0.05
    )
    flat, other = (
        [each for chain in drawn for each in chain],
        [each for chain in theirs for each in chain],
    )
    counts, others = Counter(name for name, _ in flat), Counter(name for name, _ in other)
    assert set(counts) == set(others) == set(OPERATIONS)
    assert (
        stats.chi2_contingency(
            [[each[name] for name in OPERATIONS] for each in (counts, others)]
        ).pvalue
        > 1e-3
    )
    for name in ARGUMENTS:
        one, two = ([value for label, value in each if label == name] for each in (flat, other))
        assert stats.ks_2samp(one, two).pvalue > 1e-4, name


def timm_draws(text: str, num_clips: int) -> list[list[tuple[str, float]]]:
    """The operations and arguments that timm's own code draws."""
    random.seed(0)
    np.random.seed(0)
    calls: list[tuple[str, float]] = []
    transform = reference.rand_augment_transform(text, {"img_mean": FILL})
    for operation in transform.ops:

        def note(
            image: Image.Image, *arguments: float, name: str = operation.name, **_: object
        ) -> Image.Image:
            calls.append((name, float(arguments[0]) if arguments else 0.0))
            return image

        operation.aug_fn = note
    drawn: list[list[tuple[str, float]]] = []
    for _ in range(num_clips):
        calls.clear()
        transform(Image.new("RGB", (4, 4)))
        drawn.append(list(calls))
    return drawn


@pytest.mark.parametrize(
    "text", ["rand", "rand-m11-inc1", "rand-m9", "augmix-m3", "rand-m9-mstd0.5-inc1 "]
)
def test_another_notation_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="timm's notation"):
        RandAugmentPolicy.parse(text)
