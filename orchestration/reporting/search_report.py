"""The report of a search: best settings as a recipe, Pareto front, importances, pictures."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
import yaml
from markupsafe import Markup
from optuna.trial import FrozenTrial, TrialState

from mar.atomic_dir import write_text
from mar.safe_text import markdown
from orchestration.reporting.csv_text import csv_text
from orchestration.reporting.drawing.plotly_figures import part_of_page, plotly_script
from orchestration.reporting.html_pages import write_page
from orchestration.reporting.page_footer import footer
from orchestration.search.optuna_search import OptunaSearch
from orchestration.studies.metrics import METRICS

_FEWEST_FOR_IMPORTANCE = 4
"""Finished trials below which the importances of settings are left out."""


def best_trials(proposer: OptunaSearch) -> list[FrozenTrial]:
    """Return the Pareto front, sorted by the first objective; with one objective the best trial."""
    # Optuna's best_trial raises an error if no trial is complete.
    if not _complete(proposer):
        return []
    if len(proposer.search.file.objectives) > 1:
        front = proposer.study.best_trials
    else:
        front = [proposer.study.best_trial]
    # A proposal that an equal finished run answered is marked "copy": the front has its equal too.
    front = [trial for trial in front if "copy" not in trial.user_attrs] or front
    return sorted(front, key=lambda trial: trial.values[0])


def _counts_text(proposer: OptunaSearch) -> str:
    """Return the number of trials by outcome, as text."""
    trials = proposer.study.get_trials(deepcopy=False)
    counts = {state: sum(each.state == state for each in trials) for state in TrialState}
    others = sum("run" in each.user_attrs for each in trials)
    known = proposer.known
    rejected = sum("infeasible" in each.user_attrs for each in trials)
    # Optuna has them as pruned trials, because its samplers do not learn from failed ones.
    counts[TrialState.PRUNED] -= rejected
    counts_text = (
        f"{counts[TrialState.COMPLETE] - others - known} trials finished, "
        f"{counts[TrialState.PRUNED]} ended early, "
    )
    counts_text += (
        f"{counts[TrialState.FAIL]} failed or were proposed twice, {known} were already trained; "
        f"{rejected} proposals broke a rule or a constraint and were not trained; "
    )
    return counts_text + f"{others} finished trials of other studies were known before."


def found_text(proposer: OptunaSearch) -> str:
    """Return the counts, the best trials and the importances, as Markdown."""
    frame = front_frame(proposer)
    search = proposer.search
    counts_text = _counts_text(proposer)
    kind = "Pareto front" if len(search.file.objectives) > 1 else "Best"
    # Values of settings are text of the search file: they must not be read as Markdown.
    shown = frame.map(_shown)
    lines = [
        f"**{markdown(search.file.title)}**",
        "",
        counts_text,
        "",
        f"{kind}:",
        "",
        shown.to_markdown(index=False),
    ]
    importances = importance_frame(proposer)
    if not importances.empty:
        lines += [
            "",
            "Importance of each setting (fANOVA):",
            "",
            importances.to_markdown(index=False, floatfmt=".2f"),
        ]
    return "\n".join(lines) + "\n"


def front_frame(proposer: OptunaSearch) -> pd.DataFrame:
    """Return the best trials: their objectives, then their settings."""
    rows: list[dict[str, Any]] = []
    for trial in best_trials(proposer):
        objectives = zip(proposer.search.file.objectives, trial.values, strict=True)
        values = {
            METRICS[name].title: round(value, METRICS[name].digits) for name, value in objectives
        }
        rows.append({"trial": trial.number, **values, **trial.params})
    return pd.DataFrame(rows)


def _shown(value: Any) -> Any:
    """Escape a text for Markdown; numbers stay numbers."""
    return markdown(value) if isinstance(value, str) else value


def importance_frame(proposer: OptunaSearch) -> pd.DataFrame:
    """Return the share of each objective's variance that each setting explains.

    Empty if too few trials are finished.
    """
    columns: dict[str, dict[str, float]] = {}
    complete = _complete(proposer)
    for index, name in enumerate(proposer.search.file.objectives):
        # With one value alone there is no variance to explain.
        values = {trial.values[index] for trial in complete}
        if len(complete) < _FEWEST_FOR_IMPORTANCE or len(values) < 2:
            continue
        try:
            found = optuna.importance.get_param_importances(
                proposer.study, evaluator=_fanova(), target=_value_of(index)
            )
        # No setting is in all trials, or none varies.
        except (ValueError, RuntimeError):
            continue
        columns[METRICS[name].title] = found
    frame = pd.DataFrame(columns)
    if not frame.empty:
        return frame.reset_index(names="setting")
    return frame


def write_search_report(proposer: OptunaSearch, folder: Path) -> None:
    """Write the report of a search into ``folder``.

    Its files are ``report.md`` and ``report.html``, ``best.yaml`` (a recipe, ready to run),
    ``front.csv``, ``trials.csv`` and pictures.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.md").write_text(found_text(proposer), encoding="utf-8")
    write_text(folder / "front.csv", csv_text(front_frame(proposer)))
    frame: pd.DataFrame = proposer.study.trials_dataframe(
        attrs=("number", "state", "values", "params", "user_attrs")
    )
    write_text(folder / "trials.csv", csv_text(frame))
    best = best_trials(proposer)
    if best:
        # The front is in ascending order of the first objective: its best is at one of the ends.
        if next(iter(proposer.search.file.objectives.values())) == "max":
            chosen = best[-1]
        else:
            chosen = best[0]
        objectives = dict(zip(proposer.search.file.objectives, chosen.values or [], strict=True))
        tree = proposer.search.settings(chosen.params).model_dump(mode="json")
        head = (
            f"# {proposer.search.file.title}: trial {chosen.number}, {json.dumps(objectives)}. "
            "Run it: "
            "mar run best.yaml\n"
        )
        text = head + yaml.safe_dump(
            tree, sort_keys=False, allow_unicode=True, default_flow_style=None
        )
        (folder / "best.yaml").write_text(text, encoding="utf-8")
        _draw(proposer, folder)


