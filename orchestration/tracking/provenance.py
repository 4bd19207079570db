"""Where a result comes from: commit, versions, host."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
from importlib import metadata

from mar.errors import UserError
from orchestration.installation import CODE, checkout

PINNED = "MAR_PINNED"
"""Environment variable of a job: the versions that its results depend on, as JSON."""
PACKAGES = ("mar-on-ray", "torch", "timm", "ray", "mlflow", "decord", "av", "numpy")


def tags() -> dict[str, str]:
    """Return what is the same for every trial of a launch, as tags."""
    versions = {
        f"version.{name}": version for name, version in package_versions().items() if version
    }
    return {
        **versions,
        "version.python": platform.python_version(),
        "host": platform.node(),
        **_git(),
    }


def package_versions() -> dict[str, str | None]:
    """Return the installed version of each package that bears on a result; none: not installed."""
    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def _git() -> dict[str, str]:
    """Return the checkout's commit and whether it has uncommitted changes.

    Nothing outside a checkout.
    """
    if CODE in os.environ:
        return json.loads(os.environ[CODE])
    program = shutil.which("git")
    root = checkout()
    if program is None or root is None:
        return {}

    def ask(*arguments: str) -> str:
        answer = subprocess.run(  # noqa: S603
            [program, "-C", str(root), *arguments], capture_output=True, text=True, check=False
        )
        return answer.stdout.strip()

    return {
        "mlflow.source.git.commit": ask("rev-parse", "HEAD"),
        "git.dirty": str(bool(ask("status", "--porcelain"))),
    }


def check_pinned() -> None:
    """See that the cluster has the versions that the one who submitted has.

    Raises:
        UserError: it has others.
    """
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
            "there (constraints.txt), "
            "or submit with --any-versions"
        )
