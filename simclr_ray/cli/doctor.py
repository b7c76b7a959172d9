"""What can be wrong with a machine or a cluster, found before a run finds it, and what to do.

Each check measures or tries the thing itself (writes a file, times a step, runs a task on every
node, computes a gradient in several processes); none trusts a setting. Data in, findings out: the
command line prints them.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Final

from simclr_ray import config as cfg
from simclr_ray.cli.environment import (
    check_device,
    check_machine,
    check_versions,
)
from simclr_ray.cli.node_checks import UNUSABLE, check_nodes, stored_probe
from simclr_ray.cli.time_limit import in_thread, result_until
from simclr_ray.config.experiment import ScalingConfig, TrackingConfig
from simclr_ray.config.findings import Finding, Findings, detail_of
from simclr_ray.config.imports import allow
from simclr_ray.config.uris import hide_passwords
from simclr_ray.errors import ClusterError, ConfigError, TrackingError
from simclr_ray.nn.precision import gpus_seen
from simclr_ray.tracking.runs import Tracker
from simclr_ray.tracking.system_metrics import Gpus, gpu_metrics_problem

MOST: Final = 4  # processes of the gradient check, all on this machine; more show nothing new
PARITY_BOUND: Final = 1e-9  # float64; rounding alone gives some 1e-13 (design, load-bearing 3)

WAIT_S: Final = 60.0  # for a storage or tracking store

MeasureParity = Callable[[int], float]
Checks = dict[str, Callable[[], Findings]]


def run_checks(
    storage: str,
    *,
    num_workers: int = 2,
    parity: MeasureParity | None = None,
) -> Iterator[Finding]:
    """Yield what is found on this machine and its Ray cluster, as each check ends.

    Connects to the cluster of $RAY_ADDRESS, or starts a local one and stops it again. A check that
    itself breaks becomes a finding; nothing is raised.

    Args:
        storage: Folder or URI that is to hold the runs.
        num_workers: Workers of the planned run, and processes of the gradient check.
        parity: Gives the largest relative difference between the gradients of that many processes
            and of one; `simclr_ray.train.gradient_parity` by default.
    """
    failed: set[str] = set()
    checks: Checks = {
        "versions": check_versions,
        "machine": check_machine,
        "device": lambda: [*check_device(), *check_gpu_metrics(gpus_seen())],
        "storage": lambda: until_answered({"storage": lambda: [check_storage(storage)]}, WAIT_S),
        "auth": lambda: [check_auth(os.environ)],
        # a storage that does not answer here is not waited for on other nodes
        "cluster": lambda: check_cluster("" if "storage" in failed else storage, num_workers),
        "mlflow": lambda: until_answered({"mlflow": lambda: [check_tracking("", storage)]}, WAIT_S),
        "gradient": lambda: [check_gradient(min(num_workers, MOST), parity or _worst_difference)],
    }
    for name, check in checks.items():
        for finding in guarded(name, check):
            if finding.status == "fail":
                failed.add(finding.check)
            yield finding


def check_loss(path: str, overrides: Sequence[str], num_workers: int) -> Finding:
    """Return whether an imported loss gives on several processes what it gives on one.

    Args:
        path: Import path, which this command permits.
        overrides: `key=value` of the loss's options.
        num_workers: Processes, at most `MOST`.

    Raises:
        ConfigError: The path cannot be imported, or gives no loss.
    """
    from simclr_ray.train.loss_parity import BOUND, loss_parity

    allow(path)
    processes = max(2, min(num_workers, MOST))
    parity = loss_parity(path, cfg.apply_overrides({}, overrides), processes)
    detail = (
        f"{path} on {processes} processes and on one, in float64: value differs by "
        f"{parity.value:.1e}, gradient by {parity.gradient:.1e} (bound {BOUND:g})"
    )
    if parity.holds:
        return Finding("loss", "ok", detail)
    advice = "gather z of all ranks, and scale by the contract at the head of simclr_ray.nn.losses"
    return Finding("loss", "fail", detail, advice)


def check_storage(storage: str) -> Finding:
    """Return whether a file can be written, renamed, read back and deleted in `storage`."""
    content = uuid.uuid4().hex
    try:
        with (
            stored_probe(storage, content) as (files, path),
            files.open_input_stream(path) as stream,
        ):
            same = stream.read().decode() == content
    except UNUSABLE as error:
        advice = "create the folder, grant write access, or choose another `storage=`"
        return Finding("storage", "fail", f"{storage}: {detail_of(error)}", advice)
    if not same:
        advice = "choose another `storage=`: this one does not keep what is written"
        return Finding("storage", "fail", f"{storage}: read back something else", advice)
    return Finding("storage", "ok", f"{storage}: write, rename, read and delete work")


def check_gpu_metrics(gpus: Gpus) -> Findings:
    """Return whether a run logs use, memory and power of the GPUs that torch sees, if any."""
    if not gpus:
        return []
    problem = gpu_metrics_problem(gpus)
    if not problem:
        return [Finding("GPU metrics", "ok", f"of {gpus} GPUs, with MLflow's system metrics")]
    detail, _, advice = problem.partition("; ")
    return [Finding("GPU metrics", "warn", f"none: {detail}", advice or "look at the driver")]


def check_auth(environment: Mapping[str, str]) -> Finding:
    """Return whether a token is asked of who connects to the Ray cluster."""
    mode = environment.get("RAY_AUTH_MODE", "")
    remote = bool(environment.get("RAY_ADDRESS"))
    if mode == "token":
        return Finding("auth", "ok", f"RAY_AUTH_MODE={mode}")
    if not mode and not remote:
        return Finding("auth", "ok", "a Ray that is started here has a token of its own")
    if mode == "disabled":
        where = "on every node and client (docs/cluster.md)" if remote else "or unset it"
        shown = "anyone who reaches the cluster may run code on it"
        return Finding("auth", "warn", shown, f"set RAY_AUTH_MODE=token {where}")
    shown = f"RAY_AUTH_MODE={mode} is no mode" if mode else "RAY_AUTH_MODE is unset"
    shown += ": Ray then decides by the token files it finds"
    return Finding("auth", "warn", shown, "set RAY_AUTH_MODE=token on every node and client")


def check_cluster(storage: str, num_workers: int) -> Findings:
    """Return findings on the Ray cluster: reachable, large enough, observable, nodes alike."""
    import ray

    started = not ray.is_initialized()
    if started:
        try:
            _connect()
        except (ConnectionError, OSError, RuntimeError, ValueError, ClusterError) as error:
            where = os.environ.get("RAY_ADDRESS", "a local cluster")
            advice = "is it up, is $RAY_ADDRESS right, and do token and Ray version agree?"
            return [Finding("ray", "fail", f"{where}: {detail_of(error)}", advice)]
    try:
        resources = ray.cluster_resources()  # type: ignore[no-untyped-call]  # Ray has no types
        return [
            check_resources(ray.nodes(), resources, num_workers),  # type: ignore[no-untyped-call] # Ray's
            _check_state_api(),
            *check_nodes(storage),
        ]
    finally:
        if started:
            ray.shutdown()


def check_resources(
    nodes: Iterable[Mapping[str, object]], resources: Mapping[str, float], num_workers: int
) -> Finding:
    """Return whether `num_workers` with their decode actors fit the cluster's logical CPUs."""
    alive = sum(bool(node["Alive"]) for node in nodes)
    kinds = {k: v for k, v in resources.items() if ":" not in k and "memory" not in k}
    shown = ", ".join(f"{k} {v:g}" for k, v in sorted(kinds.items()))
    detail = f"{alive} node{'s' if alive != 1 else ''} alive: {shown}"
    each = ScalingConfig(num_workers=1).num_cpus
    need, have = num_workers * each, resources.get("CPU", 0.0)
    if need <= have:
        return Finding("ray", "ok", detail)
    advice = f"lower scaling.num_workers to {max(1, int(have / each))}, or add nodes"
    return Finding("ray", "warn", f"{detail}; {num_workers} workers need {need:g} CPU", advice)


