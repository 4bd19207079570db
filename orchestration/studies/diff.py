"""Differences between two recipes with their reasons, and between a trial and the nearest run.

The reasons are the comments that follow the settings in the recipes' files.
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
    """A setting with different values in two recipes, or in a run and a trial."""

    setting: str
    first: Any
    second: Any
    reason: str
    """The comments that follow it, the second recipe's last; empty if neither has one."""


def differences(first: str, second: str) -> list[Difference]:
    """Return the settings whose values differ, in the order of the settings tree.

    Raises:
        UserError: a recipe does not exist or is wrong.
    """
    # Read twice: with all defaults for the values, and as written for the comments.
    one, other = (flatten(read_recipe(name).model_dump(mode="json")) for name in (first, second))
    files = [Recipe(find(name, "recipe")) for name in (first, second)]
    found: list[Difference] = []
    for setting in one | other:
        values = one.get(setting), other.get(setting)
        if values[0] != values[1]:
            # Two recipes that extend the same file may share a comment: it is given once.
            reasons = dict.fromkeys(comment for file in files if (comment := file.comment(setting)))
            found.append(Difference(setting, *values, "; ".join(reasons)))
    return found


class Neighbours:
    """Finds the finished run nearest to a trial, to explain why the trial counts as new."""

    def __init__(self, records: Sequence[AnyRecord]) -> None:
        # ``records`` are the newest first: in reversed order the newest of an identity is the last.
        newest = {
            record.identity: record for record in reversed(records) if record.status == "FINISHED"
        }
        self._runs = [(record.run_id, _leaves(line)) for line, record in newest.items() if line]

    def nearest(self, trial: Trial) -> tuple[str, list[Difference]] | None:
        """Return the id of the run with the fewest differences, and those, the run's value first.

        Among the settings are ``fingerprint``, that of the data, and ``results``, the code's
        ``RESULTS_VERSION``. Returns none if no run is finished.
        """
        wanted = _leaves(trial.identity)
        ours = set(wanted.items())
        if not self._runs:
            return None
        run_id, theirs = min(self._runs, key=lambda run: len(ours ^ set(run[1].items())))
        names = [name for name in wanted | theirs if wanted.get(name) != theirs.get(name)]
        return run_id, [Difference(name, theirs.get(name), wanted.get(name), "") for name in names]


def _leaves(identity_line: str) -> dict[str, str]:
    """Return the values of an identity as JSON, by dotted path."""
    # As text, lists can be members of a set.
    return {
        name: json.dumps(value, ensure_ascii=False)
        for name, value in flatten(json.loads(identity_line)).items()
    }
