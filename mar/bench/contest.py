"""Comparison of contestants: each round times every contestant once, in a fresh process.

The contestants alternate, so a period in which the machine is slow affects all of them and not one.
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
"""Receives the messages that report progress."""
COLUMNS = (
    "contestant",
    "ms a step",
    "clips/s",
    "MAR is",
    "MFU %",
    "roofline ms",
    "limited by memory %",
    "of the roofline %",
    "bandwidth %",
    "peak GiB",
    "first step s",
)


def step_cases(case: Case) -> list[Case]:
    """Return the contestants of one setting; the first is MAR as our trials run it.

    Peers run as their users run them. On the CPU they also run with our allocator setting, because
    most of our lead over the released step comes from it there (docs/log.md, 2026-11-26).
    """
    is_cpu = case.device == "cpu"
    ours = [replace(case, contestant=each, keeps_memory=is_cpu) for each in ("mar", "standard")]
    peers = [replace(case, contestant=each) for each in ("released", "videomae")]
    if is_cpu:
        peers += [replace(each, keeps_memory=True) for each in peers]
    else:
        ours += [replace(each, compiles="default") for each in ours]
        ours.append(replace(case, compiles="reduce-overhead"))
        # Activations are recomputed in the backward pass, which inference does not have.
        if case.training:
            ours.append(replace(case, recomputes=True))
    return [*ours, *peers, replace(case, contestant="videomae-fp32")]


def contest(cases: Sequence[Case], machine: Machine, rounds: int, say: Say) -> list[Timed | str]:
    """Time every case ``rounds`` times; returns for each its times, or why it cannot run."""
    results: list[Timed | str | None] = [None] * len(cases)
    for number in range(rounds):
        for index, case in enumerate(cases):
            known = results[index]
            # A case that could not run is not tried again.
            if isinstance(known, str):
                continue
            say(f"round {number + 1} of {rounds}: {name_of(case)}")
            # The roofline costs one more step and every round would find the same one, so the first
            # round alone records it. Compiled steps have none.
            roofline_machine = None
            if number == 0 and not case.compiles:
                roofline_machine = machine
            new = _time_in_process(case, roofline_machine)
            if isinstance(known, Timed) and isinstance(new, Timed):
                first = statistics.median([known.first_s, new.first_s])
                new = replace(known, seconds=known.seconds + new.seconds, first_s=first)
            results[index] = new
    return [each for each in results if each is not None]


def _time_in_process(case: Case, machine: Machine | None) -> Timed | str:
    """Run ``mar.bench.steps`` for a case; returns its times, or why it did not finish."""
    machine_fields = None
    if machine is not None:
        machine_fields = asdict(machine)
    payload = json.dumps({"case": asdict(case), "machine": machine_fields})
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-m", "mar.bench.steps", payload], capture_output=True, text=True
    )
    # Usually the system killed it because it ran out of memory.
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [""]
        return f"its process exited with code {done.returncode} {lines[-1][:100]}".rstrip()
    # The result is the last line: libraries may have printed others before it.
    answer = json.loads(done.stdout.splitlines()[-1])
    if "missing" in answer:
        return str(answer["missing"])
    return Timed(**(answer | {"case": case}))


def name_of(case: Case) -> str:
    """Return the name of a case's row: the contestant and how it runs."""
    parts = [CONTESTANTS[case.contestant]]
    if case.compiles:
        parts.append(f"compiled ({case.compiles})")
    if case.recomputes:
        parts.append("activations recomputed")
    # Our own contestants always run with it on the CPU, so their names do not mention it.
    if case.keeps_memory and case.contestant not in ("mar", "standard"):
        parts.append("our allocator setting")
    return ", ".join(parts)


def table(
    title: str,
    command: str,
    results: Sequence[Timed | str],
    cases: Sequence[Case],
    machine: Machine,
) -> Table:
    """Return the table of a comparison; the first row is ours, the reference for the other rows.

    Raises:
        UserError: our own case could not be measured.
    """
    first = results[0]
    if isinstance(first, str):
        raise UserError(f"{name_of(cases[0])}: {first}: use fewer --clips or a smaller --size")
    ours_s = statistics.median(first.seconds)
    rows = [_row(case, timed, ours_s, machine) for case, timed in zip(cases, results, strict=True)]
    return Table(title, command, COLUMNS, rows, (machine.convention,))


def _row(case: Case, timed: Timed | str, ours_s: float, machine: Machine) -> tuple[str, ...]:
    """Return the cells of a contestant; where it has no times, its name and the reason."""
    if isinstance(timed, str):
        return (name_of(case), timed, *[""] * (len(COLUMNS) - 2))
    seconds = statistics.median(timed.seconds)
    # Small figures get one digit more.
    ms_digits = 1 if seconds < 1 else 0
    rate_digits = 1 if seconds * 100 < case.clips else 2
    # In percent; the machine's rates are in 10¹² operations and 10⁹ bytes a second.
    mfu = 100 * timed.useful_operations / seconds / machine.peak_tflops / 1e12
    # A compiled step has no roofline: its cells are empty.
    roofline = [""] * 4
    if timed.floor_s:
        bandwidth = 100 * timed.bytes / seconds / machine.copy_gb_s / 1e9
        roofline = [
            f"{1e3 * timed.floor_s:.1f}",
            f"{100 * timed.memory_share:.0f}",
            f"{100 * timed.floor_s / seconds:.0f}",
            f"{bandwidth:.0f}",
        ]
    return (
        name_of(case),
        spread([1e3 * each for each in timed.seconds], ms_digits),
        f"{case.clips / seconds:.{rate_digits}f}",
        f"{seconds / ours_s:.2f} x as fast",
        f"{mfu:.1f}",
        *roofline,
        f"{timed.peak_gib:.2f}",
        f"{timed.first_s:.1f}",
    )
