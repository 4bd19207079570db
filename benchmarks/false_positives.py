"""How often two settings that do not differ are told apart, and how often two that do are.

    python benchmarks/false_positives.py -o benchmarks/false_positives_DATE.md

Simulated trainings are compared as tables and claims compare them (``orchestration.reporting``). A
video is right where its score is above 0. The score is the sum of how easy the video is, of what
the setting adds on that video (so two settings differ over videos even where their accuracies over
all possible videos are equal), of what a seed adds to all videos (its spread in points is the
column ``seeds'``), and of what a seed adds on that video. All are normal; about 71 % are right, and
two trainings of one setting differ on about one video in six. Each simulation draws new videos, new
settings and new seeds.

The second table is of rows that test the same trainings in two ways: what a training adds (five
points' spread) is in both rows. «by test» is the spread of what a training adds in one of the tests
alone.

With one training a row the question is about these two models, so there the seeds' spread is 0;
what it would be with a spread is given beside it: the reason why such a verdict says «in one
training».
"""

from __future__ import annotations

import argparse
import sys
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
from scipy import stats

from mar.bench.tables import Table, write
from orchestration.reporting.paired_tests import Correctness, compare

COMMAND = "python benchmarks/false_positives.py"
EASE, SETTING, BOTH = 1.0, 0.25, 0.45
"""Standard deviations of a score's parts: video, setting on video, seed on video."""
ACCURACY = 0.71
LEVEL = 0.05


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--simulations", type=int, default=4000)
    parser.add_argument(
        "--same-trainings", action="store_true", help="only the table of the same trainings"
    )
    default = Path(f"benchmarks/false_positives_{date.today().isoformat()}.md")
    parser.add_argument("-o", "--output", type=Path, default=default)
    args = parser.parse_args()
    rows: list[tuple[str, ...]] = []
    for videos in () if args.same_trainings else (2000, 24777):
        for seeds in (1, 2, 3, 5):
            for spread in (0.0, 0.15, 0.3, 0.5):
                rates = [
                    rejected(videos, seeds, spread, gap, args.simulations)
                    for gap in (0.0, 0.5, 1.0, 2.0)
                ]
                cells = [f"{100 * rate:.1f}" for rate in rates]
                rows.append((f"{videos:,}", str(seeds), f"{spread:g}", *cells))
                print(" | ".join(rows[-1]), flush=True)
    columns = (
        "test videos", "seeds a row", "seeds' standard deviation, points",
        "told apart at a true difference of 0, %", "0.5 points", "1 point", "2 points",
    )  # fmt: skip
    error = 100 * (LEVEL * (1 - LEVEL) / args.simulations) ** 0.5
    note = (
        f"{args.simulations} simulations a cell, at 5 %; the standard error of 5 % is "
        f"{error:.2f}. With one "
        "seed and a spread above 0 the rate is that of a difference between two trainings, not "
        "between settings."
    )
    heading = [f"# False positives of the paired tests, {date.today().isoformat()}"]
    tables = [Table("False positives", COMMAND, columns, rows, (note,))]
    tables.append(of_the_same_trainings(args.simulations))
    write(args.output, heading, [table for table in tables if table.rows])


def of_the_same_trainings(simulations: int) -> Table:
    """Return the rates for rows that test the same trainings in two ways."""
    rows: list[tuple[str, ...]] = []
    for seeds in (2, 3, 5):
        for by_test in (0.0, 0.3, 1.0):
            rates = [
                rejected(2000, seeds, 5.0, gap, simulations, by_test)
                for gap in (0.0, 0.5, 1.0, 2.0)
            ]
            cells = [f"{100 * rate:.1f}" for rate in rates]
            rows.append(("2,000", str(seeds), "5", f"{by_test:g}", *cells))
            print(" | ".join(rows[-1]), flush=True)
    columns = (
        "test videos", "trainings", "their standard deviation, points", "by test, points",
        "told apart at a true difference of 0, %", "0.5 points", "1 point", "2 points",
    )  # fmt: skip
    return Table("Two tests of the same trainings", COMMAND, columns, rows)


def rejected(
    videos: int,
    seeds: int,
    spread: float,
    gap: float,
    simulations: int,
    by_test: float | None = None,
) -> float:
    """Return the share of simulations in which two settings are told apart.

    ``spread`` and ``gap`` are in points of accuracy. With ``by_test``, points too, both rows test
    the same trainings.
    """
    rng = np.random.default_rng([videos, seeds, round(1000 * spread), round(1000 * gap)])
    whole = (EASE**2 + SETTING**2 + BOTH**2) ** 0.5
    mean = whole * stats.norm.ppf(ACCURACY)
    slope = 100 * stats.norm.pdf(mean / whole) / whole  # points of accuracy for each unit of score
    output = 0
    for _ in range(simulations):
        ease = mean + EASE * rng.standard_normal(videos, dtype=np.float32)
        rows: list[list[Correctness]] = []
        shared = spread / slope * rng.standard_normal(seeds)
        shared_on_video = BOTH * rng.standard_normal((seeds, videos), dtype=np.float32)
        for shift in (gap / 2, -gap / 2):
            setting = ease + shift / slope + SETTING * rng.standard_normal(videos, dtype=np.float32)
            if by_test is None:
                own = spread / slope * rng.standard_normal(seeds)
                on_video = BOTH * rng.standard_normal((seeds, videos), dtype=np.float32)
            else:
                own = shared + by_test / slope * rng.standard_normal(seeds)
                on_video = shared_on_video
            rows.append(
                [
                    Correctness(
                        setting + own[seed] + on_video[seed] > 0,
                        "the same videos",
                        list,
                        "" if by_test is None else f"training {seed}",
                    )
                    for seed in range(seeds)
                ]
            )
        comparison = compare(*rows)
        assert comparison
        output += comparison.p < LEVEL
    return output / simulations


if __name__ == "__main__":
    main()
