"""How many workers there is room for, and that they save before their number changes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.execution.scaling_policy import (
    ElasticScalingPolicy,
    FixedScalingPolicy,
    NoopDecision,
    ResizeDecision,
)
from ray.train.v2._internal.execution.scaling_policy.autoscaling_coordinator_client import (
    TrainAutoscalingCoordinatorClient,
)
from ray.train.v2._internal.execution.worker_group import WorkerGroupPollStatus, WorkerGroupState
from ray.train.v2.api.config import ScalingConfig as RayScalingConfig

from simclr_ray.config.sections.running import ScalingConfig
from simclr_ray.distributed import placement
from simclr_ray.distributed.placement import Node
from simclr_ray.storage.run_folder import RunFolder
from simclr_ray.train import elastic
from simclr_ray.train.elastic import ElasticWorkers, FixedWorkers
from simclr_ray.train.restarts import BackendEnd
from simclr_ray.train.stop import RESIZE

HALVES = ScalingConfig(num_workers=[1, 8])  # 0.5 CPUs a worker, 0.5 an actor


def node(name: str, cpus: float, **labels: str) -> Node:
    return Node("", is_alive=True, cpus=cpus, gpus=0.0, labels=labels, id=name)


class Cluster:
    """Nodes, what Ray's account keeps for the run on them, and what is free."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **cpus: float) -> None:
        self.nodes = {name: node(name, number) for name, number in cpus.items()}
        self.kept: Any = {name: {"CPU": number} for name, number in cpus.items()}
        self.free: dict[str, dict[str, float]] = {}
        for module in (elastic, placement):
            monkeypatch.setattr(module, "staying_nodes", lambda: list(self.nodes.values()))
        monkeypatch.setattr(elastic, "WAIT_S", 0.0)
        monkeypatch.setattr(ray._private.state, "available_resources_per_node", lambda: self.free)
        for policy in (ElasticScalingPolicy, ElasticWorkers, FixedScalingPolicy):
            if policy is FixedScalingPolicy:
                monkeypatch.setattr(policy, "_maybe_send_resource_request", lambda _: None)
                continue
            monkeypatch.setattr(policy, "_maybe_send_resource_request", lambda _: None)
            monkeypatch.setattr(policy, "_get_reserved_resources", lambda _: self.kept)


def policy_of(kind: type[Any], folder: Path, scaling: ScalingConfig, **changes: Any) -> Any:
    of_ray = RayScalingConfig(
        num_workers=(scaling.min_workers, scaling.max_workers),
        elastic_resize_monitor_interval_s=0.0,
        resources_per_worker={"CPU": scaling.cpus_per_worker},
        **changes,
    )  # fmt: skip
    if kind is ElasticScalingPolicy:
        return kind(of_ray)
    return kind(of_ray, scaling, RunFolder.of(str(folder), "r-1"))


def running(policy: Any, workers: int) -> Any:
    group = type("Group", (WorkerGroupState,), {"num_workers": workers, "__init__": lambda _: None})
    state: Any = group()
    object.__setattr__(state, "start_time", 0.0)
    status = WorkerGroupPollStatus(worker_statuses={})
    return policy.make_decision_for_running_worker_group(state, status)


def test_workers_are_counted_with_what_decodes_for_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Cluster(monkeypatch, a=2.0, b=1.0)
    ours = policy_of(ElasticWorkers, tmp_path, HALVES)
    assert ours.make_decision_for_non_running_worker_group().num_workers == 3
    of_ray = policy_of(ElasticScalingPolicy, tmp_path, HALVES)
    # six workers whose decode actors would wait for ever
    assert of_ray.make_decision_for_non_running_worker_group().num_workers == 6


def test_the_request_of_a_killed_run_does_not_keep_this_one_from_starting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = Cluster(monkeypatch, a=2.0)
    cluster.kept, cluster.free = {}, {"a": {"CPU": 2.0}}
    of_ray = policy_of(ElasticScalingPolicy, tmp_path, HALVES)
    assert isinstance(of_ray.make_decision_for_non_running_worker_group(), NoopDecision)
    ours = policy_of(ElasticWorkers, tmp_path, HALVES)
    assert ours.make_decision_for_non_running_worker_group().num_workers == 2
    cluster.free = {"a": {"CPU": 0.5}}  # others really have it
    assert isinstance(ours.make_decision_for_non_running_worker_group(), NoopDecision)


def test_what_is_kept_on_nodes_without_the_workers_label_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only = {"worker_label_selector": {"role": "gpu"}, "data_label_selector": {"role": "!gpu"}}
    cluster = Cluster(monkeypatch)
    cluster.nodes = {"a": node("a", 1.0, role="gpu"), "b": node("b", 8.0)}
    # Ray's account knows no labels: it keeps what the workers need on the node without it
    cluster.kept = {"b": {"CPU": 8.0}}
    cluster.free = {"a": {"CPU": 1.0}, "b": {"CPU": 8.0}}
    ours = policy_of(ElasticWorkers, tmp_path, HALVES.model_copy(update=only))
    assert ours.make_decision_for_non_running_worker_group().num_workers == 2
    cluster.free = {"a": {"CPU": 0.0}, "b": {"CPU": 7.0}}  # taken by those two
    assert isinstance(running(ours, 2), NoopDecision)
    assert ours.folder.read_text(RESIZE) is None
    cluster.nodes["c"], cluster.free["c"] = node("c", 0.5, role="gpu"), {"CPU": 0.5}
    assert isinstance(running(ours, 2), NoopDecision)
    assert ours.folder.read_text(RESIZE) is not None  # there is room for a third


