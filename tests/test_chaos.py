"""A short round of ``make chaos``; the long one's table is in docs/faults.md."""

from pathlib import Path

import pytest
from chaos import SETTINGS, run

_SECONDS = 1200
"""No more faults after this. Two rounds take three minutes, and much more beside other work."""
_SEED = 11


# Beside other work a round takes many minutes; a timeout would be no finding.
@pytest.mark.timeout(2 * _SECONDS)
def test_a_study_under_random_faults_equals_one_that_nobody_disturbed(tmp_path: Path) -> None:
    """Two backends, one after the other; which faults come, and when, follows from the seed."""
    settings = [setting for setting in SETTINGS if setting.name in ("local", "inline")]
    tally = run(tmp_path, _SEED, _SECONDS, settings, most_rounds=2, faults_a_round=5)
    assert not tally.problems, "\n".join(tally.problems)
    assert set(tally.rounds) == {"local", "inline"}
    # How many come before a study is finished depends on how fast the machine trains.
    assert {backend for backend, _ in tally.faults} == {"local", "inline"}
    assert tally.points > 1000
