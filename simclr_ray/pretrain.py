"""Pretraining under Ray Train: workers that run the loop, and the driver that watches them.

The driver's side: it checks what is asked for against the cluster, starts the workers (`worker`),
writes what they report to the run's folder and to MLflow, and shows it. A run has one name, made
of the experiment and the pictures' fingerprint, so the same command continues it.
"""

from __future__ import annotations

import _thread
import json
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, NamedTuple

import ray
import ray.train
import ray.train.torch
from ray.util.queue import Empty, Queue

from simclr_ray import checkpoint
from simclr_ray import config as cfg
from simclr_ray.allocator import one_arena
from simclr_ray.cluster import check_cluster, connect, driver_queue
from simclr_ray.data.maker import plan_of
from simclr_ray.data.source import Source
from simclr_ray.errors import RunError, SimclrRayError, TooManyBadImages
from simclr_ray.experiment import PLACEMENT, Experiment
from simclr_ray.logs import get_logger
from simclr_ray.mlflow_store import check_alias, store_uri
from simclr_ray.records import read_records
from simclr_ray.resolve import resolved, split_like_test
from simclr_ray.storage import RunFolder
from simclr_ray.tracking import TrackedRun, Tracker
from simclr_ray.worker import Task, our_error, work

log = get_logger(__name__)

Record = dict[str, float]
Progress = Callable[[Record], None]
WAIT_S = 10.0  # for a record; what comes is taken at once
UPLOAD_EVERY_S = 60.0
HELD_S = 30.0  # a trial's driver is a task of Ray's, which outlives a study's by seconds
METRICS, BAD_ROWS = "metrics.jsonl", "bad_rows.jsonl"
RUN_FILE, CONFIG_FILE = "run.json", "experiment.yaml"


class Run(NamedTuple):
    """One pretraining run, finished."""

    name: str
    folder: str  # path or URI
    checkpoint: Path  # local path of the last one
    mlflow_run_id: str
    metrics: Record  # the last of each


def pretrain(experiment: Experiment, *, on_progress: Progress | None = None) -> Run:
    """Train `experiment` to its end on the Ray cluster at hand, and return the run.

    Connects to the cluster of `RAY_ADDRESS`, else starts a local one. Continues the run of the
    same name and digest; a finished one is returned as it is.

    Args:
        experiment: What to train and where.
        on_progress: Called on this process with each record of metrics; a `SimclrRayError` that
            it raises ends the run.

    Raises:
        DataError: The data cannot be used.
        ClusterError: The cluster cannot hold the workers.
        RunError: Training failed, with its cause; or another process is at this very run.
    """
    experiment = experiment.absolute()
    _check_late_needs(experiment)
    source = Source.open(experiment.data.train, experiment.data.columns, experiment.data.limit)
    experiment = resolved(experiment, source)
    plan_of(experiment, source)  # fails here when the rows fill no batch
    folder = RunFolder.of(experiment.storage, experiment.run_name(source.fingerprint))
    with folder.held(HELD_S):
        folder.write_text(CONFIG_FILE, cfg.dump_yaml(cfg.to_tree(experiment)))
        tracker = Tracker.open(experiment.tracking, experiment.storage)  # before the cluster waits
        connect(experiment)
        check_cluster(experiment)
        with _tracked(experiment, source, folder, tracker) as tracked:
            return _trained(experiment, source, folder, tracked, on_progress)


def _trained(
    experiment: Experiment,
    source: Source,
    folder: RunFolder,
    tracked: TrackedRun,
    on_progress: Progress | None,
) -> Run:
    """Train what is left of a run; return it."""
    total = experiment.total_steps(source.num_rows)
    scratch = Path(tempfile.mkdtemp(prefix="simclr_ray-"))
    newest = folder.newest(scratch)
    if newest is not None:
        log.info("continuing after step %d of %d", checkpoint.step_of(newest.name), total)
    if newest is None or checkpoint.step_of(newest.name) < total:
        for name in folder.repair_snapshot():
            log.warning("Ray's snapshot named %s, which is gone; it was set aside", name)
        _fit(experiment, source, folder, tracked, on_progress)
        newest = folder.newest(scratch)
    if newest is None or checkpoint.step_of(newest.name) < total:
        raise RunError(f"{folder.uri} holds no whole checkpoint of step {total} after training")
    return Run(folder.name, folder.uri, newest, tracked.run_id, _last_metrics(folder))


