"""``mar report --all``: one self-contained page over all studies.

It needs no server and no other file.
"""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2

from mar.errors import UserError
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
from orchestration.reporting.tables import table_info, to_html
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
_STATES = ("finished", "tested", "running", "failed", "killed", "not there yet")


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
    table: str
    picture: str
    """A data URI, for print; empty where there is no figure yet."""
    chart: str
    """The same, answering the mouse; empty where the figure is a picture."""
    curves: str
    confusion: str
    findings_text: list[str]
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
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(_PAGE).render(
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
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(page, encoding="utf-8")


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
    known = (
        f", {len(hours)} of them about {sum(hours):.2f} hours at the throughput so far"
        if hours
        else ""
    )
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
    notes = findings(results) if "top1" in study.file.table.columns else []
    curves = curves_info(results)
    mistaken = confusion(results)
    return Section(
        study.name,
        study.file.title,
        to_html(table_info(results)),
        _picture(results),
        study_chart(results),
        chart(curves) if curves else "",
        confusion_chart(mistaken) if mistaken else "",
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
        differing = (
            [f"{each.setting}: {each.first} → {each.second}" for each in near[1]] if near else []
        )
        unlike = f"unlike run {near[0][:8]}: {'; '.join(differing)}" if near else ""
        return TrialState(
            trial.name, trial.key, "not there yet", "", "", "", "", None, "", own, unlike
        )
    state = {"FINISHED": "finished" if run.has_model else "tested"}.get(
        run.status, run.status.lower()
    )
    seconds = run.metrics.get("time/elapsed_s")
    server = (
        store.launch.shown_tracking if store.launch.tracking.startswith("http") else _OWN_SERVER
    )
    link = f"{server}/#/experiments/{run.experiment_id}/runs/{run.run_id}"
    made = ", ".join(
        f"{name.split('.')[-1]} {run.tags[name][:12]}" for name in _SHOWN_TAGS if name in run.tags
    )
    log = TrialDir(store.launch.trial_folder(run.key)).log
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
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


_PAGE = """\
<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Masked Action Recognition: report</title>
{{ script | safe }}
<style>
:root { --line: #d8dde3; --soft: #57606a; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 0 auto; padding: 1rem; color: #1f2328; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.25rem; margin-top: 2.5rem; border-bottom: 1px solid var(--line); }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .86rem; width: max-content; max-width: none; }
caption { display: none; } th, td { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid var(--line); }
th { text-align: right; vertical-align: bottom; } th:first-child, td:first-child { text-align: left; }
.words th, .words td { text-align: left; white-space: normal; } .words td:nth-child(3) { max-width: 26rem; }
img { max-width: 100%; height: auto; } code, pre { font-size: .85em; background: #f4f6f8; padding: .1em .3em; }
pre { white-space: pre-wrap; padding: .6rem; } .soft { color: var(--soft); font-size: .88rem; }
.supported { color: #116329; } .contradicted { color: #a40e26; } .open { color: #7a4e00; }
nav { columns: 16rem; font-size: .92rem; } nav a { display: block; } summary { cursor: pointer; }
.printed { display: none; }
@media print { .live { display: none; } .printed { display: block; } nav { display: none; } details { display: block; } h2 { break-before: page; } .wide { overflow: visible; }
  table { font-size: .62rem; width: auto; } body { max-width: none; } }
</style></head><body>
<h1>Masked Action Recognition: all studies</h1>
<p>{{ sections | length }} studies. Trials, each counted once:
{{ states }}.
{{ "%.2f" | format(hours) }} hours of training spent; {{ to_come }}.</p>
{% if failures %}<p>Failures, by kind and reason:</p><ul>{% for reason, count in failures.most_common() %}<li>{{ count }} × {{ reason }}</li>{% endfor %}</ul>{% endif %}
<p>Of the paper's {{ verdicts.values() | sum }} claims our runs support {{ verdicts["supported"] }}, contradict
{{ verdicts["contradicted"] }} and leave open {{ verdicts["open"] }}; of {{ verdicts["not there yet"] }} the runs are not there yet.
<span class="soft">Supported: the test videos tell every comparison it rests on apart, in the paper's direction; contradicted:
at least one, in the other direction (paired, at 5 % after Holm's correction). {{ one_training }}</span></p>
<nav>{% for section in sections %}<a href="#{{ section.name }}">{{ section.title }}</a>{% endfor %}</nav>
{% for section in sections %}
<h2 id="{{ section.name }}">{{ section.title }}</h2>
{% for words in section.findings_text %}<p>{{ words }}</p>{% endfor %}
<div class="wide">{{ section.table | safe }}</div>
{% if section.chart %}<div class="live">{{ section.chart | safe }}</div>{% endif %}
{% if section.picture %}<p{% if section.chart %} class="printed"{% endif %}><img src="{{ section.picture }}" alt="{{ section.title }}"></p>{% endif %}
{% if section.curves %}<details class="live"><summary>Learning curves</summary>{{ section.curves | safe }}</details>{% endif %}
{% if section.confusion %}<details class="live"><summary>What the best model takes for what</summary>{{ section.confusion | safe }}</details>{% endif %}
{% if section.claims %}<ul>{% for claim in section.claims %}
<li><b class="{{ claim.verdict.split()[0] }}">{{ claim.verdict }}</b>: {{ claim.text }}
{% for pair, gap in claim.pairs.items() if gap %}<br><span class="soft">{{ pair }}:
{{ "%+.2f [%+.2f, %+.2f], p = %.2g" | format(gap.difference, gap.low, gap.high, gap.p) }}</span>{% endfor %}</li>
{% endfor %}</ul>{% endif %}
<p><code>{{ section.command }}</code> <span class="soft">data {{ section.fingerprints }}</span></p>
{% if section.trials %}<details><summary>{{ section.trials | length }} trials: {{ section.counts }}</summary>
<div class="wide words"><table><tr><th>trial</th><th>state</th><th>its settings</th><th>hours</th><th>run</th><th>made by</th></tr>
{% for trial in section.trials %}<tr><td>{{ trial.name }}</td><td>{{ trial.state }}</td><td><code>{{ trial.settings }}</code></td>
<td>{{ "%.3f" | format(trial.hours) if trial.hours is not none else "–" }}</td>
<td>{% if trial.link %}<a href="{{ trial.link }}">{{ trial.run_id[:8] }}</a>{% else %}<code>{{ trial.run_id[:8] }}</code>{% endif %}</td>
<td class="soft">{{ trial.made_by }}{{ trial.unlike }}</td></tr>{% endfor %}</table></div></details>
{% for trial in section.trials if trial.reason or trial.log %}<p><b>{{ trial.name }}</b> {{ trial.state }}: {{ trial.reason }}</p>
{% if trial.log %}<pre>{{ trial.log }}</pre>{% endif %}{% endfor %}{% endif %}
{% endfor %}
<p class="soft">Runs are in MLflow at {{ tracking }} (<code>mar ui</code> opens it, and then the links to runs lead there).</p>
<script>document.querySelectorAll("details").forEach(each =>
  each.addEventListener("toggle", () => window.dispatchEvent(new Event("resize"))));</script>
</body></html>
"""
