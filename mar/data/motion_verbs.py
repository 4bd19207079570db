"""Makes a small data set of video files in which only the motion determines the class.

It serves the demo, the tests and first steps. Outlines of scikit-learn's handwritten digits, filled
with photo textures, move over photos that are part of scikit-image and scikit-learn. Classes come
in pairs of opposite motions. A clip of a pair's second class is an independent draw of the first
class's motion **played backwards**, so a single frame does not show the direction. Training and
validation use different photos and different digits. Files are H.264 mp4s, with splits and labels
in Something-Something's annotation format.
"""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from mar.data import process_pool
from mar.data.decoders import write_video
from mar.data.video.sequential_reader import Frames
from mar.errors import Failure, UserError

VERBS = (
    "Moving [something] to the right",
    "Moving [something] to the left",
    "Moving [something] down",
    "Moving [something] up",
    "Moving [something] closer",
    "Moving [something] away",
    "Turning [something] clockwise",
    "Turning [something] counterclockwise",
    "Moving [something] and [something] together",
    "Moving [something] and [something] apart",
    "Covering [something] with [something]",
    "Uncovering [something]",
)
"""Class templates; each one with an odd index is the one before it, played backwards."""

# Different photos in the two splits: a model cannot recognise a background instead of a motion.
PHOTOS = {
    "train": (
        "astronaut.png",
        "chelsea.png",
        "coffee.png",
        "flower.jpg",
        "hubble_deep_field.jpg",
        "brick.png",
        "grass.png",
    ),
    "validation": (
        "china.jpg",
        "rocket.jpg",
        "motorcycle_left.png",
        "ihc.png",
        "gravel.png",
        "moon.png",
    ),
}
_FIRST_VALIDATION_DIGIT = 1300
"""Index in scikit-learn's 1797 digits; those before it are for training."""
_INK = 90
"""Brightness, from 0 to 255, above which a pixel belongs to a digit."""
FRAMES_PER_S = 12
# Equal frames must give equal files: files of other sizes would change the data's fingerprint, and
# so the identity of every trial. x264's macroblock tree, which slower presets use, breaks this.
_X264 = {"crf": "16", "threads": "1", "preset": "superfast"}
"""Options of x264, the encoder."""


@dataclass(frozen=True)
class MotionVerbs:
    """The options of a data set; equal values make equal videos."""

    seed: int = 0
    size: int = 32
    """Height and width, pixels; even."""
    frames: int = 16
    classes: int = 4
    """How many of ``VERBS`` are used, from the first on; even, so that each has its opposite."""
    train: int = 2048
    validation: int = 1024
    clutter: int = 0
    """Number of objects that do not move."""
    shake: float = 0.0
    """Camera shake: its standard deviation, as a share of the height."""
    motion: float = 1.0
    """The share of each motion that a video shows, from its start; 0: nothing moves (pictures)."""

    def __post_init__(self) -> None:
        if self.classes % 2 or not 2 <= self.classes <= len(VERBS):
            raise UserError(f"classes: must be even, from 2 to {len(VERBS)}, not {self.classes}")
        # Video in 4:2:0 needs even sizes.
        if self.size % 2 or self.size < 16:
            raise UserError(f"size: must be even and at least 16 pixels, not {self.size}")
        if min(self.frames, self.train, self.validation) < 2 or self.clutter < 0 or self.shake < 0:
            raise UserError(
                "frames, train and validation must be at least 2, clutter and shake not negative"
            )
        if not 0 <= self.motion <= 1:
            raise UserError(f"motion: must be from 0 (pictures) to 1, not {self.motion:g}")


DIFFICULTIES = {
    "easy": MotionVerbs(),
    "medium": MotionVerbs(size=64, classes=8, clutter=1, shake=0.01),
    "hard": MotionVerbs(size=96, classes=12, frames=32, clutter=3, shake=0.02),
}

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class _Pose:
    """An object's position: centre and size as shares of the height, rotation in degrees."""

    x: float
    y: float
    size: float
    angle: float = 0.0


def make(
    folder: Path,
    options: MotionVerbs,
    say: Callable[[int, int], None] = lambda done, total: None,
    processes: int = 1,
) -> bool:
    """Write the data set to ``folder``; return False if the folder has this very set already.

    ``say`` is called with the number of finished videos and the total. The folder appears only when
    it is complete. With several ``processes`` the videos are the same, and are there sooner.

    Raises:
        UserError: ``folder`` has other content.
        Failure: the folder cannot be written, for example because the disk is full.
    """
    folder = folder.resolve()
    facts = folder / "motion-verbs.json"
    if facts.is_file() and facts.read_text(encoding="utf-8") == _facts(options):
        return False
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(
            f"{folder} already exists and holds something else; choose another folder or remove it"
        )
    # Beside the folder, so that the rename at the end stays on one file system and is atomic.
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        _write(unfinished, options, say, processes)
        (unfinished / facts.name).write_text(_facts(options), encoding="utf-8")
        # An empty folder that the user made may be in the way.
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.rename(folder)
    except OSError as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise Failure(f"could not write {folder}: {error}") from None
    return True


