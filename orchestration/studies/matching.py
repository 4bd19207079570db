"""Which finished run answers which trial: by equal identities, of whatever study."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Protocol, TypeVar

from orchestration.studies.identity import training_identity, with_defaults_filled
from orchestration.studies.trial import ABSENT, Trial


class Record(Protocol):
    """What is needed of a run; ``tracking.RunRecord`` is one."""

    @property
    def run_id(self) -> str:
        """MLflow's id."""
        ...

    @property
    def status(self) -> str:
        """MLflow's word: FINISHED, RUNNING, FAILED or KILLED."""
        ...

    @property
    def metrics(self) -> Mapping[str, float]:
        """The last value of each."""
        ...

    @property
    def identity(self) -> str:
        """Which training it is (``study.identity``)."""
        ...

    @property
    def has_model(self) -> bool:
        """Whether its result has a model: it was trained, not tested again."""
        ...

    @property
    def weights(self) -> str | None:
        """The name of the pre-trained weights it started from, if any."""
        ...


AnyRecord = TypeVar("AnyRecord", bound=Record)


def match(trials: Sequence[Trial], records: Sequence[AnyRecord]) -> dict[str, AnyRecord]:
    """Return, by trial key, the newest finished run with the trial's settings, of whatever study.

    A run logged before a setting existed matches if the trial leaves that setting at its default.
    Where the data is not at hand, its fingerprint is unknown, and the settings alone decide: a
    table needs no videos. So it is with pre-trained weights, and their name.
    """
    return _match(trials, records, lambda line: line)


def match_training(trials: Sequence[Trial], records: Sequence[AnyRecord]) -> dict[str, AnyRecord]:
    """Return, by trial key, a finished run of the same training, tested in whatever way."""
    return _match(trials, [record for record in records if record.has_model], training_identity)


def _match(
    trials: Sequence[Trial], records: Sequence[AnyRecord], part: Callable[[str], str]
) -> dict[str, AnyRecord]:
    """Match trials and records by a part of their identities."""
    finished = [record for record in records if record.status == "FINISHED" and record.identity]
    exact = {part(record.identity): record for record in reversed(finished)}
    found = {
        trial.key: exact[part(trial.identity)] for trial in trials if part(trial.identity) in exact
    }
    missing: dict[str, list[Trial]] = {}
    for trial in trials:
        if trial.key not in found:
            missing.setdefault(part(trial.identity), []).append(trial)
    is_anywhere = any(trial.fingerprint == ABSENT for each in missing.values() for trial in each)
    for record in finished if missing else []:
        for data in (None, ABSENT) if is_anywhere else (None,):
            for weights in {None, record.weights}:
                line = _completed(record.identity, data, weights)
                for trial in missing.get(part(line), []) if line else []:
                    found.setdefault(trial.key, record)
    return found


@lru_cache(maxsize=2**15)  # a search asks for every proposal
def _completed(identity_line: str, data_fingerprint: str | None, weights: str | None) -> str:
    try:
        return with_defaults_filled(identity_line, data_fingerprint, weights)
    except (
        ValueError,
        KeyError,
    ):  # written by a version whose settings this one does not understand
        return ""
