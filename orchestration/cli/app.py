"""The command ``mar`` and its verbs: parsing and printing, nothing else.

The modules of ``cli`` import only what parsing needs. Each verb imports the rest when it is called,
so that ``mar --help`` and ``mar plan`` are quick.
"""

from __future__ import annotations

import errno
import sys
from typing import NoReturn

import typer

from mar.errors import Failure, UserError
from orchestration.cli.bench import bench
from orchestration.cli.data import data_app, init
from orchestration.cli.inference import predict, reconstruct
from orchestration.cli.jobs import jobs_app, status, stop_study, submit
from orchestration.cli.recipes import cost, diff, mask, settings, show
from orchestration.cli.studies import figure, plan, report, run, table
from orchestration.cli.system import doctor, recover, ui
from orchestration.cli.testing import evaluate, features
from orchestration.cli.weights import weights_app
from orchestration.secrets import without_secrets

_EXAMPLES = """Examples:

mar plan quickstart — what it would train, and what that costs

mar run quickstart mask.ratio=0.75 — train what is missing, print the table

mar predict mini clip.mp4 — ask the model that ships with mar

mar settings mask — what each setting means"""

# Without Typer's own exceptions: ``main`` prints one line for each error that it knows.
app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Masked Action Recognition: studies, searches and models.",
    epilog=_EXAMPLES,
)
# In the order in which a new user needs them; the help lists the groups in this order.
_VERBS = {
    "Studies and searches": (plan, run, status, table, figure, report),
    "Models": (predict, reconstruct, evaluate, features),
    "Recipes and data": (init, settings, show, diff, cost, mask),
    "This machine": (ui, doctor, bench, recover),
}
for _group, _verbs in _VERBS.items():
    for _verb in _verbs:
        app.command(rich_help_panel=_group)(_verb)
app.command("stop", rich_help_panel="Studies and searches")(stop_study)
app.add_typer(weights_app, name="weights", rich_help_panel="Models")
app.add_typer(data_app, name="data", rich_help_panel="Recipes and data")
# ``submit`` parses the options of ``mar run`` itself (``_parse_run_options``).
app.command(
    rich_help_panel="Clusters",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)(submit)
app.add_typer(jobs_app, name="jobs", rich_help_panel="Clusters")


def main() -> NoReturn:
    """Run the command, then exit: code 0 if it is done, 1 if it failed, 2 for a user's mistake."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        # A terminal in the C locale must not stop a study because of the × in "2 × 2".
        if reconfigure:
            reconfigure(encoding="utf-8", errors="replace")
    try:
        app()
    except UserError as error:
        _end(str(error), 2)
    except Failure as error:
        _end(str(error), 1)
    # The reader of the output has ended, as in ``mar table … | head``.
    except BrokenPipeError:
        sys.exit(1)
    except OSError as error:
        # A name that no file system can hold is a mistake of whoever wrote it.
        _end(str(error), 2 if error.errno == errno.ENAMETOOLONG else 1)
    sys.exit(0)


def _end(message: str, code: int) -> NoReturn:
    print(f"mar: {without_secrets(message)}", file=sys.stderr)
    sys.exit(code)
