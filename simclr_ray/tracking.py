"""Runs, metrics, lineage and the model registry: the one door to MLflow.

Everything goes through `MlflowClient` and explicit run ids. The fluent API keeps one active run per
process and one tracking URI per interpreter, which is wrong as soon as a driver, its workers and a
study write to different runs. MLflow takes seconds to import, so it is imported where it is used.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from simclr_ray import mlflow_store as store
from simclr_ray.errors import TrackingError
from simclr_ray.logs import get_logger

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    from simclr_ray.config import Scalar
    from simclr_ray.experiment import Tracking

_log = get_logger(__name__)


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
        uri = store.store_uri(tracking.uri, storage)
        database = store.sqlite_file(uri)
        location = None
        if database is not None:
            database.parent.mkdir(parents=True, exist_ok=True)
            location = (database.parent / store.ARTIFACTS).as_uri()
        with store.quiet(), store.first_contact():
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
        all_tags = store.tags_of(tags)
        if parent_id:
            all_tags["mlflow.parentRunId"] = parent_id
        with _door(f"start run {name!r}", self.uri) as client:
            if resume_id:
                run = client.get_run(resume_id)
                client.update_run(resume_id, status="RUNNING")
                for key, value in all_tags.items():
                    client.set_tag(resume_id, key, value)
            else:
                run = client.create_run(self.experiment_id, tags=all_tags, run_name=name)
        info = run.info
        tracked = TrackedRun(self.uri, info.run_id, info.experiment_id, resumed=bool(resume_id))
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
        """Return the existing run `run_id` of the store `uri`, its status as it is."""
        with _door(f"find run {run_id}", uri) as client:
            experiment_id = client.get_run(run_id).info.experiment_id
        return cls(uri, run_id, experiment_id, resumed=True)

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Store one point per key in one request; drop those that the run has already.

        A run that goes on from a checkpoint repeats the steps since that checkpoint. MLflow would
        keep both points, so a key's point at or below the highest step stored for it is dropped.
        NaN and infinities are stored (SQL stores clamp infinities to the largest double).

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
            for some in store.batches(fresh, store.MAX_METRICS_PER_BATCH):
                client.log_batch(self.run_id, metrics=some, synchronous=True)
        self._highest.update({metric.key: step for metric in fresh})

    def log_params(self, params: Mapping[str, Scalar]) -> None:
        """Store parameters; long values are cut, with their length said.

        MLflow's parameters cannot change. Where a resumed run has another value (placement may
        differ), the old parameter stays and the new value becomes the tag `resumed/<key>`.

        Raises:
            TrackingError: the store refuses or cannot be reached.
        """
        wanted = store.params_of(params)
        with _door("log parameters", self.uri) as client:
            from mlflow.entities import Param

            stored = client.get_run(self.run_id).data.params if self._resumed else {}
            new = [Param(k, v) for k, v in wanted.items() if k not in stored]
            other = {f"resumed/{k}": v for k, v in wanted.items() if stored.get(k, v) != v}
            for some in store.batches(new, store.MAX_PER_BATCH):
                client.log_batch(self.run_id, params=some, synchronous=True)
        self.set_tags(other)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags on the run, replacing values of the same keys; long values are cut."""
        with _door("set tags", self.uri) as client:
            from mlflow.entities import RunTag

            made = [RunTag(k, v) for k, v in store.tags_of(tags).items()]
            for some in store.batches(made, store.MAX_PER_BATCH):
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

            name, digest = (
                name[: store.MAX_DATASET_NAME_CHARS],
                fingerprint[: store.MAX_DIGEST_CHARS],
            )
            profile = json.dumps({"num_rows": num_rows, "fingerprint": fingerprint})
            source = json.dumps({"uri": uri})
            dataset = Dataset(name, digest, "uri", source, profile=profile)
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
        with _door("end the run", self.uri) as client:
            client.set_terminated(self.run_id, status)

    @contextlib.contextmanager
    def system_metrics(self, interval_s: float = 10.0) -> Iterator[None]:
        """Log this machine's `system/...` metrics every `interval_s` while the block runs.

        Needs psutil, and pynvml for GPUs; without psutil one line is logged and the block runs.
        """
        monitor = self._started_monitor(interval_s)
        try:
            yield
        finally:
            if monitor is not None:
                with store.quiet():
                    monitor.finish()  # type: ignore[no-untyped-call] # MLflow's is not annotated

    def register_model(
        self, name: str, parts: store.ModelParts, *, alias: str, tags: Mapping[str, str]
    ) -> store.RegisteredEncoder:
        """Store a pyfunc model under this run and make it a new version of `name`.

        The alias moves last, so it never points to a version that is not whole.

        Raises:
            TrackingError: the alias is reserved, or the registry refuses or cannot be reached.
        """
        store.check_alias(alias)
        with store.quiet(), _door(f"register {name!r}", self.uri) as client:
            model = client.create_logged_model(
                self.experiment_id, name="encoder", source_run_id=self.run_id, model_type="encoder"
            )
            try:
                with tempfile.TemporaryDirectory() as scratch:
                    folder = Path(scratch) / "model"
                    _save_pyfunc(folder, parts, self.run_id, model)
                    client.log_model_artifacts(model.model_id, str(folder))
            except BaseException:
                client.finalize_logged_model(model.model_id, "FAILED")
                raise
            client.finalize_logged_model(model.model_id, "READY")
            version = _create_version(client, name, model, self.run_id, tags)
            client.set_registered_model_alias(name, alias, str(version))
        return store.RegisteredEncoder(name, version, f"models:/{name}/{version}", self.run_id)

    def _started_monitor(self, interval_s: float) -> SystemMetricsMonitor | None:
        try:
            with store.quiet():
                from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

                monitor = SystemMetricsMonitor(  # type: ignore[no-untyped-call]
                    self.run_id,
                    sampling_interval=interval_s,
                    resume_logging=True,
                    tracking_uri=self.uri,
                )
                monitor.start()  # type: ignore[no-untyped-call]
        except Exception as error:  # noqa: BLE001 - psutil, its kernel files, drivers: all optional
            _log.warning("no system metrics: %s", error)
            return None
        return monitor

    def _highest_step(self, client: MlflowClient, key: str) -> int:
        """Return the highest step that the store has for `key`, or one below every step."""
        if key not in self._highest:
            history = client.get_metric_history(self.run_id, key) if self._resumed else []
            self._highest[key] = max((metric.step for metric in history), default=-(2**63))
        return self._highest[key]


