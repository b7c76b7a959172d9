"""The start of a run's cluster, beside all else that takes seconds before workers can start.

Ray's servers start in processes of their own, for which this one only waits: it opens MLflow's
store meanwhile, and imports what the run needs besides. What workers will wait for is started as
soon as there is a cluster, and not when they ask for it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

import ray

from simclr_ray.data.ray_tasks import start_stats_actor
from simclr_ray.distributed.ray_cluster import check_machine, connect, is_local
from simclr_ray.tracking.store import first_contact
from simclr_ray.train.disk_space import check_space
from simclr_ray.train.resolve import ResolvedExperiment
from simclr_ray.train.single_fit import start_single_worker, takes_single_worker
from simclr_ray.train.tracked import open_tracker

PATIENCE_S = 15.0  # a store that answers nothing is given up after 10
Started = TypeVar("Started")
Other = TypeVar("Other")


def start_cluster(
    resolved: ResolvedExperiment, meanwhile: Callable[[], None] = lambda: None
) -> None:
    """Connect to the cluster or start one, and open MLflow's store meanwhile.

    Nothing is left behind by what is refused: a cluster that was started for it is stopped.

    Args:
        resolved: What is to run.
        meanwhile: Called in another thread before the store is opened; what it raises is raised.

    Raises:
        ClusterError: No cluster answers, or this machine cannot hold the run.
        ConfigError: MLflow has no such store, or a disk has no room for the checkpoints.
        TrackingError: MLflow refuses, or cannot be reached and the run is new.
    """
    check_machine(resolved.config)
    check_space(resolved)
    cancelled = threading.Event()
    with_cluster(
        lambda: connect(resolved.config),
        lambda: _open(resolved, meanwhile, cancelled),
        cancelled.set,
    )
    if takes_single_worker(resolved):
        start_single_worker(resolved.config)
    elif is_local():
        start_stats_actor()  # before the first rank asks for it, and waits


def with_cluster(
    start: Callable[[], Started],
    other: Callable[[], Other],
    give_up: Callable[[], None] = lambda: None,
) -> tuple[Started, Other]:
    """Start a cluster, and do something else meanwhile that opens MLflow's store; return both.

    Where either raises, a cluster that was started is stopped, and the other has ended.

    Args:
        start: Connects to a cluster, or starts one.
        other: Called in another thread; it imports nothing of Ray.
        give_up: Called where `start` raises, so that `other` ends early.
    """
    was_up = ray.is_initialized()
    pool = ThreadPoolExecutor(1, thread_name_prefix="head-start")
    with first_contact():  # in this thread: Ray reads the environment that it changes
        pending = pool.submit(other)
        pool.shutdown(wait=False)
        try:
            started = start()
        except BaseException:  # an interrupt among them
            give_up()
            wait([pending], timeout=PATIENCE_S)  # it has no limits of time without this block
            if not was_up and ray.is_initialized():  # what came after it was connected
                ray.shutdown()
            raise
        try:
            return started, pending.result()
        except BaseException:
            if not was_up:
                ray.shutdown()
            raise


def _open(
    resolved: ResolvedExperiment, first: Callable[[], None], cancelled: threading.Event
) -> None:
    """Call `first`; open the store, which stays open, and import what `pipeline` does besides Ray.

    Nothing of Ray: the main thread is importing parts of it, and modules that import each other
    cannot be imported by two threads at a time. Once `cancelled` is set, no further part is begun.
    """
    parts: list[Callable[[], object]] = [first, lambda: open_tracker(resolved), _import_figures]
    for part in parts:
        if cancelled.is_set():
            return
        part()


def _import_figures() -> None:
    from simclr_ray.train import figures  # noqa: F401 - 0.6 s, of matplotlib
