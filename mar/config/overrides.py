"""Settings from and to plain values: overriding, checking, comparing.

Imports neither torch nor Ray.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from mar.config.schema import Node, TrainingConfig
from mar.errors import UserError


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return ``{"mask.ratio": 0.5, …}`` for a nested mapping."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        path = f"{prefix}{name}"
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{path}.")  # pyright: ignore[reportUnknownArgumentType]
        else:
            flat[path] = value
    return flat


def merge(tree: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``tree`` with dotted (or nested) settings replaced; ``tree`` itself is left alone."""
    merged = _branches_copied(tree)
    for path, value in flatten(overrides).items():
        *branches, leaf = path.split(".")
        node = merged
        for branch in branches:
            child = node.setdefault(branch, {})
            if not isinstance(child, dict):
                raise SettingError(path, f"{branch} is a value, not a branch")
            node = child
        node[leaf] = value
    return merged


def _branches_copied(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy whose branches may be changed; leaves are shared, nobody changes those."""
    return {
        name: _branches_copied(value) if isinstance(value, Mapping) else value
        for name, value in tree.items()
    }  # pyright: ignore[reportUnknownArgumentType]


def _paths(model: type[Node], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield f"{prefix}{name}"
        if isinstance(field.annotation, type) and issubclass(field.annotation, Node):
            yield from _paths(field.annotation, f"{prefix}{name}.")


SETTING_PATHS = tuple(_paths(TrainingConfig))
"""Every dotted path of the tree, branches included."""


class SettingError(UserError):
    """One setting is wrong; ``path`` says which, so that a caller can name the file and line."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"{path}: {reason}" if path else reason)
        self.path = path


def build(tree: Mapping[str, Any]) -> TrainingConfig:
    """Check a nested mapping and make it a settings tree.

    Raises:
        SettingError: an unknown path (its nearest neighbour is named) or a value that breaks a
            rule.
    """
    try:
        return TrainingConfig.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        path = ".".join(str(part) for part in first["loc"])
        message = _rule(first["msg"])
        if not path:  # a rule between branches: its message begins with the setting to blame
            path, message = message.split(": ", 1)
        known = [
            candidate
            for candidate in SETTING_PATHS
            if path == candidate or path.startswith(f"{candidate}.")
        ]
        if first["type"] == "extra_forbidden":
            nearest = difflib.get_close_matches(path, SETTING_PATHS, n=1, cutoff=0.4)
            raise SettingError(
                path, "no such setting" + (f"; did you mean {nearest[0]}?" if nearest else "")
            ) from None
        group = max(known, key=len, default=path)
        if first["type"] in ("tuple_type", "list_type"):
            message = "must be a list, as [2, 2]"
        elif first["type"] in ("model_type", "model_attributes_type", "dict_type"):
            inside = [
                each.removeprefix(f"{group}.")
                for each in SETTING_PATHS
                if each.startswith(f"{group}.")
            ]
            message = (
                "is a group of settings, set one of them "
                f"({', '.join(f'{group}.{each}' for each in inside[:4])}, …)"
            )
        if isinstance(first["input"], (Mapping, BaseModel)):
            value = ""
        else:
            value = f", not {first['input']!r}"
        raise SettingError(group, f"{message}{value}") from None


def _rule(message: str) -> str:
    return message.removeprefix("Value error, ").replace("Input should be", "must be")


PATH_SETTINGS = ("root", "videos", "train", "val", "labels", "cache")
"""Settings of ``data`` that say where it lies: they bear on no result."""


def without_paths(settings: TrainingConfig) -> dict[str, Any]:
    """Return the settings as plain values, without the paths of data and pre-trained weights."""
    tree = settings.model_dump(mode="json")
    data = {name: value for name, value in tree["data"].items() if name not in PATH_SETTINGS}
    encoder = {name: value for name, value in tree["encoder"].items() if name != "weights"}
    return {**tree, "data": data, "encoder": encoder}