def _check_late_needs(experiment: Experiment) -> None:
    """Fail now for what would otherwise fail, or mislead, after hours of training."""
    data = experiment.data
    same = split_like_test(data)
    if same:
        log.warning("%s holds the pictures of %s: scores flatter", data.test, same)
    if data.bank and not data.test:
        Source.open(data.bank, data.columns)
    if experiment.register_as.name:
        check_alias(experiment.register_as.alias)
    store_uri(experiment.tracking.uri, experiment.storage)


def _params(experiment: Experiment) -> dict[str, cfg.Scalar]:
    """Return what MLflow shows as parameters: every leaf, or those asked for and the rest's digest.

    A path that names a node of the config stands for all below it.
    """
    leaves, asked = cfg.leaves(experiment), experiment.tracking.only_params
    if not asked:
        return leaves
    shown = {k: v for k, v in leaves.items() if any(f"{k}.".startswith(f"{a}.") for a in asked)}
    rest = {k: v for k, v in leaves.items() if k not in shown and k.split(".")[0] not in PLACEMENT}
    return shown | {"rest": cfg.digest_of(rest)}


@contextmanager
def _tracked(
    experiment: Experiment, source: Source, folder: RunFolder, tracker: Tracker
) -> Iterator[TrackedRun]:
    """Open the MLflow run, new or continued, and give it its status at the end."""
    text = folder.read_text(RUN_FILE)
    resume_id = json.loads(text)["mlflow_run_id"] if text else ""
    if text and json.loads(text)["tracking_uri"] != tracker.uri:
        log.warning("the run was tracked elsewhere; it goes on as a new MLflow run here")
        resume_id = ""
    run = tracker.start_run(
        folder.name,
        params=_params(experiment),
        tags={"digest": experiment.digest(), "storage": folder.uri},
        resume_id=resume_id,
        parent_id=experiment.tracking.parent_run,
    )
    stored = {
        "mlflow_run_id": run.run_id,
        "tracking_uri": tracker.uri,
        "fingerprint": source.fingerprint,
        "digest": experiment.digest(),
    }
    folder.write_text(RUN_FILE, json.dumps(stored, indent=1))
    run.log_dataset("train", source.uri, source.fingerprint, source.num_rows, "pretraining")
    status = "KILLED"
    try:
        with run.system_metrics() if experiment.tracking.system_metrics else nullcontext():
            yield run
        status = "FINISHED"
    except Exception:
        status = "FAILED"
        raise
    finally:
        run.finish(status)  # type: ignore[arg-type] # one of the three literals


def _fit(
    experiment: Experiment,
    source: Source,
    folder: RunFolder,
    tracked: TrackedRun,
    on_progress: Progress | None,
) -> None:
    scaling = experiment.scaling
    inbox = driver_queue()
    resources = {"CPU": scaling.cpus_per_worker}
    if scaling.gpus_per_worker:
        resources["GPU"] = scaling.gpus_per_worker
    trainer = ray.train.torch.TorchTrainer(
        work,
        train_loop_config={"task": Task(cfg.to_tree(experiment), source, folder, inbox)},
        scaling_config=ray.train.ScalingConfig(
            num_workers=scaling.num_workers,
            use_gpu=scaling.gpus_per_worker > 0,
            resources_per_worker=resources,
        ),
        torch_config=ray.train.torch.TorchConfig(
            backend="nccl" if scaling.gpus_per_worker else "gloo",
            timeout_s=int(scaling.collective_timeout_s),
        ),
        run_config=ray.train.RunConfig(  # type: ignore[call-arg] # Train V2 puts its own there
            name=folder.name,
            storage_path=folder.storage,
            worker_runtime_env={"env_vars": one_arena()},
            failure_config=ray.train.FailureConfig(max_failures=scaling.max_failures),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=experiment.checkpoint.keep),
            logging_config=ray.train.LoggingConfig(log_level="ERROR"),
        ),
    )
    watcher = _Watcher(inbox, folder, tracked, on_progress, experiment, source)
    handler = signal.getsignal(signal.SIGINT)
    try:
        with watcher:
            trainer.fit()
    except (KeyboardInterrupt, SystemExit):  # Ray's handler aborts the run and exits by 0
        if watcher.fatal is None:
            raise KeyboardInterrupt from None
    except ray.train.TrainingFailedError as error:
        ours = watcher.fatal or our_error(error)
        raise ours or RunError(f"training failed: {_root_message(error)}") from error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, handler)  # Ray leaves its own behind
    if watcher.fatal is not None:
        raise watcher.fatal


