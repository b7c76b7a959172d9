"""Runs, metrics, lineage and the model registry: the one door to MLflow.

Everything goes through `MlflowClient` and explicit run ids. The fluent API keeps one active run per
process and one tracking URI per interpreter, which is wrong as soon as a driver, its workers and a
study write to different runs. MLflow takes seconds to import, so it is imported where it is used.

The default store is SQLite inside the storage folder, and its experiments get an absolute artifact
location: SQLite's own default is `./mlruns` *relative to the working directory*, and a Ray worker's
is somewhere in the session folder.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple
from urllib.parse import urlsplit

from simclr_ray.errors import TrackingError
from simclr_ray.logs import get_logger

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from simclr_ray.config import Scalar
    from simclr_ray.experiment import Tracking

URI_VARIABLE = "MLFLOW_TRACKING_URI"
DATABASE = "mlflow.db"
ARTIFACTS = "mlartifacts"

# mlflow.utils.validation: what MLflow 3 takes; it refuses what is longer instead of cutting it.
MAX_PER_BATCH = 100
MAX_METRICS_PER_BATCH = 1000
MAX_PARAM_CHARS = 6000
MAX_TAG_CHARS = 5000  # 8000 since 2.x, 5000 on the servers before
MAX_KEY_CHARS = 250
MAX_DIGEST_CHARS = 36
MAX_DATASET_NAME_CHARS = 500

# MLflow's own defaults are 7 retries with doubling waits and 120 s per request: minutes before a
# mistyped address is reported. Used while a store is opened; a user's own values win.
FIRST_CONTACT = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
# A library prints no links on its host's stdout, and makes no calls home on its users' behalf.
MANNERS = {"MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true", "MLFLOW_DISABLE_TELEMETRY": "true"}

_log = get_logger(__name__)


class ModelVersion(NamedTuple):
    """One version in the model registry."""

    name: str
    version: int
    uri: str
    run_id: str


def store_uri(setting: str, storage: str) -> str:
    """Return the tracking URI: `setting`, else $MLFLOW_TRACKING_URI, else SQLite in `storage`.

    Raises `TrackingError` when the default is asked of a storage that is no local folder.
    """
    given = setting or os.environ.get(URI_VARIABLE, "")
    if given:
        return given
    folder = _local_folder(storage)
    if folder is None:
        raise TrackingError(
            f"storage {storage} is not a local folder, and the default SQLite store needs one; "
            f"set tracking.uri (or ${URI_VARIABLE}) to an MLflow server"
        )
    return f"sqlite:///{folder / DATABASE}"


class Tracker:
    """One experiment in one MLflow store, seen from the driver."""

    def __init__(self, uri: str, experiment_id: str) -> None:
        self.uri = uri
        self.experiment_id = experiment_id

    @classmethod
    def open(cls, tracking: Tracking, storage: str) -> Tracker:
        """Return the tracker of `tracking.experiment`, which is created where it does not exist.

        Creates the database and the folder of the default store too; call it once on the driver
        before workers start, since the first opening of a SQLite store runs its migrations.

        Raises:
            TrackingError: the store is unreachable, refuses, or has the experiment as deleted.
        """
        uri = store_uri(tracking.uri, storage)
        location = None
        if not tracking.uri and uri.startswith("sqlite:"):
            folder = Path(urlsplit(uri).path.removeprefix("/")).parent
            if (local := _local_folder(storage)) is not None:
                folder = local
            location = (folder / ARTIFACTS).as_uri()
        return cls(uri, _experiment_id(uri, tracking.experiment, location))

    def start_run(
        self,
        name: str,
        *,
        params: Mapping[str, Scalar],
        tags: Mapping[str, str],
        resume_id: str = "",
        parent_id: str = "",
    ) -> TrackedRun:
        """Return a new running run, or the run `resume_id` set to running again.

        Args:
            name: shown in MLflow; runs are told apart by id, not by name.
            params: dotted config leaves; see `TrackedRun.log_params` for a resumed run.
            tags: set on the run, replacing values of the same keys.
            resume_id: run to continue; its metric history goes on without duplicate points.
            parent_id: run under which MLflow's UI nests this one.

        Raises:
            TrackingError: the store refuses, or does not know `resume_id`.
        """
        all_tags = dict(tags) | ({"mlflow.parentRunId": parent_id} if parent_id else {})
        short = {_key(k): _cut(v, MAX_TAG_CHARS) for k, v in all_tags.items()}
        with _door(f"start run {name!r}", self.uri) as client:
            if resume_id:
                client.update_run(resume_id, status="RUNNING")
                for key, value in short.items():
                    client.set_tag(resume_id, key, value)
                run_id = resume_id
            else:
                run = client.create_run(self.experiment_id, tags=short, run_name=name)
                run_id = run.info.run_id
        tracked = TrackedRun(self.uri, run_id, self.experiment_id, resumed=bool(resume_id))
        tracked.log_params(params)
        return tracked


class TrackedRun:
    """One run, by its id. Holds no connection, so it can be pickled and used on any machine."""

    def __init__(self, uri: str, run_id: str, experiment_id: str, *, resumed: bool) -> None:
        self.uri = uri
        self.run_id = run_id
        self.experiment_id = experiment_id
        self._resumed = resumed
        self._highest: dict[str, int] = {}

    @classmethod
    def attach(cls, uri: str, run_id: str) -> TrackedRun:
        """Return the existing run `run_id` of the store `uri`, its status untouched."""
        with _door(f"find run {run_id}", uri) as client:
            experiment_id = client.get_run(run_id).info.experiment_id
        return cls(uri, run_id, experiment_id, resumed=True)

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Store one point per key in one request; drop those that the run has already.

        A run that goes on from a checkpoint repeats the steps since that checkpoint. MLflow would
        keep both points, so a key's point at or below the highest step stored for it is dropped.
        NaN and infinities are stored as they are (SQL stores clamp infinities to the largest double).

        Raises:
            TrackingError: the store refuses or cannot be reached.
        """
        with _door(f"log metrics of step {step}", self.uri) as client:
            from mlflow.entities import Metric

            now_ms = int(time.time() * 1000)
            fresh = [
                Metric(key, float(value), now_ms, step)
                for key, value in metrics.items()
                if step > self._highest_step(client, key)
            ]
            for some in _batches(fresh, MAX_METRICS_PER_BATCH):
                client.log_batch(self.run_id, metrics=some, synchronous=True)
        self._highest.update({metric.key: step for metric in fresh})

    def log_params(self, params: Mapping[str, Scalar]) -> None:
        """Store parameters; long values are cut, with their length said.

        MLflow's parameters cannot change. Where a resumed run has another value (placement may
        differ), the old parameter stays and the new value becomes the tag `resumed/<key>`.

        Raises:
            TrackingError: the store refuses or cannot be reached.
        """
        wanted = {_key(k): _cut(str(v), MAX_PARAM_CHARS) for k, v in params.items()}
        with _door("log parameters", self.uri) as client:
            from mlflow.entities import Param, RunTag

            stored = client.get_run(self.run_id).data.params if self._resumed else {}
            new = [Param(k, v) for k, v in wanted.items() if k not in stored]
            changed = [
                RunTag(_key(f"resumed/{k}"), _cut(v, MAX_TAG_CHARS))
                for k, v in wanted.items()
                if stored.get(k, v) != v
            ]
            for some in _batches(new, MAX_PER_BATCH):
                client.log_batch(self.run_id, params=some, synchronous=True)
            for tags in _batches(changed, MAX_PER_BATCH):
                client.log_batch(self.run_id, tags=tags, synchronous=True)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags on the run, replacing values of the same keys; long values are cut."""
        with _door("set tags", self.uri) as client:
            from mlflow.entities import RunTag

            made = [RunTag(_key(k), _cut(v, MAX_TAG_CHARS)) for k, v in tags.items()]
            for some in _batches(made, MAX_PER_BATCH):
                client.log_batch(self.run_id, tags=some, synchronous=True)

    def log_dataset(
        self, name: str, uri: str, fingerprint: str, num_rows: int, context: str
    ) -> None:
        """Record that the run read a dataset: MLflow shows it as an input, by fingerprint.

        Args:
            name: shown in MLflow.
            uri: where the data lies.
            fingerprint: of its content; MLflow's digest is its first 36 characters.
            num_rows: rows used.
            context: what for, such as `train`, `bank` or `test`.
        """
        with _door(f"log dataset {name!r}", self.uri) as client:
            from mlflow.entities import Dataset, DatasetInput, InputTag

            dataset = Dataset(
                name=name[:MAX_DATASET_NAME_CHARS],
                digest=fingerprint[:MAX_DIGEST_CHARS],
                source_type="uri",
                source=json.dumps({"uri": uri}),
                profile=json.dumps({"num_rows": num_rows, "fingerprint": fingerprint}),
            )
            tag = InputTag("mlflow.data.context", context)
            client.log_inputs(self.run_id, datasets=[DatasetInput(dataset, tags=[tag])])

    def log_artifact(self, path: Path, folder: str = "") -> None:
        """Upload a file, or a folder with all in it, to `folder` among the run's artifacts."""
        with _door(f"store {path.name}", self.uri) as client:
            client.log_artifact(self.run_id, str(path), folder or None)

    def log_text(self, text: str, file: str) -> None:
        """Store `text` as the artifact `file` (a path like `tables/scores.md`)."""
        with _door(f"store {file}", self.uri) as client:
            client.log_text(self.run_id, text, file)

    def log_dict(self, tree: Mapping[str, Any], file: str) -> None:
        """Store `tree` as the artifact `file`: JSON or YAML by its ending."""
        with _door(f"store {file}", self.uri) as client:
            client.log_dict(self.run_id, dict(tree), file)

    def finish(self, status: Literal["FINISHED", "FAILED", "KILLED"]) -> None:
        """Set the run's last status and end time."""
        with _door(f"end run {self.run_id}", self.uri) as client:
            client.set_terminated(self.run_id, status)

    @contextlib.contextmanager
    def system_metrics(self, interval_s: float = 10.0) -> Iterator[None]:
        """Log this machine's `system/...` metrics every `interval_s` while the block runs.

        CPU, memory, disk and network need psutil, GPU metrics pynvml; without psutil, one line is
        logged and the block runs all the same: watching must not stop what is watched.
        """
        try:
            with _quiet():
                from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

                monitor = SystemMetricsMonitor(
                    self.run_id,
                    sampling_interval=interval_s,
                    resume_logging=True,
                    tracking_uri=self.uri,
                )
                monitor.start()
        except Exception as error:  # noqa: BLE001 - psutil, its kernel files, drivers: all optional
            _log.warning("no system metrics: %s", error)
            yield
            return
        try:
            yield
        finally:
            with _quiet():
                monitor.finish()

    def register_model(
        self, folder: Path, name: str, *, alias: str, tags: Mapping[str, str]
    ) -> ModelVersion:
        """Store the MLflow model in `folder` under this run and make it a new version of `name`.

        The alias moves last, so it never points to a version that is not whole.

        Raises:
            TrackingError: the store or the registry refuses, or cannot be reached.
        """
        with _door(f"register {name!r}", self.uri) as client:
            model = client.create_logged_model(
                self.experiment_id, name="encoder", source_run_id=self.run_id, model_type="encoder"
            )
            _stamp(folder, self.run_id, model.model_id, model.artifact_location)
            _log_output(client, self.run_id, model.model_id)
            client.log_model_artifacts(model.model_id, str(folder))
            client.finalize_logged_model(model.model_id, "READY")
            _ensure_registered(client, name)
            version = client.create_model_version(
                name,
                f"models:/{model.model_id}",
                self.run_id,
                tags={k: _cut(v, MAX_TAG_CHARS) for k, v in tags.items()},
                model_id=model.model_id,
            )
            client.set_registered_model_alias(name, alias, version.version)
        number = int(version.version)
        return ModelVersion(name, number, f"models:/{name}/{number}", self.run_id)

    def _highest_step(self, client: MlflowClient, key: str) -> int:
        """Return the highest step that the store has for `key`, or one below every step."""
        if key not in self._highest:
            history = client.get_metric_history(self.run_id, key) if self._resumed else []
            self._highest[key] = max((metric.step for metric in history), default=-(2**63))
        return self._highest[key]
