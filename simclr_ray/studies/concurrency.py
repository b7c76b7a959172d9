"""How many trials run at a time: as many as the cluster holds, counted again while a study runs.

A node that joins later runs trials as well. For an autoscaler to add one there must be work that
waits for it, and a trial begins only where there is room: `Demand` stands in for those that wait.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)

from simclr_ray.config.experiment import Experiment, ScalingConfig
from simclr_ray.distributed.placement import (
    Node,
    free_nodes,
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
# Waiting trials that an autoscaler is shown at a time: each is a placement group of Ray's
MAX_SHOWN: Final = 16


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
    if scaling.num_gpus:
        fits = min(fits, math.floor(sum(node.gpus for node in there) / scaling.num_gpus))
    if scaling.worker_label_selector or scaling.data_label_selector:  # only some nodes serve
        fits = min(fits, workers_on(there, scaling) // scaling.max_workers)
    return fits


def largest_of(trials: Sequence[Trial]) -> Experiment:
    """Return the experiment of the trial that takes most."""
    return max((t.experiment for t in trials), key=lambda e: e.scaling.num_cpus)


def per_machine(experiment: Experiment) -> int:
    """Return how many trials the cores of this machine are for."""
    return max(1, (os.cpu_count() or 1) // experiment.scaling.max_workers)


class Demand:
    """What trials that wait for room need, shown to Ray's autoscaler as pending placement groups.

    A trial that waits in Tune asks Ray for nothing, and what Ray is not asked for no autoscaler
    provides. `ray.autoscaler.sdk.request_resources` would not do: Ray Train calls it for all runs
    of a cluster, and each call takes back the one before. Where no node can be added, the groups
    wait and cost nothing.

    A group must not take the room of a trial that begins, restarts or is evaluated: where one finds
    room, or a whole trial would, all are given back until that room is used.
    """

    def __init__(self, scaling: ScalingConfig) -> None:
        worker = {"CPU": scaling.cpus_per_worker}
        if scaling.gpus_per_worker:
            worker["GPU"] = scaling.gpus_per_worker
        parts = [
            (worker, scaling.worker_label_selector),
            ({"CPU": scaling.data_cpus_per_worker}, scaling.data_label_selector),
        ] * scaling.max_workers
        self._bundles = [bundle for bundle, _ in parts]
        selectors = [dict(selector) for _, selector in parts]
        self._options = {"bundle_label_selector": selectors} if any(selectors) else {}
        self._scaling = scaling
        self._groups: list[PlacementGroup] = []

    def show(self, waiting: int) -> None:
        """Have as many groups pending as trials wait, `MAX_SHOWN` at most; none where is room."""
        shown = min(waiting, MAX_SHOWN) if waiting and not self._is_room() else 0
        while len(self._groups) > shown:
            remove_placement_group(self._groups.pop())
        while len(self._groups) < shown:
            self._groups.append(placement_group(self._bundles, **self._options))

    def _is_room(self) -> bool:
        if any(_state_of(group) == "CREATED" for group in self._groups):
            return True
        return workers_on(free_nodes(), self._scaling) >= self._scaling.max_workers


def _state_of(group: PlacementGroup) -> str:
    table: dict[str, Any] = placement_group_table(group)
    return str(table.get("state", ""))
