"""The command, run in the test's own process: loading Ray and MLflow anew takes seconds."""

import contextlib
import io
import sys
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