def _facts(options: MotionVerbs) -> str:
    return json.dumps(asdict(options), indent=1)


@dataclass(frozen=True)
class _Item:
    """A video to write."""

    file: Path
    split: str
    part: int
    """The split's number, 0 for training."""
    index: int
    """The video's number in its split."""
    label: int


def _write(
    folder: Path, options: MotionVerbs, say: Callable[[int, int], None], processes: int
) -> None:
    (folder / "videos").mkdir(parents=True)
    counts = {"train": options.train, "validation": options.validation}
    items: list[_Item] = []
    for part, (split, count) in enumerate(counts.items()):
        rows: list[dict[str, Any]] = []
        for index in range(count):
            identifier = str(1_000_000 * (part + 1) + index)
            # Classes take turns, so all have equally many videos (or one more).
            label = index % options.classes
            file = folder / "videos" / f"{identifier}.mp4"
            items.append(_Item(file, split, part, index, label))
            sentence = VERBS[label].replace("[something]", "a digit")
            rows.append(
                {
                    "id": identifier,
                    "label": sentence,
                    "template": VERBS[label],
                    "placeholders": ["a digit"],
                }
            )
        _write_json(folder / f"{split}.json", rows)
    names = {
        verb.replace("[", "").replace("]", ""): str(label)
        for label, verb in enumerate(VERBS[: options.classes])
    }
    _write_json(folder / "labels.json", names)
    written = map(partial(_write_video, options), items)
    # Processes cost a second to start, which a few videos do not earn back.
    if processes > 1:
        written = process_pool.each(partial(_write_video, options), items, processes, _crashed)
    for done, _ in enumerate(written, start=1):
        say(done, len(items))


def _write_video(options: MotionVerbs, item: _Item) -> None:
    # Each video has a random stream of its own, so it does not depend on the others.
    rng = np.random.default_rng([options.seed, item.part, item.index])
    scene = _Scene(options, item.split, item.label, rng)
    write_video(item.file, np.stack(list(scene.frames())), FRAMES_PER_S, **_X264)


def _crashed(item: _Item) -> None:
    raise Failure(f"could not write {item.file.name}: the process that encodes it was ended")


def _write_json(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content, indent=1), encoding="utf-8")


