"""Which nodes a label selector chooses, and what has room on them."""

from __future__ import annotations

from typing import Any

import pytest
import ray
from ray._private.label_utils import validate_label_selector

from simclr_ray import config as cfg
from simclr_ray.config.experiment import Experiment, ScalingConfig
from simclr_ray.config.moves import stored_tree
from simclr_ray.distributed import placement
from simclr_ray.distributed.placement import (
    Node,
    check_cluster,
    matches,
    workers_on,
)
from simclr_ray.errors import ClusterError, ConfigError

HALVES = ScalingConfig(num_workers=[1, 8])  # 0.5 CPUs a worker, 0.5 an actor
DATA = {"role": "data"}
APART = {"data_label_selector": DATA, "worker_label_selector": {"role": "!data"}}


@pytest.mark.parametrize(
    ("expression", "chosen"),  # of role: data, gpu, and none
    [("data", "yn-"), ("!data", "ny+"), ("in(data)", "yn-"), ("in(data,gpu)", "yy-"),
     ("in(gpu,data)", "yy-"), ("!in(data,gpu)", "nn+"), ("!in(data,x)", "ny+")],
)  # fmt: skip
def test_an_expression_chooses_nodes(expression: str, chosen: str) -> None:
    has = [matches({"role": expression}, labels) for labels in (DATA, {"role": "gpu"}, {})]
    assert has == [letter in "y+" for letter in chosen]
    assert matches({}, {})
    assert not matches({"role": expression, "x": "y"}, DATA)


