"""Writes the reference's pages from the code, and one for each table and figure of the paper.

    python benchmarks/reference_pages.py docs/reference

``make docs`` runs it before it builds the site. Nothing here repeats what a docstring says.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import typer

import mar
from mar.config.reference import Setting, branches, keys_of, settings_below
from mar.weights.known_weights import known_weights
from orchestration.cli.app import app
from orchestration.config import HELP, LaunchConfig, WorkerConfig
from orchestration.reporting.study_results import StudyResults
from orchestration.reporting.table_formats import FORMATS
from orchestration.reporting.tables import table_info
from orchestration.search.schema import SearchFile
from orchestration.storage.trial_dir import TrialDir
from orchestration.studies.devices import device
from orchestration.studies.loader import paper_studies, read_study
from orchestration.studies.metrics import METRICS
from orchestration.studies.plan import plan_trials
from orchestration.studies.schema import StudyFile
from orchestration.studies.trial import Study
from orchestration.tracking import tags

ROOT = Path(__file__).parent.parent


def settings_page() -> str:
    """Every setting of a recipe, by branch."""
    lines = [
        "# Settings",
        "",
        "Everything that changes a result. A recipe is a YAML file of these; a study's axis sets "
        "them; so does the command, as `mar run STUDY mask.ratio=0.75`. `mar settings mask` prints "
        "the same, and `mar show RECIPE` what a recipe has.",
        "",
    ]
    for branch, about in branches().items():
        lines += [f"## {branch}", "", about, "", *table(settings_below(branch), branch)]
    return "\n".join([*lines, "## seed", "", *table(settings_below("seed"), "")])


def table(keys: Iterable[Setting], branch: str) -> list[str]:
    """Return a Markdown table of settings or keys."""
    lines = ["| name | default | what it may be | meaning |", "|:--|:--|:--|:--|"]
    for each in keys:
        name = each.path.removeprefix(f"{branch}.") if branch else each.path
        default = f"`{each.default}`" if each.default != "required" else "required"
        cells = [f"`{name}`", default, each.type, each.meaning]
        lines.append(f"| {' | '.join(text.replace('|', chr(92) + '|') for text in cells)} |")
    return [*lines, ""]


def files_page() -> str:
    """The keys of study and search files."""
    lines = [
        "# Study and search files",
        "",
        "## A study",
        "",
        "Each combination of the axes' labels is a row of the table, trained once for each seed.",
        "",
        *table(keys_of(StudyFile), ""),
        "A label's settings may be a list, as `mask.ratio: [0.25, 0.5]`: one label for each value.",
        "",
        "## A search",
        "",
        "Optuna proposes trials, one after another or several at a time.",
        "",
        *table(keys_of(SearchFile), ""),
    ]
    return "\n".join(lines)


def metrics_page() -> str:
    """Columns of tables, metrics and tags in MLflow."""
    lines = [
        "# Metrics and tags",
        "",
        "## Columns of a table",
        "",
        "The names that `table.columns`, `figure.x`, `figure.y` and a search's `objectives` take.",
        "",
        "| name | printed as | metric in MLflow | better |",
        "|:--|:--|:--|:--|",
    ]
    better = {True: "more", False: "less", None: ""}
    for name, metric in METRICS.items():
        source = metric.source
        if source.startswith("cost."):
            source = f"none: computed from the settings ({source.removeprefix('cost.')})"
        lines.append(
            f"| `{name}` | {metric.title} | `{source}` | {better[metric.higher_is_better]} |"
        )
    lines += [
        "",
        "## Tags of a run",
        "",
        *pairs("tag", documented(tags)),
        "Also `version.PACKAGE`, `host`, `git.dirty` and MLflow's own: user, source, commit.",
        "",
    ]
    return "\n".join(lines)


def pairs(heading: str, rows: Iterable[tuple[str, str]]) -> list[str]:
    """Return a Markdown table of names and their meanings."""
    lines = [f"| {heading} | meaning |", "|:--|:--|"]
    return [*lines, *(f"| `{name}` | {text} |" for name, text in rows), ""]


def documented(module: Any) -> Iterable[tuple[str, str]]:
    """Yield the value of each text constant of a module, and the docstring below it."""
    body = ast.parse(Path(module.__file__).read_text(encoding="utf-8")).body
    for number, node in enumerate(body):
        if not (isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)):
            continue
        below = body[number + 1] if number + 1 < len(body) else None
        text = ""
        if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            text = one_line(str(below.value.value))
        yield str(node.value.value), text


def command_page() -> str:
    """Every verb of the command, with its arguments and options."""
    command: Any = typer.main.get_command(app)
    lines = ["# The command", "", "Exit codes: 0 done, 1 failed, 2 the user's mistake.", ""]
    for name, verb in command.commands.items():
        if hasattr(verb, "commands"):
            for below, part in verb.commands.items():
                lines += verb_lines(f"{name} {below}", part)
        else:
            lines += verb_lines(name, verb)
    return "\n".join(lines)


def verb_lines(name: str, verb: Any) -> list[str]:
    """Return the lines about one verb."""
    arguments = [each for each in verb.params if each.param_type_name == "argument"]
    usage = " ".join(metavar(each) for each in arguments)
    help_text = one_line(verb.help or "")
    lines = [f"## mar {name}", "", help_text, "", "```", f"mar {name} {usage}".rstrip(), "```", ""]
    rows: list[str] = []
    for each in verb.params:
        if each.name == "help" or getattr(each, "hidden", False):
            continue
        if each.param_type_name == "argument":
            shown = f"`{metavar(each)}`"
        else:
            shown = ", ".join(f"`{option}`" for option in each.opts)
        meaning = one_line(each.help or "")
        default = each.default
        if default not in (None, False, (), ...) and each.param_type_name == "option":
            meaning += f" Default: {default}."
        rows.append(f"| {shown} | {meaning.replace('|', chr(92) + '|')} |")
    if rows:
        lines += ["| | |", "|:--|:--|", *rows, ""]
    return lines


def metavar(argument: Any) -> str:
    """Return the placeholder of an argument."""
    return argument.metavar or argument.name.upper()


def python_page() -> str:
    """The public names of ``import mar``."""
    lines = ["# Python", "", "```python", "import mar", "```", ""]
    for name in ("load", "Model", "Study", "results", "Results", "UserError", "Failure"):
        value = getattr(mar, name)
        if not inspect.isclass(value):
            lines += call_lines(f"mar.{name}", value, 2)
            continue
        lines += [f"## mar.{name}", "", *docstring(value)]
        for member, found in vars(value).items():
            if member.startswith("_") or not inspect.getdoc(found):
                continue
            function = getattr(found, "__func__", found)
            if callable(function):
                lines += call_lines(f"{name}.{member}", function, 3)
            elif hasattr(found, "func") or isinstance(found, property):
                lines += [f"### {name}.{member}", "", *docstring(found)]
    options = [each for config in (LaunchConfig, WorkerConfig) for each in fields_of(config)]
    lines += [
        "## Options of Study.run",
        "",
        *pairs("option", options),
    ]
    return "\n".join(lines)


def fields_of(config: Any) -> list[tuple[str, str]]:
    """Return the fields of a configuration that are options, with their help."""
    found = config.__dataclass_fields__.values()
    return [
        (each.name, each.metadata[HELP].replace("|", "\\|"))
        for each in found
        if HELP in each.metadata
    ]


def call_lines(name: str, function: Callable[..., Any], level: int) -> list[str]:
    """Return the lines about a function: its signature and its docstring."""
    signature = inspect.signature(function)
    own = [each for each in signature.parameters.values() if each.name not in ("self", "cls")]
    text = str(signature.replace(parameters=own)).replace("'", "")
    return [
        f"{'#' * level} {name}",
        "",
        "```python",
        f"{name}{text}",
        "```",
        "",
        *docstring(function),
    ]


def docstring(thing: Any) -> list[str]:
    """Return a docstring as Markdown: its sections as lists, its examples as code."""
    text = inspect.getdoc(thing) or ""
    lines: list[str] = []
    for block in text.replace("``", "`").split("\n\n"):
        first, *rest = block.split("\n")
        if first in ("Args:", "Returns:", "Raises:"):
            items = re.sub(r"\n\s{4,}(?=\S)", " ", "\n".join(line[4:] for line in rest))
            lines += [f"**{first}**", "", *(f"- {item}" for item in items.split("\n")), ""]
        elif first.startswith(">>>"):
            code = [line.removeprefix(">>> ") for line in (first, *rest)]
            lines += ["```python", *code, "```", ""]
        else:
            lines += [block, ""]
    return lines


def store_page() -> str:
    """The files of a store and of a trial's folder."""
    lines = [
        "# Files in a store",
        "",
        "A store is a folder (`--store`, by default `mar_store`). It can be moved and copied.",
        "",
        "| path | what it is |",
        "|:--|:--|",
        "| `mlflow.db` | the tracking store of MLflow, SQLite; `mar recover` makes it again from "
        "the results |",
        "| `artifacts/` | MLflow's artifacts: the results, logs and reports of each run |",
        "| `trials/KEY/` | one training: its checkpoints while it runs, then its result |",
        "| `reports/STUDY/` | the table in every format, the figures and the page |",
        "| `frames/` | frame caches that `data.cache: auto` made |",
        "| `stable/` | what trainings of several lengths share (`warmup_stable_decay`) |",
        "| `tokens/` | tokens of frozen encoders that `encoder.cached` keeps |",
        "| `searches/NAME.db` | a search's Optuna study |",
        "| `studies/` | which file has which study's name |",
        "| `locks/` | held while a study runs; a request to stop |",
        "",
        "## A trial's folder",
        "",
        "| path | what it is |",
        "|:--|:--|",
    ]
    example = TrialDir(Path("KEY"))
    for name, member in vars(TrialDir).items():
        if isinstance(member, property):
            path = getattr(example, name)
            if isinstance(path, Path):
                lines.append(f"| `{path}` | {one_line(member.__doc__ or '')} |")
    return "\n".join([*lines, ""])


