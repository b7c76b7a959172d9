"""Where on the cluster at hand work goes: its nodes, their labels, and what has room on them.

Ray's label selectors choose nodes by `label key -> expression`; Ray evaluates them where it places
a worker or actor. `matches` evaluates the same expressions where room is counted beforehand.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

import ray

from simclr_ray.config.experiment import Experiment, ScalingConfig
from simclr_ray.config.wording import GIB, counted
from simclr_ray.distributed.object_store import (
    ADVICE,
    FILLED_FRACTION,
    HAND_OVER_BYTES,
    TABLES,
    num_decode_actors,
    store_bytes,
)
from simclr_ray.distributed.selectors import selectors_of, shown
from simclr_ray.errors import ClusterError

EPSILON: Final = 1e-6  # 3 times 0.1 CPUs are more than 0.3
PARTS: Final = re.compile(r"(!?)(?:in\((.*)\)|(.*))")
# labels that every node has, each its own or all the same: no help to who looks for a name
OF_EVERY_NODE: Final = ("ray.io/node-id", "ray.io/ray-node-id")


class Node(NamedTuple):
    """One node of the cluster at hand."""

    address: str
    is_alive: bool
    cpus: float
    gpus: float
    labels: Mapping[str, str] = {}
    id: str = ""
    store: float = 0.0  # bytes of its object store; 0: not known


def nodes() -> list[Node]:
    """Return the nodes of the cluster at hand, those that are gone included."""
    return [
        Node(
            node["NodeManagerAddress"],
            bool(node["Alive"]),
            float(node["Resources"].get("CPU", 0.0)),
            float(node["Resources"].get("GPU", 0.0)),
            dict(node.get("Labels") or {}),
            str(node["NodeID"]),
            float(node["Resources"].get("object_store_memory", 0.0)),
        )
        for node in ray.nodes()  # type: ignore[no-untyped-call] # Ray's
    ]


def staying_nodes() -> list[Node]:
    """Return the nodes that are alive and not about to be taken away."""
    leaving = ray._private.state.state.get_draining_nodes()
    return [node for node in nodes() if node.is_alive and node.id not in leaving]


def free_nodes() -> list[Node]:
    """Return the staying nodes, each with what nobody has of its CPUs and GPUs."""
    free: Mapping[str, Mapping[str, float]]
    free = ray._private.state.available_resources_per_node()  # type: ignore[no-untyped-call] # Ray's
    left = ((node, free.get(node.id, {})) for node in staying_nodes())
    return [node._replace(cpus=f.get("CPU", 0.0), gpus=f.get("GPU", 0.0)) for node, f in left]


def matches(selector: Mapping[str, str], labels: Mapping[str, str]) -> bool:
    """Return whether a node with `labels` is one that Ray's label selector chooses.

    Args:
        selector: Label key -> `value`, `!value`, `in(a,b)` or `!in(a,b)`. A node without the label
            matches what is negated, and nothing else.
        labels: Of the node.

    Example:
        >>> matches({"role": "!in(data,head)"}, {"role": "gpu"}), matches({"role": "data"}, {})
        (True, False)
    """
    return all(_has(labels.get(key), expression) for key, expression in selector.items())


def _has(value: str | None, expression: str) -> bool:
    parts = PARTS.fullmatch(expression)
    assert parts is not None  # whatever text: the last branch takes it
    negated, several, one = parts.groups()
    values = {one} if several is None else set(several.split(","))
    return (value in values) != bool(negated)


def worker_resources(scaling: ScalingConfig) -> dict[str, float]:
    """Return what a worker reserves, by Ray's names."""
    gpus = {"GPU": scaling.gpus_per_worker} if scaling.gpus_per_worker else {}
    return {"CPU": scaling.cpus_per_worker, **gpus}


