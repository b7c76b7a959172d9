"""A run and its MLflow run: begun, delivered to while it trains, ended, and delivered later.

What is logged goes into the run's folder (`run_log`) and from there to MLflow
(`tracking/delivery.py`). A new run needs MLflow at its start; nothing else waits for it.
"""

from __future__ import annotations

import logging
import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from simclr_ray import config as cfg
from simclr_ray.config.experiment import Experiment
from simclr_ray.config.logging import warn_once
from simclr_ray.errors import (
    ConfigError,
    StorageError,
    TrackingError,
    TrackingUnavailableError,
)
from simclr_ray.storage.lease import is_lost
from simclr_ray.storage.metrics_log import TIME, newest_record
from simclr_ray.storage.removal import remove_unlocked
from simclr_ray.storage.run_folder import CONFIG_FILE, METRICS, OTHER_METRICS, RunFolder
from simclr_ray.storage.run_record import RunRecord
from simclr_ray.tracking.delivery import STATE, Delivery, DeliveryCounts
from simclr_ray.tracking.runs import MlflowStatus, TrackedRun, Tracker
from simclr_ray.tracking.sender import Sender, sending
from simclr_ray.tracking.store import CLUSTER_TAG, delivering, store_uri
from simclr_ray.tracking.system_metrics import system_metrics
from simclr_ray.train.rollback import Rollbacks
from simclr_ray.train.run_log import DELIVERED, RunLog

if TYPE_CHECKING:  # of what imports torch: a sync needs none of it
    from simclr_ray.train.resolve import ResolvedExperiment

STOPPED_PATIENCE_S = 5.0  # who stops a run waits for its end, or kills it
log = logging.getLogger(__name__)


class Tracked(NamedTuple):
    """A run that is being tracked."""

    run_id: str  # of MLflow
    log: RunLog
    sender: Sender


class Writes:
    """What is to be told to a run's MLflow run, now or later."""

    def __init__(self, log: RunLog, delivery: Delivery) -> None:
        self.log, self.delivery = log, delivery

    def metrics(self, values: dict[str, float], step: int) -> None:
        """Log metrics that are not of training; of the same step again, they are what counts.

        By their time, since MLflow keeps both. What is sent by its log is sent once a step.
        """
        record = {TIME: round(time.time(), 3), "step": step, **values}
        before = self.log.records(OTHER_METRICS)
        if any(old.get("step") == step and values.keys() & old.keys() for old in before):
            self.delivery.enqueue("record", record=record)
        self.log.append(OTHER_METRICS, record)

    def text(self, text: str, file: str) -> None:
        """Store `text` as the artifact `file`."""
        self.delivery.enqueue("text", text=text, file=file)

    def config(self, experiment: Experiment) -> None:
        """Store the experiment as an artifact, by which a version finds what it was trained by."""
        self.text(cfg.dump_yaml(cfg.to_tree(experiment)), CONFIG_FILE)

    def file(self, path: Path) -> None:
        """Store a local file in the run folder and as an artifact."""
        self.log.put(path)
        self.delivery.enqueue("file", name=path.name)

    def status(self, status: MlflowStatus) -> None:
        """Set the run's status."""
        self.delivery.set_status(status)


def sync_command(folder: RunFolder) -> str:
    """Return the command that delivers what MLflow lacks of a run."""
    return shlex.join(["simclr-ray", "run", "sync", folder.uri])


def open_tracker(resolved: ResolvedExperiment) -> Tracker | None:
    """Return the tracker of an experiment, or None where its run goes on without MLflow.

    That is a run that was begun, whose MLflow does not answer now: its points are delivered later.

    Raises:
        ConfigError: MLflow has no such store.
        TrackingError: MLflow refuses; or a new run cannot reach it.
    """
    config = resolved.config
    try:
        return Tracker.open(config.tracking, config.storage)
    except TrackingUnavailableError as error:
        record = RunRecord.find(resolved.folder)
        if record is None or record.tracking_uri != store_uri(config.tracking.uri, config.storage):
            raise
        warn_once(log, f"{error}; the run goes on, and is delivered later")
        return None


