"""Times a training step under each mask strategy, in turn, beside hiding at random.

    python benchmarks/mask_step.py --clips 2 --rounds 5

One step of each strategy after the other, so that whatever else the machine does meets all of them.
The selection alone is timed too: what a mask that sees the clip does before the model begins.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from typing import Any

import torch

from mar.config.overrides import build
from mar.model.encoder import patchify
from mar.model.mar import MAR
from mar.model.masking import training_mask

STRATEGIES: dict[str, dict[str, Any]] = {
    "random": {"strategy": "random", "motion": "standard"},
    "cell, running": {},
    "cell, motion chooses": {"choice": "motion"},
    "cell, half by motion": {"choice": "motion", "content": 0.5},
    "motion": {"strategy": "motion"},
    "redundancy": {"strategy": "redundancy"},
    "static": {"strategy": "static"},
    "static, with lengths": {"strategy": "static", "lengths": True},
}


def main() -> None:
    """Print a table of the strategies: seconds of a step and of the selection, and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--clips", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size", default="base")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    settings = {
        name: build({"encoder": {"size": given.size}, "mask": mask})
        for name, mask in STRATEGIES.items()
    }
    models = {name: MAR(each).train() for name, each in settings.items()}
    pixels = torch.rand(given.clips, 3, 16, 224, 224)
    labels = torch.full((given.clips, 174), 1 / 174)
    steps: dict[str, list[float]] = {name: [] for name in STRATEGIES}
    selections: dict[str, list[float]] = {name: [] for name in STRATEGIES}
    # The first round warms up, and is not counted.
    for number in range(given.rounds + 1):
        for name, model in models.items():
            each = settings[name]
            generator = torch.Generator().manual_seed(number)
            drawn = training_mask(each.mask, each.grid, given.clips, generator)
            tubelets = patchify(pixels, each.encoder.tubelet)
            began = time.perf_counter()
            model.masked(drawn, tubelets)
            selected = time.perf_counter() - began
            began = time.perf_counter()
            model(pixels, drawn, labels).total.mean().backward()
            stepped = time.perf_counter() - began
            model.zero_grad(set_to_none=True)
            if number:
                selections[name].append(selected)
                steps[name].append(stepped)
    print(
        f"{platform.machine()}, {given.threads} thread(s), float32, ViT of size {given.size}, "
        f"{given.clips} clip(s) of 16 × 224², ρ = 50 %, median of {given.rounds} rounds\n"
    )
    print("| mask | selection, ms a clip | step, s | beside random |\n|:--|--:|--:|--:|")
    for name in STRATEGIES:
        selection = 1000 * statistics.median(selections[name]) / given.clips
        step = statistics.median(steps[name])
        # Ratios within a round: other work beside lasts longer than one.
        ratio = statistics.median(
            one / other for one, other in zip(steps[name], steps["random"], strict=True)
        )
        print(f"| {name} | {selection:.1f} | {step:.2f} | {ratio - 1:+.1%} |")


if __name__ == "__main__":
    main()