def workers_on(nodes: Sequence[Node], scaling: ScalingConfig) -> int:
    """Return how many workers, with their data actors, find room on nodes with such resources.

    Where workers may lie on nodes that decode, Ray may put them there first: the worst is counted,
    since actors without room wait for ever.

    Example: two nodes of 2 CPUs, 0.5 for a worker and 0.5 for its actor: 4.
    """
    decoding = [n for n in nodes if matches(scaling.data_label_selector, n.labels)]
    cpus, decodes = sum(node.cpus for node in decoding), scaling.data_cpus_per_worker
    shared = workers_alone_on(decoding, scaling)
    room = _times(cpus - shared * scaling.cpus_per_worker, decodes)
    if room < shared:
        room = _times(cpus, decodes + scaling.cpus_per_worker)
    return min(workers_alone_on(nodes, scaling), room)


def workers_alone_on(nodes: Sequence[Node], scaling: ScalingConfig) -> int:
    """Return how many workers find room, if nothing decodes for them."""
    fitting = [node for node in nodes if matches(scaling.worker_selector, node.labels)]
    return places_on(fitting, scaling.cpus_per_worker, scaling.gpus_per_worker)


def places_on(nodes: Sequence[Node], cpus: float, gpus: float) -> int:
    """Return how many processes with so much each find room: none is spread over nodes."""
    each = {"cpus": cpus, "gpus": gpus}
    return sum(
        min(_times(getattr(node, what), number) for what, number in each.items() if number)
        for node in nodes
    )


def _times(amount: float, each: float) -> int:
    return int((amount + EPSILON) // each)


def check_cluster(experiment: Experiment) -> None:
    """Raise `ClusterError` if the cluster cannot hold what `experiment` asks for."""
    scaling = experiment.scaling
    cluster: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call] # Ray's
    data_cpus, workers = scaling.data_cpus_per_worker, scaling.min_workers
    for what, needed in (("CPU", scaling.least_cpus), ("GPU", scaling.least_gpus)):
        if needed > cluster.get(what, 0.0):
            raise ClusterError(
                f"scaling asks for {needed:g} {what}s ({counted(workers, 'worker')}"
                + (f", each with {data_cpus:g} for decoding" if what == "CPU" else "")
                + f"), the cluster has {cluster.get(what, 0.0):g}; lower scaling.num_workers or "
                f"scaling.{'cpus' if what == 'CPU' else 'gpus'}_per_worker"
            )
    alive = [node for node in nodes() if node.is_alive]
    _check_labels(scaling, alive)
    room = workers_on(alive, scaling)
    if room < workers:  # what there is in all would do, and no node has enough of it in one piece
        raise ClusterError(
            f"scaling asks for {counted(workers, 'worker')}, each of {scaling.cpus_per_worker:g} "
            f"CPUs and {scaling.gpus_per_worker:g} GPUs on one node and {data_cpus:g} CPUs for "
            f"decoding; the {counted(len(alive), 'node')} of the cluster have room for {room}; "
            "lower scaling.num_workers, scaling.cpus_per_worker or scaling.data_actors_per_worker"
        )
    of = experiment.evaluation  # its actors come after training, when it would be too late
    check_actors(of.num_actors, of.cpus_per_actor, of.gpus_per_actor, scaling.worker_selector)


def check_actors(num: int, cpus: float, gpus: float, selector: Mapping[str, str]) -> None:
    """Raise `ClusterError` where the actors that encode splits would wait for room for ever.

    Args:
        num: Of actors; 0 always fits.
        cpus: That each reserves.
        gpus: The same.
        selector: The labels of their nodes.
    """
    there = [node for node in nodes() if node.is_alive and matches(selector, node.labels)]
    room = places_on(there, cpus, gpus)
    if room < num:
        labels = f" with the labels {shown(selector)}" if selector else ""
        raise ClusterError(
            f"evaluation.actors={num}, each of {cpus:g} CPUs and {gpus:g} GPUs on one node: there "
            f"is room for {room} on {counted(len(there), 'node')}{labels}; set evaluation.actors="
            f"{room or 'auto'}"
        )