@contextmanager
def tracked_run(resolved: ResolvedExperiment, tracker: Tracker | None) -> Iterator[Tracked]:
    """Open the MLflow run, new or continued, deliver to it, and give it its status at the end."""
    folder = resolved.folder
    run = _started(resolved, tracker) if tracker else None
    with RunLog(folder, is_patient=True) as run_log:
        delivery = _delivery(folder, run_log, run)
        delivery.set_status("RUNNING", has_it=run is not None)
        if run is None:
            delivery.enqueue("params", values=params_of(resolved.config))
        with sending(delivery, sync_command(folder)) as sender:
            try:
                with _machine(resolved.config, run_log, sender):
                    yield Tracked(delivery.run.run_id, run_log, sender)
            except BaseException as error:
                is_stopped = not isinstance(error, Exception)
                if not is_lost(folder.uri):  # else the MLflow run is of the driver that has it now
                    delivery.set_status("KILLED" if is_stopped else "FAILED")
                if is_stopped or isinstance(error, StorageError):  # MLflow may lie on that disk
                    sender.patience_s = STOPPED_PATIENCE_S
                raise
            else:
                delivery.set_status("FINISHED")
            finally:
                with suppress(StorageError):  # the log's own end says it, or what ended the run
                    run_log.try_upload()  # before MLflow is waited for


@contextmanager
def late_writes(folder: RunFolder) -> Iterator[Writes]:
    """Take what a run's MLflow run is to be told after training; deliver it, now or later.

    Raises:
        ConfigError: The folder holds no run.
    """
    with RunLog(folder) as run_log:
        delivery = _delivery(folder, run_log)
        yield Writes(run_log, delivery)
        with sending(delivery, sync_command(folder)):
            pass


def deliver_queued(folder: RunFolder) -> None:
    """Deliver what MLflow lacks of a run that has ended, if that is known; a failure is a line."""
    record = RunRecord.find(folder)
    text = folder.read_text(STATE)
    if record is None or text is None:
        return
    with RunLog(folder) as run_log:
        delivery = _delivery(folder, run_log)
        if str(delivery.undelivered()):
            with sending(delivery, sync_command(folder)):
                pass


def sync_run(folder: RunFolder) -> DeliveryCounts:
    """Deliver what MLflow lacks of a run: points, other writes, and the right status.

    A run that nobody runs and that MLflow shows as running was killed, and is shown so.

    Raises:
        ConfigError: The folder holds no run.
        RunError: Its driver runs; that delivers by itself.
        TrackingError: MLflow refuses or does not answer; what was delivered until then is.
    """
    record = RunRecord.read(folder)
    points = 0
    with folder.lock(), RunLog(folder) as run_log, delivering():
        run = TrackedRun.attach(record.tracking_uri, record.mlflow_run_id)
        delivery = _delivery(folder, run_log, run)
        writes, wanted = len(delivery.state.owed), delivery.state.status
        before = run.status()
        if wanted in ("", "RUNNING") and before == "RUNNING":
            delivery.set_status("KILLED")
        elif wanted not in ("", "RUNNING", before):
            delivery.set_status(wanted)  # type: ignore[arg-type] # read from JSON
        while (sent := delivery.send()) is not None:
            points += sent
        after = delivery.state.status
    return DeliveryCounts(points, writes, "" if after in ("", before) else after)


