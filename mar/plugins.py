"""What installed packages add by entry points: masks, encoders, classifiers, annotation formats.

A package names them in its ``pyproject.toml``::

    [project.entry-points."mar.masks"]
    stripes = "my_package:stripes"

Then ``mask.strategy: stripes`` is a setting like any other. Imports neither torch nor the package,
until a setting names what it adds.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from pydantic import BaseModel, ValidationError

from mar.errors import UserError

MASKS = "mar.masks"
"""The group of :class:`MaskStrategy` objects."""
ENCODERS = "mar.encoders"
"""The group of :class:`EncoderFactory` objects."""
CLASSIFIERS = "mar.classifiers"
"""The group of :class:`ClassifierFactory` objects."""
FORMATS = "mar.annotation_formats"
"""The group of functions from (``DataConfig``, split) to ``Annotations``."""


class NoOptions(BaseModel, extra="forbid", frozen=True):
    """The settings of what has none."""


def _rounded_down(_: BaseModel, ratio: float, grid: tuple[int, int, int]) -> int:
    t, h, w = grid
    return int(ratio * t * h * w)


@dataclass(frozen=True)
class MaskStrategy:
    """A mask strategy of a package of one's own: what its entry point in ``mar.masks`` names."""

    draw: Callable[[Any, tuple[int, int, int], int, int, Any], Any] | None = None
    """(options, token grid, hidden tokens of a clip, clips, ``torch.Generator``) -> a boolean
    tensor, B × t × h × w, True where a token is hidden; every clip hides as many. All random
    numbers must come from the generator."""
    options: type[BaseModel] = NoOptions
    """The strategy's own settings, ``mask.options``: a pydantic model."""
    num_hidden: Callable[[Any, float, tuple[int, int, int]], int] = _rounded_down
    """(options, ratio ρ, token grid) -> hidden tokens of a clip; by default ρ of all, rounded
    down."""
    score: Callable[[Any, Any], Any] | None = None
    """A mask that sees the clip has this in place of ``draw``: (options, tubelets with pixel values
    from 0 to 1, B × t × h × w × P, on their device) -> a number for each token, B × t × h × w. The
    tokens of the highest numbers are visible; chance decides between equal ones."""


@dataclass(frozen=True)
class EncoderFactory:
    """An encoder of a package of one's own: what its entry point in ``mar.encoders`` names."""

    build: Callable[[Any, tuple[int, int, int], int], Any]
    """(options, token grid, values P of a tubelet) -> an ``nn.Module`` that maps visible tubelets,
    B × K × P, normalised by ImageNet's mean and deviation, and their flat indices, B × K, to tokens
    B × K × D. Layer decay knows ``embed.…`` and ``blocks.0.…`` by these names; other parameters
    have the full learning rate."""
    width: Callable[[Any], int]
    """(options) -> the width D of a token."""
    options: type[BaseModel] = NoOptions
    """The encoder's own settings, ``encoder.options``: a pydantic model."""


@dataclass(frozen=True)
class ClassifierFactory:
    """A classifier of a package of one's own: what its entry point in ``mar.classifiers`` names."""

    build: Callable[[Any, int, tuple[int, int, int], int], Any]
    """(options, the encoder's width D, token grid, classes C) -> an ``nn.Module`` that maps the
    encoder's visible tokens, B × K × D, and their flat indices, B × K, to class scores, B × C."""
    options: type[BaseModel] = NoOptions
    """The classifier's own settings, ``classifier.options``: a pydantic model."""


_TYPES: dict[str, type[MaskStrategy | EncoderFactory | ClassifierFactory]] = {
    MASKS: MaskStrategy,
    ENCODERS: EncoderFactory,
    CLASSIFIERS: ClassifierFactory,
}
"""Group -> the class of what its entry points name."""


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
    # The package's own code runs here, which may raise anything.
    with package_errors(group, name):
        return _installed(group)[name].load()


def origin(group: str, name: str) -> str:
    """Return the package and version that adds a name."""
    found = _installed(group)[name]
    # Entry points that a program makes by itself belong to no package.
    if found.dist is None:
        return found.value
    return f"{found.dist.name} {found.dist.version}"


def options(group: str, name: str, given: Mapping[str, Any]) -> BaseModel:
    """Return the checked settings of what a package adds under a name.

    Raises:
        ValueError: they are refused, or the entry point names something of another class.
    """
    added = load(group, name)
    expected = _TYPES[group]
    if not isinstance(added, expected):
        raise ValueError(
            f"{name}, of the package {origin(group, name)}, is not a mar.plugins."
            f"{expected.__name__}"
        )
    try:
        return added.options.model_validate(dict(given))
    except ValidationError as error:
        first = error.errors()[0]
        path = ".".join(str(part) for part in first["loc"])
        raise ValueError(
            f"options.{path}: {first['msg']} (the package {origin(group, name)})"
        ) from None


def checked_options(
    group: str, name: str, given: Mapping[str, Any], is_built_in: bool
) -> dict[str, Any]:
    """Return the value of a branch's setting ``options``, defaults filled in.

    Raises:
        ValueError: something that is built in has no options; a package's own refuses them.
    """
    if is_built_in:
        if given:
            raise ValueError(f"options: {name} has none")
        return {}
    # Defaults are filled in, so that an option that is written out is the same trial.
    return options(group, name, given).model_dump(mode="json")


@contextmanager
def package_errors(group: str, name: str) -> Generator[None]:
    """Turn any error of a package's code into one that names the package.

    Raises:
        UserError: the code raised something.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{name} ({group}), of the package {origin(group, name)}: {type(error).__name__}: "
            f"{error}"
        ) from error
