"""All that is to be said of a GPU, measured in one run; begins nothing after 7.5 minutes. Never run on a GPU yet.

    python benchmarks/device.py -o benchmarks/device_DATE.md        (finds ``mar`` beside it)
    python benchmarks/device.py --small --device cpu                (tries the script itself, on a CPU)

Training and inference of ViT-B (ρ = 50 %, λ = 0.1, bridging 512 × 2) beside standard training and the step as released, in
eager mode, compiled and as CUDA graphs; ViT-L; clips a step; the memory of one clip at each mask ratio (Table V); that the
step never waits; which attention kernel runs. It goes from what matters most to what matters least. Needs torch and timm with what they bring, pydantic and jaxtyping; no Ray, MLflow or decoder.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

from mar.bench.data import augmentation_table, checkpoint_table
from mar.bench.machine import Machine, this_machine
from mar.bench.run import heading
from mar.bench.steps import Case, Timed, learner_of, random_batch, time_case
from mar.bench.tables import Table, spread, write
from mar.memory import peak_training_memory_gib
from mar.step import train_step

COMMAND = "python benchmarks/device.py"
PAPER_GB = {0.0: 15.08, 0.25: 11.21, 0.5: 7.63, 0.75: 5.21}
"""Table V."""
TARGETS = {
    "ViT-base, training": "622 clips/s",
    "ViT-base, inference": "2290 views/s",
    "ViT-large, training": "180 clips/s",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny models: to try this script")
    parser.add_argument("--limit-s", type=float, default=450.0, help="begin nothing after so long")
    parser.add_argument("-o", "--output", type=Path, default=Path(f"benchmarks/device_{date.today().isoformat()}.md"))
    told = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    started, machine = time.monotonic(), this_machine(torch.device(told.device))
    base = Case("mar", clips=64, device=told.device, steps=20, warm_up=5)
    if told.small:
        base = replace(base, size="tiny", frames=4, pixels=32, clips=2, steps=2, warm_up=1)
    large = base if told.small else replace(base, size="large", clips=32)
    parts: list[Callable[[], Table]] = [
        lambda: speeds("Training", machine, contestants(base)),
        lambda: speeds("Inference", machine, contestants(replace(base, training=False, clips=2 * base.clips))),
        lambda: speeds("ViT-L", machine, [large, replace(large, training=False)]),
        *([lambda: memory(base)] if told.device == "cuda" else []),
        lambda: waits(base),
        lambda: kernels(base),
        lambda: speeds("Clips a step", machine, [replace(base, clips=clips) for clips in batches(base)]),
        lambda: speeds("Compiled", machine, compiled(base)),
        lambda: augmentation_table(base, machine, 3, COMMAND),
        lambda: checkpoint_table(base, 3, COMMAND),
    ]
    for part in parts:
        left = told.limit_s - (time.monotonic() - started)
        if left < 0:
            print("the time is up: what follows is not measured")
            break
        try:
            table = part()
        except torch.OutOfMemoryError as error:
            print(f"left out, not enough memory: {error}")
            continue
        print(table, flush=True)
        write(told.output, heading(machine), [table])
    print(f"{time.monotonic() - started:.0f} s; written: {told.output}")


def contestants(case: Case) -> list[Case]:
    others = [replace(case, contestant=each) for each in ("standard", "released", "videomae", "videomae-fp32")]
    return [case, *others]


def compiled(case: Case) -> list[Case]:
    """What compiling and CUDA graphs bring, at a full batch and where launches dominate."""
    one = replace(case, clips=1)
    modes = ("", "default", "reduce-overhead")
    return [replace(each, compiles=mode) for each in (case, one) for mode in modes] + [replace(case, recomputes=True)]


def batches(case: Case) -> list[int]:
    return [1, 2, 4] if case.size == "tiny" else [8, 16, 32, 128]


def speeds(title: str, machine: Machine, cases: list[Case]) -> Table:
    rows: list[tuple[str, ...]] = []
    ours = 0.0
    for case in cases:
        name = f"{case.contestant}{f', compiled: {case.compiles}' if case.compiles else ''}"
        name += ", activations recomputed" if case.recomputes else ""
        what = f"ViT-{case.size}, {'training' if case.training else 'inference'}"
        if case.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            timed = time_case(case, None if case.compiles else machine)
        except (ImportError, torch.OutOfMemoryError) as error:
            rows.append((name, what, str(case.clips), f"not measured: {str(error).splitlines()[0][:60]}", *[""] * 7))
            continue
        seconds = statistics.median(timed.seconds)
        ours = ours or seconds / case.clips
        rows.append((name, what, str(case.clips), *figures(timed, seconds, ours, machine), TARGETS.get(what, "")))
    columns = ("contestant", "model", "clips", "ms a step", "clips/s", "first row is", "MFU %", "of the roofline %")
    columns = (*columns, "limited by memory %", "peak GiB", "first step s", "target")
    filled = [(*row, *[""] * (len(columns) - len(row))) for row in rows]
    return Table(title, COMMAND, columns, filled, (machine.convention,))


def figures(timed: Timed, seconds: float, ours: float, machine: Machine) -> tuple[str, ...]:
    clips = timed.case.clips
    floor = [f"{100 * timed.floor_s / seconds:.0f}", f"{100 * timed.memory_share:.0f}"] if timed.floor_s else ["", ""]
    return (
        spread([1e3 * each for each in timed.seconds], 1),
        f"{clips / seconds:.0f}",
        f"{seconds / clips / ours:.2f} x as fast",
        f"{100 * timed.useful_operations / seconds / machine.peak_tflops / 1e12:.1f}",
        *floor,
        f"{timed.peak_gib:.2f}",
        f"{timed.first_s:.1f}",
    )


def memory(case: Case) -> Table:
    """One clip at each ratio, beside Table V."""
    rows: list[tuple[str, ...]] = []
    for ratio, paper in PAPER_GB.items():
        contestant = "mar" if ratio else "standard"
        settings = replace(case, contestant=contestant, ratio=ratio, clips=1).settings
        rows.append((f"{ratio:.0%}", f"{peak_training_memory_gib(settings, 1):.2f}", f"{paper:.2f}"))
    return Table("Memory of one clip", COMMAND, ("ρ", "peak GiB", "paper, G"), rows)


def waits(case: Case) -> Table:
    """Fail if a step waits for the device: PyTorch raises at whatever makes the host wait."""
    learner, batch = learner_of(case), random_batch(case, torch.device(case.device))
    for _ in range(3):
        train_step(learner, batch)
    words = "nothing to wait for on a CPU"
    if case.device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
        try:
            train_step(learner, batch)
            words = "no"
        except RuntimeError as error:
            words = f"yes: {str(error).splitlines()[0]}"
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return Table("Does a step wait for the device?", COMMAND, ("answer",), [(words,)])


def kernels(case: Case) -> Table:
    """Name the kernels that take most of a step, attention's among them."""
    from torch.profiler import ProfilerActivity, profile

    learner, batch = learner_of(case), random_batch(case, torch.device(case.device))
    for _ in range(3):
        train_step(learner, batch)
    kinds = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if case.device == "cuda" else [])
    with profile(activities=kinds) as profiler:
        train_step(learner, batch)
        if case.device == "cuda":
            torch.cuda.synchronize()
    averages = profiler.key_averages()
    name = "self_device_time_total" if case.device == "cuda" else "self_cpu_time_total"
    times = sorted(((float(getattr(each, name)), str(each.key)) for each in averages), reverse=True)
    whole = sum(time_us for time_us, _ in times)
    rows = [(key[:90], f"{time_us / 1e3:.2f}", f"{100 * time_us / whole:.1f}") for time_us, key in times[:20]]
    return Table("Kernels of a step", COMMAND, ("kernel", "ms", "%"), rows)


if __name__ == "__main__":
    main()
