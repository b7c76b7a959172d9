"""Pretraining under Ray Train: workers that run the loop, and the driver that watches them.

The driver's side: it checks what is asked for against the cluster, starts the workers (`worker`),
writes what they report to the run's folder and to MLflow, and shows it. A run has one name, made
of the experiment and the pictures' fingerprint, so the same command continues it.
"""

from __future__ import annotations

import json
import logging
import math
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import ray
import ray.train
import ray.train.torch
from ray.util.queue import Empty, Queue

from simclr_ray import checkpoint
from simclr_ray import config as cfg
from simclr_ray.data.maker import plan_of
from simclr_ray.data.source import Source
from simclr_ray.errors import ClusterError, RunError, SimclrRayError
from simclr_ray.experiment import Experiment
from simclr_ray.logs import get_logger
from simclr_ray.storage import RunFolder
from simclr_ray.tracking import TrackedRun, Tracker
from simclr_ray.worker import Task, our_error, work

log = get_logger(__name__)

Record = dict[str, float]
Progress = Callable[[Record], None]
POLL_S = 0.5
METRICS, BAD_ROWS, RUN_FILE, CONFIG_FILE = (
    "metrics.jsonl", "bad_rows.jsonl", "run.json", "experiment.yaml",
)  # fmt: skip


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
        on_progress: Called on this process with each record of metrics.

    Raises:
        DataError: The data cannot be used.
        ClusterError: The cluster cannot hold the workers.
        RunError: Training failed; the message has the cause.
    """
    experiment = experiment.absolute()
    source = Source.open(experiment.data.train, experiment.data.columns, experiment.data.limit)
    plan_of(experiment, source)  # fails here when the rows fill no batch
    folder = RunFolder.of(experiment.storage, experiment.run_name(source.fingerprint))
    total = experiment.total_steps(source.num_rows)
    folder.write_text(CONFIG_FILE, cfg.dump_yaml(cfg.to_tree(experiment)))
    connect(experiment)
    _check_cluster(experiment)
    with _tracked(experiment, source, folder) as tracked:
        done = folder.checkpoints()
        if not done or checkpoint.step_of(done[0]) < total:
            for name in folder.repair_snapshot():
                log.warning("Ray's snapshot named %s, which is gone; it was set aside", name)
            _fit(experiment, source, folder, tracked, on_progress)
        newest = folder.newest(Path(tempfile.gettempdir()) / "simclr_ray" / folder.name)
        if newest is None:
            raise RunError(f"{folder.uri} holds no whole checkpoint after training")
        last = _last_metrics(folder)
        return Run(folder.name, folder.uri, newest, tracked.run_id, last)


def connect(experiment: Experiment | None = None) -> None:
    """Connect to the cluster of `RAY_ADDRESS`, or start one on this machine. Idempotent.

    A cluster that is started here offers as many logical CPUs as `experiment` needs.
    """
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    if "RAY_ADDRESS" in os.environ:
        ray.init(logging_level=logging.ERROR, log_to_driver=False)
        return
    os.environ.setdefault("RAY_AUTH_MODE", "token")  # Ray's default, said aloud
    # one machine is not preempted, and the watcher costs a process
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    # logical CPUs may exceed cores: workers and decode actors share them by time
    wanted = _cpus_wanted(experiment) if experiment else 0.0
    ray.init(
        address="local",
        num_cpus=max(os.cpu_count() or 1, math.ceil(wanted) + 1),
        object_store_memory=2**30,
        logging_level=logging.ERROR,
        log_to_driver=False,
    )
    # Ray Train's helpers find the cluster by this, where several run on one machine
    os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address


def _cpus_wanted(experiment: Experiment) -> float:
    scaling = experiment.scaling
    data_cpus = scaling.data_actors_per_worker * scaling.cpus_per_data_actor
    return scaling.num_workers * (scaling.cpus_per_worker + data_cpus)


def _check_cluster(experiment: Experiment) -> None:
    scaling = experiment.scaling
    cluster: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    data_cpus = scaling.data_actors_per_worker * scaling.cpus_per_data_actor
    cpus = _cpus_wanted(experiment)
    gpus = scaling.num_workers * scaling.gpus_per_worker
    for what, needed in (("CPU", cpus), ("GPU", gpus)):
        if needed > cluster.get(what, 0.0):
            raise ClusterError(
                f"scaling asks for {needed:g} {what}s ({scaling.num_workers} workers"
                + (f", each with {data_cpus:g} for decoding" if what == "CPU" else "")
                + f"), the cluster has {cluster.get(what, 0.0):g}; lower scaling.num_workers or "
                f"scaling.{'cpus' if what == 'CPU' else 'gpus'}_per_worker"
            )
    if scaling.data_resource and scaling.data_resource not in cluster:
        raise ClusterError(
            f"no node has the resource {scaling.data_resource!r} of scaling.data_resource; "
            f"there are: {', '.join(sorted(cluster))}"
        )


@contextmanager
def _tracked(experiment: Experiment, source: Source, folder: RunFolder) -> Iterator[TrackedRun]:
    """Open the MLflow run, new or continued, and give it its status at the end."""
    text = folder.read_text(RUN_FILE)
    resume_id = json.loads(text)["mlflow_run_id"] if text else ""
    tracker = Tracker.open(experiment.tracking, experiment.storage)
    run = tracker.start_run(
        folder.name,
        params=cfg.leaves(experiment),
        tags={"digest": experiment.digest(), "storage": folder.uri},
        resume_id=resume_id,
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
        with run.system_metrics() if experiment.tracking.system_metrics else _nothing():
            yield run
        status = "FINISHED"
    except Exception:
        status = "FAILED"
        raise
    finally:
        run.finish(status)  # type: ignore[arg-type] # one of the three literals


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def _fit(
    experiment: Experiment,
    source: Source,
    folder: RunFolder,
    tracked: TrackedRun,
    on_progress: Progress | None,
) -> None:
    scaling = experiment.scaling
    inbox = Queue(actor_options={"num_cpus": 0})
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
        run_config=ray.train.RunConfig(
            name=folder.name,
            storage_path=folder.storage,
            failure_config=ray.train.FailureConfig(max_failures=scaling.max_failures),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=experiment.checkpoint.keep),
            logging_config=ray.train.LoggingConfig(log_level="ERROR"),
        ),
    )
    watcher = _Watcher(inbox, folder, tracked, on_progress)
    try:
        with watcher:
            trainer.fit()
    except KeyboardInterrupt:
        if watcher.fatal is None:
            raise
    except ray.train.TrainingFailedError as error:
        ours = watcher.fatal or our_error(error)
        raise ours or RunError(f"training failed: {_root_message(error)}") from error
    if watcher.fatal is not None:
        raise watcher.fatal


class _Watcher:
    """Takes the workers' records, in a thread: to the log file first, then MLflow, then the eye."""

    def __init__(
        self, inbox: Queue, folder: RunFolder, tracked: TrackedRun, on_progress: Progress | None
    ) -> None:
        self.inbox, self.folder, self.tracked = inbox, folder, tracked
        self.on_progress = on_progress
        self.fatal: SimclrRayError | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        local = folder.local or Path(tempfile.mkdtemp(prefix="simclr_ray-"))
        local.mkdir(parents=True, exist_ok=True)
        self._local = local

    def __enter__(self) -> _Watcher:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(timeout=60)
        self.inbox.shutdown(force=True)
        if self.folder.local is None:
            for name in (METRICS, BAD_ROWS):
                if (self._local / name).is_file():
                    self.folder.put_folder(self._local / name, name)

    def _watch(self) -> None:
        while True:
            last = self._stop.is_set()  # read before draining: nothing put before is missed
            for item in self._drain():
                self._take(item)
            if last:
                return
            time.sleep(POLL_S)

    def _drain(self) -> list[Any]:
        items = []
        try:
            while True:
                items.append(self.inbox.get_nowait())
        except (Empty, ray.exceptions.RayError):
            return items

    def _take(self, item: Any) -> None:
        if isinstance(item, SimclrRayError):
            self.fatal = item
            if threading.main_thread().is_alive() and not self._stop.is_set():
                import _thread

                _thread.interrupt_main()  # no retry can mend it: end `fit` now
            return
        name = BAD_ROWS if "reason" in item else METRICS
        _append(self._local / name, json.dumps(item))
        if name == BAD_ROWS:
            return
        metrics = {k: v for k, v in item.items() if "/" in k}
        try:
            self.tracked.log_metrics(metrics, int(item["step"]))
        except SimclrRayError as error:  # the run is worth more than its log
            log.warning("not logged to MLflow: %s", error)
        if self.on_progress is not None:
            self.on_progress(item)


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
    for line in (folder.read_text(METRICS) or "").splitlines():
        try:
            last.update(json.loads(line))
        except ValueError:
            log.debug("%s has a line that was cut off", METRICS)
    return last
