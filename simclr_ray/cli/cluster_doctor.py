"""What can be wrong with a cluster for a planned run, found in a minute by a job of its own."""

from __future__ import annotations

import os
import time
from collections.abc import Generator, Iterator, Sequence
from datetime import UTC, datetime
from typing import Final

from simclr_ray.cli.doctor import (
    PARITY_BOUND,
    Checks,
    check_auth,
    check_storage,
    check_tracking,
    guarded,
    until_answered,
)
from simclr_ray.cli.node_checks import check_nodes
from simclr_ray.config.experiment import Experiment
from simclr_ray.config.findings import Finding, Findings
from simclr_ray.config.tracking_uri import SERVER_ADVICE, file_store_problem, server_of
from simclr_ray.config.uris import recall, remember
from simclr_ray.config.wording import GIB, MIB, counted
from simclr_ray.errors import ClusterError
from simclr_ray.tracking.store import URI_VARIABLE
from simclr_ray.train.cluster_check import GATHERED, GRADIENT, REDUCED, RankReport

WITHIN_S: Final = 60.0  # all of it
LEAST_S: Final = 10.0  # for what is left when others took too long
ANSWER_S: Final = 20.0  # of storage and tracking store to this machine, MLflow's import included
SLOW_STEP_S: Final = 1.0


def check_cluster_for(
    experiment: Experiment, *, within_s: float = WITHIN_S
) -> Generator[Finding, None, None]:
    """Yield what is found on the cluster of $RAY_ADDRESS for a planned run, as each check ends.

    What was found is kept by the cluster, also where it was broken off; encoders that are trained
    on it are tagged by it.

    Args:
        experiment: The planned run: its storage, tracking and scaling.
        within_s: What all of it may take.

    Raises:
        ClusterError: No cluster is named, none answers, or it turns this client away.
    """
    from simclr_ray.distributed.cluster_health import keep
    from simclr_ray.distributed.ray_cluster import connect

    if not os.environ.get("RAY_ADDRESS"):
        raise ClusterError(
            "RAY_ADDRESS is unset: `doctor --cluster` is a job of a cluster (ray job submit)"
        )
    began = time.monotonic()
    connect()
    seen: Findings = []
    is_whole = False
    try:
        for finding in _findings(experiment, began + within_s, seen):
            seen.append(finding)
            yield finding
        is_whole = True
    finally:
        keep(summary(seen, datetime.now(UTC), is_whole=is_whole))


def summary(findings: Sequence[Finding], now: datetime, *, is_whole: bool = True) -> str:
    """Return all in a line: when, whether all is well, and what the workers have shown.

    Args:
        findings: Of all checks, or of those before an interrupt or a defect.
        now: When.
        is_whole: Whether they are all.
    """
    failed = sorted({finding.check for finding in findings if finding.status == "fail"})
    states = [] if is_whole else ["broken off"]
    states += [f"failed: {', '.join(failed)}"] if failed else []
    shown = [f.detail for f in findings if f.check == "gradient" and f.status == "ok"]
    return "; ".join([*(states or ["ok"]), *shown, f"{now:%Y-%m-%dT%H:%MZ}"])


def _findings(experiment: Experiment, deadline: float, seen: Findings) -> Iterator[Finding]:
    """Yield what each check finds; `seen` are those before, which decide on later ones."""

    def left_s() -> float:
        return max(LEAST_S, deadline - time.monotonic())

    def has_failed(*checks: str) -> bool:
        return any(finding.check in checks and finding.status == "fail" for finding in seen)

    storage, server = experiment.storage, server_of(tracking_uri(experiment))
    stores: Checks = {
        "storage": lambda: [check_storage(storage)],
        "mlflow": lambda: [check_store(experiment)],
    }
    yield check_auth(os.environ)
    yield from until_answered(stores, min(ANSWER_S, left_s() / 2))
    shared = "" if has_failed("storage") else storage
    yield from guarded("nodes", lambda: check_nodes(shared, left_s() / 2, server))
    yield from guarded("room", lambda: [check_room(experiment)])
    yield from guarded("data nodes", lambda: [check_data_nodes(experiment)])
    yield from guarded("object store", lambda: [check_object_store(experiment)])
    if has_failed("room", "storage", "shared storage"):
        yield Finding(
            "gradient", "fail", "not tried: workers cannot start", "mend what is said above"
        )
        return
    yield from guarded("gradient", lambda: check_workers(experiment, left_s()))


def check_store(experiment: Experiment) -> Finding:
    """Return whether the run's MLflow store opens, and is one for as many nodes as there are."""
    from simclr_ray.distributed.placement import nodes

    several = sum(node.is_alive for node in nodes()) > 1
    if several and (problem := file_store_problem(tracking_uri(experiment))):
        return Finding("mlflow", "fail", problem, SERVER_ADVICE)
    return check_tracking(experiment.tracking.uri, experiment.storage)


