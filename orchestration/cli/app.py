"""The command ``mar`` and its verbs: parsing and printing, nothing else.

Imports only what parsing needs; each verb imports its own, so that ``mar --help`` and ``mar plan``
are quick.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, NoReturn

import typer

from mar.errors import Failure, UserError
from orchestration.cli.bench import bench
from orchestration.cli.data import data_app
from orchestration.cli.jobs import jobs_app, status, stop_study, submit
from orchestration.cli.recipes import cost, diff, mask, show
from orchestration.cli.studies import figure, plan, report, run, table
from orchestration.cli.system import doctor, recover, ui
from orchestration.cli.weights import evaluate, predict, reconstruct, weights_app
from orchestration.secrets import without_secrets

if TYPE_CHECKING:
    pass

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
app.add_typer(data_app, name="data")
app.add_typer(weights_app, name="weights")
app.add_typer(jobs_app, name="jobs")
app.command()(status)
app.command("stop")(stop_study)
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(submit)


def main() -> NoReturn:
    """Run the command; exit 0 done, 1 failed, 2 the user's mistake."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure:  # a terminal in the C locale must not stop a study over the × of "2 × 2"
            reconfigure(encoding="utf-8", errors="replace")
    try:
        app()
    except UserError as error:
        _end(str(error), 2)
    except Failure as error:
        _end(str(error), 1)
    except BrokenPipeError:
        sys.exit(1)
    except OSError as error:
        _end(str(error), 1)
    sys.exit(0)


def _end(message: str, code: int) -> NoReturn:
    print(f"mar: {without_secrets(message)}", file=sys.stderr)
    sys.exit(code)


for verb in (
    run,
    plan,
    table,
    figure,
    report,
    evaluate,
    predict,
    reconstruct,
    bench,
    show,
    diff,
    cost,
    mask,
    ui,
    recover,
    doctor,
):
    app.command()(verb)
