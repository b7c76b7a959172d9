"""How many trials run at a time while nodes come and go."""

from __future__ import annotations

from typing import Any

import pytest
from ray import tune
from ray.tune.experiment import Experiment as TuneExperiment

from simclr_ray.config.experiment import ScalingConfig
from simclr_ray.distributed.placement import Node
from simclr_ray.studies import concurrency
from simclr_ray.studies.concurrency import Concurrency, trials_on
from simclr_ray.studies.search import TrialQueue

HALVES = ScalingConfig(num_workers=2)  # 0.5 CPUs a worker, 0.5 an actor: 2 a trial, and a bit


def node(cpus: float, gpus: float = 0.0, **labels: str) -> Node:
    return Node("", is_alive=True, cpus=cpus, gpus=gpus, labels=labels, id=f"{cpus}{labels}")


@pytest.mark.parametrize(
    ("nodes", "changes", "number"),
    [
        ([node(4)], {}, 1),
        ([node(4.1)], {}, 2),
        ([node(3), node(3)], {}, 2),
        ([node(50, 4)], {"gpus_per_worker": 1.0}, 2),
        ([node(3, role="data"), node(9)], {"data_label_selector": {"role": "data"}}, 3),
        ([node(3, role="data"), node(9)], {"worker_label_selector": {"role": "data"}}, 3),
        ([node(9)], {"worker_label_selector": {"role": "gpu"}}, 0),
    ],
)
def test_trials_are_counted_with_what_decodes_for_them(
    nodes: list[Node], changes: dict[str, Any], number: int
) -> None:
    assert trials_on(nodes, HALVES.model_copy(update=changes)) == number


def queue_of(room: Concurrency, num_trials: int) -> TrialQueue:
    queue = TrialQueue(room, num_trials)
    space = {"trial": tune.grid_search(list(range(num_trials)))}
    experiment = TuneExperiment("t", run=lambda _: None, config=space, storage_path="/tmp")
    queue.add_configurations([experiment])
    return queue


def test_a_node_that_joins_lets_more_trials_begin_and_one_that_leaves_fewer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    nodes, shown = [node(3)], list[int]()

    class Shown:
        def __init__(self, scaling: ScalingConfig) -> None:
            assert scaling == HALVES

        def show(self, waiting: int) -> None:
            shown.append(waiting)

    monkeypatch.setattr(concurrency, "staying_nodes", lambda: nodes)
    monkeypatch.setattr(concurrency, "RECOUNT_S", -1.0)
    monkeypatch.setattr("simclr_ray.studies.search.Demand", Shown)
    with queue_of(Concurrency(1, HALVES, is_fixed=False), 5) as queue:
        first = queue.next_trial()
        assert (first is not None, queue.next_trial()) == (True, None)
        assert shown[-1] == 4
        nodes.append(node(2))
        second = queue.next_trial()
        assert (second is not None, queue.next_trial()) == (True, None)
        assert shown[-1] == 3
        del nodes[:]  # all are gone: the trials wait, and none begins
        assert queue.next_trial() is None
        nodes.append(node(3))
        queue.on_trial_complete(first.trial_id)
        assert queue.next_trial() is None  # room for one, which runs
        queue.on_trial_complete(second.trial_id)
        assert queue.next_trial() is not None
    assert shown[-1] == 0


def test_a_number_that_was_given_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(concurrency, "staying_nodes", lambda: [node(100)])
    monkeypatch.setattr(concurrency, "RECOUNT_S", -1.0)
    with queue_of(Concurrency(2, HALVES, is_fixed=True), 5) as queue:
        assert [queue.next_trial() is not None for _ in range(3)] == [True, True, False]