def tracking_uri(experiment: Experiment) -> str:
    """Return the address of a run's MLflow store, as it is stated; empty where none is."""
    return recall(remember(experiment.tracking.uri or os.environ.get(URI_VARIABLE, "")))


def check_room(experiment: Experiment) -> Finding:
    """Return whether the cluster at hand holds the run's workers and what makes their views."""
    from simclr_ray.distributed.placement import check_cluster, room_text

    try:
        check_cluster(experiment)
    except ClusterError as error:
        return Finding("room", "fail", str(error), "start more nodes, or ask for less")
    return Finding("room", "ok", room_text(experiment.scaling))


def check_data_nodes(experiment: Experiment) -> Finding:
    """Return which nodes make views, and with how many CPUs."""
    from simclr_ray.distributed.placement import matches, nodes
    from simclr_ray.distributed.selectors import shown

    selector = experiment.scaling.data_label_selector
    alive = [node for node in nodes() if node.is_alive and node.cpus]
    data = [node for node in alive if matches(selector, node.labels)]
    if not data:
        detail = f"no node with CPUs has the labels {shown(selector)}" if selector else "no CPUs"
        advice = (
            "start nodes by `ray start --labels=KEY=VALUE`, as scaling.data_label_selector asks"
        )
        return Finding("data nodes", "fail", detail, advice)
    where = ", ".join(f"{node.address} ({node.cpus:g} CPUs)" for node in data)
    chosen = shown(selector) if selector else "any node may make views"
    return Finding("data nodes", "ok", f"{chosen}: {where}")


def check_object_store(experiment: Experiment) -> Finding:
    """Return whether the views of a run fit Ray's object store on each node, or go to disk."""
    from simclr_ray.distributed.placement import decode_actors_of, nodes, store_problem

    alive = [node for node in nodes() if node.is_alive]
    if problem := store_problem(experiment, alive):
        shown, _, advice = problem.rpartition(": ")
        return Finding("object store", "warn", shown, advice)
    with_views = [node for node in alive if decode_actors_of(experiment, node, alive)]
    least = min((node.store for node in with_views), default=0.0)
    return Finding("object store", "ok", f"{least / GIB:.1f} GiB or more where views go")


def check_workers(experiment: Experiment, timeout_s: float) -> Findings:
    """Return findings on what the workers compute and exchange, through their own backend."""
    from simclr_ray.train import cluster_check

    try:
        reports = cluster_check.check_workers(experiment.scaling, experiment.storage, timeout_s)
    except ClusterError as error:
        advice = "see the logs of Ray on the nodes; is another job using them?"
        return [Finding("gradient", "fail", str(error), advice)]
    return [gradient_finding(reports), network_finding(reports)]


def gradient_finding(reports: Sequence[RankReport]) -> Finding:
    """Return whether the ranks compute the gradient that one process computes."""
    worst = max(reports, key=lambda report: report.difference)
    hosts = len({report.host for report in reports})
    through = f" over {worst.backend}" if worst.backend else ""
    detail = (
        f"{counted(len(reports), 'worker')} on {counted(hosts, 'node')}{through} "
        f"({worst.device.partition(':')[0]}) against 1: {worst.difference.difference:.1e}"
    )
    if worst.difference.difference <= PARITY_BOUND:  # false for NaN as well
        return Finding("gradient", "ok", detail)
    named = f"{detail}, allowed {PARITY_BOUND:.0e}; {worst.host}, {worst.difference.name}"
    advice = "do not train here: install the locked versions of torch and its libraries"
    return Finding("gradient", "fail", named, advice)


def network_finding(reports: Sequence[RankReport]) -> Finding:
    """Return how fast the ranks exchange what a step exchanges: by the slowest of them."""
    if len(reports) == 1:
        return Finding("network", "ok", "1 worker exchanges nothing")
    gather, reduce = (max(getattr(r, of) for r in reports) for of in ("gather_s", "reduce_s"))
    step = reduce / REDUCED * GRADIENT
    detail = (
        f"{GATHERED // MIB} MiB of each worker gathered in {1e3 * gather:.1f} ms; gradients summed "
        f"at {REDUCED / MIB / reduce:,.0f} MiB/s: {step:.2g} s for a ResNet-50's"
    )
    if step <= SLOW_STEP_S:
        return Finding("network", "ok", detail)
    advice = "each step takes that long: a faster network, compress_gradients=true, or fewer nodes"
    return Finding("network", "warn", detail, advice)
