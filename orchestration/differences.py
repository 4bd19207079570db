"""What two recipes differ in, and why: the reasons are the comments behind the settings, in the recipes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mar.settings import flatten
from orchestration.files import Recipe, find
from orchestration.study import read_recipe


@dataclass(frozen=True)
class Difference:
    """One setting of two recipes."""

    setting: str
    first: Any
    second: Any
    reason: str
    """The comments behind it, the second recipe's last; empty where neither has one."""


def differences(first: str, second: str) -> list[Difference]:
    """Return the settings whose values differ, in the order of the settings tree.

    Raises:
        UserError: one of the recipes is not there or is wrong.
    """
    one, other = (flatten(read_recipe(name).model_dump(mode="json")) for name in (first, second))
    files = [Recipe(find(name, "recipe")) for name in (first, second)]
    found: list[Difference] = []
    for setting in one | other:
        values = one.get(setting), other.get(setting)
        if values[0] != values[1]:
            reasons = dict.fromkeys(words for file in files if (words := file.comment(setting)))
            found.append(Difference(setting, *values, "; ".join(reasons)))
    return found