def clusters_page() -> str:
    """The README of ``cluster/`` with the files that it names below."""
    text = (ROOT / "cluster" / "README.md").read_text(encoding="utf-8")
    text = text.replace("](../docs/", "](../")
    files = dict.fromkeys(re.findall(r"\]\(([a-z_]+/[a-z_.]+|Dockerfile)\)", text))
    sections: list[str] = []
    for name in files:
        content = (ROOT / "cluster" / name).read_text(encoding="utf-8").rstrip()
        language = "yaml" if name.endswith(".yaml") else "bash"
        sections += [f"## cluster/{name}", "", f"```{language}", content, "```", ""]
        # The heading's anchor, as the site makes it: letters, digits, underscores and hyphens.
        anchor = re.sub(r"[^a-z0-9_-]", "", f"cluster/{name}".lower())
        text = text.replace(f"]({name})", f"](#{anchor})")
    # What is left is a folder: a page has no listing of it.
    text = re.sub(r"\[(mlflow/)\]\(mlflow/\)", r"`cluster/\1`", text)
    return "\n".join([text.rstrip(), "", *sections])


DEVICES = ("v100", "h200")
"""Profiles whose hours a study's page gives."""


def paper_pages() -> dict[str, str]:
    """A page for each study of the paper: its command, its hours, the paper's numbers; an index."""
    pages: dict[str, str] = {}
    index = [
        "# The paper's tables and figures",
        "",
        "Each is a study that ships with mar. Hours are device-hours of its own trainings and "
        "tests, by the devices' profiles (`mar plan STUDY --device v100`); what studies share is "
        "trained once, so together they are fewer ([all of it](../guides/paper.md)).",
        "",
        "| study | rows | to train | " + " | ".join(f"hours, {each}" for each in DEVICES) + " |",
        "|:--|--:|--:|" + "--:|" * len(DEVICES),
    ]
    for name in paper_studies():
        study = read_study(name)
        lines = plan_trials(study, [])
        to_train = sum(line.state == "new" for line in lines)
        hours = [_hours(study, device_name) for device_name in DEVICES]
        cells = " | ".join(hours)
        index.append(
            f"| [{study.file.title}](paper_{study.name}.md) | {len(study.trials)} | {to_train} | "
            f"{cells} |"
        )
        pages[f"paper_{study.name}.md"] = _paper_page(study, to_train, hours)
    pages["paper.md"] = "\n".join([*index, ""])
    return pages


