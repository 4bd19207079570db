"""Every setting with its type, default and meaning: for ``mar settings`` and the documentation.

All of it comes from the settings' classes (``mar.config.schema``): nothing is said twice.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from mar.config.overrides import SETTING_PATHS
from mar.config.schema import TrainingConfig
from mar.errors import UserError

_TYPES = {
    "boolean": "true or false",
    "integer": "whole number",
    "number": "number",
    "string": "text",
    "null": "none",
    "object": "keys and values",
}
_BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}


@dataclass(frozen=True)
class Setting:
    """One setting, or one key of a file."""

    path: str
    type: str
    """What it may be, in words."""
    default: str
    """As it is written in YAML; ``required`` where there is none."""
    meaning: str


def settings_below(path: str = "") -> list[Setting]:
    """Return the settings of a branch, or one setting; all without a path.

    Raises:
        UserError: there is no such path.
    """
    if path and path not in SETTING_PATHS:
        near = difflib.get_close_matches(path, SETTING_PATHS, n=3, cutoff=0.4)
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        raise UserError(f"{path}: no such setting{hint}")
    return [
        each
        for each in keys_of(TrainingConfig)
        if not path or each.path == path or each.path.startswith(f"{path}.")
    ]


def branches() -> dict[str, str]:
    """Return the branches of the settings tree and what each is about, in its order."""
    tree = TrainingConfig.model_json_schema()
    found: dict[str, str] = {}
    for name, schema in tree["properties"].items():
        target = _target(schema, tree)
        if "properties" in target:
            found[name] = _one_line(target.get("description", ""))
    return found


def keys_of(model: type[BaseModel]) -> list[Setting]:
    """Return every key of a file that pydantic checks, branches opened, in the file's order."""
    tree = model.model_json_schema()
    return list(_keys(tree, tree, ""))


def _keys(node: dict[str, Any], tree: dict[str, Any], prefix: str) -> Iterator[Setting]:
    for name, schema in node["properties"].items():
        target = _target(schema, tree)
        if "properties" in target:
            yield from _keys(target, tree, f"{prefix}{name}.")
            continue
        if "default" in schema:
            default = json.dumps(schema["default"], ensure_ascii=False)
        else:
            default = "required"
        meaning = _one_line(schema.get("description", ""))
        yield Setting(f"{prefix}{name}", _type(schema, tree), default, meaning)


def _target(schema: dict[str, Any], tree: dict[str, Any]) -> dict[str, Any]:
    """Return the schema that a reference stands for."""
    if "$ref" in schema:
        return tree["$defs"][schema["$ref"].rsplit("/", 1)[1]]
    return schema


def _type(schema: dict[str, Any], tree: dict[str, Any]) -> str:
    """Return in words what a value may be."""
    schema = {**_target(schema, tree), **schema}
    if "enum" in schema:
        return " | ".join(f"`{value}`" for value in schema["enum"])
    if "const" in schema:
        return f"`{schema['const']}`"
    if "anyOf" in schema:
        return ", or ".join(_type(each, tree) for each in schema["anyOf"])
    if schema.get("type") == "array":
        return _list_type(schema, tree)
    bounds = [f"{sign} {schema[key]:g}" for key, sign in _BOUNDS.items() if key in schema]
    kind = _TYPES.get(schema.get("type", ""), "any value")
    return ", ".join([kind, *bounds])


def _list_type(schema: dict[str, Any], tree: dict[str, Any]) -> str:
    if "prefixItems" in schema:
        parts = [_type(each, tree) for each in schema["prefixItems"]]
        if len(set(parts)) == 1:
            return f"list of {len(parts)}: {parts[0]}"
        return f"list of {len(parts)}: {'; '.join(parts)}"
    if "items" in schema:
        return f"list: {_type(schema['items'], tree)}"
    return "list"


def _one_line(text: str) -> str:
    """Return a docstring as one line, with Python's double backticks as single ones."""
    return re.sub(r"``([^`]*)``", r"`\1`", " ".join(text.split()))
