"""``mar report --all``: one self-contained page over all studies.

It needs no server and no other file.
"""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from mar.errors import UserError
from orchestration.reporting.html_pages import write_page
from orchestration.reporting.plotly_figures import (
    chart,
    confusion_chart,
    picture,
    plotly_script,
    study_chart,
)
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

_SHOWN_TAGS = ("mlflow.source.git.commit", "version.torch", "version.ray", "host")
_LAST_LINES = 12
_OWN_SERVER = "http://127.0.0.1:5000"
"""Where ``mar ui`` shows an embedded store."""
_STATES = ("finished", "tested", "running", "failed", "killed", "missing")


@dataclass(frozen=True)
class TrialState:
    """One trial, as the page shows it."""

    name: str
    key: str
    state: str
    """finished, tested (another trial's model), failed, running, killed or not there yet."""
    run_id: str
    link: str
    reason: str
    log: str
    hours: float | None
    made_by: str
    """Commit and versions."""
    settings: str
    """Its own, beside those that all trials of the study share."""
    unlike: str
    """What keeps it from being a run that is there, while it is not there itself."""


@dataclass(frozen=True)
class Section:
    """One study, as the page shows it."""

    name: str
    title: str
    table: Markup
    picture: str
    """A data URI, for print; empty where there is no figure yet."""
    chart: Markup
    """The same, answering the mouse; empty where the figure is a picture."""
    curves: Markup
    confusion: Markup
    findings: list[str]
    claims: list[Claim]
    trials: list[TrialState]
    command: str
    fingerprints: str

    @property
    def counts(self) -> str:
        """How many trials are in which state."""
        return _counted({each.key: each.state for each in self.trials})


def write_site(
    studies: Sequence[Study], store: Store, overrides: Sequence[str], file: Path
) -> None:
    """Write the page.

    Raises:
        Failure: the tracking store cannot be read.
    """
    records = store.trials()
    sections = [_section(study, records, store, overrides) for study in studies]
    verdicts = Counter(
        claim.verdict.removesuffix(IN_ONE) for section in sections for claim in section.claims
    )
    states = _counted({trial.key: trial.state for section in sections for trial in section.trials})
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
    """Return how often each reason ended a trial, each trial once."""
    return Counter(
        {each.key: each.reason for part in sections for each in part.trials if each.reason}.values()
    )


def _to_come(studies: Sequence[Study], records: Sequence[RunRecord]) -> str:
    """Return how many trainings are left, and their device-hours.

    At the throughput of each study's finished trials.
    """
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
    """Return how many trials are in which state, in words."""
    counts = Counter(states.values())
    return ", ".join(f"{counts[state]} {state}" for state in _STATES if counts[state])


def _section(
    study: Study, records: Sequence[RunRecord], store: Store, overrides: Sequence[str]
) -> Section:
    results = StudyResults.match(study, records, store.file_of)
    found = results.runs
    neighbours = Neighbours(records)
    newest = {record.key: record for record in reversed(records)}
    trials = [
        _state(study, trial, found.get(trial.key) or newest.get(trial.key), store, neighbours)
        for trial in study.trials
    ]
    if "top1" in study.file.table.columns:
        notes = findings(results)
    else:
        notes = []
    curves = curves_info(results)
    mistaken = confusion(results)
    return Section(
        study.name,
        study.file.title,
        Markup(to_html(table_info(results))),  # noqa: S704  (escaped there)
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
    state = {"FINISHED": "finished" if run.has_model else "tested"}.get(
        run.status, run.status.lower()
    )
    seconds = run.metrics.get("time/elapsed_s")
    if store.launch.tracking.startswith("http"):
        server = store.launch.shown_tracking
    else:
        server = _OWN_SERVER
    link = f"{server}/#/experiments/{run.experiment_id}/runs/{run.run_id}"
    made = ", ".join(
        f"{name.split('.')[-1]} {run.tags[name][:12]}" for name in _SHOWN_TAGS if name in run.tags
    )
    log = TrialDir(store.launch.trial_folder(run.key)).log
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
    """Return why a trial ended badly, its kind first."""
    kind = run.tags.get(FAILURE_KIND)
    return (f"{kind}: " if kind else "") + run.tags.get(FAILURE, run.tags.get(PRUNED, ""))


def _of_label(file: StudyFile, axis: str, label: str) -> list[tuple[str, object]]:
    return list(file.axes.get(axis, {}).get(label, {}).items())


def _picture(results: StudyResults) -> str:
    try:
        return picture(results)
    except UserError:  # no reconstruction yet
        return ""