def _hours(study: Study, device_name: str) -> str:
    """Return the device-hours of a study's own trainings and tests."""
    planned = [
        line.device_hours
        for line in plan_trials(study, [], device(device_name))
        if line.state in ("new", "test")
    ]
    known = [each for each in planned if each is not None]
    # A sum over some of the trials would look like the cost of all of them.
    if len(known) < len(planned):
        return "–"
    return f"{sum(known):,.1f}"


def _paper_page(study: Study, to_train: int, hours: list[str]) -> str:
    lines = [f"# {study.file.title}", ""]
    if to_train:
        costs = ", ".join(
            f"{each} device-hours on {name}" for name, each in zip(DEVICES, hours, strict=True)
        )
        lines += [f"{to_train} trainings: {costs}.", ""]
    lines += ["```", f"mar run {study.name}", f"mar table {study.name}", "```", ""]
    if study.file.paper:
        lines += ["The paper's numbers, and room for yours:", ""]
    lines += [FORMATS["md"](table_info(StudyResults(study, {}))), ""]
    if study.file.claims:
        lines += [
            "## What the paper concludes",
            "",
            *(f"- {each}" for each in study.file.claims),
            "",
        ]
    mini = f"docs/mini/{study.name}.md"
    if (ROOT / mini).is_file():
        lines += [f"[The same at a small size, trained](../mini/{study.name}.md)", ""]
    return "\n".join(lines)


