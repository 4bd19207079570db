"""Everything that a GPU's figures are taken from, in one run; no part starts after 8 minutes.

    python benchmarks/device.py -o benchmarks/device_DATE.md        (finds ``mar`` beside it)
    python benchmarks/device.py --small --device cpu                (a rehearsal, on a CPU)
    python benchmarks/device.py --part compiled --part waits        (some of the parts)

The parts go from the most valuable to the least. A part that fails is named at the end and in the
file; the others are measured all the same. Beside the Markdown file a JSON file has the same
tables. Needs torch, timm, pydantic and jaxtyping with what they bring, and ``transformers`` for
the comparison with its VideoMAE; no Ray, MLflow or video decoder.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch

from mar.bench.data import augmentation_table, checkpoint_table
from mar.bench.machine import Machine, synchronise, this_machine
from mar.bench.run import heading
from mar.bench.steps import Case, Timed, random_batch, time_case, train_state_of
from mar.bench.tables import Table, spread, write
from mar.training.memory import peak_training_memory_gib
from mar.training.step import train_step

COMMAND = "python benchmarks/device.py"
RATIOS = (0.0, 0.25, 0.5, 0.75)
PAPER_GB = {0.0: 15.08, 0.25: 11.21, 0.5: 7.63, 0.75: 5.21}
"""Table V."""
TARGETS = {
    "ViT-base, training": "622 clips/s",
    "ViT-base, inference": "2290 views/s",
    "ViT-large, training": "180 clips/s",
}
WINDOW_S = 4.0
"""How long trials that share a device are timed."""
RANDAUGMENT = "rand-m7-n4-mstd0.5-inc1"
"""Table I."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny models: a rehearsal")
    parser.add_argument("--limit-s", type=float, default=480.0, help="start no part after this")
    parser.add_argument("--part", action="append", default=[], help="measure this part; repeatable")
    default = Path(f"benchmarks/device_{date.today().isoformat()}.md")
    parser.add_argument("-o", "--output", type=Path, default=default)
    parser.add_argument("--trial", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    base = Case("mar", clips=64, device=args.device, steps=20, warm_up=5)
    if args.small:
        base = replace(base, size="tiny", frames=4, pixels=32, clips=2, steps=2, warm_up=1)
    if args.trial:
        run_trial(base)
        return
    started = time.monotonic()
    machine = this_machine(torch.device(args.device))
    parts = parts_of(base, machine, args.small)
    unknown = set(args.part) - set(parts)
    if unknown:
        parser.error(f"--part {unknown.pop()}: the parts are {', '.join(parts)}")
    failed: list[tuple[str, str]] = []
    tables: list[Table] = []
    for name, measure in parts.items():
        if args.part and name not in args.part:
            continue
        if time.monotonic() - started > args.limit_s:
            failed.append((name, "not started: the time was up"))
            continue
        try:
            table = measure()
        except Exception as error:
            traceback.print_exc()
            failed.append((name, f"{type(error).__name__}: {error}".splitlines()[0]))
            continue
        print(f"[{time.monotonic() - started:.0f} s]\n{table}", flush=True)
        tables.append(table)
        save(args.output, machine, tables)
    if failed:
        tables.append(Table("Not measured", COMMAND, ("part", "why"), failed))
        print(tables[-1])
        save(args.output, machine, tables)
    print(f"{time.monotonic() - started:.0f} s; written: {args.output}")


def save(output: Path, machine: Machine, tables: list[Table]) -> None:
    write(output, heading(machine), tables)
    content = {"machine": asdict(machine), "tables": [asdict(table) for table in tables]}
    output.with_suffix(".json").write_text(json.dumps(content, indent=1), encoding="utf-8")


def parts_of(base: Case, machine: Machine, is_small: bool) -> dict[str, Callable[[], Table]]:
    inference = replace(base, training=False, clips=2 * base.clips)
    large = base
    if not is_small:
        large = replace(base, size="large", clips=32)
    by_ratio = [case_at(base, ratio) for ratio in RATIOS]
    by_ratio += [case_at(inference, ratio) for ratio in RATIOS]
    parts: dict[str, Callable[[], Table]] = {
        "training": lambda: speeds("Training", machine, contestants(base)),
        "inference": lambda: speeds("Inference", machine, contestants(inference)),
        "ratios": lambda: speeds("Mask ratios", machine, by_ratio),
        "large": lambda: speeds("ViT-L", machine, at_large(large)),
        "waits": lambda: waits(base),
    }
    if base.device == "cuda":
        parts["memory"] = lambda: memory(base)
    parts |= {
        "compiled": lambda: speeds("Compiled", machine, compiled(base)),
        "kernels": lambda: kernels(replace(base, compiles="default")),
        "beside": lambda: beside(base, is_small),
        "randaugment": lambda: randaugment(base),
        "augmentation": lambda: augmentation_table(base, machine, 3, COMMAND),
        "clips": lambda: speeds("Clips a step", machine, batches(base)),
        "checkpoint": lambda: checkpoint_table(base, 3, COMMAND),
    }
    return parts


def contestants(case: Case) -> list[Case]:
    return [
        case,
        replace(case, compiles="default"),
        replace(case, contestant="standard"),
        replace(case, contestant="standard", compiles="default"),
        replace(case, contestant="released"),
        replace(case, contestant="videomae"),
        replace(case, contestant="videomae-fp32", steps=min(case.steps, 5)),
    ]


def at_large(case: Case) -> list[Case]:
    training = [case, replace(case, compiles="default")]
    return training + [replace(each, training=False) for each in training]


def case_at(case: Case, ratio: float) -> Case:
    """Return our model at a mask ratio; nothing hidden is standard training."""
    return replace(case, contestant="mar" if ratio else "standard", ratio=ratio)


def compiled(case: Case) -> list[Case]:
    """What else changes a step's time or memory, at a full batch and where launches dominate."""
    one = replace(case, clips=1)
    return [
        replace(case, recomputes=True),
        replace(case, compiles="reduce-overhead"),
        one,
        replace(one, compiles="default"),
        replace(one, compiles="reduce-overhead"),
    ]


def batches(case: Case) -> list[Case]:
    sizes = [8, 16, 32, 128]
    if case.size == "tiny":
        sizes = [1, 2, 4]
    return [replace(case, clips=clips) for clips in sizes]


def speeds(title: str, machine: Machine, cases: list[Case]) -> Table:
    columns = (
        "contestant", "model", "ρ", "clips", "ms a step", "clips/s", "first row is", "MFU %",
        "of the roofline %", "limited by memory %", "peak GiB", "first step s", "target",
    )  # fmt: skip
    rows: list[tuple[str, ...]] = []
    ours = 0.0
    for case in cases:
        kind = "training" if case.training else "inference"
        model = f"ViT-{case.size}, {kind}"
        head = (describe(case), model, f"{case.settings.mask.ratio:.0%}", str(case.clips))
        if case.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            timed = time_case(case, None if case.compiles else machine)
        except Exception as error:
            traceback.print_exc()
            reason = f"not measured: {type(error).__name__}: {error}".splitlines()[0][:90]
            rows.append((*head, reason, *[""] * (len(columns) - len(head) - 1)))
            continue
        seconds = statistics.median(timed.seconds)
        ours = ours or seconds / case.clips
        target = TARGETS.get(model, "") if case.contestant == "mar" and case.ratio == 0.5 else ""
        rows.append((*head, *figures(timed, seconds, ours, machine), target))
        print(" | ".join(rows[-1]), flush=True)
    return Table(title, COMMAND, columns, rows, (machine.convention,))


def describe(case: Case) -> str:
    name: str = case.contestant
    if case.compiles:
        name += f", compiled: {case.compiles}"
    if case.recomputes:
        name += ", activations recomputed"
    return name


def figures(timed: Timed, seconds: float, ours: float, machine: Machine) -> tuple[str, ...]:
    clips = timed.case.clips
    roofline = ("", "")
    if timed.floor_s:
        roofline = (f"{100 * timed.floor_s / seconds:.0f}", f"{100 * timed.memory_share:.0f}")
    return (
        spread([1e3 * each for each in timed.seconds], 1),
        f"{clips / seconds:.0f}",
        f"{seconds / clips / ours:.2f} x as fast",
        f"{100 * timed.useful_operations / seconds / machine.peak_tflops / 1e12:.1f}",
        *roofline,
        f"{timed.peak_gib:.2f}",
        f"{timed.first_s:.1f}",
    )


def memory(case: Case) -> Table:
    """One clip at each ratio, beside Table V."""
    rows: list[tuple[str, ...]] = []
    for ratio, paper in PAPER_GB.items():
        settings = replace(case_at(case, ratio), clips=1).settings
        peak = peak_training_memory_gib(settings, 1)
        rows.append((f"{ratio:.0%}", f"{peak:.2f}", f"{paper:.2f}"))
    return Table("Memory of one clip", COMMAND, ("ρ", "peak GiB", "paper, G"), rows)


def waits(case: Case) -> Table:
    """Whether a step waits for the device: by PyTorch's own check, and by the profiler."""
    learner = train_state_of(case)
    batch = random_batch(case, torch.device(case.device))
    for _ in range(3):
        train_step(learner, batch)
    if case.device != "cuda":
        return Table("Does a step wait?", COMMAND, ("by", "answer"), [("", "this is a CPU")])
    torch.cuda.set_sync_debug_mode("error")
    try:
        train_step(learner, batch)
        answer = "no"
    except RuntimeError as error:
        answer = f"yes: {str(error).splitlines()[0]}"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        for _ in range(5):
            train_step(learner, batch)
    torch.cuda.synchronize()
    seen = [each for each in profiler.key_averages() if "Synchronize" in str(each.key)]
    found = ", ".join(f"{each.count} x {each.key}" for each in seen) or "none"
    rows = [
        ("torch.cuda.set_sync_debug_mode, one step", answer),
        ("the profiler's synchronisations, five steps (one is the profiler's own)", found),
    ]
    return Table("Does a step wait?", COMMAND, ("by", "answer"), rows)


def kernels(case: Case) -> Table:
    """Name the kernels that take most of a compiled step, attention's among them."""
    from torch.profiler import ProfilerActivity, profile

    learner = train_state_of(case)
    batch = random_batch(case, torch.device(case.device))
    for _ in range(3):
        train_step(learner, batch)
    kinds = [ProfilerActivity.CPU]
    column = "self_cpu_time_total"
    if case.device == "cuda":
        kinds.append(ProfilerActivity.CUDA)
        column = "self_device_time_total"
    with profile(activities=kinds) as profiler:
        train_step(learner, batch)
        synchronise(torch.device(case.device))
    averages = profiler.key_averages()
    # Operators' rows repeat the time of the kernels that they launch: kernels alone are counted.
    if case.device == "cuda":
        averages = [each for each in averages if "CUDA" in str(each.device_type)]
    times = sorted(
        ((float(getattr(each, column)), str(each.key)) for each in averages), reverse=True
    )
    whole = sum(time_us for time_us, _ in times)
    rows = [
        (key[:110].replace("|", "/"), f"{time_us / 1e3:.2f}", f"{100 * time_us / whole:.1f}")
        for time_us, key in times[:25]
    ]
    return Table("Kernels of a compiled step", COMMAND, ("kernel", "ms", "%"), rows)


def beside(case: Case, is_small: bool) -> Table:
    """Time 1, 2 and 4 small trials that share the device, each in a process of its own."""
    rows: list[tuple[str, ...]] = []
    alone = 0.0
    for number in (1, 2, 4):
        with processes(case, number, is_small) as children:
            for child in children:
                read(child, "ready")
            for child in children:
                assert child.stdin
                child.stdin.write("go\n")
                child.stdin.flush()
            rates = [float(read(child, "clips/s").split()[1]) for child in children]
        together = sum(rates)
        alone = alone or together
        each = " ".join(f"{rate:.0f}" for rate in rates)
        rows.append((str(number), each, f"{together:.0f}", f"{together / alone:.2f}"))
    case = small_trial(case)
    shape = f"{case.frames} × {case.pixels}², {case.clips} clips a step, ρ = {case.ratio:.0%}"
    note = f"ViT-{case.size}, {shape}; training on random clips for {WINDOW_S:g} s, no MPS."
    columns = ("trials", "clips/s of each", "clips/s together", "one alone is")
    return Table("Small trials beside each other", COMMAND, columns, rows, (note,))


def small_trial(case: Case) -> Case:
    if case.size == "tiny":
        return case
    return replace(case, size="small", pixels=128, clips=16)


@contextmanager
def processes(case: Case, number: int, is_small: bool) -> Iterator[list[subprocess.Popen[str]]]:
    command = [sys.executable, __file__, "--trial", "--device", case.device]
    if is_small:
        command.append("--small")
    pipe = subprocess.PIPE
    children = [
        subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) for _ in range(number)
    ]
    try:
        yield children
    finally:
        for child in children:
            child.kill()
            child.wait()