def decode_actors_of(experiment: Experiment, node: Node, there: Sequence[Node]) -> int:
    """Return how many decode actors a node may have tables of: its own, or those of its workers.

    Ray spreads actors over the nodes that may decode, and puts workers on as few as hold them.
    """
    scaling, total = experiment.scaling, num_decode_actors(experiment)
    decoding = [n for n in there if n.cpus and matches(scaling.data_label_selector, n.labels)]
    workers = min(workers_alone_on([node], scaling), scaling.max_workers)
    for_workers = math.ceil(total * workers / scaling.max_workers)
    return max(for_workers, math.ceil(total / len(decoding)) if node in decoding else 0)


def hand_over_bytes(experiment: Experiment, there: Sequence[Node]) -> int:
    """Return how much a decode actor hands over at once: less where a node's store is small."""
    most = float(HAND_OVER_BYTES)
    for node in there:
        actors = decode_actors_of(experiment, node, there)
        if actors and node.store:
            most = min(most, node.store * FILLED_FRACTION / (TABLES * actors))
    return int(most)


def store_problem(experiment: Experiment, there: Sequence[Node]) -> str:
    """Return which nodes have too small a store for a run, however little is handed over at once.

    Args:
        experiment: Of the run.
        there: The nodes that are alive.

    Returns:
        A line; empty where there is none, or where the size of a store is not known.
    """
    small = []
    for node in there:
        actors = decode_actors_of(experiment, node, there)
        needed = store_bytes(experiment, actors, hand_over=0)
        if 0 < node.store < needed:
            small.append(f"{node.address} {node.store / GIB:.1f} of {needed / GIB:.1f} GiB")
    if not small:
        return ""
    lacking = f"Ray's object store is too small for the views of a run: {', '.join(small)}"
    return f"{lacking}; Ray writes each batch to disk: {ADVICE}"


def room_text(scaling: ScalingConfig) -> str:
    """Return how many workers are asked for, and for how many the cluster at hand has room."""
    most = f" to {scaling.max_workers}" if scaling.is_elastic else ""
    room = workers_on([node for node in nodes() if node.is_alive], scaling)
    return f"{scaling.min_workers}{most} workers asked for, room for {room} with their decoding"


def _check_labels(scaling: ScalingConfig, alive: Sequence[Node]) -> None:
    """Raise `ClusterError` where no node has the labels of a selector, or those have no room."""
    needs = {
        "worker_label_selector": (scaling.cpus_per_worker, scaling.gpus_per_worker),
        "data_label_selector": (scaling.cpus_per_data_actor, 0.0),
    }
    for key, selector in selectors_of(scaling).items():
        cpus, gpus = needs[key]
        is_stated = bool(getattr(scaling, key))
        own = "" if is_stated else " (what scaling.data_label_selector leaves; set it to share)"
        matching = [node for node in alive if matches(selector, node.labels)]
        if selector and not matching:
            raise ClusterError(
                f"no node has the labels of scaling.{key}={shown(selector)}{own}; "
                f"{_labels_of(alive)}"
            )
        if selector and not any(n.cpus >= cpus and n.gpus >= gpus for n in matching):
            raise ClusterError(
                f"{counted(len(matching), 'node')} with the labels of scaling.{key}="
                f"{shown(selector)}{own}, and none has {cpus:g} CPUs and {gpus:g} GPUs"
            )


def _labels_of(alive: Sequence[Node]) -> str:
    """Return which labels there are, of how many nodes each."""
    labels = [
        f"{key}={value}"
        for node in alive
        for key, value in node.labels.items()
        if key not in OF_EVERY_NODE
    ]
    if not labels:
        return "no node has labels of its own (`ray start --labels=KEY=VALUE` gives them)"
    counts = {label: labels.count(label) for label in sorted(labels)}
    there = ", ".join(f"{label} ({counted(n, 'node')})" for label, n in counts.items())
    return f"there are: {there}"
