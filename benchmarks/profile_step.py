"""Where a training step's time goes, at an earlier commit and now: a picture.

    python benchmarks/profile_step.py [--before COMMIT] [-o docs/step_profile.png]

ViT-B, 16 × 224², ρ = 50 %, bf16, two clips on the CPU; each version in a process of its own, in
turn, the median of some steps. Operations are timed by PyTorch's profiler, and scaled to a step
without it. Also printed: the time that the process spent in the kernel, which is mostly for being
handed memory.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib as mpl

mpl.use("agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).parent.parent
GROUPS = {
    "linear layers": ("aten::mm", "aten::addmm"),
    "attention": ("flash_attention", "aten::bmm", "softmax", "aten::baddbmm"),
    "norms, GELU, sums": ("norm", "gelu", "aten::add", "aten::mul", "aten::sum"),
    "copies and casts": ("copy", "cat", "index", "gather", "clone", "contiguous", "fill"),
    "AdamW": ("adam",),
    "the rest": ("",),
}
INSIDE = """
import json, resource, sys, time, torch
from torch.profiler import ProfilerActivity, profile
from mar.model.masking import training_mask
from mar.model.mar import MAR
from mar.training.optim import build_optimizer
from mar.config.overrides import build
try:
    from mar.training.allocator import keep_freed_memory
    keep_freed_memory()
except ImportError:
    pass
settings = build({"data": {"num_classes": 174}, "mask": {"ratio": 0.5},
                  "recipe": {"batch_size": 2}})
torch.manual_seed(0)
model = MAR(settings)
optimizer = build_optimizer(model, settings.recipe)
pixels, labels = torch.rand(2, 3, 16, 224, 224), torch.full((2, 174), 1 / 174)
generator = torch.Generator().manual_seed(0)
def step():
    hidden = training_mask(settings.mask, settings.grid, 2, generator)
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(pixels, hidden, labels)
    losses.total.mean().backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
step(); step()
times, system = [], []
for _ in range(4):
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_stime, time.perf_counter()
    step()
    times.append(time.perf_counter() - started)
    system.append(resource.getrusage(resource.RUSAGE_SELF).ru_stime - before)
with profile(activities=[ProfilerActivity.CPU]) as found:
    step()
ops = {each.key: each.self_cpu_time_total / 1e6 for each in found.key_averages()}
print(json.dumps({"seconds": times, "system_s": system, "ops": ops}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--before", default="6c0f13e")
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "docs" / "step_profile.png")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        earlier = Path(name) / "earlier"
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run(
            [*git, "add", "--detach", str(earlier), args.before], check=True, capture_output=True
        )
        try:
            rounds = [(profiled(earlier), profiled(ROOT)) for _ in range(2)]
        finally:
            subprocess.run(
                [*git, "remove", "--force", str(earlier)], check=True, capture_output=True
            )
    bars = {
        f"before ({args.before})": [each[0] for each in rounds],
        "now": [each[1] for each in rounds],
    }
    draw(bars, args.output)


def profiled(root: Path) -> dict[str, float]:
    """Return a step's seconds by group, scaled to an unprofiled step; and of the system."""
    env = os.environ | {"PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, "-c", INSIDE],
        env=env,
        capture_output=True,
        text=True,
        check=True,
        cwd=root,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    groups = dict.fromkeys(GROUPS, 0.0)
    for name, seconds in found["ops"].items():
        groups[
            next(group for group, parts in GROUPS.items() if any(part in name for part in parts))
        ] += seconds
    step = statistics.median(found["seconds"])
    scale = step / sum(groups.values())
    print(
        f"{root.name}: {step:.2f} s a step, {statistics.median(found['system_s']):.2f} s of both "
        "cores in the kernel"
    )
    return {group: scale * seconds for group, seconds in groups.items()}


def draw(bars: dict[str, list[dict[str, float]]], file: Path) -> None:
    figure, axes = plt.subplots(figsize=(9, 2.6), layout="constrained")
    for output, (name, rounds) in enumerate(bars.items()):
        left = 0.0
        for number, group in enumerate(GROUPS):
            seconds = statistics.median(each[group] for each in rounds)
            axes.barh(
                output, seconds, left=left, color=f"C{number}", label=group if output == 0 else None
            )
            if seconds > 0.12:
                axes.text(
                    left + seconds / 2,
                    output,
                    f"{seconds:.2f}",
                    ha="center",
                    va="center",
                    color="white",
                )
            left += seconds
        axes.text(left + 0.03, output, f"{left:.2f} s", va="center")
        print(
            name,
            {
                group: round(statistics.median(each[group] for each in rounds), 3)
                for group in GROUPS
            },
        )
    axes.set_yticks(range(len(bars)), list(bars))
    axes.invert_yaxis()
    axes.set_xlabel(
        "seconds of a training step: ViT-B, 16 × 224², ρ = 50 %, bf16, 2 clips, 2 cores"
    )
    figure.legend(ncols=3, loc="outside upper center", frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.1)
    figure.savefig(file, dpi=150)


if __name__ == "__main__":
    main()
