"""What a checkpoint costs the step: written in its place, and beside the training, in turn.

    python benchmarks/checkpoints.py [paper/ssv2_vit_b] [--rounds 5]

Steps are those of a recipe's model on random clips, few and small (``--frames``, ``--clips``), since what is measured is
the time between them. It writes ``benchmarks/checkpoints_DATE.md``.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from mar.checkpoint import Progress, Saver, State, save
from mar.keep import Keep
from mar.masking import training_mask
from mar.model import MAR
from mar.optim import build_optimizer
from orchestration.study import read_recipe

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="paper/ssv2_vit_b")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clips", type=int, default=1)
    parser.add_argument("--steps", type=int, default=3, help="after each checkpoint")
    told = parser.parse_args()
    settings = read_recipe(told.recipe, ["encoder.weights=null"])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = MAR(settings).to(device)
    optimizer = build_optimizer(model, settings.recipe)
    generator, clip = torch.Generator().manual_seed(0), settings.clip
    pixels = torch.rand(told.clips, 3, clip.frames, clip.size, clip.size, device=device)
    labels = torch.full((told.clips, settings.data.num_classes), 1 / settings.data.num_classes, device=device)

    def step() -> None:
        losses = model(pixels, training_mask(settings.mask, settings.grid, told.clips, generator), labels)
        losses.total.mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize()

    waited: dict[str, list[float]] = {"in its place": [], "beside the training": []}
    slowed: dict[str, list[float]] = {"alone": [], "while one is written": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        step()  # makes the optimiser's state
        with Saver(folder / "beside", settings, Keep(last=1)) as saver:
            saver.save(model, optimizer, Progress(step=0))  # makes the buffers
            for number in range(1, told.rounds + 1):
                saver.wait()
                slowed["alone"].append(timed(step))
                waited["in its place"].append(
                    timed(
                        lambda number=number: save(
                            folder / "placed",
                            settings,
                            State(model.state_dict(), optimizer.state_dict(), Progress(step=number)),
                            Keep(last=1),
                        )
                    )
                )
                waited["beside the training"].append(
                    timed(lambda number=number: saver.save(model, optimizer, Progress(step=number)))
                )
                slowed["while one is written"].append(timed(step))
        size_gib = sum(file.stat().st_size for file in (folder / "beside").rglob("*") if file.is_file()) / 2**30
    text = "\n".join(
        [
            f"# Checkpoints, {time.strftime('%Y-%m-%d')}",
            "",
            f"`python benchmarks/checkpoints.py {told.recipe}`: {size_gib:.2f} GiB, {told.rounds} rounds, taken in turn; "
            f"{torch.cuda.get_device_name() if device.type == 'cuda' else 'CPU, 2 threads at most'}, torch {torch.__version__}, "
            f"Python {platform.python_version()}.",
            "",
            "| | median s | spread |",
            "|:--|--:|--:|",
            *(
                f"| {what} {kind} | {statistics.median(values):.3f} | {min(values):.3f} to {max(values):.3f} |"
                for what, table in (("the training waits, written", waited), ("a step", slowed))
                for kind, values in table.items()
            ),
            "",
        ]
    )
    print(text)
    (HERE / f"checkpoints_{time.strftime('%Y-%m-%d')}.md").write_text(text)


def timed(do: Callable[[], object]) -> float:
    began = time.perf_counter()
    do()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
