"""Which backend runs a launch: the one place that knows their names."""

from __future__ import annotations

from orchestration.backends.base import Backend
from orchestration.config import LaunchConfig


def backend_of(launch: LaunchConfig) -> Backend:
    """Return the backend of a launch."""
    # Imported when it is used: ``local`` loads PyTorch, which the others load in other processes,
    # and runs without Ray.
    if launch.backend == "local":
        from orchestration.backends import local

        return local
    # ``inline`` and ``train`` are both Tune's; ``ray_tune`` gives the trials to one or the other.
    from orchestration.backends import ray_tune

    return ray_tune