class _Watcher:
    """Takes the workers' records, in a thread: to the log file first, then MLflow, then the eye."""

    def __init__(
        self,
        inbox: Queue,
        folder: RunFolder,
        tracked: TrackedRun,
        on_progress: Progress | None,
        experiment: Experiment,
        source: Source,
    ) -> None:
        self.inbox, self.folder, self.tracked = inbox, folder, tracked
        self.on_progress, self.experiment, self.source = on_progress, experiment, source
        self.fatal: SimclrRayError | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._local = folder.local or Path(tempfile.mkdtemp(prefix="simclr_ray-"))
        self._local.mkdir(parents=True, exist_ok=True)
        self._uploaded_at = time.monotonic()
        if folder.local is None:  # what earlier starts of this run have logged
            for name in (METRICS, BAD_ROWS):
                (self._local / name).write_text(folder.read_text(name) or "", encoding="utf-8")
        bad_rows = read_records(folder.read_text(BAD_ROWS) or "")
        self._bad = {int(row["id"]): str(row["reason"]) for row in bad_rows}

    def __enter__(self) -> _Watcher:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        with suppress(ray.exceptions.RayError):
            self.inbox.put(None)  # so that the thread need not wait for a record
        self._thread.join(timeout=60)
        self.inbox.shutdown(force=True)
        self._upload()

    def _watch(self) -> None:
        while True:
            last = self._stop.is_set()  # read before draining: nothing put before is missed
            try:
                for item in self._drain() if last else self._arrived():
                    self._take(item)
                if time.monotonic() - self._uploaded_at > UPLOAD_EVERY_S:
                    self._upload()
            except OSError as error:
                self._end(RunError(f"the log of the run cannot be written: {error}"))
            if last:
                return

    def _arrived(self) -> list[Any]:
        """Return what has come, after waiting for it: asking again and again costs CPU."""
        try:
            return [self.inbox.get(timeout=WAIT_S), *self._drain()]
        except Empty:
            return []
        except ray.exceptions.RayError:  # the queue is gone, and the run is about to end
            self._stop.wait(1.0)
            return []

    def _drain(self) -> list[Any]:
        items = []
        try:
            while True:
                items.append(self.inbox.get_nowait())
        except (Empty, ray.exceptions.RayError):
            return items

    def _take(self, item: Any) -> None:
        if item is None:
            return
        if isinstance(item, SimclrRayError):
            self._end(item)
        elif "reason" in item:
            self._take_bad(item)
        else:
            self._take_metrics(item)

    def _take_metrics(self, item: Record) -> None:
        _append(self._local / METRICS, json.dumps(item))
        metrics = {k: v for k, v in item.items() if "/" in k}
        try:
            self.tracked.log_metrics(metrics, int(item["step"]))
        except SimclrRayError as error:  # the run is worth more than its log
            log.warning("not logged to MLflow: %s", error)
        if self.on_progress is not None:
            try:
                self.on_progress(item)
            except SimclrRayError as error:  # who watches may end a run
                self._end(error)

    def _take_bad(self, item: dict[str, Any]) -> None:
        """Name the row; end the run when more are unusable than `data.max_bad_share` allows."""
        if item["id"] in self._bad:
            return
        self._bad[item["id"]] = item["reason"]
        _append(self._local / BAD_ROWS, json.dumps(item))
        share, rows = self.experiment.data.max_bad_share, self.source.num_rows
        if len(self._bad) > share * rows:
            reasons = "; ".join(sorted(set(self._bad.values()))[:5])
            self._end(
                TooManyBadImages(
                    f"{len(self._bad)} of {rows} rows cannot be used, more than data.max_bad_share="
                    f"{share:g} allows; reasons: {reasons}; ids: {sorted(self._bad)[:10]}"
                )
            )

    def _end(self, error: SimclrRayError) -> None:
        """End `fit` now, once: no retry can mend it."""
        if self.fatal is None:
            self.fatal = error
            if not self._stop.is_set():
                _thread.interrupt_main()

    def _upload(self) -> None:
        self._uploaded_at = time.monotonic()
        if self.folder.local is None:
            for name in (METRICS, BAD_ROWS):
                self.folder.put_folder(self._local / name, name)


def _root_message(error: BaseException) -> str:
    failures = getattr(error, "worker_failures", {})
    root = next(iter(failures.values()), error)
    return " ".join(str(root).split())[-2000:]


def _append(path: Path, line: str) -> None:
    """Append a line; where a kill has cut the last one off, start on a new one."""
    with path.open("ab+") as file:
        if file.tell() and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n":
            file.write(b"\n")
        file.write(line.encode() + b"\n")


def _last_metrics(folder: RunFolder) -> Record:
    last: Record = {}
    for record in read_records(folder.read_text(METRICS) or ""):
        last.update(record)
    return last
