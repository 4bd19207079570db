"""The parts of a training with ``recipe.schedule: warmup_stable_decay``; imports no torch."""

from __future__ import annotations

from typing import Protocol


class Schedule(Protocol):
    """What of ``RecipeConfig`` decides the parts."""

    @property
    def epochs(self) -> int:
        """Epochs in all."""
        ...

    @property
    def decay_share(self) -> float:
        """Share of them in which the rate falls."""
        ...


def decay_epochs(recipe: Schedule) -> int:
    """Return the number of epochs at the end in which the rate falls: at least one."""
    return max(1, round(recipe.decay_share * recipe.epochs))


def stable_epochs(recipe: Schedule) -> int:
    """Return the number of epochs before these, which longer trainings begin with too."""
    return recipe.epochs - decay_epochs(recipe)
