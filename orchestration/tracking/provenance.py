"""Where a result comes from: commit, versions, host."""

from __future__ import annotations

import getpass
import json
import os
import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path

from mar.errors import UserError
from orchestration.installation import CODE, checkout

PINNED = "MAR_PINNED"
"""Environment variable of a submitted job: the submitter's versions of ``PACKAGES``, as JSON."""
PACKAGES = ("mar-on-ray", "torch", "timm", "ray", "mlflow", "decord", "av", "numpy")


def tags() -> dict[str, str]:
    """Return the tags that all trials of a launch share: versions, host and commit."""
    versions = {
        f"version.{name}": version for name, version in package_versions().items() if version
    }
    return {
        **versions,
        "version.python": platform.python_version(),
        "host": platform.node(),
        **_git(),
    }


def source_tags(file: Path | None) -> dict[str, str]:
    """Return who launches a study and its file, under the names that MLflow's pages show.

    ``file`` is none for a study that a program made.
    """
    try:
        user = getpass.getuser()
    # In a container a user may have a number and no name.
    except (KeyError, OSError):
        user = ""
    source = str(file) if file else "mar"
    return {"mlflow.user": user, "mlflow.source.name": source, "mlflow.source.type": "LOCAL"}


def package_versions() -> dict[str, str | None]:
    """Return the version of each package that affects results; none if it is not installed."""
    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def _git() -> dict[str, str]:
    """Return the checkout's commit and whether it has uncommitted changes; empty without one."""
    # A submitted job runs from a copy without ``.git``: its submitter sends these tags.
    if CODE in os.environ:
        return json.loads(os.environ[CODE])
    program = shutil.which("git")
    root = checkout()
    if program is None or root is None:
        return {}

    def ask(*arguments: str) -> str:
        # A checkout that git refuses, as one of another user's, gives an empty text and no error:
        # a training must not depend on git.
        answer = subprocess.run(  # noqa: S603
            [program, "-C", str(root), *arguments], capture_output=True, text=True, check=False
        )
        return answer.stdout.strip()

    # The first name is MLflow's own: its pages show that commit beside a run.
    return {
        "mlflow.source.git.commit": ask("rev-parse", "HEAD"),
        "git.dirty": str(bool(ask("status", "--porcelain"))),
    }


def check_pinned() -> None:
    """Check that the cluster has the same package versions as the machine that submitted the job.

    Raises:
        UserError: a version differs.
    """
    # Without the variable nothing is compared: no job, or one submitted with ``--any-versions``.
    pinned: dict[str, str | None] = json.loads(os.environ.get(PINNED, "{}"))
    here = package_versions()
    others = [
        f"{name} {here.get(name)} (yours: {version})"
        for name, version in pinned.items()
        if here.get(name) != version
    ]
    if others:
        raise UserError(
            f"the cluster has other versions than you: {', '.join(others)}. Install the same "
            "versions on it (constraints.txt), or submit with --any-versions"
        )
