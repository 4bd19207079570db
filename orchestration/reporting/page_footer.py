"""The footer of a report's page: when and how it was made, and where its runs are."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from orchestration.secrets import without_secrets
from orchestration.tracking import provenance


def footer(command: Sequence[str], experiments: Sequence[str] = ()) -> dict[str, Any]:
    """Return the values for the template ``footer.html``.

    ``command`` is the command that made the page, ``experiments`` are the ids of the MLflow
    experiments of its runs.
    """
    tags = provenance.tags()
    # An installed wheel has no git commit.
    commit = tags.get("mlflow.source.git.commit", "")[:12] or "no checkout"
    if tags.get("git.dirty") == "True":
        commit = f"{commit} with uncommitted changes"
    made = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    versions = (
        f"mar-on-ray {tags.get('version.mar-on-ray', '')}, torch {tags.get('version.torch', '')}"
    )
    # A page may be published, so an address in the command must not contain a password.
    return {
        "facts": f"Made {made} on {tags['host']}; code {commit}; {versions}",
        "command": without_secrets(shlex.join(command)),
        "experiments": experiments,
    }