def check_tracking(uri: str, storage: str) -> Finding:
    """Return whether the MLflow store opens; an SQLite file is made where a run would make it."""
    try:
        tracker = Tracker.open(TrackingConfig(uri=uri), storage)
    except (ConfigError, TrackingError, OSError) as error:
        advice = "start the server, or correct tracking.uri or $MLFLOW_TRACKING_URI"
        return Finding("mlflow", "fail", detail_of(error), advice)
    return Finding("mlflow", "ok", f"{hide_passwords(tracker.uri)} opens")


def check_gradient(num_workers: int, parity: MeasureParity) -> Finding:
    """Return whether `num_workers` processes compute the gradient that one computes."""
    difference = parity(num_workers)
    detail = f"{num_workers} processes against 1: largest relative difference {difference:.1e}"
    if difference <= PARITY_BOUND:  # false for NaN as well
        return Finding("gradient", "ok", detail)
    advice = "do not train here: a build of torch or gloo computes wrongly; install the locked ones"
    return Finding("gradient", "fail", f"{detail}, allowed {PARITY_BOUND:.0e}", advice)


def _check_state_api() -> Finding:
    import ray
    from ray.util.state import list_nodes
    from ray.util.state.exception import RayStateApiException

    try:
        # of one that was started here by its address: where several run, Ray asks which is meant
        here = None if os.environ.get("RAY_ADDRESS") else ray.get_runtime_context().gcs_address
        list_nodes(address=here, timeout=30)
    except (RayStateApiException, OSError, RuntimeError, ValueError) as error:
        advice = "start Ray with its dashboard and ray[default]: Ray Train frees lost workers by it"
        return Finding("state API", "warn", detail_of(error), advice)
    return Finding("state API", "ok", "the dashboard answers")


def _connect() -> None:
    from simclr_ray.distributed.ray_address import check_answers
    from simclr_ray.distributed.ray_cluster import init, start_to_check

    address = os.environ.get("RAY_ADDRESS")
    if address:
        check_answers(address)
        init(address=address)
        return
    start_to_check()


def _worst_difference(num_workers: int) -> float:
    from simclr_ray.train.gradient_parity import gradient_parity

    return gradient_parity(num_workers).max_relative_difference


def until_answered(checks: Checks, limit_s: float) -> Findings:
    """Return the findings of checks that go on side by side; what is late is one as well."""
    until = time.monotonic() + limit_s
    begun = [(name, in_thread(partial(guarded, name, check))) for name, check in checks.items()]
    findings: Findings = []
    for name, future in begun:
        advice = "is its server up, its address right, and its port open to this machine?"
        late = Finding(name, "fail", f"no answer within {limit_s:.0f} s", advice)
        answer: Findings = result_until(future, until, [late])
        findings += answer
    return findings


def guarded(name: str, check: Callable[[], Findings]) -> Findings:
    """Return what a check finds; that it broke is a finding as well."""
    try:
        return check()
    except Exception as error:  # noqa: BLE001 - a doctor reports what breaks, whatever it is
        advice = "the check itself broke; please report this line"
        return [Finding(name, "fail", f"{type(error).__name__}: {detail_of(error)}", advice)]
