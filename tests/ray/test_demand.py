"""What trials that wait for room ask of Ray, and that they take nobody's room."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable

import pytest
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group

from simclr_ray.config.experiment import ScalingConfig
from simclr_ray.distributed.demand import MAX_SHOWN, Demand, no_group_left
from simclr_ray.distributed.placement import free_nodes

pytestmark = [pytest.mark.ray, pytest.mark.slow]

# three of the four CPUs of the tests' cluster
SCALING = ScalingConfig(num_workers=1, cpus_per_worker=1.5, cpus_per_data_actor=1.5)


def states() -> Counter[str]:
    """Return how many groups that are not removed are in which state."""
    table = placement_group_table().values()
    return Counter(str(g["state"]) for g in table if g["state"] != "REMOVED")


def wait_for(until: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not until():
        assert time.monotonic() < deadline, states()
        time.sleep(0.05)


def test_trials_that_wait_are_shown_until_there_is_room(ray_cluster: str) -> None:
    wait_for(lambda: states() == {})  # what earlier tests have ended
    wait_for(lambda: sum(node.cpus for node in free_nodes()) == 4)
    demand = Demand(SCALING)
    try:
        _shown_and_taken_back(demand)
    finally:  # or all later tests wait for the room that is shown
        demand.show(0)
    assert states() == {}


def _shown_and_taken_back(demand: Demand) -> None:
    demand.show(3)
    assert states() == {}  # a trial is on its way there
    taken = placement_group([{"CPU": 2}])
    try:
        assert taken.wait(30)
        wait_for(lambda: sum(node.cpus for node in free_nodes()) == 2)
        demand.show(3)
        wait_for(lambda: states() == {"CREATED": 1, "PENDING": 3})
        demand.show(1)
        wait_for(lambda: states() == {"CREATED": 1, "PENDING": 1})
        demand.show(10**6)
        wait_for(lambda: states() == {"CREATED": 1, "PENDING": MAX_SHOWN})
    finally:
        remove_placement_group(taken)
    wait_for(lambda: states()["CREATED"] == 1)  # one of ours has found room, as a node gives it
    demand.show(10**6)
    wait_for(lambda: states() == {})  # and all make way for the trial


def leave_two() -> None:
    with no_group_left():
        placement_group([{"CPU": 400}])  # waits for ever
        assert placement_group([{"CPU": 1}]).wait(30)
        raise KeyboardInterrupt


def test_groups_of_somebody_who_is_gone_are_removed_and_those_of_before_stay(
    ray_cluster: str,
) -> None:
    before = placement_group([{"CPU": 1}])
    try:
        assert before.wait(30)
        with pytest.raises(KeyboardInterrupt):
            leave_two()
        wait_for(lambda: states() == {"CREATED": 1})
    finally:
        remove_placement_group(before)
