"""What can be wrong with a cluster for a planned run, found in a minute by a job of its own."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Final

from simclr_ray.cli.doctor import PARITY_BOUND, check_auth, check_storage, check_tracking
from simclr_ray.cli.node_checks import check_nodes
from simclr_ray.config.experiment import Experiment
from simclr_ray.config.findings import Finding, Findings
from simclr_ray.config.wording import counted
from simclr_ray.errors import ClusterError
from simclr_ray.train.cluster_check import GATHERED, GRADIENT, REDUCED, RankReport

WITHIN_S: Final = 60.0  # all of it
LEAST_S: Final = 10.0
MIB: Final = 2**20
SLOW_STEP_S: Final = 1.0


def check_cluster_for(experiment: Experiment, *, within_s: float = WITHIN_S) -> Iterator[Finding]:
    """Yield what is found on the cluster of $RAY_ADDRESS for a planned run, as each check ends.

    What was found is kept by the cluster; encoders that are trained on it are tagged by it.

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
    for finding in _findings(experiment, began + within_s):
        seen.append(finding)
        yield finding
    keep(summary(seen, datetime.now(UTC)))


def summary(findings: Sequence[Finding], now: datetime) -> str:
    """Return all in a line: when, whether all is well, and what the workers have shown."""
    failed = sorted({finding.check for finding in findings if finding.status == "fail"})
    state = f"failed: {', '.join(failed)}" if failed else "ok"
    shown = [f.detail for f in findings if f.check == "gradient" and f.status == "ok"]
    return "; ".join([state, *shown, f"{now:%Y-%m-%dT%H:%MZ}"])


def _findings(experiment: Experiment, deadline: float) -> Iterator[Finding]:
    yield check_auth(os.environ)
    yield check_storage(experiment.storage)
    yield check_tracking(experiment.tracking.uri, experiment.storage)
    yield from (of_nodes := check_nodes(experiment.storage, (deadline - time.monotonic()) / 2))
    room = check_room(experiment)
    yield room
    yield check_data_nodes(experiment)
    if room.status == "fail" or any(f.check == "shared storage" for f in of_nodes):
        yield Finding(
            "gradient", "fail", "not tried: workers cannot start", "mend what is said above"
        )
        return
    yield from check_workers(experiment, max(LEAST_S, deadline - time.monotonic()))


def check_room(experiment: Experiment) -> Finding:
    """Return whether the cluster at hand holds the run's workers and what makes their views."""
    from simclr_ray.distributed.placement import check_cluster

    scaling = experiment.scaling
    try:
        check_cluster(experiment)
    except ClusterError as error:
        return Finding("room", "fail", str(error), "start more nodes, or ask for less")
    workers = counted(scaling.max_workers, "worker")
    return Finding("room", "ok", f"{workers}: {scaling.num_cpus:g} CPUs, {scaling.num_gpus:g} GPUs")


def check_data_nodes(experiment: Experiment) -> Finding:
    """Return which nodes make views, and with how many CPUs."""
    from simclr_ray.distributed.placement import matches, nodes, shown

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
