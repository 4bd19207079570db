"""Settings from and to plain values: override, check and compare them.

Imports neither torch nor Ray.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from mar.config.node import Node
from mar.config.schema import TrainingConfig
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
    """Return ``tree`` with dotted (or nested) settings replaced; ``tree`` itself is not changed."""
    merged = _branches_copied(tree)
    for path, value in flatten(overrides).items():
        *branches, leaf = path.split(".")
        node = merged
        for branch in branches:
            child = node.setdefault(branch, {})
            # As in ``seed.x``: the path goes through a setting that has no settings below it.
            if not isinstance(child, dict):
                raise SettingError(path, f"{branch} is a value, not a branch")
            node = child
        node[leaf] = value
    return merged


def _branches_copied(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy whose branches may be changed; leaves are shared, because none is changed."""
    return {
        name: _branches_copied(value) if isinstance(value, Mapping) else value
        for name, value in tree.items()
    }  # pyright: ignore[reportUnknownArgumentType]


def _paths(model: type[Node], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield f"{prefix}{name}"
        # issubclass raises TypeError for what is not a class, such as ``float | None``.
        if isinstance(field.annotation, type) and issubclass(field.annotation, Node):
            yield from _paths(field.annotation, f"{prefix}{name}.")


SETTING_PATHS = tuple(_paths(TrainingConfig))
"""Every dotted path of the tree, branches included."""


class SettingError(UserError):
    """One setting is wrong; a caller can find the file and line by its ``path``."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"{path}: {reason}" if path else reason)
        self.path = path


def build(tree: object) -> TrainingConfig:
    """Check a nested mapping and return it as settings.

    Raises:
        SettingError: an unknown path (the message suggests a similar one), or a value that breaks a
            rule.
    """
    if not isinstance(tree, Mapping):
        raise SettingError("", f"settings must be a mapping, not {tree!r}")
    try:
        return TrainingConfig.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        path = ".".join(str(part) for part in first["loc"])
        message = _rule(first["msg"])
        # A rule between branches has no location; its message begins with the setting to change
        # (see TrainingConfig).
        if not path:
            path, message = message.split(": ", 1)
        # pydantic's location can be longer than a setting's path, as ``mask.cell.0`` for an item of
        # a list. The longest known path that begins it is the setting.
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
        # pydantic's own messages for these types name Python classes, such as "a valid tuple".
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
        # A group of settings is too long to be quoted.
        if isinstance(first["input"], (Mapping, BaseModel)):
            value = ""
        else:
            value = f", not {first['input']!r}"
        raise SettingError(group, f"{message}{value}") from None


def _rule(message: str) -> str:
    # pydantic puts "Value error, " before the message of a ValueError from a validator.
    return message.removeprefix("Value error, ").replace("Input should be", "must be")


PATH_SETTINGS = ("root", "videos", "train", "val", "labels", "cache")
"""Settings of ``data`` that are locations of the data: they do not affect a result."""


def without_paths(settings: TrainingConfig) -> dict[str, Any]:
    """Return the settings as plain values, without the paths of data and pre-trained weights."""
    # ``encoder.weights`` is a path or a name. What it refers to has a fingerprint of its own.
    tree = settings.model_dump(mode="json")
    data = {name: value for name, value in tree["data"].items() if name not in PATH_SETTINGS}
    encoder = {name: value for name, value in tree["encoder"].items() if name != "weights"}
    return {**tree, "data": data, "encoder": encoder}
