"""Finds where this project is installed: its packages, the files it ships, and its checkout."""

from pathlib import Path

import mar

# The only place that uses ``__file__`` for this: other modules may move.
_PACKAGE = Path(__file__).parent


def package_folders() -> tuple[Path, Path]:
    """Return the folders of the two packages, as they are copied to a cluster."""
    return Path(mar.__file__).parent, _PACKAGE


def packaged(folder: str) -> Path:
    """Return a folder that ships with the project.

    It is inside the package in a wheel, and beside the packages in a checkout.
    """
    # ``[tool.hatch.build.targets.wheel.force-include]`` in pyproject.toml puts it there.
    inside = _PACKAGE / folder
    if inside.is_dir():
        return inside
    return _PACKAGE.parent / folder


def checkout() -> Path | None:
    """Return the git checkout that this code runs from; none where it is installed from a wheel."""
    root = _PACKAGE.parent
    # In a worktree ``.git`` is a file and not a folder.
    if (root / ".git").exists():
        return root
    return None


CODE = "MAR_CODE"
"""Environment variable of a submitted job: the tags of the commit that was packed, as JSON."""
