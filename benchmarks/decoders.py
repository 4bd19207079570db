"""Which decoder reads which kind of file fastest, and what our reader adds to the bare decoder.

    python benchmarks/decoders.py VIDEOS -o benchmarks/decoders_DATE.md

VIDEOS is a folder of videos; each kind (container, codec, sides below 128 pixels or not) is
measured on its first files. One reading is what training takes of a video: it is opened, and 16
frames, one from each of 16 equal parts, are decoded; then 16 neighbours, 4 apart. The contestants
take turns, file by file, in one process and one thread. ``first`` is our reader on a file that it
has not seen (it looks through the packets), ``again`` on one that it has. The frames of all are
compared before anything is timed.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import av
import numpy as np
import torch

from mar.bench.machine import this_machine
from mar.bench.run import heading
from mar.bench.tables import Table, spread, write
from mar.config.input_settings import ClipConfig
from mar.data import decoders
from mar.data.decoders import Decord, TorchCodec, probe_decoder
from mar.data.sampling import Reader, training_frames
from mar.data.video.sequential_reader import BrokenVideo, SequentialReader

COMMAND = "python benchmarks/decoders.py VIDEOS"
SEGMENTS, DENSE = ClipConfig(), ClipConfig(sampling="dense", stride=4)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("videos", type=Path)
    parser.add_argument("--files", type=int, default=6, help="of each kind")
    parser.add_argument("--rounds", type=int, default=7)
    default = Path(f"benchmarks/decoders_{date.today().isoformat()}.md")
    parser.add_argument("-o", "--output", type=Path, default=default)
    args = parser.parse_args()
    torch.set_num_threads(1)
    machine = this_machine(torch.device("cpu"))
    rows: list[tuple[str, ...]] = []
    for kind, files in sorted(kinds_of(args.videos).items()):
        row = measure(kind, files[: args.files], args.rounds)
        rows.append(row)
        print(" | ".join(row), flush=True)
    columns = (
        "kind", "files", "frames each", "auto takes", "decord", "torchcodec", "PyAV",
        "ours, first", "ours, again", "ours / its bare decoder, first", "again",
    )  # fmt: skip
    notes = (
        "Milliseconds a reading: medians over files and rounds; ratios are taken pair by pair, and "
        "their median and quartiles are given. A decoder whose frames are not those that are shown "
        "has «wrong» in its column.",
    )
    write(args.output, heading(machine), [Table("Decoders", COMMAND, columns, rows, notes)])


def kinds_of(folder: Path) -> dict[str, list[Path]]:
    kinds: dict[str, list[Path]] = {}
    for file in sorted(folder.rglob("*.*")):
        try:
            with av.open(str(file), metadata_errors="ignore") as container:
                stream = container.streams.video[0]
                name = stream.codec_context.name
                size = "small" if min(stream.width, stream.height) < 128 else "large"
                form = container.format.name.split(",")[0]
            if len(SequentialReader.of(file)) >= 16:
                kinds.setdefault(f"{form}, {name}, {size}", []).append(file)
        except (av.FFmpegError, OSError, ValueError, IndexError, BrokenVideo):
            continue
    return kinds


def measure(kind: str, files: list[Path], rounds: int) -> tuple[str, ...]:
    bare: dict[str, Callable[[Path], object]] = {"decord": Decord, "pyav": SequentialReader.of}
    if not probe_decoder("torchcodec"):
        bare["torchcodec"] = TorchCodec
    times: dict[str, list[float]] = {name: [] for name in (*bare, "first", "again")}
    lengths = [len(SequentialReader.of(file)) for file in files]
    taken = Reader(files[0]).decoder
    wrong = {name for name in bare if not all(is_right(bare[name], file) for file in files)}
    for number in range(rounds + 1):
        for file, length in zip(files, lengths, strict=True):
            indices = wanted(length, number)
            found = {name: timed(make, file, indices) for name, make in bare.items()}
            decoders._is_exact.clear()
            found["first"] = timed(Reader, file, indices)
            found["again"] = timed(Reader, file, indices)
            if number:
                for name, seconds in found.items():
                    times[name].append(1e3 * seconds)
    cells = [
        "wrong" if name in wrong else spread(times[name], 1) if times.get(name) else "absent"
        for name in ("decord", "torchcodec", "pyav")
    ]
    ratios = [
        spread([ours / theirs for ours, theirs in zip(times[each], times[taken], strict=True)])
        for each in ("first", "again")
    ]
    frames = f"{min(lengths)}-{max(lengths)}"
    ours = [spread(times[each], 1) for each in ("first", "again")]
    return (kind, str(len(files)), frames, taken, *cells, *ours, *ratios)


def wanted(length: int, number: int) -> list[list[int]]:
    rng = np.random.default_rng(number)
    return [training_frames(clip, length, None, rng).tolist() for clip in (SEGMENTS, DENSE)]


def timed(make: Callable[[Path], object], file: Path, indices: list[list[int]]) -> float:
    """Return the seconds of a reading, the mean of the two samplings; infinite where it fails."""
    total = 0.0
    for each in indices:
        started = time.perf_counter()
        try:
            make(file).frames(each)  # type: ignore[attr-defined]
        except Exception:
            return float("nan")
        total += time.perf_counter() - started
    return total / len(indices)


def is_right(make: Callable[[Path], object], file: Path) -> bool:
    shown = SequentialReader.of(file)
    try:
        opened = make(file)
        for indices in wanted(len(shown), 0):
            given = opened.frames(indices)  # type: ignore[attr-defined]
            difference = np.abs(given.astype(int) - shown.frames(indices).astype(int)).mean()
            if difference > 4:
                return False
        return len(opened) == len(shown)  # type: ignore[arg-type]
    except Exception:
        return False


if __name__ == "__main__":
    main()