def fetch_model(where: str, folder: Path, *, uri: str, part: str = "") -> Path:
    """Return the path in `folder` of the downloaded model `where`, or of a part of it.

    Args:
        where: `models:/name@alias`, `models:/name/3` or `models:/name/latest`.
        folder: an existing folder.
        uri: tracking URI of the store; its registry is asked.
        part: path inside of the model; empty: the whole model.

    Raises:
        TrackingError: `where` has another form, or there is no such model, version or alias.
    """
    address = store.model_address(where)
    name, version = address.name, address.version
    with store.quiet(), _door(f"find {where}", uri) as client:
        from mlflow.artifacts import download_artifacts

        if address.alias:
            version = str(client.get_model_version_by_alias(name, address.alias).version)
        elif version == "latest":
            found = client.search_model_versions(f"name = '{name}'")
            version = str(max((int(v.version) for v in found), default=1))
        source = client.get_model_version_download_uri(name, version)
        got = download_artifacts(
            artifact_uri=f"{source}/{part}".rstrip("/"),
            dst_path=str(folder),
            tracking_uri=uri,
            registry_uri=uri,
        )
    return Path(got)


def _save_pyfunc(folder: Path, parts: store.ModelParts, run_id: str, logged: LoggedModel) -> None:
    """Write the MLflow model folder that `Model.log` would write, without an active run."""
    import numpy as np
    import pandas as pd
    from mlflow import pyfunc
    from mlflow.models import Model, ModelSignature
    from mlflow.types import ColSpec, DataType, Schema, TensorSpec

    image = Schema([ColSpec(DataType.binary, "image")])
    features = Schema([TensorSpec(np.dtype(np.float32), (-1, parts.feature_dim))])
    pyfunc.save_model(
        path=str(folder),
        python_model=str(parts.code),
        artifacts={name: str(path) for name, path in parts.artifacts.items()},
        signature=ModelSignature(inputs=image, outputs=features),
        input_example=pd.DataFrame({"image": [parts.example]}),
        pip_requirements=list(parts.requirements),
        metadata=dict(parts.metadata),
        mlflow_model=Model(
            artifact_path=logged.artifact_location,
            run_id=run_id,
            model_uuid=logged.model_id,
            model_id=logged.model_id,
        ),
    )


def _create_version(
    client: MlflowClient, name: str, model: LoggedModel, run_id: str, tags: Mapping[str, str]
) -> int:
    from mlflow.entities import LoggedModelOutput
    from mlflow.exceptions import MlflowException

    client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=0)])
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    made = client.create_model_version(
        name,
        model.artifact_location,  # `models:/<id>` is looked up in the global store, not in this one
        run_id,
        tags=store.tags_of(tags),
        model_id=model.model_id,
    )
    return int(made.version)


def _experiment_id(uri: str, name: str, artifact_location: str | None) -> str:
    with _door(f"open experiment {name!r}", uri) as client:
        from mlflow.exceptions import MlflowException

        experiment = client.get_experiment_by_name(name)
        if experiment is None:
            try:
                return str(client.create_experiment(name, artifact_location=artifact_location))
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":  # another driver was quicker
                    raise
                experiment = client.get_experiment_by_name(name)
        if experiment is None or experiment.lifecycle_stage != "active":
            raise TrackingError(
                f"experiment {name!r} is deleted in {store.without_password(uri)}: restore it, "
                "or set tracking.experiment to another name"
            )
        return str(experiment.experiment_id)


@contextlib.contextmanager
def _door(action: str, uri: str) -> Iterator[MlflowClient]:
    """Give a client for `uri`; whatever MLflow or its stores raise becomes a `TrackingError`."""
    try:
        yield _client(uri)
    except TrackingError:
        raise
    except Exception as error:
        where, reason = store.without_password(uri), store.reason_of(error)
        raise TrackingError(f"MLflow at {where} could not {action}: {reason}") from error


@functools.lru_cache(maxsize=16)
def _client(uri: str) -> MlflowClient:
    for variable, value in store.MANNERS.items():
        os.environ.setdefault(variable, value)
    with store.quiet():
        from mlflow import MlflowClient

        return MlflowClient(tracking_uri=uri)
