"""The only worker of a run on this machine: one process of Ray, without those that many need.

Ray Train keeps a controller, a cleaner and a barrier for a run, and Ray Data an actor that makes
views and three that keep account: seven processes, each of which imports for seconds. Of one
worker beside its driver none is needed: it makes its views in a thread, copies its checkpoints
itself, and whether it fails or hangs its driver sees (`monitor.RunMonitor`), which starts it
again. What is computed is the same to the last bit at the same number of threads, and the run's
folder is the same: either goes on where the other stopped.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import ray
from ray.exceptions import RayError

from simclr_ray.config.experiment import Experiment
from simclr_ray.data.ahead import ahead, started
from simclr_ray.data.batch import Batch
from simclr_ray.data.source import Source
from simclr_ray.distributed.ray_cluster import driver_queue, is_local
from simclr_ray.errors import RunError, SimclrRayError
from simclr_ray.storage.metrics_log import newest_record, read_records
from simclr_ray.storage.run_folder import BAD_ROWS, METRICS, RunFolder
from simclr_ray.train import stop
from simclr_ray.train.alone import can_train_alone
from simclr_ray.train.context import LoneContext, Upload
from simclr_ray.train.failures import cause_of, final_error
from simclr_ray.train.health import HealthWatch
from simclr_ray.train.heartbeat import Inbox, RanksFailed, RankStarted
from simclr_ray.train.monitor import RunMonitor
from simclr_ray.train.recorder import OnProgress
from simclr_ray.train.resolve import ResolvedExperiment
from simclr_ray.train.rollback import Rollbacks, kept_by_ray
from simclr_ray.train.tracked import Tracked
from simclr_ray.train.worker import TrainWorker, WorkerInput, tell_final

BATCHES_AHEAD: Final = 2
LOOK_S: Final = 0.5  # so often, whether the run is to end
STORED_S: Final = 0.005  # so often, whether the driver has written its log

log = logging.getLogger(__name__)
_waiting: list[Any] = []  # an actor that nobody has given anything to do yet


def takes_lone_worker(resolved: ResolvedExperiment) -> bool:
    """Return whether a run needs nothing but one process on the driver's machine.

    That is one worker on CPU, whose views one process makes, in the cluster that was started for
    it, with storage on a disk: into a bucket Ray Train copies beside the next steps. A frozen
    encoder has no worker.
    """
    config = resolved.config
    return (
        can_train_alone(config)
        and not config.init.freeze
        and config.scaling.data_actors_per_worker == 1
        and resolved.folder.local is not None
        and is_local()
    )


def start_lone_worker(experiment: Experiment) -> None:
    """Start the process of a run that comes soon: it imports what it needs meanwhile."""
    if not _waiting:
        _waiting.append(_started_actor(experiment))


@contextmanager
def no_worker_left() -> Iterator[None]:
    """End a worker that the block has found nothing to do for: it would hold CPUs and memory."""
    try:
        yield
    finally:
        while _waiting:
            _end(_waiting.pop())


def fit_by_lone_worker(
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
    given = WorkerInput(resolved, inbox, rollbacks)
    is_done, failed = False, None
    with watcher:
        try:
            while not is_done and watcher.fatal is None:
                is_done = _is_done(given, watcher)  # or once more: the watcher counts
        except SimclrRayError as error:
            failed = error
    failed = watcher.fatal or failed  # the watcher's says what is likely behind it
    if failed is not None:
        raise failed
    watcher.say_bad_rows()


class _Monitor(RunMonitor):
    """A monitor whose driver looks at `fatal` by itself: an interrupt would look like a stop."""

    def interrupt(self) -> None:
        """Do nothing."""


def _is_done(given: WorkerInput, watcher: RunMonitor) -> bool:
    """Train in a process; return whether to the end or a stop. It is gone afterwards.

    Raises:
        SimclrRayError: No restart mends it, or none is wanted.
    """
    config = given.experiment.config
    actor = _waiting.pop() if _waiting else _started_actor(config)
    try:
        trained = actor.train.remote(given)
        while not ray.wait([trained], timeout=LOOK_S)[0]:
            if watcher.fatal is not None:
                return False
        ray.get(trained)
    except RayError as error:
        ours = final_error(error)
        if ours is None and not config.scaling.max_failures:
            ours = RunError(f"training failed: {cause_of(error)}")
        if ours is not None:
            raise ours from error
        given.inbox.put(RanksFailed({"rank 0": cause_of(error)}))
        return False
    finally:
        _end(actor)
    return True


def _end(actor: Any) -> None:
    with suppress(RayError):
        ray.kill(actor)


def _started_actor(experiment: Experiment) -> Any:
    return LoneWorker.options(num_cpus=experiment.scaling.num_cpus).remote()  # type: ignore[attr-defined]


@ray.remote
class LoneWorker:
    """Ray's actor of the worker; its import of this module is most of its start."""

    def train(self, given: WorkerInput) -> None:
        """Train from the newest checkpoint; an error that no restart can mend is sent first."""
        resolved, inbox = given.experiment, _Inbox(given.inbox)
        context = _Context(resolved.folder, kept_by_ray(resolved.config), inbox)
        try:
            worker = TrainWorker(given._replace(inbox=inbox), context)
            worker.run()
            worker.heartbeat.stop()
        except Exception as error:
            tell_final(given.inbox, error)
            raise


class _Inbox:
    """The driver's inbox, which knows what was put into it last."""

    def __init__(self, inbox: Inbox) -> None:
        self._inbox = inbox
        self._last: dict[str, dict[str, Any]] = {}  # by the log that it goes into

    def put(self, item: Any) -> None:
        """Put one item."""
        if isinstance(item, dict):
            self._last[BAD_ROWS if "reason" in item else METRICS] = item
        self._inbox.put(item)

    def is_stored(self, folder: Path) -> bool:
        """Return whether all records that were put are in the run's logs."""
        record, row = self._last.get(METRICS, {}), self._last.get(BAD_ROWS, {})
        newest = newest_record(folder / METRICS)
        if record and (newest.get("step") != record["step"] or not record.keys() <= newest.keys()):
            return False
        rows = (folder / BAD_ROWS).read_text(encoding="utf-8") if row else ""
        return not row or any(known["id"] == row["id"] for known in read_records(rows))


class _Context(LoneContext):
    """A rank whose driver is another process of the machine."""

    def __init__(self, folder: RunFolder, keep: int | None, inbox: _Inbox) -> None:
        super().__init__(folder, keep)
        self._inbox = inbox

    def save(
        self, step: int, written: Path | None, name: str, upload: Upload, *, wait: bool
    ) -> None:
        """Keep a checkpoint once the driver has stored what came before it.

        A worker outlives a driver that is killed, by moments in which it takes steps: a run that
        goes on after one of them would lack its records.
        """
        assert self._folder.local is not None
        while not self._inbox.is_stored(self._folder.local):
            time.sleep(STORED_S)
        super().save(step, written, name, upload, wait=wait)

    def begin(self, inbox: Inbox) -> None:
        """Tell the driver where this process is, and how to end it."""
        inbox.put(RankStarted.here(self.rank))

    def batches(
        self, experiment: Experiment, source: Source, steps: range, run: str
    ) -> Iterator[Batch]:
        """Return the batches, which a thread makes ahead, from now on."""
        return started(ahead(super().batches(experiment, source, steps, run), BATCHES_AHEAD))
