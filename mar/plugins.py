"""What installed packages add: masks and annotation formats, by entry points.

A package names them in its ``pyproject.toml``::

    [project.entry-points."mar.masks"]
    stripes = "my_package:stripes"

Then ``mask.strategy: stripes`` is a setting like any other. Imports neither torch nor the package,
until a setting names what it adds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from pydantic import BaseModel, ValidationError

from mar.errors import UserError

MASKS = "mar.masks"
"""The group of :class:`MaskStrategy` objects."""
FORMATS = "mar.annotation_formats"
"""The group of functions from (``DataConfig``, split) to ``Annotations``."""


class NoOptions(BaseModel, extra="forbid", frozen=True):
    """The settings of a strategy that has none."""


def _rounded_down(_: BaseModel, ratio: float, grid: tuple[int, int, int]) -> int:
    t, h, w = grid
    return int(ratio * t * h * w)


@dataclass(frozen=True)
class MaskStrategy:
    """A mask strategy of a package of one's own: what its entry point in ``mar.masks`` names."""

    draw: Callable[[Any, tuple[int, int, int], int, int, Any], Any]
    """(options, token grid, hidden tokens of a clip, clips, ``torch.Generator``) -> a boolean
    tensor, B × t × h × w, True where a token is hidden; every clip hides as many. All random
    numbers must come from the generator."""
    options: type[BaseModel] = NoOptions
    """The strategy's own settings, ``mask.options``: a pydantic model."""
    num_hidden: Callable[[Any, float, tuple[int, int, int]], int] = _rounded_down
    """(options, ratio ρ, token grid) -> hidden tokens of a clip; by default ρ of all, rounded
    down."""


@lru_cache
def _installed(group: str) -> Mapping[str, EntryPoint]:
    """Return the entry points of a group by name."""
    return {each.name: each for each in entry_points(group=group)}


def names(group: str) -> list[str]:
    """Return the names that installed packages add to a group."""
    return sorted(_installed(group))


def check_name(group: str, name: str, built_in: tuple[str, ...]) -> str:
    """Return a name that is built in or that an installed package adds.

    Raises:
        ValueError: it is neither.
    """
    if name in built_in or name in _installed(group):
        return name
    known = ", ".join(repr(each) for each in built_in)
    added = ", ".join(repr(each) for each in names(group))
    more = f"or of an installed package: {added}" if added else f"no package adds one ({group})"
    raise ValueError(f"must be {known}; {more}")


@lru_cache
def load(group: str, name: str) -> Any:
    """Return what a package adds under a name.

    Raises:
        UserError: the package cannot be imported, or the name leads to nothing.
    """
    try:
        return _installed(group)[name].load()
    # The package's own code runs here, which may raise anything.
    except Exception as error:
        raise UserError(
            f"{name} ({group}), of the package {origin(group, name)}: {type(error).__name__}: "
            f"{error}"
        ) from error


def origin(group: str, name: str) -> str:
    """Return the package and version that adds a name."""
    found = _installed(group)[name]
    # Entry points that a program makes by itself belong to no package.
    if found.dist is None:
        return found.value
    return f"{found.dist.name} {found.dist.version}"


def mask_options(name: str, given: Mapping[str, Any]) -> BaseModel:
    """Return the checked settings of a package's mask strategy.

    Raises:
        ValueError: the strategy refuses them, or is not a :class:`MaskStrategy`.
    """
    strategy = load(MASKS, name)
    if not isinstance(strategy, MaskStrategy):
        raise ValueError(
            f"{name}, of the package {origin(MASKS, name)}, is not a mar.plugins.MaskStrategy"
        )
    try:
        return strategy.options.model_validate(dict(given))
    except ValidationError as error:
        first = error.errors()[0]
        path = ".".join(str(part) for part in first["loc"])
        raise ValueError(
            f"options.{path}: {first['msg']} (the package {origin(MASKS, name)})"
        ) from None