def _draw(proposer: OptunaSearch, folder: Path) -> None:
    """Write Optuna's own pictures, and a page with interactive charts."""
    import matplotlib as mpl

    # Optuna draws with pyplot, which otherwise looks for a display. It must be set before pyplot
    # is imported.
    mpl.use("Agg")
    import optuna.visualization as interactive
    import optuna.visualization.matplotlib as pictures
    from matplotlib import pyplot

    drawn = _pictures(proposer, pictures)
    parts = _pictures(proposer, interactive)
    for name in drawn:
        _quietly(lambda name=name: drawn[name]())
        # No figure is open if the drawing failed.
        if pyplot.get_fignums():
            pyplot.gcf().savefig(folder / f"{name}.png", dpi=140, bbox_inches="tight")
        pyplot.close("all")
    charts = [
        part_of_page(figure) for draw in parts.values() if (figure := _quietly(draw)) is not None
    ]
    importances = importance_frame(proposer)
    importance_table = None
    if not importances.empty:
        importance_table = _html_table(importances, float_format="{:.2f}".format)
    front_title = "Best"
    if len(proposer.search.file.objectives) > 1:
        front_title = "Pareto front"
    write_page(
        folder / "report.html",
        "search_report.html",
        title=proposer.search.file.title,
        script=plotly_script(),
        counts=_counts_text(proposer),
        front_title=front_title,
        front=_html_table(front_frame(proposer)),
        importances=importance_table,
        charts=charts,
        **footer(["mar", "run", proposer.search.name]),
    )


def _html_table(frame: pd.DataFrame, **options: Any) -> Markup:
    """Return a table as part of a page; pandas escapes its content."""
    return Markup(frame.to_html(index=False, border=0, escape=True, **options))  # noqa: S704


def _pictures(proposer: OptunaSearch, library: Any) -> dict[str, Callable[[], Any]]:
    """Return the function that draws each picture, by the picture's name.

    ``library`` is ``optuna.visualization`` or ``optuna.visualization.matplotlib``.
    """
    objectives = [METRICS[name].title for name in proposer.search.file.objectives]
    # With several objectives Optuna's functions require a target.
    first: dict[str, Any] = {}
    if len(objectives) > 1:
        first = {"target": _value_of(0), "target_name": objectives[0]}
    study = proposer.study
    drawn: dict[str, Callable[[], Any]] = {
        "history": lambda: library.plot_optimization_history(study, **first),
        "slice": lambda: library.plot_slice(study, **first),
        "parallel_coordinates": lambda: library.plot_parallel_coordinate(study, **first),
        "importances": lambda: library.plot_param_importances(study, evaluator=_fanova(), **first),
    }
    # Optuna draws a Pareto front in two or three dimensions.
    if 1 < len(objectives) < 4:
        drawn["pareto_front"] = lambda: library.plot_pareto_front(study, target_names=objectives)
    return drawn


def _quietly(draw: Callable[[], Any]) -> Any:
    """Return the drawn figure; none if too few trials differ for it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return draw()
        except (ValueError, RuntimeError, ZeroDivisionError):
            return None


def _fanova() -> optuna.importance.FanovaImportanceEvaluator:
    # Optuna 5's default, PED-ANOVA, looks at low values even if high ones are better. A fixed seed
    # gives the same importances in the table and in the picture.
    return optuna.importance.FanovaImportanceEvaluator(seed=0)


def _value_of(index: int) -> Callable[[FrozenTrial], float]:
    return lambda trial: trial.values[index]


def _complete(proposer: OptunaSearch) -> list[FrozenTrial]:
    return proposer.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
