"""What a sweep costs besides the training: now and at an earlier commit, in turn.

    python benchmarks/sweep.py [--before COMMIT] [--backends local inline train] [--trials 6]
        [--rounds 2]

A study of tiny trainings (one epoch of sixteen clips) is run by the command line, by the package
here and by that of an earlier commit (checked out beside, under the same interpreter). It is timed
from outside: from the start of the command to the first trial's own code, and from each trial's end
to the next one's; of that, the training's own time is taken out.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from itertools import pairwise
from pathlib import Path

import yaml

from mar.data.motion_verbs import MotionVerbs, make

HERE = Path(__file__).parent
ROOT = HERE.parent
RECIPE = {
    "data": {
        "format": "ssv2",
        "videos": "videos",
        "train": "train.json",
        "val": "validation.json",
        "num_classes": 2,
    },
    "clip": {"frames": 8, "size": 16},
    "encoder": {"size": "custom", "width": 16, "depth": 1, "heads": 2, "tubelet": [2, 4, 4]},
    "classifier": {"width": 16, "depth": 1, "heads": 2},
    "reconstruction": {"width": 16, "depth": 1, "heads": 2},
    "recipe": {"epochs": 1, "batch_size": 8, "warmup_epochs": 0, "precision": "fp32"},
    "evaluation": {"clips": 1, "crops": 1},
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--before", default="6c0f13e", help="the commit to compare with")
    parser.add_argument("--backends", nargs="+", default=["local", "inline", "train"])
    parser.add_argument("--trials", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument(
        "--output", type=Path, default=HERE / f"sweep_{date.today().isoformat()}.md"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        earlier = scratch / "earlier"
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run(
            [*git, "add", "--detach", str(earlier), args.before], check=True, capture_output=True
        )
        try:
            found = {
                (backend, when, number): one(scratch, root, backend, args.trials)
                for number in range(args.rounds)
                for backend in args.backends
                for when, root in (("before", earlier), ("now", ROOT))
            }
            helps = {when: helped(root) for when, root in (("before", earlier), ("now", ROOT))}
        finally:
            subprocess.run(
                [*git, "remove", "--force", str(earlier)], check=True, capture_output=True
            )
    text = table(found, helps, args)
    args.output.write_text(text, encoding="utf-8")
    print(text)


def study_in(folder: Path, num_trials: int) -> Path:
    """Write data, recipe and study; return the study."""
    make(folder / "data", MotionVerbs(size=32, frames=8, classes=2, train=16, validation=8))
    recipe = {**RECIPE, "data": {**RECIPE["data"], "root": str(folder / "data")}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    rates = {
        f"rate {number}": {"recipe.base_lr": 0.001 * (number + 1)} for number in range(num_trials)
    }
    study = {
        "title": "Many",
        "recipe": "recipe.yaml",
        "axes": {"rate": rates},
        "table": {"columns": ["top1"]},
    }
    (folder / "study.yaml").write_text(yaml.safe_dump(study, allow_unicode=True))
    return folder / "study.yaml"


def one(
    scratch: Path, root: Path, backend: str, num_trials: int
) -> tuple[float, float, float, float]:
    """Run the study.

    Return seconds to the first trial's code, per trial and besides its training, and in all.
    """
    with tempfile.TemporaryDirectory(dir=scratch) as name:
        folder = Path(name)
        study, store = study_in(folder, num_trials), folder / "store"
        command = [
            sys.executable,
            "-m",
            "orchestration",
            "run",
            str(study),
            "--store",
            str(store),
            "--max-concurrent-trials",
            "1",
        ]
        command += ["--backend", "local"] if backend == "local" else ["--backend", backend]
        begins: dict[str, float] = {}
        ends: dict[str, float] = {}
        started = time.time()
        with (folder / "out.txt").open("w") as out:
            running = subprocess.Popen(
                command,
                cwd=folder,
                env=os.environ | {"PYTHONPATH": str(root)},
                stdout=out,
                stderr=out,
            )
            while running.poll() is None:
                for trial in (store / "trials").glob("*"):
                    if (
                        trial.name not in begins
                        and (log := trial / "logs" / "worker0.txt").exists()
                    ):
                        begins[trial.name] = log.stat().st_mtime if not begins else time.time()
                    if (
                        trial.name not in ends
                        and (seal := trial / "result" / "manifest.json").exists()
                    ):
                        ends[trial.name] = seal.stat().st_mtime
                time.sleep(0.02)
        whole = time.time() - started
        if running.returncode:
            sys.exit((folder / "out.txt").read_text())
        inside = [
            json.loads((store / "trials" / trial / "result" / "metrics.json").read_text())[
                "time/elapsed_s"
            ]
            for trial in ends
        ]
        times = sorted(ends.values())
        per_trial = statistics.median(later - sooner for sooner, later in pairwise(times))
        print(backend, root.name, f"{per_trial:.2f}", file=sys.stderr)
        return (
            min(begins.values()) - started,
            per_trial,
            per_trial - statistics.median(inside),
            whole,
        )


def helped(root: Path) -> float:
    """Return the median seconds of ``mar --help``."""
    times: list[float] = []
    for _ in range(7):
        started = time.perf_counter()
        command = [sys.executable, "-m", "orchestration", "--help"]
        subprocess.run(
            command, env=os.environ | {"PYTHONPATH": str(root)}, capture_output=True, check=True
        )
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def table(
    found: dict[tuple[str, str, int], tuple[float, float, float, float]],
    helps: dict[str, float],
    args: argparse.Namespace,
) -> str:
    """Return what the file says."""
    lines = [
        f"# A sweep's own time, {date.today().isoformat()}",
        "",
        f"`python benchmarks/sweep.py --before {args.before} --trials {args.trials} --rounds "
        f"{args.rounds}`: medians of the "
        f"rounds, seconds; {os.cpu_count()} cores, Python {platform.python_version()}.",
        "",
        "| backend | | to the first trial's code | a trial, end to end | of that, not training | "
        "the whole command |",
        "|:--|:--|--:|--:|--:|--:|",
    ]
    for backend in args.backends:
        for when in ("before", "now"):
            rounds = [
                values for (one_, at, _), values in found.items() if (one_, at) == (backend, when)
            ]
            medians = [statistics.median(column) for column in zip(*rounds, strict=True)]
            lines.append(
                f"| {backend} | {when} | " + " | ".join(f"{value:.2f}" for value in medians) + " |"
            )
    helps_said = ", ".join(f"{when} {seconds:.2f} s" for when, seconds in helps.items())
    return "\n".join([*lines, "", f"`mar --help`: {helps_said}.", ""])


if __name__ == "__main__":
    main()