class _Scene:
    """One clip: a background, objects that stand still, and one or two that move."""

    def __init__(
        self, options: MotionVerbs, split: str, label: int, rng: np.random.Generator
    ) -> None:
        self.options = options
        # The order of the draws below decides the videos of a seed, and so their fingerprint.
        self.rng = rng
        self.backwards = label % 2 == 1
        # The background is larger than the clip, by as much as the camera can shake.
        margin = round(3 * options.shake * options.size) + 1
        self.background = _photo_crop(split, options.size + 2 * margin, rng)
        self.margin = margin
        self.objects = [_object(split, options.size, rng) for _ in range(2 + options.clutter)]
        self.standing = [
            _Pose(rng.uniform(0.1, 0.9), rng.uniform(0.1, 0.9), rng.uniform(0.2, 0.35))
            for _ in range(options.clutter)
        ]
        time = np.linspace(0, options.motion, options.frames)
        self.moving = list(_MOTIONS[label // 2](time, rng))

    def frames(self) -> Iterator[Frames]:
        if self.backwards:
            order = reversed(self.moving)
        else:
            order = iter(self.moving)
        for poses in order:
            # Drawn for each frame and not reversed: shake has no direction in time.
            shake = np.clip(
                self.rng.normal(0, self.options.shake, 2),
                -3 * self.options.shake,
                3 * self.options.shake,
            )
            left, top = np.round(self.margin + shake * self.options.size).astype(int)
            canvas = self.background.crop(
                (left, top, left + self.options.size, top + self.options.size)
            )
            # There may be one object more than poses: most motions move one object, not two.
            for picture, pose in zip(self.objects, [*poses, *self.standing], strict=False):
                _paste(canvas, picture, pose)
            yield np.asarray(canvas)


# Each motion takes times from 0 to 1 and yields the poses of its objects at each of them. What it
# draws, such as place, size and speed, holds for the whole clip.


def _move_right(time: Array, rng: np.random.Generator) -> Iterator[list[_Pose]]:
    size = rng.uniform(0.4, 0.6)
    y = rng.uniform(0.25, 0.75)
    length = rng.uniform(0.5, 0.8)
    start = rng.uniform(0.1, 0.9 - length)
    return ([_Pose(start + length * t, y, size)] for t in time)


def _move_down(time: Array, rng: np.random.Generator) -> Iterator[list[_Pose]]:
    return ([_Pose(pose.y, pose.x, pose.size)] for (pose,) in _move_right(time, rng))


def _move_closer(time: Array, rng: np.random.Generator) -> Iterator[list[_Pose]]:
    x, y = rng.uniform(0.35, 0.65, 2)
    small = rng.uniform(0.2, 0.3)
    growth = rng.uniform(0.4, 0.6)
    return ([_Pose(x, y, small + growth * t)] for t in time)


def _turn_clockwise(time: Array, rng: np.random.Generator) -> Iterator[list[_Pose]]:
    x, y = rng.uniform(0.4, 0.6, 2)
    size = rng.uniform(0.6, 0.8)
    start = rng.uniform(0, 360)
    turn = rng.uniform(100, 240)
    return ([_Pose(x, y, size, start - turn * t)] for t in time)


def _move_together(time: Array, rng: np.random.Generator) -> Iterator[list[_Pose]]:
    y = rng.uniform(0.3, 0.7)
    size = rng.uniform(0.25, 0.35)
    far = rng.uniform(0.32, 0.4)
    near = rng.uniform(0.1, 0.16)
    return (
        [_Pose(0.5 - far + (far - near) * t, y, size), _Pose(0.5 + far - (far - near) * t, y, size)]
        for t in time
    )


def _cover(time: Array, rng: np.random.Generator) -> Iterator[list[_Pose]]:
    x = rng.uniform(0.4, 0.6)
    y = rng.uniform(0.4, 0.6)
    size = rng.uniform(0.35, 0.45)
    direction = rng.uniform(0, 2 * np.pi)
    far = rng.uniform(0.35, 0.45)
    away = far * np.array([np.cos(direction), np.sin(direction)])
    return (
        [_Pose(x, y, size), _Pose(x + away[0] * (1 - t), y + away[1] * (1 - t), 1.5 * size)]
        for t in time
    )


# In the order of VERBS, one motion for each pair of classes.
_MOTIONS = (_move_right, _move_down, _move_closer, _turn_clockwise, _move_together, _cover)


def _paste(canvas: Image.Image, picture: Image.Image, pose: _Pose) -> None:
    side = max(2, round(pose.size * canvas.width))
    small = picture.resize((side, side), Image.Resampling.BILINEAR)
    if pose.angle:
        small = small.rotate(pose.angle, Image.Resampling.BILINEAR)
    corner = (round(pose.x * canvas.width - side / 2), round(pose.y * canvas.height - side / 2))
    canvas.paste(small.convert("RGB"), corner, small.getchannel("A"))


def _object(split: str, size: int, rng: np.random.Generator) -> Image.Image:
    """Return a digit's outline, filled with a brightened or darkened photo texture, in RGBA."""
    digits = _digits()
    if split == "train":
        first = 0
        last = _FIRST_VALIDATION_DIGIT
    else:
        first = _FIRST_VALIDATION_DIGIT
        last = len(digits)
    outline = Image.fromarray(digits[rng.integers(first, last)]).resize(
        (size, size), Image.Resampling.BICUBIC
    )
    # The background may be the same photo; half white or half black stands out from it.
    shade = int(rng.choice([0, 255]))
    texture = Image.blend(
        _photo_crop(split, size, rng), Image.new("RGB", (size, size), (shade,) * 3), 0.5
    )
    texture.putalpha(Image.fromarray((np.asarray(outline) > _INK).astype(np.uint8) * 255))
    return texture


@cache
def _digits() -> npt.NDArray[np.uint8]:
    # scikit-learn's digits have values from 0 to 16.
    datasets: Any = importlib.import_module("sklearn.datasets")
    return (datasets.load_digits().images * 255 / 16).astype(np.uint8)


@cache
def _photo(name: str) -> Image.Image:
    # The two packages carry these files themselves: nothing is downloaded.
    for module, folder in (("skimage", "data"), ("sklearn", "datasets/images")):
        origin = importlib.import_module(module).__file__
        assert origin
        file = Path(origin).parent / folder / name
        if file.is_file():
            return Image.open(file).convert("RGB")
    raise Failure(
        f"the photo {name} is neither in scikit-image nor in scikit-learn; install the versions "
        "in constraints.txt"
    )


def _photo_crop(split: str, side: int, rng: np.random.Generator) -> Image.Image:
    """Return a random square of a random photo, scaled to ``side`` pixels."""
    photo = _photo(PHOTOS[split][rng.integers(len(PHOTOS[split]))])
    length = int(rng.uniform(0.4, 0.9) * min(photo.size))
    left = int(rng.integers(photo.width - length))
    top = int(rng.integers(photo.height - length))
    square = photo.crop((left, top, left + length, top + length))
    return square.resize((side, side), Image.Resampling.BILINEAR)
