"""Contestants side by side: every round runs each of them once, in a fresh process.

So a minute in which the machine is slow affects all of them.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace

from mar.bench.machine import Machine
from mar.bench.steps import CONTESTANTS, Case, Timed
from mar.bench.tables import Table, spread
from mar.errors import UserError

Say = Callable[[str], None]
COLUMNS = (
    "contestant", "ms a step", "clips/s", "MAR is", "MFU %", "roofline ms",
    "limited by memory %", "of the roofline %",
    "bandwidth %", "peak GiB", "first step s",
)  # fmt: skip


def step_cases(case: Case) -> list[Case]:
    """Return the contestants of one setting.

    Ours as trials run it, the peers as their users run them, and the peers with our allocator.
    """
    is_cpu = case.device == "cpu"
    ours = [replace(case, contestant=each, keeps_memory=is_cpu) for each in ("mar", "standard")]
    if not is_cpu:
        compiled = [replace(each, compiles="default") for each in ours]
        ours += [*compiled, replace(case, compiles="reduce-overhead")]
        ours += [replace(case, recomputes=True)] if case.training else []
    peers = [replace(case, contestant=each) for each in ("released", "videomae")]
    peers += [replace(each, keeps_memory=True) for each in peers] if is_cpu else []
    return [*ours, *peers, replace(case, contestant="videomae-fp32")]


def contest(cases: Sequence[Case], machine: Machine, rounds: int, say: Say) -> list[Timed | str]:
    """Time every case ``rounds`` times; of one that cannot run, return why."""
    results: list[Timed | str | None] = [None] * len(cases)
    for number in range(rounds):
        for index, case in enumerate(cases):
            known = results[index]
            if isinstance(known, str):
                continue
            say(f"round {number + 1} of {rounds}: {name_of(case)}")
            new = _in_a_process(case, machine if number == 0 and not case.compiles else None)
            if isinstance(known, Timed) and isinstance(new, Timed):
                first = statistics.median([known.first_s, new.first_s])
                new = replace(known, seconds=known.seconds + new.seconds, first_s=first)
            results[index] = new
    return [each for each in results if each is not None]


def _in_a_process(case: Case, machine: Machine | None) -> Timed | str:
    payload = json.dumps({"case": asdict(case), "machine": asdict(machine) if machine else None})
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-m", "mar.bench.steps", payload], capture_output=True, text=True
    )
    if done.returncode:  # killed for its memory, mostly
        last = done.stderr.strip().splitlines()[-1:] or [""]
        return f"its process ended with {done.returncode} {last[0][:100]}".rstrip()
    found = json.loads(done.stdout.splitlines()[-1])
    if "missing" in found:
        return str(found["missing"])
    return Timed(**(found | {"case": case}))


def name_of(case: Case) -> str:
    """Return what a row is called."""
    extras = [f"compiled ({case.compiles})"] if case.compiles else []
    extras += ["activations recomputed"] if case.recomputes else []
    if case.keeps_memory and case.contestant not in ("mar", "standard"):
        extras.append("our allocator setting")
    return ", ".join([CONTESTANTS[case.contestant], *extras])


def table(
    title: str,
    command: str,
    results: Sequence[Timed | str],
    cases: Sequence[Case],
    machine: Machine,
) -> Table:
    """Return the table of a contest; the first row is ours, to which the others are held.

    Raises:
        UserError: ours could not be measured.
    """
    first = results[0]
    if isinstance(first, str):
        raise UserError(f"{name_of(cases[0])}: {first}: take fewer --clips or a smaller --size")
    ours = statistics.median(first.seconds)
    rows = [_row(*pair, ours, machine) for pair in zip(cases, results, strict=True)]
    return Table(title, command, COLUMNS, rows, (machine.convention,))


def _row(case: Case, timed: Timed | str, ours_s: float, machine: Machine) -> tuple[str, ...]:
    if isinstance(timed, str):
        return (name_of(case), timed, *[""] * (len(COLUMNS) - 2))
    seconds = statistics.median(timed.seconds)
    roofline = [
        f"{1e3 * timed.floor_s:.1f}",
        f"{100 * timed.memory_share:.0f}",
        f"{100 * timed.floor_s / seconds:.0f}",
    ]
    bandwidth = f"{100 * timed.bytes / seconds / machine.copy_gb_s / 1e9:.0f}"
    return (
        name_of(case),
        spread([1e3 * each for each in timed.seconds], 1 if seconds < 1 else 0),
        f"{case.clips / seconds:.{1 if seconds * 100 < case.clips else 2}f}",
        f"{seconds / ours_s:.2f} x as fast",
        f"{100 * timed.useful_operations / seconds / machine.peak_tflops / 1e12:.1f}",
        *([*roofline, bandwidth] if timed.floor_s else [""] * 4),
        f"{timed.peak_gib:.2f}",
        f"{timed.first_s:.1f}",
    )
