"""The report of a study: its table in every format, its figures, and an HTML page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from markupsafe import Markup

from mar.atomic_dir import write_text
from mar.config.overrides import flatten, without_paths
from mar.errors import UserError
from mar.safe_text import markdown
from mar.visualization.charts import draw_confusion
from orchestration.reporting.csv_text import csv_text
from orchestration.reporting.drawing.matplotlib_figures import draw, draw_figure
from orchestration.reporting.drawing.plotly_figures import (
    chart,
    confusion_chart,
    plotly_script,
    study_chart,
)
from orchestration.reporting.figures import FigureInfo, figure_info
from orchestration.reporting.html_pages import write_page
from orchestration.reporting.page_footer import footer
from orchestration.reporting.significance import Claim, claims
from orchestration.reporting.study_results import StudyResults
from orchestration.reporting.table_formats import FORMATS, to_html
from orchestration.reporting.tables import TableInfo, table_info
from orchestration.reporting.training_figures import confusion, curves_info
from orchestration.studies.trial import Study


def write_report(results: StudyResults, folder: Path) -> tuple[str, list[str]]:
    """Write the report of a study into ``folder``.

    Its files are ``table.*``, ``figure.*``, ``curves.*``, ``confusion.*``, ``report.md`` and
    ``report.html``. Reconstructions, curves and a confusion matrix that are not available yet are
    left out. Other files in the folder stay.

    Returns the table in Markdown, and the findings and verdicts, one line each.
    """
    folder.mkdir(parents=True, exist_ok=True)
    study = results.study
    table = table_info(results)
    figure = figure_info(results)
    for ending, render in FORMATS.items():
        (folder / f"table.{ending}").write_text(render(table), encoding="utf-8")
    for ending in ("png", "pdf"):
        # A model's reconstructions are made by its test: before that there is no figure.
        with suppress(UserError):
            draw_figure(results, folder / f"figure.{ending}")
    # ``csv_text`` makes sure that a spreadsheet takes no label for a formula.
    write_text(folder / "figure.csv", csv_text(figure.frame()))
    curves = curves_info(results)
    mistaken = confusion(results)
    for ending in ("png", "pdf"):
        if curves:
            draw(curves, folder / f"curves.{ending}")
            write_text(folder / "curves.csv", csv_text(curves.frame()))
        if mistaken:
            draw_confusion(mistaken.counts, list(mistaken.names), folder / f"confusion.{ending}")
            write_text(folder / "confusion.csv", csv_text(mistaken.frame(), index=True))
    judged = claim_lines(claims(results))
    (folder / "report.md").write_text(_markdown(results, table, judged), encoding="utf-8")
    trees = {trial.name: flatten(without_paths(trial.settings)) for trial in study.trials}
    write_page(
        folder / "report.html",
        "study_report.html",
        title=study.file.title,
        script=plotly_script(),
        findings=findings(results),
        # ``to_html`` escapes the texts of the cells.
        table=Markup(to_html(table, has_caption=False)),  # noqa: S704
        chart=study_chart(results),
        curves=_chart_or_none(curves),
        confusion_title="" if mistaken is None else mistaken.title,
        confusion=None if mistaken is None else confusion_chart(mistaken),
        claims=judged,
        differing_settings=_differing(trees),
        trials=trees,
        shared_settings=_shared_settings(study),
        **footer(["mar", "run", study.name], results.experiment_ids),
    )
    return FORMATS["md"](table), [*findings(results), *judged]


def claim_lines(judged: Sequence[Claim]) -> list[str]:
    """Return a line for each of the study's claims: our verdict, and the measured differences."""
    lines: list[str] = []
    for claim in judged:
        gaps = [
            f"{pair}: {gap.difference:+.2f} [{gap.low:+.2f}, {gap.high:+.2f}], p = {gap.p:.2g}, n "
            f"= {gap.num_seeds}"
            for pair, gap in claim.pairs.items()
            if gap is not None
        ]
        lines.append(f"{claim.verdict}: {claim.text}" + (f" ({'; '.join(gaps)})" if gaps else ""))
    return lines


def findings(results: StudyResults) -> list[str]:
    """Return sentences on the best row: its accuracy, chance level, and shuffled frames."""
    study = results.study
    all_rows = results.rows
    present = [row for row in all_rows if row.cells["top1"].mean is not None]
    if not present:
        # Finished runs without an accuracy have pre-trained by reconstruction alone.
        if any(row.finished for row in all_rows):
            return []
        return ["No trial is finished yet."]
    best = max(present, key=lambda row: row.cells["top1"].mean or 0.0)
    top1 = best.cells["top1"].mean or 0.0
    settings = study.trials[0].settings
    chance = 100 / settings.data.num_classes
    notes = [
        f"Best: {best.label}, {top1:.2f} % top-1 on videos that it has not seen "
        f"({top1 / chance:.1f} times chance level, {chance:.2f} %)."
    ]
    # Near chance level here means that the model uses motion, not single frames.
    shuffled = best.cells["shuffled_top1"].mean
    if shuffled is not None:
        notes.append(
            f"With each clip's frames in random order the same model has {shuffled:.2f} %."
        )
    return notes


def _shared_settings(study: Study) -> list[tuple[str, str]]:
    """Return the settings that are equal in all trials, by their paths."""
    trees = [flatten(trial.settings.model_dump(mode="json")) for trial in study.trials]
    first = trees[0]
    return [
        (path, str(value))
        for path, value in first.items()
        if all(tree[path] == value for tree in trees)
    ]


def _markdown(results: StudyResults, table: TableInfo, judged: Sequence[str]) -> str:
    """Return the report in Markdown; ``judged`` are the lines of the claims."""
    study = results.study
    # Titles, values and claims are written by users: ``markdown`` escapes them.
    shared = "\n".join(
        f"| `{path}` | {markdown(value)} |" for path, value in _shared_settings(study)
    )
    found = "\n".join(markdown(note) for note in findings(results))
    title = markdown(study.file.title)
    claimed = (
        "## Claims\n\n" + "".join(f"- {markdown(line)}\n" for line in judged) + "\n"
        if judged
        else ""
    )
    return (
        f"# {title}\n\n{found}\n\n{FORMATS['md'](table)}\n![{title}](figure.png)\n\n{claimed}"
        f"## Settings that all trials share\n\n| setting | value |\n|---|---|\n{shared}\n"
    )


def _chart_or_none(info: FigureInfo | None) -> Markup | None:
    if info is None:
        return None
    return chart(info)


def _differing(trees: Mapping[str, Mapping[str, object]]) -> list[str]:
    """Return the paths of the settings in which trials differ.

    ``trees`` are the settings of each trial, by the trial's name.
    """
    # Trials of different recipes may lack each other's settings, so all trees give paths.
    paths = dict.fromkeys(path for tree in trees.values() for path in tree)
    return [path for path in paths if len({str(tree.get(path)) for tree in trees.values()}) > 1]
