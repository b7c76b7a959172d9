"""What Ray Tune chooses: the points of a learning search, and which trials end early."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from ray import tune
from ray.tune.schedulers import AsyncHyperBandScheduler, MedianStoppingRule, TrialScheduler

from simclr_ray.errors import ConfigError, ConfigIssue
from simclr_ray.studies.definition import Dimension, Study, label_of
from simclr_ray.studies.plan import Trial

NEVER_S: Final = 10**9
EPOCH: Final = "epoch"  # what trials are compared at: the key of their reports


def scheduler_of(study: Study, trials: Sequence[Trial]) -> TrialScheduler | None:
    """Return what compares trials at epoch ends; metric and mode are Tune's to give."""
    settings = study.scheduler
    if settings.name == "asha":
        longest = max(t.experiment.epochs for t in trials)
        return AsyncHyperBandScheduler(
            time_attr=EPOCH,
            grace_period=settings.grace_epochs,
            reduction_factor=settings.reduction_factor,
            max_t=settings.max_epochs or longest,
            stop_last_trials=False,  # who reaches the last rung goes on to its end
        )
    if settings.name == "median":
        return MedianStoppingRule(
            time_attr=EPOCH,
            grace_period=settings.grace_epochs,
            min_time_slice=NEVER_S,  # it would pause trials until others report: ours cannot be
        )
    return None


def in_drawn_order(study: Study, trials: Sequence[Trial]) -> list[Trial]:
    """Return a grid's trials in an order drawn by the study's own seed: each restart's is the same.

    Asynchronous halving lets a trial through that beats those before it. Values are usually listed
    from low to high, and where the metric rises with them it would let nearly every trial through.
    """
    order = np.random.default_rng(study.search.seed).permutation(len(trials))
    return [trials[int(at)] for at in order]


def _domain(dim: Dimension) -> Any:
    """Return a dimension as Tune draws it."""
    if dim.uniform:
        return tune.uniform(*dim.uniform)
    if dim.loguniform:
        return tune.loguniform(*dim.loguniform)
    return tune.choice([label_of(value) for value in dim.listed])


def searched_space(study: Study) -> dict[str, Any]:
    """Return the space as Tune knows it, for a search that draws from it."""
    return {name: _domain(dim) for name, dim in study.space.items()}


def optuna_search(study: Study) -> Any:
    """Return the search. Raises `ConfigError` without optuna, an optional package."""
    try:
        import optuna
        from ray.tune.search.optuna import OptunaSearch
    except ImportError as error:
        problem = "optuna is not installed: pip install 'simclr-ray[search]'"
        raise ConfigError([ConfigIssue("search.name", problem)]) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return OptunaSearch(
        sampler=optuna.samplers.TPESampler(seed=study.search.seed),
        metric=study.metric,
        mode=study.mode,
    )
