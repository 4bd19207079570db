"""The samplers and pruners of a search file, by the names that it gives them."""

from __future__ import annotations

from collections.abc import Callable

import optuna

PRICE = "price"
"""The pruner for several objectives."""
# Optuna does not store a sampler or its seed with a study, so each launch makes one.
SAMPLERS: dict[str, Callable[[int], optuna.samplers.BaseSampler]] = {
    "tpe": lambda seed: optuna.samplers.TPESampler(seed=seed),
    "nsga2": lambda seed: optuna.samplers.NSGAIISampler(seed=seed),
    "nsga3": lambda seed: optuna.samplers.NSGAIIISampler(seed=seed),
    "gp": lambda seed: optuna.samplers.GPSampler(seed=seed),
    "qmc": lambda seed: optuna.samplers.QMCSampler(seed=seed),
    "random": lambda seed: optuna.samplers.RandomSampler(seed=seed),
}
"""Sampler's name -> makes it from a seed."""

# A pruner's step is an epoch: ``OptunaSearch.should_prune`` reports once an epoch.
PRUNERS: dict[str, Callable[[], optuna.pruners.BasePruner]] = {
    "none": optuna.pruners.NopPruner,
    # ``search.price_pruning`` decides: Optuna's own pruners know one objective.
    PRICE: optuna.pruners.NopPruner,
    # Epochs are counted from 1, so 2 spares the first, which is still in warm-up.
    "median": lambda: optuna.pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=2),
    # Trials are compared after 1, 3, 9, … epochs, and the best third of them trains on.
    "asha": lambda: optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=3),
}
"""Pruner's name -> makes it."""
