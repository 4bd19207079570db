"""``python -m mar.bench``: the benchmarks without Ray and MLflow, which a GPU machine may lack.

``mar bench`` runs the same parts.
"""

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
    """Measure the parts named on the command line, print their tables and write them to a file."""
    args = _parser().parse_args()
    try:
        case = case_of(args.size, args.ratio, args.clips, args.precision, args.steps)
        # Measured once: every part states its shares of the same rates.
        machine = this_machine(torch.device(case.device), case.precision)
        # One file for all parts: each part replaces its own table alone.
        file = args.output or run.default_file(machine)
        for part in args.parts or run.PARTS:
            if part not in run.PARTS:
                raise UserError(f"{part}: no such part; the parts are {', '.join(run.PARTS)}")
            run.measure(part, case, machine, args.rounds, args.videos, file, "python -m mar.bench")
    except UserError as error:
        # A mistake of the user is reported in one line, without a traceback.
        sys.exit(f"error: {error}")
    print(f"written: {file}")


def _parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(prog="python -m mar.bench", description=run.__doc__)
    parser.add_argument("parts", nargs="*", help=f"{', '.join(run.PARTS)}; default: all")
    parser.add_argument("--size", default="base", help="encoder size: base, large, …")
    parser.add_argument("--ratio", type=float, default=0.5, help="mask ratio ρ")
    parser.add_argument(
        "--clips", type=int, help="clips per step; default: 2 on the CPU, 32 on a GPU"
    )
    parser.add_argument("--precision", default="bf16", choices=["bf16", "fp32"])
    parser.add_argument("--rounds", type=int, default=2, help="each runs every contestant in turn")
    parser.add_argument("--steps", type=int, help="steps timed in each round")
    parser.add_argument(
        "--videos",
        type=Path,
        help="folder of videos for the loader; default: videos generated for the benchmark",
    )
    parser.add_argument(
        "--output",
        type=Path,
        help="file to write; default: below benchmarks/, named after this machine and the date",
    )
    return parser


if __name__ == "__main__":
    main()