def test_running_workers_save_before_their_number_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = Cluster(monkeypatch, a=2.0)
    policy = policy_of(ElasticWorkers, tmp_path, HALVES)
    asked = policy.folder
    assert isinstance(running(policy, 2), NoopDecision)
    assert asked.read_text(RESIZE) is None
    cluster.nodes["b"], cluster.kept["b"] = node("b", 2.0), {"CPU": 2.0}
    for _ in range(3):
        assert isinstance(running(policy, 2), NoopDecision)
        assert asked.read_text(RESIZE) is not None  # a file that rank 0 sees
    cluster.nodes["c"], cluster.kept["c"] = node("c", 1.0), {"CPU": 1.0}  # meanwhile
    # they have saved and ended
    kept, cluster.kept = cluster.kept, None  # Ray's account does not answer in time
    assert isinstance(policy.make_decision_for_non_running_worker_group(), NoopDecision)
    cluster.kept = kept
    decision = policy.make_decision_for_non_running_worker_group()
    assert isinstance(decision, ResizeDecision)
    assert decision.num_workers == 5
    assert asked.read_text(RESIZE) is None
    assert isinstance(running(policy, 5), NoopDecision)
    assert asked.read_text(RESIZE) is None


def test_what_a_killed_driver_asked_for_is_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Cluster(monkeypatch, a=2.0)
    policy = policy_of(ElasticWorkers, tmp_path, HALVES)
    policy.folder.write_text(RESIZE, "")
    assert policy.make_decision_for_non_running_worker_group().num_workers == 2
    assert policy.folder.read_text(RESIZE) is None


def test_a_store_that_does_not_answer_is_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError("slow down")

    cluster = Cluster(monkeypatch, a=2.0)
    policy = policy_of(ElasticWorkers, tmp_path, HALVES)
    assert policy.make_decision_for_non_running_worker_group().num_workers == 2
    cluster.nodes["b"], cluster.kept["b"] = node("b", 2.0), {"CPU": 2.0}
    with monkeypatch.context() as store:
        store.setattr(RunFolder, "write_text", refuse)
        assert isinstance(running(policy, 2), NoopDecision)
    assert isinstance(running(policy, 2), NoopDecision)
    assert policy.folder.read_text(RESIZE) is not None
    with monkeypatch.context() as store:
        store.setattr(RunFolder, "remove", refuse)
        assert policy.make_decision_for_non_running_worker_group().num_workers == 4
    assert policy.make_decision_for_non_running_worker_group().num_workers == 4
    assert policy.folder.read_text(RESIZE) is None


def test_a_group_that_fails_when_it_was_asked_to_save_is_asked_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = Cluster(monkeypatch, a=2.0, b=2.0)
    policy = policy_of(ElasticWorkers, tmp_path, HALVES)
    running(policy, 3)
    assert policy.folder.read_text(RESIZE) is not None
    del cluster.nodes["b"], cluster.kept["b"]
    assert policy.make_decision_for_non_running_worker_group().num_workers == 2
    assert policy.folder.read_text(RESIZE) is None
    assert isinstance(running(policy, 2), NoopDecision)


def test_a_fixed_number_waits_until_what_decodes_has_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    three = HALVES.model_copy(update={"num_workers": 3})
    of_ray = RayScalingConfig(num_workers=3, resources_per_worker={"CPU": 0.5})
    cluster = Cluster(monkeypatch, a=1.0, b=1.0)
    # three workers have room on two CPUs; their decode actors have not
    ours: Any = FixedWorkers(of_ray, three)
    bare: Any = FixedScalingPolicy(of_ray)
    assert bare.make_decision_for_non_running_worker_group().num_workers == 3
    assert isinstance(ours.make_decision_for_non_running_worker_group(), NoopDecision)
    cluster.nodes["c"] = node("c", 1.0)
    assert ours.make_decision_for_non_running_worker_group().num_workers == 3


@pytest.mark.parametrize("alone", [False, True])
def test_no_autoscaler_is_told_of_workers_of_this_machine(
    monkeypatch: pytest.MonkeyPatch,
    alone: bool,
) -> None:
    sent: list[int] = []
    monkeypatch.setattr(elastic, "is_local", lambda: alone)
    monkeypatch.setattr(
        TrainAutoscalingCoordinatorClient, "send_resource_request", lambda *_: sent.append(1)
    )
    node_of_all = node("a", 8.0)
    monkeypatch.setattr(elastic, "staying_nodes", lambda: [node_of_all])
    of_ray = RayScalingConfig(num_workers=3, resources_per_worker={"CPU": 0.5})
    policy: Any = FixedWorkers(of_ray, HALVES.model_copy(update={"num_workers": 3}))
    policy.after_controller_start(SimpleNamespace(run_id="r"))
    assert policy.make_decision_for_non_running_worker_group().num_workers == 3
    assert bool(sent) is not alone
    policy.before_controller_abort()


def test_the_trainer_of_a_run_has_no_datasets_to_hand_out(tmp_path: Path) -> None:
    trainer = elastic.Trainer(
        lambda: None,
        scaling=ScalingConfig(),
        folder=RunFolder.of(str(tmp_path), "r-1"),
        inbox=None,  # type: ignore[arg-type] # sends nothing here
    )
    callbacks = trainer._create_default_callbacks()
    assert [c for c in callbacks if type(c) is DatasetsCallback] == []
    (ours,) = [c for c in callbacks if isinstance(c, DatasetsCallback)]
    assert ours.before_init_train_context([]) == {}
    assert len([c for c in callbacks if isinstance(c, BackendEnd)]) == 1
