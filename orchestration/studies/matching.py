"""Matches trials with finished runs of any study, by equal identities."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Protocol, TypeVar

from orchestration.studies.identity import training_identity, with_defaults_filled
from orchestration.studies.trial import ABSENT, Trial


class Record(Protocol):
    """What matching needs of a run; ``tracking.RunRecord`` has it.

    A protocol, because ``studies`` must not import ``tracking``.
    """

    @property
    def run_id(self) -> str:
        """The run's id in MLflow."""
        ...

    @property
    def status(self) -> str:
        """The run's status in MLflow: FINISHED, RUNNING, FAILED or KILLED."""
        ...

    @property
    def metrics(self) -> Mapping[str, float]:
        """The last value of each metric."""
        ...

    @property
    def identity(self) -> str:
        """The identity of its trial (``studies.identity``)."""
        ...

    @property
    def was_trained(self) -> bool:
        """Whether it was trained, not only tested."""
        ...

    @property
    def has_model(self) -> bool:
        """Whether its result has a model: it was trained, and not recovered without one."""
        ...

    @property
    def weights(self) -> str | None:
        """The name of the pre-trained weights it started from, if any."""
        ...


AnyRecord = TypeVar("AnyRecord", bound=Record)


def match(trials: Sequence[Trial], records: Sequence[AnyRecord]) -> dict[str, AnyRecord]:
    """Return, by trial key, the newest finished run with the trial's identity, of any study.

    ``records`` are the newest first. A run that was logged before a setting existed matches if the
    trial has that setting's default. While the data is missing here, its fingerprint is unknown and
    runs match by their settings alone, so that a table can be printed without the videos. While
    pre-trained weights are missing, they match by their name.
    """
    return _match(trials, records, lambda line: line)


def match_training(trials: Sequence[Trial], records: Sequence[AnyRecord]) -> dict[str, AnyRecord]:
    """Return, by trial key, a finished run of the same training, tested in any way."""
    # A run that was only tested has no model with which to test again; nor has one whose result
    # came without it.
    return _match(trials, [record for record in records if record.has_model], training_identity)


def _match(
    trials: Sequence[Trial], records: Sequence[AnyRecord], part: Callable[[str], str]
) -> dict[str, AnyRecord]:
    """Match trials and records by a part of their identities."""
    # First by equal text, which is fast. The newest record of an identity is the last one in
    # reversed order, so it replaces the older ones.
    finished = [record for record in records if record.status == "FINISHED" and record.identity]
    exact = {part(record.identity): record for record in reversed(finished)}
    found = {
        trial.key: exact[part(trial.identity)] for trial in trials if part(trial.identity) in exact
    }
    # Then, for the trials that are left, by completed identities: this parses every record.
    missing: dict[str, list[Trial]] = {}
    for trial in trials:
        if trial.key not in found:
            missing.setdefault(part(trial.identity), []).append(trial)
    # A trial without its data may match a run with data of any content.
    is_anywhere = any(trial.fingerprint == ABSENT for each in missing.values() for trial in each)
    for record in finished if missing else []:
        for data in (None, ABSENT) if is_anywhere else (None,):
            # With the content of its weights, and with their name for a trial that lacks them.
            for weights in {None, record.weights}:
                line = _completed(record.identity, data, weights)
                for trial in missing.get(part(line), []) if line else []:
                    found.setdefault(trial.key, record)
    return found


# Cached, because a search matches each of its proposals with the same records.
@lru_cache(maxsize=2**15)
def _completed(identity_line: str, data_fingerprint: str | None, weights: str | None) -> str:
    """Return a record's identity with the settings it lacks; empty if it cannot be understood."""
    try:
        return with_defaults_filled(identity_line, data_fingerprint, weights)
    # A version whose settings this one does not know wrote it.
    except (ValueError, KeyError):
        return ""
