"""The input path, step by step, beside the peers': clips a second on one core, in one run.

    python benchmarks/input_path.py VIDEO… -o benchmarks/input_path_DATE.md

Each step is timed alone, on clips of 16 frames (stride 4) of the given videos; the peers' path is
decord, then PIL RandAugment frame by frame (timm), then resizing. Every round times every step, so
that a slow minute is nobody's own; medians of the rounds. Every reader opens the file anew.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from timm.data.auto_augment import rand_augment_transform

from mar.augmentation.randaugment import draw_operations, rand_augment
from mar.config.input_settings import DataConfig
from mar.config.randaugment_policy import RandAugmentPolicy
from mar.data.annotations import Video
from mar.data.cache_index import Packing
from mar.data.crops import crop_and_resize
from mar.data.decoders import TorchCodec, decode_with, probe_decoder
from mar.data.frame_cache import open_video, pack
from mar.data.sampling import Reader
from mar.model.pixels import to_pixels

FRAMES, STRIDE, SIZE, ROUNDS = 16, 4, 224, 9
POLICY = (
    "rand-m8-mstd0.5-inc1"  # at 9, timm now and then asks Pillow to keep no bit, which is an error
)


def main() -> None:
    """Time every step and write a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("videos", nargs="+", type=Path)
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        lines = table(args.videos, Path(scratch))
    text = "\n".join([*heading(args.videos), *lines, ""])
    print(text)
    if args.output:
        args.output.write_text(text, encoding="utf-8")


def heading(videos: list[Path]) -> list[str]:
    """Return where and with what it was measured."""
    model = next(
        (
            line.split(": ")[1]
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        "",
    )
    with Reader(videos[0]) as reader:
        height, width = reader.frames([0]).shape[1:3]
    return [
        f"# The input path, {datetime.date.today()}",
        "",
        f"`python benchmarks/input_path.py` on {len(videos)} videos of {width} × {height} pixels, "
        f"clips of {FRAMES} frames; "
        f"one core ({model}), Python {platform.python_version()}, torch {torch.__version__}, timm "
        f"{timm.__version__}.",
        "",
        "| step | ms a clip | spread | clips/s a core |",
        "|:--|--:|--:|--:|",
    ]


def table(videos: list[Path], scratch: Path) -> list[str]:
    """Return a line for each step."""
    root = videos[0].parent
    (scratch / "train.txt").write_text("".join(f"{video.name} 0\n" for video in videos))
    data = DataConfig(
        root=str(root),
        train=str(scratch / "train.txt"),
        val=str(scratch / "train.txt"),
        num_classes=1,
    )
    for kind in ("jpeg", "raw"):
        pack(data, scratch / kind, Packing(kind), 1, lambda *_: None)
    listed = [Video(video.name, video, 0) for video in videos]
    numbers = [STRIDE * frame for frame in range(FRAMES)]
    caches = {
        kind: data.model_copy(update={"cache": str(scratch / kind)}) for kind in ("jpeg", "raw")
    }
    clips = [frames_of(video, numbers) for video in videos]
    box = (8, 20, 200, 230)
    small = [crop_and_resize(clip, box, SIZE) for clip in clips]
    pil = rand_augment_transform(POLICY, {"img_mean": (124, 116, 104)})
    drawn = draw_operations(RandAugmentPolicy.parse(POLICY), len(videos), np.random.default_rng(0))
    batch = torch.stack(small)

    def peers(video: Path) -> None:
        frames = frames_of(video, numbers)
        pictures = [pil(Image.fromarray(frame)) for frame in frames]
        crop_and_resize(np.stack([np.asarray(picture) for picture in pictures]), box, SIZE)

    def ours(video: Video, cache: DataConfig) -> None:
        with open_video(cache, video) as reader:
            crop_and_resize(reader.frames(numbers), box, SIZE)

    def read(video: Video, cache: DataConfig) -> None:
        with open_video(cache, video) as reader:
            reader.frames(numbers)

    steps: dict[str, Callable[[int], object]] = {
        "decode: decord alone": lambda index: bare_decord(videos[index], numbers),
        "decode: mar's reader": lambda index: frames_of(videos[index], numbers),
        "decode: torchcodec alone": lambda index: TorchCodec(videos[index]).frames(numbers),
        "decode: mar's reader, torchcodec": lambda index: frames_of(
            videos[index], numbers, "torchcodec"
        ),
        "decode: PyAV, the whole file": lambda index: decode_with("pyav", videos[index]),
        "read: JPEG cache": lambda index: read(listed[index], caches["jpeg"]),
        "read: raw cache": lambda index: read(listed[index], caches["raw"]),
        "crop and resize to 224": lambda index: crop_and_resize(clips[index], box, SIZE),
        "RandAugment: timm on PIL images": lambda index: [
            pil(Image.fromarray(frame)) for frame in small[index].numpy()
        ],
        "RandAugment: ours, this core": lambda index: rand_augment(
            to_pixels(batch[index : index + 1]), drawn[index : index + 1]
        ),
        "peers: decord, PIL RandAugment, resize": lambda index: peers(videos[index]),
        "mar's loader: video, crop": lambda index: ours(listed[index], data),
        "mar's loader: JPEG cache, crop": lambda index: ours(listed[index], caches["jpeg"]),
        "mar's loader: raw cache, crop": lambda index: ours(listed[index], caches["raw"]),
    }
    if probe_decoder("torchcodec"):
        steps = {name: step for name, step in steps.items() if "torchcodec" not in name}
    rounds = [
        {name: timed(step, len(videos)) for name, step in steps.items()} for _ in range(ROUNDS + 1)
    ][1:]
    lines = [line(name, [each[name] for each in rounds]) for name in steps]
    for bare, ours_ in (
        ("decord alone", "mar's reader"),
        ("torchcodec alone", "mar's reader, torchcodec"),
    ):
        if f"decode: {bare}" in steps:
            ratio = statistics.median(
                each[f"decode: {ours_}"] / each[f"decode: {bare}"] for each in rounds
            )
            lines += [
                "",
                f"{ours_} takes {ratio:.3f} times what {bare} takes (median of the rounds).",
            ]
    return lines


def timed(step: Callable[[int], object], num_videos: int) -> float:
    """Return a step's milliseconds a video."""
    started = time.perf_counter()
    for index in range(num_videos):
        step(index)
    return (time.perf_counter() - started) / num_videos * 1e3


def line(name: str, rounds: list[float]) -> str:
    """Return a step's row."""
    median = statistics.median(rounds)
    return (
        f"| {name} | {median:.2f} | {min(rounds):.2f} to {max(rounds):.2f} | {1000 / median:.0f} |"
    )


def frames_of(video: Path, numbers: list[int], decoder: str = "auto") -> np.ndarray:
    """Return frames by mar's reader."""
    with Reader(video, decoder) as reader:
        return reader.frames(numbers)


def bare_decord(video: Path, numbers: list[int]) -> np.ndarray:
    """Return frames by decord, nothing around it."""
    import decord

    return decord.VideoReader(str(video), num_threads=1).get_batch(numbers).asnumpy()


if __name__ == "__main__":
    main()
