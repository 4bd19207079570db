"""The command: in the test's own process (``here``) or in one of its own (``begin``, ``end``)."""

import contextlib
import io
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from orchestration.cli.app import main


def loaders_of(launch: psutil.Process) -> list[psutil.Process]:
    """Return the loader processes of a launch, or of a Ray that it has started."""
    below = launch.children(recursive=True)
    servers = {each.pid for each in below if "forkserver" in " ".join(each.cmdline())}
    return [each for each in below if each.ppid() in servers]


def run_mar(workdir: Path, *arguments: str, code: int = 0) -> tuple[str, str]:
    """Run ``mar`` in a folder; return what it printed, and its errors.

    It must exit with ``code``.
    """
    output, errors = io.StringIO(), io.StringIO()
    before = sys.argv
    try:
        sys.argv = ["mar", *arguments]
        with (
            contextlib.chdir(workdir),
            contextlib.redirect_stdout(output),
            contextlib.redirect_stderr(errors),
        ):
            main()
    except SystemExit as ended:
        assert ended.code == code, errors.getvalue() + output.getvalue()
    finally:
        sys.argv = before
    return output.getvalue(), errors.getvalue()


BIN = Path(sys.executable).parent


def begin(
    workdir: Path, *arguments: str, environment: dict[str, str] | None = None
) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [BIN / "mar", *arguments],
        cwd=workdir,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def end(process: subprocess.Popen[str], code: int) -> str:
    output = process.communicate(timeout=200)[0]
    assert process.returncode == code, output
    return output


def wait_for(there: Callable[[], object], timeout_s: float = 60) -> None:
    until = time.monotonic() + timeout_s
    while not there():
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.05)


def here(workdir: Path, *arguments: str, code: int = 0) -> str:
    """Run the command in ``place``; return its errors and what it printed, of JSON that alone."""
    output, errors = run_mar(workdir, *arguments, code=code)
    return output if "--json" in arguments else errors + output


def ray_processes(folder: Path | str) -> list[psutil.Process]:
    """Return the processes of the Ray whose sessions are in a folder, and of no other."""
    found: dict[int, psutil.Process] = {}
    for process in psutil.process_iter(["cmdline"]):
        if not any(str(folder) in word for word in process.info["cmdline"] or []):
            continue
        # Workers are named by what they do: only their parent, the raylet, names the folder.
        with contextlib.suppress(psutil.NoSuchProcess):
            found |= {each.pid: each for each in process.children(recursive=True)}
            found[process.pid] = process
    return [*found.values()]


def end_ray(folder: Path | str) -> None:
    """Kill the Ray whose sessions are in a folder, and no other.

    ``ray stop`` ends every Ray of this machine, also one that trains for somebody else.
    """
    for process in ray_processes(folder):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
