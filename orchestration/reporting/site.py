"""The page of ``mar report --all``: one self-contained HTML file over all studies.

The page needs no server and no other file.
"""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from mar.errors import UserError
from orchestration.reporting.drawing.plotly_figures import (
    chart,
    confusion_chart,
    picture,
    plotly_script,
    study_chart,
)
from orchestration.reporting.html_pages import write_page
from orchestration.reporting.significance import IN_ONE, ONE_TRAINING, Claim, claims
from orchestration.reporting.study_report import findings
from orchestration.reporting.study_results import StudyResults
from orchestration.reporting.table_formats import to_html
from orchestration.reporting.tables import table_info
from orchestration.reporting.training_figures import confusion, curves_info
from orchestration.storage.trial_dir import TrialDir
from orchestration.studies.diff import Neighbours
from orchestration.studies.plan import Planned, plan_trials
from orchestration.studies.schema import StudyFile
from orchestration.studies.trial import Study, Trial
from orchestration.tracking.run_record import RunRecord
from orchestration.tracking.store import Store
from orchestration.tracking.tags import FAILURE, FAILURE_KIND, PRUNED

# A bare version number would be ambiguous: each is shown with the last part of its tag's name.
_SHOWN_TAGS = ("mlflow.source.git.commit", "version.torch", "version.ray", "host")
_LAST_LINES = 12
"""Lines of a failed trial's log that the page shows."""
_OWN_SERVER = "http://127.0.0.1:5000"
"""Address at which ``mar ui`` shows an embedded store, by default."""
# The order in which the page counts them.
_STATES = ("finished", "tested", "running", "failed", "killed", "missing")


@dataclass(frozen=True)
class TrialState:
    """What the page shows of one trial."""

    name: str
    key: str
    state: str
    """``finished``, ``tested`` (another trial's model), ``failed``, ``running``, ``killed`` or
    ``missing``."""
    run_id: str
    link: str
    reason: str
    log: str
    hours: float | None
    made_by: str
    """Commit and versions."""
    settings: str
    """Its own settings, without those that all trials of the study share."""
    unlike: str
    """For a missing trial: how its settings differ from those of the most similar run."""


@dataclass(frozen=True)
class Section:
    """What the page shows of one study."""

    name: str
    title: str
    table: Markup
    picture: str
    """The figure as a data URI, for print; empty if it cannot be drawn yet."""
    chart: Markup
    """The figure as an interactive chart; empty for masks and reconstructions."""
    curves: Markup
    confusion: Markup
    findings: list[str]
    claims: list[Claim]
    trials: list[TrialState]
    command: str
    fingerprints: str

    @property
    def counts(self) -> str:
        """The number of trials in each state, as text."""
        return _counted({each.key: each.state for each in self.trials})


def write_site(
    studies: Sequence[Study], store: Store, overrides: Sequence[str], file: Path
) -> None:
    """Write the page over the given studies.

    ``overrides`` are shown in each study's command.

    Raises:
        Failure: the tracking store cannot be read.
    """
    # Read once: every section matches its trials with the same runs.
    records = store.trials()
    sections = [_section(study, records, store, overrides) for study in studies]
    verdicts = Counter(
        claim.verdict.removesuffix(IN_ONE) for section in sections for claim in section.claims
    )
    # By key, because studies share trials.
    states = _counted({trial.key: trial.state for section in sections for trial in section.trials})
    # By run, because several trials may have the same run. A tested trial spent no training time.
    spent = {
        trial.run_id: trial.hours
        for section in sections
        for trial in section.trials
        if trial.state == "finished"
    }
    write_page(
        file,
        "site.html",
        title="Masked Action Recognition: report",
        sections=sections,
        one_training=ONE_TRAINING if all(len(study.file.seeds) == 1 for study in studies) else "",
        script=plotly_script(),
        verdicts=verdicts,
        states=states,
        hours=sum(each or 0.0 for each in spent.values()),
        to_come=_to_come(studies, records),
        failures=_failures(sections),
        tracking=store.launch.shown_tracking,
    )


def _failures(sections: Sequence[Section]) -> Counter[str]:
    """Return how many trials each reason ended; a trial of several studies counts once."""
    return Counter(
        {each.key: each.reason for part in sections for each in part.trials if each.reason}.values()
    )


