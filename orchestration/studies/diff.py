"""What two recipes differ in, and why; what a trial and the run nearest to it differ in.

The reasons are the comments behind the settings, in the recipes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mar.config.overrides import flatten
from orchestration.studies.matching import AnyRecord
from orchestration.studies.recipe import read_recipe
from orchestration.studies.trial import Trial
from orchestration.studies.yaml_document import Recipe, find


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
            reasons = dict.fromkeys(comment for file in files if (comment := file.comment(setting)))
            found.append(Difference(setting, *values, "; ".join(reasons)))
    return found


class Neighbours:
    """Finished runs, to find the one nearest to a trial: why a training counts as new."""

    def __init__(self, records: Sequence[AnyRecord]) -> None:
        newest = {
            record.identity: record for record in reversed(records) if record.status == "FINISHED"
        }
        self._runs = [(record.run_id, _leaves(line)) for line, record in newest.items() if line]

    def nearest(self, trial: Trial) -> tuple[str, list[Difference]] | None:
        """Return the run with the fewest other settings, and those, the run's value first.

        None: there is no run.

        ``fingerprint`` is the data's content, ``results`` the version of the code that results
        depend on.
        """
        wanted = _leaves(trial.identity)
        ours = set(wanted.items())
        if not self._runs:
            return None
        run_id, theirs = min(self._runs, key=lambda run: len(ours ^ set(run[1].items())))
        names = [name for name in wanted | theirs if wanted.get(name) != theirs.get(name)]
        return run_id, [Difference(name, theirs.get(name), wanted.get(name), "") for name in names]


def _leaves(identity_line: str) -> dict[str, str]:
    return {
        name: json.dumps(value, ensure_ascii=False)
        for name, value in flatten(json.loads(identity_line)).items()
    }