def read(child: subprocess.Popen[str], word: str) -> str:
    """Return the child's next line, which begins with a word."""
    assert child.stdout
    line = child.stdout.readline()
    if not line.startswith(word):
        raise RuntimeError(f"a trial's process ended early: {line!r}")
    return line


def run_trial(case: Case) -> None:
    """Train when told to, for a while; the other end is :func:`beside`."""
    case = small_trial(case)
    device = torch.device(case.device)
    learner = train_state_of(case)
    batch = random_batch(case, device)
    for _ in range(3):
        train_step(learner, batch)
    synchronise(device)
    print("ready", flush=True)
    sys.stdin.readline()
    started = time.perf_counter()
    steps = 0
    while time.perf_counter() - started < WINDOW_S:
        train_step(learner, batch)
        synchronise(device)
        steps += 1
    print(f"clips/s {steps * case.clips / (time.perf_counter() - started)}", flush=True)


def randaugment(case: Case) -> Table:
    """Time RandAugment on the device, and timm's with PIL on one core."""
    from PIL import Image
    from timm.data.auto_augment import rand_augment_transform

    from mar.augmentation.randaugment import draw_operations, rand_augment
    from mar.config.randaugment_policy import RandAugmentPolicy

    device = torch.device(case.device)
    batch = random_batch(case, device)
    pixels = batch.clips.flatten(0, 1).permute(0, 4, 1, 2, 3).float() / 255
    policy = RandAugmentPolicy.parse(RANDAUGMENT)
    times: list[float] = []
    for seed in range(12):
        operations = draw_operations(policy, case.clips, np.random.default_rng(seed))
        synchronise(device)
        started = time.perf_counter()
        rand_augment(pixels, operations)
        synchronise(device)
        times.append(case.clips / (time.perf_counter() - started))
    transform = rand_augment_transform(RANDAUGMENT, {"img_mean": (124, 116, 104)})
    frames = batch.clips[0, 0].cpu().numpy()
    images = [Image.fromarray(frame) for frame in frames]
    theirs: list[float] = []
    for _ in range(8):
        started = time.perf_counter()
        for image in images:
            transform(image)
        theirs.append(1 / (time.perf_counter() - started))
    rows = [
        ("ours, on the device", spread(times[2:], 0)),
        ("timm, PIL, one core (each frame draws anew)", spread(theirs[1:], 0)),
    ]
    return Table("RandAugment", COMMAND, ("where", "clips/s"), rows)


if __name__ == "__main__":
    main()