def _to_come(studies: Sequence[Study], records: Sequence[RunRecord]) -> str:
    """Return how many trainings are left, and their hours at the throughput of finished trials."""
    # Trainings that an earlier study of the list already plans are not counted again.
    earlier = Planned()
    new = [
        line
        for study in studies
        for line in plan_trials(study, records, None, earlier)
        if line.state == "new"
    ]
    hours = [line.device_hours for line in new if line.device_hours is not None]
    if not new:
        return "nothing is left to train"
    if hours:
        known = f", {len(hours)} of them about {sum(hours):.2f} hours at the throughput so far"
    else:
        known = ""
    return f"{len(new)} trainings to come{known}"


def _counted(states: Mapping[str, str]) -> str:
    """Return the number of trials in each state as text; ``states`` maps a trial to its state."""
    counts = Counter(states.values())
    return ", ".join(f"{counts[state]} {state}" for state in _STATES if counts[state])


def _section(
    study: Study, records: Sequence[RunRecord], store: Store, overrides: Sequence[str]
) -> Section:
    """Return what the page shows of one study."""
    results = StudyResults.match(study, records, store.file_of)
    found = results.runs
    neighbours = Neighbours(records)
    # A trial without a finished run shows its newest other run: failed, running or killed. Records
    # come newest first, so the newest is written last.
    newest = {record.key: record for record in reversed(records)}
    trials = [
        _state(study, trial, found.get(trial.key) or newest.get(trial.key), store, neighbours)
        for trial in study.trials
    ]
    # A study of costs or reconstructions alone has no accuracy to report.
    if "top1" in study.file.table.columns:
        notes = findings(results)
    else:
        notes = []
    curves = curves_info(results)
    mistaken = confusion(results)
    return Section(
        study.name,
        study.file.title,
        # ``to_html`` escapes the texts of the cells.
        Markup(to_html(table_info(results))),  # noqa: S704
        _picture(results),
        study_chart(results),
        chart(curves) if curves else Markup(""),
        confusion_chart(mistaken) if mistaken else Markup(""),
        notes,
        claims(results),
        trials if study.trains else [],
        f"mar run {study.name} {' '.join(shlex.quote(word) for word in overrides)}".strip(),
        ", ".join(sorted({trial.fingerprint for trial in study.trials})),
    )


def _state(
    study: Study, trial: Trial, run: RunRecord | None, store: Store, neighbours: Neighbours
) -> TrialState:
    """Return what the page shows of one trial; ``run`` is its newest run, if it has one."""
    own = "; ".join(
        f"{path}: {value}"
        for axis, label in trial.labels.items()
        for path, value in _of_label(study.file, axis, label)
    )
    if run is None:
        near = neighbours.nearest(trial)
        if near:
            differing = [f"{each.setting}: {each.first} → {each.second}" for each in near[1]]
        else:
            differing = []
        if near:
            unlike = f"unlike run {near[0][:8]}: {'; '.join(differing)}"
        else:
            unlike = ""
        return TrialState(trial.name, trial.key, "missing", "", "", "", "", None, "", own, unlike)
    # What was not trained was tested with another trial's model.
    state = {"FINISHED": "finished" if run.was_trained else "tested"}.get(
        run.status, run.status.lower()
    )
    seconds = run.metrics.get("time/elapsed_s")
    # A database has no pages of its own: its links work while ``mar ui`` shows it.
    if store.launch.tracking.startswith("http"):
        server = store.launch.shown_tracking
    else:
        server = _OWN_SERVER
    link = f"{server}/#/experiments/{run.experiment_id}/runs/{run.run_id}"
    made = ", ".join(
        f"{name.split('.')[-1]} {run.tags[name][:12]}" for name in _SHOWN_TAGS if name in run.tags
    )
    log = TrialDir(store.launch.trial_folder(run.key)).log
    # The trial may have run on another machine, whose folder is not here.
    if log.is_file():
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    else:
        lines = []
    is_bad = state in ("failed", "killed")
    return TrialState(
        trial.name,
        trial.key,
        state,
        run.run_id,
        link,
        _reason(run) if is_bad else "",
        "\n".join(lines[-_LAST_LINES:]) if is_bad else "",
        None if seconds is None else seconds / 3600,
        made,
        own,
        "",
    )


def _reason(run: RunRecord) -> str:
    """Return why a trial failed, the kind of failure first."""
    kind = run.tags.get(FAILURE_KIND)
    return (f"{kind}: " if kind else "") + run.tags.get(FAILURE, run.tags.get(PRUNED, ""))


def _of_label(file: StudyFile, axis: str, label: str) -> list[tuple[str, object]]:
    return list(file.axes.get(axis, {}).get(label, {}).items())


def _picture(results: StudyResults) -> str:
    """Return the figure as a data URI; empty if the model's reconstructions are missing."""
    try:
        return picture(results)
    except UserError:
        return ""
