"""A Ray of our own that does not come up: once more, then in words."""

from typing import Any

import pytest
import ray

from mar.errors import Failure
from orchestration.backends.ray_session import ray_session
from orchestration.config import LaunchConfig

TIMED_OUT = "The current node timed out during startup."


def fails(monkeypatch: pytest.MonkeyPatch, times: int) -> list[dict[str, Any]]:
    """Let ``ray.init`` fail so many times as on a busy machine; return its calls."""
    calls: list[dict[str, Any]] = []

    def init(**options: Any) -> None:
        calls.append(options)
        if len(calls) <= times:
            # Ray's own error: a bare Exception.
            raise Exception(TIMED_OUT)

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    return calls


def test_a_ray_that_does_not_come_up_at_first_is_started_once_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = fails(monkeypatch, times=1)
    with ray_session(LaunchConfig()):
        assert len(calls) == 2
    assert calls[0] == calls[1]


def test_a_ray_that_does_not_come_up_twice_is_a_failure_in_words(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = fails(monkeypatch, times=2)
    words = r"Ray does not start: .*timed out.* --backend local"
    with pytest.raises(Failure, match=words), ray_session(LaunchConfig()):
        pytest.fail("no trial may start")
    assert len(calls) == 2
