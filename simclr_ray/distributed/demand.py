"""Work that waits for room, and what Ray's autoscaler sees of it.

For an autoscaler to add a node there must be work that waits for it. A run begins only where there
is room, and so does a trial: `Demand` stands in for those that wait.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import ray
from ray import PlacementGroupID
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)

from simclr_ray.config.experiment import Experiment, ScalingConfig
from simclr_ray.distributed.placement import (
    check_cluster,
    free_nodes,
    worker_resources,
    workers_on,
)
from simclr_ray.distributed.ray_cluster import is_local
from simclr_ray.errors import ClusterError

# Waiting trials that an autoscaler is shown at a time: each is a placement group of Ray's
MAX_SHOWN: Final = 16
POLL_S: Final = 2.0
LEFT_S: Final = 1.0
ADVICE: Final = "for nodes that are still to join, scaling.wait_for_nodes_s=900 waits"
log = logging.getLogger(__name__)


def wait_for_room(experiment: Experiment, is_stopped: Callable[[], bool] = bool) -> None:
    """Return once the cluster can hold a run; the nodes it lacks are asked of Ray's autoscaler.

    Args:
        experiment: Of the run; `scaling.wait_for_nodes_s` is how long its nodes may take to join.
        is_stopped: Whether it is to wait no longer; asked every two seconds.

    Raises:
        ClusterError: The cluster cannot hold it by then.
        KeyboardInterrupt: It is to wait no longer.
    """
    scaling = experiment.scaling
    until, demand, last = time.monotonic() + scaling.wait_for_nodes_s, Demand(scaling), ""
    try:
        while True:
            try:
                return check_cluster(experiment)
            except ClusterError as lacking:
                if time.monotonic() >= until and is_local():
                    raise
                if time.monotonic() >= until:
                    raise ClusterError(f"{lacking}; {ADVICE}") from lacking
                if str(lacking) != last:
                    log.info(
                        "waiting %g s at most for nodes: %s", scaling.wait_for_nodes_s, lacking
                    )
                    last = str(lacking)
            if is_stopped():
                raise KeyboardInterrupt
            demand.show(1)
            time.sleep(POLL_S)
    finally:
        demand.show(0)


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
        parts = [
            (worker_resources(scaling), scaling.worker_selector),
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


@contextmanager
def no_group_left() -> Iterator[None]:
    """Remove the placement groups that a block has left in this job where it was broken off.

    A group whose creator was killed while it asked for it belongs to nobody: Ray keeps it, it takes
    room as soon as there is some, and all who wait for that room wait on. The job must make no
    others meanwhile.
    """
    before = set(_groups_of_job())
    try:
        yield
    except BaseException:
        until = time.monotonic() + LEFT_S
        while time.monotonic() < until:  # what was asked for may arrive after who asked is gone
            for name in set(_groups_of_job()) - before:
                remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(name))))
            time.sleep(LEFT_S / 5)
        raise


def _groups_of_job() -> list[str]:
    """Return the ids of the placement groups of this job that are not removed, which end in its."""
    job = ray.get_runtime_context().get_job_id()
    table: dict[str, dict[str, Any]] = placement_group_table()
    return [name for name, g in table.items() if name.endswith(job) and g["state"] != "REMOVED"]


def _state_of(group: PlacementGroup) -> str:
    table: dict[str, Any] = placement_group_table(group)
    return str(table.get("state", ""))
