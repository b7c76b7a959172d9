"""How many trials run at a time: as many as the cluster holds, counted again while a study runs.

A node that joins later runs trials as well.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from simclr_ray.config.experiment import Experiment, ScalingConfig
from simclr_ray.distributed.machine import cores
from simclr_ray.distributed.placement import (
    Node,
    nodes,
    staying_nodes,
    workers_on,
)
from simclr_ray.distributed.ray_cluster import is_local
from simclr_ray.errors import ClusterError
from simclr_ray.studies.definition import Study
from simclr_ray.studies.plan import Trial

DRIVER_CPUS: Final = 0.01  # of the actor that reports; Tune refuses 0
RECOUNT_S: Final = 5.0


@dataclass
class Concurrency:
    """How many trials run at a time.

    Attributes:
        now: As counted last.
        scaling: Of the largest trial.
        is_fixed: Whether it stays, as where it was given.
    """

    now: int
    scaling: ScalingConfig
    is_fixed: bool
    _counted_at: float = field(default_factory=time.monotonic)

    def recount(self) -> int:
        """Return how many run at a time; counted anew every `RECOUNT_S`, and never none."""
        if not self.is_fixed and time.monotonic() - self._counted_at > RECOUNT_S:
            self.now = max(1, trials_on(staying_nodes(), self.scaling))
            self._counted_at = time.monotonic()
        return self.now


def concurrency_of(study: Study, trials: Sequence[Trial]) -> Concurrency:
    """Return how many trials the cluster at hand runs at a time, decoding included.

    On one machine logical CPUs are shared by time, and cores count: one for each worker. A search
    that learns takes one trial after the other, unless told otherwise: else it could not be
    repeated.

    Raises:
        ClusterError: Not one fits, or not as many as `concurrency` asks for.
    """
    largest = largest_of(trials)
    scaling, there = largest.scaling, [node for node in nodes() if node.is_alive]
    fits = trials_on(there, scaling)
    if fits < max(1, study.concurrency):
        raise ClusterError(
            f"concurrency={max(1, study.concurrency)} asks for trials of "
            f"{scaling.num_cpus + DRIVER_CPUS:g} CPUs and {scaling.num_gpus:g} GPUs each; the "
            f"cluster holds {fits} of them: it has {sum(node.cpus for node in there):g} CPUs and "
            f"{sum(node.gpus for node in there):g} GPUs"
        )
    if study.concurrency or study.search.learns:
        return Concurrency(study.concurrency or 1, scaling, is_fixed=True)
    if is_local():
        return Concurrency(min(fits, per_machine(largest)), scaling, is_fixed=True)
    return Concurrency(fits, scaling, is_fixed=False)


def trials_on(there: Sequence[Node], scaling: ScalingConfig) -> int:
    """Return how many trials of such a size find room on the nodes that are there."""
    cpus = sum(node.cpus for node in there)
    fits = math.floor(cpus / (scaling.num_cpus + DRIVER_CPUS))
    return min(fits, workers_on(there, scaling) // scaling.max_workers)


def largest_of(trials: Sequence[Trial]) -> Experiment:
    """Return the experiment of the trial that takes most."""
    return max((t.experiment for t in trials), key=lambda e: e.scaling.num_cpus)


def per_machine(experiment: Experiment) -> int:
    """Return how many trials the cores of this machine are for."""
    return max(1, cores() // experiment.scaling.max_workers)
