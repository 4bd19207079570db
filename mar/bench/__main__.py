"""``python -m mar.bench``: what needs neither Ray nor MLflow. ``mar bench`` has the rest too."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from mar.bench import run
from mar.bench.machine import this_machine
from mar.bench.steps import case_of
from mar.errors import UserError


def main() -> None:
    """Measure the parts that the command line names, print them and write the file."""
    parser = argparse.ArgumentParser(prog="python -m mar.bench", description=run.__doc__)
    parser.add_argument("parts", nargs="*", help=f"{', '.join(run.PARTS)}; none: all")
    parser.add_argument("--size", default="base", help="of the encoder: base, large, …")
    parser.add_argument("--ratio", type=float, default=0.5, help="mask ratio ρ")
    parser.add_argument("--clips", type=int, help="of a step; none: 2 on the CPU, 32 on a GPU")
    parser.add_argument("--precision", default="bf16", choices=["bf16", "fp32"])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, help="timed in each round")
    parser.add_argument(
        "--videos", type=Path, help="folder of videos for the loader; none: videos that are made"
    )
    parser.add_argument(
        "--output", type=Path, help="none: a file of this machine and date below benchmarks/"
    )
    args = parser.parse_args()
    try:
        case = case_of(args.size, args.ratio, args.clips, args.precision, args.steps)
        machine = this_machine(torch.device(case.device), case.precision)
        file = args.output or run.default_file(machine)
        for part in args.parts or run.PARTS:
            if part not in run.PARTS:
                raise UserError(f"{part}: no such part; there are {', '.join(run.PARTS)}")
            run.measure(part, case, machine, args.rounds, args.videos, file, "python -m mar.bench")
    except UserError as error:
        sys.exit(f"error: {error}")
    print(f"written: {file}")


if __name__ == "__main__":
    main()