def one_line(text: str) -> str:
    """Return a docstring as one line of Markdown."""
    return " ".join(text.split()).replace("``", "`")


def weights_page() -> str:
    """The pre-trained weights that mar is known to read."""
    lines = [
        "# Pre-trained weights",
        "",
        "What mar is known to read; `mar weights list` prints the same. `encoder.weights` takes "
        "the name; a file that has an address is fetched from there first, and its path given. The "
        "accuracies are as published, top-1, after fine-tuning on the named data. The licence is "
        "that of "
        "the weights: non-commercial ones are for research. None of them is downloaded by mar's "
        "tests: each entry says how its layout is checked.",
        "",
    ]
    for each in known_weights():
        lines += [f"## {each.model}", "", f"`{each.name}`", ""]
        facts = {
            "Fetch it": each.address,
            "Pre-trained on": each.data + (f", {each.epochs} epochs" if each.epochs else ""),
            "Accuracy": each.accuracy,
            "Licence": each.licence,
            "Settings": f"`{each.settings}`" if each.settings else "",
            "Recipe": f"`{each.recipe}`" if each.recipe else "",
            "Checked": each.checked,
        }
        for label, text in facts.items():
            if text:
                # A bare address is a link between angle brackets.
                shown = re.sub(r"(https?://\S+)", r"<\1>", text)
                lines.append(f"- {label}: {shown}")
        lines.append("")
    return "\n".join(lines)


PAGES = {
    "settings.md": settings_page,
    "weights.md": weights_page,
    "files.md": files_page,
    "metrics.md": metrics_page,
    "command.md": command_page,
    "python.md": python_page,
    "store.md": store_page,
    "clusters.md": clusters_page,
}


def main() -> None:
    """Write the pages."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    pages = {name: page() for name, page in PAGES.items()} | paper_pages()
    for name, text in pages.items():
        (folder / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
