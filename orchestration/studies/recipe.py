"""Recipes: the settings of one training, from a file and from ``path=value`` overrides."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from mar.config.overrides import SETTING_PATHS, SettingError, build, merge
from mar.config.schema import TrainingConfig
from mar.errors import UserError
from mar.safe_input import parse_yaml
from mar.weights.hub import is_path
from orchestration.studies.yaml_document import Recipe, find


def read_recipe(name: str, overrides: Sequence[str] = ()) -> TrainingConfig:
    """Read a recipe file and apply ``path=value`` overrides.

    Raises:
        UserError: a bad file, setting or override; the message says where.
    """
    recipe = Recipe(find(name, "recipe"))
    # Without this check, the first key of a study would be reported as an unknown setting.
    if {"axes", "space"} & recipe.content.keys():
        what = "a search" if "space" in recipe.content else "a study"
        raise UserError(
            f"{recipe.documents[-1].path} is {what}, not a recipe; its settings are in "
            f"{recipe.content.get('recipe')}"
        )
    changes = parse_overrides(overrides)
    try:
        return build(merge(recipe.content, changes))
    except SettingError as error:
        if touches(error.path, changes):
            location = ""
        else:
            location = f"{recipe.location_of_setting(error.path)}: "
        raise UserError(f"{location}{error}") from None


def recipe_tree(name: str) -> dict[str, Any]:
    """Return the settings that a recipe's files set, nested, without the defaults."""
    return Recipe(find(name, "recipe")).content


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """Return the values of ``path=value`` words by dotted path; a value is read as YAML.

    Raises:
        UserError: a word has no path or no equals sign, or its value is not YAML.
    """
    changes: dict[str, Any] = {}
    for word in overrides:
        path, equals, text = word.partition("=")
        # A label may contain an equals sign, as "ρ = 50 %". The path ends at the first one that
        # follows the name of a setting.
        if word.startswith(("axes.", "rows.")):
            ends = [
                location
                for location in range(len(word))
                if word[location] == "=" and _SETTING.search(word[:location])
            ]
            if ends:
                path = word[: ends[0]]
                text = word[ends[0] + 1 :]
        if not equals or not path:
            raise UserError(f"{word!r}: expected path=value, as in mask.ratio=0.75")
        try:
            changes[path] = parse_yaml(text)[0]
        except yaml.YAMLError as error:
            reason = getattr(error, "problem", None) or "not valid YAML"
            raise UserError(f"{path}={text}: {reason}") from None
    return changes


_SETTING = re.compile(rf"\.(?:{'|'.join(re.escape(path) for path in SETTING_PATHS)}|recipe)$")


def touches(path: str, changes: Mapping[str, Any]) -> bool:
    """Whether a change is to this setting, to a part of it, or to the group it is in."""
    # The dot keeps a setting apart from others whose names begin with its own.
    return any(
        change == path or change.startswith(f"{path}.") or path.startswith(f"{change}.")
        for change in changes
    )


def absolute_paths(settings: TrainingConfig) -> TrainingConfig:
    """Return the settings with absolute paths to data and weights."""
    # A worker has another working folder, in which a relative path is another file.
    data = settings.data
    encoder = settings.encoder
    weights = settings.encoder.weights
    cache = data.cache
    if data.cache_folder:
        cache = str(Path(data.cache_folder).resolve())
    data = data.model_copy(update={"root": str(Path(data.root).resolve()), "cache": cache})
    # Weights may also have the name of a model on a hub.
    if weights and is_path(weights):
        encoder = encoder.model_copy(update={"weights": str(Path(weights).expanduser().resolve())})
    return settings.model_copy(update={"data": data, "encoder": encoder})
