"""The command, run in the test's own process: loading Ray and MLflow anew takes seconds."""

import contextlib
import io
import sys
from pathlib import Path

from orchestration.cli import main


def run_mar(place: Path, *words: str, code: int = 0) -> tuple[str, str]:
    """Run ``mar`` in a folder; return what it printed, and its errors. It must exit with ``code``."""
    output, errors = io.StringIO(), io.StringIO()
    before = sys.argv
    try:
        sys.argv = ["mar", *words]
        with contextlib.chdir(place), contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
            main()
    except SystemExit as ended:
        assert ended.code == code, errors.getvalue() + output.getvalue()
    finally:
        sys.argv = before
    return output.getvalue(), errors.getvalue()