def remove_run(folder: RunFolder) -> str:
    """Delete a run's folder, and mark MLflow's run as deleted; return what is left, as a clause.

    Raises:
        ConfigError: The folder holds no run.
        RunError: Its driver runs.
    """
    record = RunRecord.find(folder)
    if record is None and folder.read_text(CONFIG_FILE) is None:
        raise ConfigError.of(folder.uri, "is no run folder")
    remove_unlocked(folder)
    if record is None:
        return ""
    try:
        TrackedRun.attach(record.tracking_uri, record.mlflow_run_id).delete()
    except (ConfigError, TrackingError) as error:
        return f"; MLflow's run stays: {error}"
    return ""


def _delivery(folder: RunFolder, run_log: RunLog, run: TrackedRun | None = None) -> Delivery:
    """Return the delivery of a folder's run; `run` where that is open, else asking nothing."""
    is_open = run is not None
    if run is None:
        record = RunRecord.read(folder)
        run = TrackedRun(record.tracking_uri, record.mlflow_run_id, "", resumed=True)
    delivery = Delivery(run, run_log.path, DELIVERED)
    delivery.is_rewritten = is_open
    for write in delivery.state.owed:
        if write["kind"] == "file":
            run_log.fetch(write["name"])
    return delivery


def _started(resolved: ResolvedExperiment, tracker: Tracker) -> TrackedRun | None:
    """Return the MLflow run, or None where a continued one does not answer."""
    experiment, source, folder = resolved.config, resolved.source, resolved.folder
    record = RunRecord.find(folder)
    rollbacks = Rollbacks.read(folder)
    try:
        resume_id = record.mlflow_run_id if record else ""
        if record and not tracker.has_run(resume_id):  # ids are unique, addresses change by a move
            log.warning("the run was tracked elsewhere; it goes on as a new MLflow run here")
            resume_id = ""
        tags = {"digest": resolved.digest, "storage": folder.uri}
        if record is None and folder.read_text(METRICS) is not None:  # run.json is lost
            resume_id = tracker.find_run(tags)
        run = tracker.start_run(
            folder.name,
            params=params_of(experiment),
            tags=tags | _cluster_tags() | rollbacks.tags,
            resume_id=resume_id,
            parent_id=experiment.tracking.parent_run,
        )
        RunRecord(
            run.run_id, tracker.uri, source.fingerprint, resolved.digest, **rollbacks.named
        ).write(folder)
        run.log_dataset("train", source.uri, source.fingerprint, source.num_rows, "pretraining")
    except TrackingUnavailableError as error:
        if record is None or record.tracking_uri != tracker.uri:
            raise
        warn_once(log, f"{error}; the run goes on, and is delivered later")
        return None
    return run


def _cluster_tags() -> dict[str, str]:
    from simclr_ray.distributed.cluster_health import cluster_result  # Ray's: no sync needs it

    result = cluster_result()
    return {} if result is None else {CLUSTER_TAG: result}


@contextmanager
def _machine(experiment: Experiment, run_log: RunLog, sender: Sender) -> Iterator[None]:
    """Log the machine's metrics, if that is asked for."""
    if not experiment.tracking.system_metrics:
        yield
        return

    from simclr_ray.nn.precision import gpus_seen  # which imports torch

    def append(record: dict[str, float]) -> None:
        run_log.append(OTHER_METRICS, record)
        sender.wake()

    newest = newest_record(run_log.path / OTHER_METRICS, "system/")
    with system_metrics(append, int(newest.get("step", -1)) + 1, gpus=gpus_seen()):
        yield


def params_of(experiment: Experiment) -> dict[str, cfg.Scalar]:
    """Return what MLflow shows as parameters: every leaf, or those asked for and the rest's digest.

    A path that names a node of the config stands for all below it.
    """
    leaves, only = cfg.leaves(cfg.to_tree(experiment)), experiment.tracking.only_params
    if not only:
        return leaves
    shown = {k: v for k, v in leaves.items() if any(f"{k}.".startswith(f"{a}.") for a in only)}
    decisive = cfg.leaves(cfg.identity(experiment))
    return shown | {"rest": cfg.digest_of({k: v for k, v in decisive.items() if k not in shown})}