@pytest.mark.parametrize("key", ["role", "ray.io/market-type", "a.b/c_d", "a" * 63])
@pytest.mark.parametrize("value", ["data", "!data", "in(a,b)", "!in(a, b)", "A.b_c-1"])
def test_what_a_config_takes_ray_takes(key: str, value: str) -> None:
    scaling = ScalingConfig(data_label_selector={key: value}, worker_label_selector={key: value})
    assert validate_label_selector(scaling.data_label_selector) is None
    assert scaling.worker_label_selector == {key: value.replace(" ", "")}


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [("role", "", "no expression"), ("role", "in()", "no expression"), ("a/b/c", "x", "'a/b/c'"),
     ("role", "!!data", "no expression"), ("role", "in(a;b)", "no expression"), ("", "x", "''"),
     ("role", "data ", "no expression"), ("a" * 64, "x", "no key of a label"),
     ("role", "not(data)", "no expression"), ("role", 1, "a valid string")],
)  # fmt: skip
def test_what_is_no_selector_is_refused(key: str, value: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        cfg.validate(ScalingConfig, {"worker_label_selector": {key: value}})
    assert "worker_label_selector" in str(caught.value)


def test_a_custom_resource_is_refused_by_name_and_read_from_what_runs_have_stored() -> None:
    tree = {"name": "t", "data": {"train": "here"}, "scaling": {"data_resource": "data"}}
    with pytest.raises(ConfigError, match=r"data_resource=data is gone.*data_label_selector"):
        cfg.validate(Experiment, tree)
    assert cfg.validate(Experiment, stored_tree(tree)).scaling == ScalingConfig()
    empty = {**tree, "scaling": {"data_resource": ""}}
    assert cfg.validate(Experiment, empty).scaling == ScalingConfig()
    assert stored_tree({"scaling": 1}) == {"scaling": 1}


def node(cpus: float, gpus: float = 0.0, **labels: str) -> Node:
    return Node("", is_alive=True, cpus=cpus, gpus=gpus, labels=labels, id=f"{cpus}{labels}")


@pytest.mark.parametrize(
    ("there", "changes", "room"),
    [
        ([node(2), node(2.0, x="y")], {}, 4),
        ([node(2), node(1)], {"data_actors_per_worker": 2}, 2),
        ([node(0.9)], {"cpus_per_worker": 0.3, "cpus_per_data_actor": 0.15}, 2),
        ([node(0.3)], {"cpus_per_worker": 0.1, "cpus_per_data_actor": 0.0001}, 2),
        ([node(8, 2), node(8.0, x="y")], {"gpus_per_worker": 1.0}, 2),
        # actors on nodes of their own: 3 of 1 CPU each
        ([node(8), node(3, role="data")], APART | {"cpus_per_data_actor": 1.0}, 3),
        ([node(8), node(3, role="data")], {"data_label_selector": DATA}, 6),
        # workers have no room but there, where they go only if told to: 3 CPUs for both
        ([node(3, role="data")], {"data_label_selector": DATA}, 0),
        ([node(3, role="data")], {"data_label_selector": DATA, "worker_label_selector": DATA}, 3),
        # of 4 CPUs that decode, Ray may give 3.5 to the 7 workers that fit there
        ([node(4, role="data"), node(9, role="gpu")],
         {"data_label_selector": DATA, "worker_label_selector": {"role": "in(data,gpu)"}}, 4),
        ([node(1), node(8, role="data")], APART, 2),
        ([node(8)], {"data_label_selector": DATA}, 0),
        ([node(8)], {"worker_label_selector": DATA}, 0),
        ([], {}, 0),
    ],
)  # fmt: skip
def test_room_is_counted_with_the_data_actors(
    there: list[Node], changes: dict[str, Any], room: int
) -> None:
    assert workers_on(there, HALVES.model_copy(update=changes)) == room


@pytest.mark.parametrize(
    ("data", "workers", "expected"),
    [
        # Ray would put workers where the views are made, and leave no room for those
        (DATA, {}, {"role": "!data"}),
        ({"role": "!gpu"}, {}, {"role": "gpu"}),
        ({"role": "in(a,b)"}, {}, {"role": "!in(a,b)"}),
        ({"role": "!in(a,b)"}, {}, {"role": "in(a,b)"}),
        (DATA, {"x": "y"}, {"x": "y"}),  # as asked for
        (DATA, DATA, DATA),
        (DATA | {"x": "y"}, {}, {}),
        ({}, {}, {}),
    ],
)
def test_workers_leave_nodes_of_views_alone(
    data: dict[str, str], workers: dict[str, str], expected: dict[str, str]
) -> None:
    scaling = ScalingConfig(data_label_selector=data, worker_label_selector=workers)
    assert scaling.worker_selector == expected
    for label in ("data", "gpu", "a", "b"):
        if not workers and len(data) == 1:
            assert matches(expected, {"role": label}) != matches(data, {"role": label})


@pytest.mark.parametrize(
    ("there", "changes", "says"),
    [
        # 16 CPUs of them decode, and no worker may: 4 for each of 4 workers are 16
        ([node(16, 1, role="gpu")] * 4 + [node(4, role="data")],
         {"num_workers": 4, "gpus_per_worker": 1.0, "data_actors_per_worker": 4,
          "cpus_per_data_actor": 1.0, "data_label_selector": DATA}, "room for 1;"),
        ([node(1), node(1.0, x="y"), node(1.0, x="z")], {"num_workers": 1, "cpus_per_worker": 2.0},
         r"each of 2 CPUs and 0 GPUs on one node.* 3 nodes of the cluster have room for 0"),
        ([node(8, 1), node(8.0, 1, x="y")], {"num_workers": 1, "gpus_per_worker": 2.0},
         "2 GPUs on one node"),
        ([node(8, role="data")], {"num_workers": 1, "data_label_selector": DATA},
         r"labels of scaling\.worker_label_selector=role: !data \(what.*; there are"),
        ([node(4), node(4.0, x="y")], {"num_workers": 1, "evaluation.actors": 3,
         "evaluation.cpus_per_actor": 3.0}, r"room for 2 on 2 nodes; set evaluation\.actors=2"),
        ([node(4), node(9.0, role="data")], {"num_workers": 1, "data_label_selector": DATA,
         "evaluation.actors": 1, "evaluation.cpus_per_actor": 5.0},
         "room for 0 on 1 node with the labels role: !data; set evaluation.actors=auto"),
    ],
)  # fmt: skip
def test_what_would_wait_for_ever_is_refused(
    there: list[Node], changes: dict[str, Any], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placement, "nodes", lambda: there)
    total = {"CPU": sum(n.cpus for n in there), "GPU": sum(n.gpus for n in there)}
    monkeypatch.setattr(ray, "cluster_resources", lambda: total)
    tree: dict[str, Any] = {"name": "t", "data": {"train": "h"}, "scaling": {}, "evaluation": {}}
    for key, value in changes.items():
        section, _, name = key.rpartition(".")
        tree[section or "scaling"][name] = value
    experiment = cfg.validate(Experiment, tree)
    with pytest.raises(ClusterError, match=says):
        check_cluster(experiment)


def test_a_cluster_without_the_labels_says_which_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    there = [
        node(8, role="gpu"),
        node(2, role="data"),
        node(0.1, role="tiny"),
        node(9, role="gpu"),
    ]
    there[0].labels["ray.io/node-id"] = "ab"  # type: ignore[index] # each node's own, says nothing
    monkeypatch.setattr(placement, "nodes", lambda: there)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 20.0})
    experiment = cfg.validate(Experiment, {"name": "t", "data": {"train": "here"}})

    def check(**selectors: dict[str, str]) -> None:
        scaling = experiment.scaling.model_copy(update=selectors)
        check_cluster(experiment.model_copy(update={"scaling": scaling}))

    check(worker_label_selector={"role": "gpu"}, data_label_selector={"role": "in(data,tiny)"})
    with pytest.raises(ClusterError) as caught:
        check(data_label_selector={"role": "dta"})
    assert str(caught.value) == (
        "no node has the labels of scaling.data_label_selector=role: dta; there are: "
        "role=data (1 node), role=gpu (2 nodes), role=tiny (1 node)"
    )
    with pytest.raises(ClusterError, match=r"worker_label_selector=role: tiny, and none has 0\.5"):
        check(worker_label_selector={"role": "tiny"})
    there[:] = [node(8)]
    with pytest.raises(ClusterError, match=r"no node has labels of its own.*ray start --labels"):
        check(worker_label_selector={"role": "tiny"})
