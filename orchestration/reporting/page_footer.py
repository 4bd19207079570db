"""The last lines of every page: when and how it was made, and where the runs are."""

from __future__ import annotations

import html
import shlex
from collections.abc import Sequence
from datetime import datetime

from orchestration.secrets import without_secrets
from orchestration.tracking import provenance


def footer(command: Sequence[str], experiments: Sequence[str] = ()) -> str:
    """Return a page's last lines, in HTML.

    ``experiments`` are the ids in MLflow of those that its runs are in.
    """
    tags = provenance.tags()
    commit = tags.get("mlflow.source.git.commit", "")[:12] or "no checkout"
    dirty = " with uncommitted changes" if tags.get("git.dirty") == "True" else ""
    line = without_secrets(shlex.join(command))
    facts = [
        f"Made {datetime.now().astimezone().strftime('%Y-%m-%d %H:%M %Z')} on {tags['host']}",
        f"code {commit}{dirty}",
        f"mar-on-ray {tags.get('version.mar-on-ray', '')}, torch {tags.get('version.torch', '')}",
    ]
    text = html.escape("; ".join(facts))
    return (
        f'<footer style="color:#666;font-size:.85em;margin-top:2em"><p>{text}.</p>'
        f"<p>Command: <code>{html.escape(line)}</code></p>{_links(experiments)}</footer>\n"
    )


def _links(experiments: Sequence[str]) -> str:
    """Return links to the runs in MLflow.

    The port is the reader's, 5000 unless they say another.
    """
    if not experiments:
        return ""
    links = " ".join(
        f'<a class="mlflow" data-page="/#/experiments/{html.escape(each)}" '
        f'href="http://127.0.0.1:5000/#/experiments/{html.escape(each)}">experiment '
        f"{html.escape(each)}</a>"
        for each in experiments
    )
    change = (
        "document.querySelectorAll('a.mlflow').forEach(a => "
        "a.href = 'http://127.0.0.1:' + (parseInt(this.value) || 5000) + a.dataset.page)"
    )
    field = f'<input size="5" value="5000" aria-label="port" oninput="{change}">'
    return f"<p>Runs in MLflow (<code>mar ui</code>, port {field}): {links}</p>"
