"""What Ray Tune chooses: the points of a learning search, and which trials end early."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any, Final, Self

import numpy as np
from ray import tune
from ray.tune.schedulers import AsyncHyperBandScheduler, MedianStoppingRule, TrialScheduler
from ray.tune.search.basic_variant import BasicVariantGenerator

from simclr_ray.config.wording import counted
from simclr_ray.distributed.demand import Demand
from simclr_ray.errors import ConfigError
from simclr_ray.studies.concurrency import RECOUNT_S, Concurrency
from simclr_ray.studies.definition import Study
from simclr_ray.studies.plan import Trial
from simclr_ray.studies.space import Dimension, label_of

log = logging.getLogger(__name__)

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


class TrialQueue(BasicVariantGenerator):
    """Tune's grid, which hands out as many trials as there is room for now; a context manager.

    Those that wait are shown to Ray's autoscaler, unless the number at a time is fixed.
    """

    def __init__(self, concurrency: Concurrency, num_trials: int) -> None:
        super().__init__(max_concurrent=concurrency.now)
        self._concurrency, self._num_waiting = concurrency, num_trials
        self._demand = None if concurrency.is_fixed else Demand(concurrency.scaling)
        self._shown_at = 0.0

    def __enter__(self) -> Self:
        """Return the queue."""
        return self

    def __exit__(self, *_: object) -> None:
        """Take back what the autoscaler was shown."""
        if self._demand is not None:
            self._demand.show(0)

    def next_trial(self) -> Any:
        """Return a trial, or None where there is no room or nothing left."""
        before, self.max_concurrent = self.max_concurrent, self._concurrency.recount()
        if before != self.max_concurrent:
            log.info("the cluster holds %s at a time now", counted(self.max_concurrent, "trial"))
        trial = super().next_trial()  # type: ignore[no-untyped-call] # Ray's
        self._num_waiting -= trial is not None
        now = time.monotonic()
        if self._demand is not None and (trial is not None or now - self._shown_at > RECOUNT_S):
            self._shown_at = now
            self._demand.show(self._num_waiting)
        return trial

    def get_state(self) -> dict[str, Any]:
        """Return nothing: a study goes on from its own folder, not from what Tune keeps."""
        return {}


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
        problem = "optuna is not installed: pip install 'simclr-ray[optuna]'"
        raise ConfigError.of("search.name", problem) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return OptunaSearch(
        sampler=optuna.samplers.TPESampler(seed=study.search.seed),
        metric=study.metric,
        mode=study.mode,
    )
