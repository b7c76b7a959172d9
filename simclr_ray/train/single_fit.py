"""Training by one process of Ray on this machine, without those that many workers need.

Ray Train keeps a controller, a cleaner and a barrier for a run, and Ray Data an actor that makes
views and three that keep account: seven processes, each of which imports for seconds. Of one
worker beside its driver none is needed: it makes its views in a thread, copies its checkpoints
itself, and whether it fails or hangs its driver sees (`monitor.RunMonitor`), which starts it
again. What is computed is the same to the last bit at the same number of threads, and the run's
folder is the same: either goes on where the other stopped.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final

import ray
from ray.exceptions import RayError

from simclr_ray.config.experiment import Experiment
from simclr_ray.config.uris import remembered
from simclr_ray.distributed.ray_cluster import driver_queue, is_local
from simclr_ray.errors import RestartsError, SimclrRayError
from simclr_ray.train import stop
from simclr_ray.train.failures import cause_of, end_of_run, will_recur
from simclr_ray.train.health import HealthWatch
from simclr_ray.train.heartbeat import RanksFailed
from simclr_ray.train.monitor import RunMonitor
from simclr_ray.train.recorder import OnProgress
from simclr_ray.train.resolve import ResolvedExperiment
from simclr_ray.train.rollback import Rollbacks
from simclr_ray.train.scaling import can_train_in_process
from simclr_ray.train.single_worker import SingleWorker
from simclr_ray.train.tracked import Tracked
from simclr_ray.train.worker import WorkerInput

LOOK_S: Final = 0.5  # so often, whether the run is to end
COUNTED_S: Final = 10.0  # until a failure is counted
GONE_S: Final = 5.0  # until a process that is ended is gone

log = logging.getLogger(__name__)
_waiting: list[Any] = []  # a worker that nobody has given anything to do yet


def takes_single_worker(resolved: ResolvedExperiment) -> bool:
    """Return whether a run needs nothing but one process on the driver's machine.

    That is one worker on CPU, whose views one process makes, in the cluster that was started for
    it, with storage on a disk: into a bucket Ray Train copies beside the next steps. A frozen
    encoder has no worker.
    """
    config = resolved.config
    return (
        can_train_in_process(config)
        and not config.init.freeze
        and config.scaling.data_actors_per_worker == 1
        and resolved.folder.local is not None
        and is_local()
    )


def start_single_worker(experiment: Experiment) -> None:
    """Start the process of a run that comes soon: it imports what it needs meanwhile."""
    if not _waiting:
        _waiting.append(_started_worker(experiment))


@contextmanager
def no_worker_left() -> Iterator[None]:
    """End a worker that the block has found nothing to do for: it would hold CPUs and memory."""
    try:
        yield
    finally:
        while _waiting:
            _end(_waiting.pop())


def fit_by_single_worker(
    resolved: ResolvedExperiment,
    tracked: Tracked,
    on_progress: OnProgress | None,
    health: HealthWatch,
    rollbacks: Rollbacks,
) -> None:
    """Train in one process of Ray from the newest checkpoint to the end, or until a stop.

    What fails is tried again from there, as often as `scaling.max_failures` says.

    Raises:
        SimclrRayError: What no restart mends, or `on_progress` raised; or it failed too often.
        KeyboardInterrupt: Ctrl-C.
    """
    stop.workers_are_gone()
    inbox = driver_queue()
    log.info("starting 1 worker")
    watcher = _Monitor(inbox, tracked, on_progress, resolved, health)
    worker_input = WorkerInput(resolved, inbox, rollbacks, remembered())
    is_done = False
    failed: SimclrRayError | None = None
    with watcher:
        try:
            while not is_done and watcher.fatal is None:
                is_done = _train_once(worker_input, watcher)
        except SimclrRayError as error:
            failed = error
        except RayError as error:
            message = f"Ray has ended the run: {cause_of(error)}; the same command goes on"
            failed = RestartsError(message)
    failed = watcher.fatal or failed  # the watcher's says what is likely behind it
    if failed is not None:
        raise failed
    watcher.say_bad_rows()


class _Monitor(RunMonitor):
    """A monitor whose driver looks at `fatal` by itself: an interrupt would look like a stop."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._counted = threading.Event()

    def interrupt(self) -> None:
        """Do nothing."""

    def count(self, failed: RanksFailed) -> None:
        """Have a failure counted, and return when it is."""
        self._counted.clear()
        self.inbox.put(failed)
        self._counted.wait(COUNTED_S)

    def _take_failure(self, failed: RanksFailed) -> None:
        super()._take_failure(failed)
        self._counted.set()


def _train_once(worker_input: WorkerInput, watcher: _Monitor) -> bool:
    """Train in a process, which is gone afterwards; return whether to the end or a stop.

    Raises:
        SimclrRayError: No restart mends it, or none is wanted.
        RayError: The inbox is gone, or all of Ray.
    """
    config = worker_input.experiment.config
    worker, pid = _waiting.pop() if _waiting else _started_worker(config), 0
    try:
        pid = ray.get(worker.pid.remote())
        trained = worker.train.remote(worker_input)
        while not ray.wait([trained], timeout=LOOK_S)[0]:
            if watcher.fatal is not None:
                return False
        ray.get(trained)
    except RayError as error:
        cause = cause_of(error)
        final = end_of_run(error, cause, config.scaling.max_failures)
        if final is not None:
            raise final from error
        watcher.count(RanksFailed({"rank 0": cause}, will_recur(error)))
        return False
    finally:
        _end(worker, pid)
    return True


def _end(worker: Any, pid: int = 0) -> None:
    """End a worker; where its process is known, wait until that writes nothing more."""
    with suppress(RayError):
        ray.kill(worker)
    until = time.monotonic() + GONE_S
    with suppress(ProcessLookupError):
        while pid and time.monotonic() < until:
            os.kill(pid, 0)
            time.sleep(0.01)


def _started_worker(experiment: Experiment) -> Any:
    return SingleWorker.options(num_cpus=experiment.scaling.num_cpus).remote()  # type: ignore[attr-defined] # ray.remote has made it
