"""Runs, metrics and lineage in MLflow; `inference.registry` has the models.

Everything goes through `MlflowClient` and explicit run ids. The fluent API keeps one active run per
process and one tracking URI per interpreter, which is wrong as soon as a driver, its workers and a
study write to different runs. MLflow takes seconds to import, so it is imported where it is used.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from simclr_ray.config.uris import hide_passwords
from simclr_ray.errors import ConfigError, TrackingError, TrackingUnavailableError
from simclr_ray.tracking import moved, store

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run as MlflowRun

    from simclr_ray.config import Scalar
    from simclr_ray.config.experiment import TrackingConfig

MlflowStatus = Literal["RUNNING", "FINISHED", "FAILED", "KILLED"]


class MetricPoint(NamedTuple):
    """One value of a metric; a store keeps the same point once."""

    key: str
    value: float
    step: int
    time_ms: int


class Tracker:
    """One experiment in one MLflow store, seen from the driver."""

    def __init__(self, uri: str, experiment_id: str) -> None:
        self.uri = uri
        self.experiment_id = experiment_id

    @classmethod
    def open(cls, tracking: TrackingConfig, storage: str) -> Tracker:
        """Return the tracker of `tracking.experiment`, which is created where it does not exist.

        A store whose project was moved or copied is rewritten first (`moved`).
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
        moved.rewrite_moved_store(uri)
        with store.quiet(), store.first_contact():
            return cls(uri, _experiment_id(uri, tracking.experiment, location))

    def has_run(self, run_id: str) -> bool:
        """Return whether the store knows a run of this id, in whatever experiment."""
        with mlflow_client(f"find run {run_id}", self.uri) as client:
            from mlflow.exceptions import MlflowException

            try:
                client.get_run(run_id)
            except MlflowException as error:
                if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                    return False
                raise
        return True

    def find_run(self, tags: Mapping[str, str]) -> str:
        """Return the id of the newest run that has all these tags; empty where there is none."""
        wanted = {key: value.replace("'", "''") for key, value in store.tags_of(tags).items()}
        has_all = " and ".join(f"tags.`{key}` = '{value}'" for key, value in wanted.items())
        with mlflow_client("find a run", self.uri) as client:
            runs = client.search_runs(
                [self.experiment_id], has_all, order_by=["attributes.start_time DESC"],
                max_results=1,
            )  # fmt: skip
        return str(runs[0].info.run_id) if runs else ""

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
        with mlflow_client(f"start run {name!r}", self.uri) as client:
            if resume_id:
                run = client.get_run(resume_id)
                client.update_run(resume_id, status="RUNNING")
                for key, value in all_tags.items():
                    client.set_tag(resume_id, key, value)
            else:
                run = client.create_run(self.experiment_id, tags=all_tags, run_name=name)
        info = run.info
        tracked = TrackedRun(self.uri, info.run_id, info.experiment_id, resumed=bool(resume_id))
        try:
            tracked.log_params(params)
        except TrackingError:
            if not resume_id:  # nobody knows of it: it would be shown as running for ever
                with store.first_contact(), contextlib.suppress(TrackingError):
                    tracked.finish("FAILED")
            raise
        return tracked

    def end_left_running(self, parent_id: str) -> list[str]:
        """Set runs under a run, and those under them, from RUNNING to KILLED; return their ids.

        A process that is killed leaves its runs so; call it when nobody works on them.
        """
        ended: list[str] = []
        with mlflow_client("end runs that were left", self.uri) as client:
            for child in self._under(client, parent_id):
                for run in (child, *self._under(client, child.info.run_id)):
                    if run.info.status == "RUNNING":
                        client.set_terminated(run.info.run_id, "KILLED")
                        ended.append(run.info.run_id)
        return ended

    def _under(self, client: MlflowClient, parent_id: str) -> list[MlflowRun]:
        wanted = f"tags.mlflow.parentRunId = '{parent_id}'"
        return list(client.search_runs([self.experiment_id], wanted, max_results=store.MAX_RUNS))


class TrackedRun:
    """One run, by its id. Holds no connection, so it can be pickled and used on any machine."""

    def __init__(self, uri: str, run_id: str, experiment_id: str, *, resumed: bool) -> None:
        self.uri = uri
        self.run_id = run_id
        self.experiment_id = experiment_id
        self.is_resumed = resumed
        self._highest: dict[str, int] = {}

    @classmethod
    def attach(cls, uri: str, run_id: str) -> TrackedRun:
        """Return the existing run `run_id` of the store `uri`, its status as it is.

        A store whose project was moved or copied is rewritten first (`moved`).

        Raises:
            TrackingError: There is no such store or run, or the store refuses.
        """
        try:
            store.check_there(uri)
        except ConfigError as error:  # a run is worth more than its store: callers go on without
            raise TrackingError(str(error)) from error
        moved.rewrite_moved_store(uri)
        with mlflow_client(f"find run {run_id}", uri) as client:
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
        with mlflow_client(f"log metrics of step {step}", self.uri) as client:
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

    def log_points(self, points: Sequence[MetricPoint]) -> None:
        """Store points as they are, in one request for up to 1,000; see `stored_steps`.

        Raises:
            TrackingError: the store refuses or cannot be reached; some may be stored.
        """
        with mlflow_client(f"log {len(points)} points", self.uri) as client:
            from mlflow.entities import Metric

            metrics = [Metric(p.key, p.value, p.time_ms, p.step) for p in points]
            for some in store.batches(metrics, store.MAX_METRICS_PER_BATCH):
                client.log_batch(self.run_id, metrics=some, synchronous=True)

    def stored_keys(self) -> set[str]:
        """Return the metrics of which the run has points."""
        with mlflow_client("look up metrics", self.uri) as client:
            return set(client.get_run(self.run_id).data.metrics)

    def stored_steps(self, key: str) -> list[int]:
        """Return the steps of which the run has a point of `key`, as often as it has one."""
        with mlflow_client(f"look up {key}", self.uri) as client:
            return [metric.step for metric in client.get_metric_history(self.run_id, key)]

    def status(self) -> str:
        """Return the run's status as MLflow shows it, such as `RUNNING`."""
        with mlflow_client("look up the run", self.uri) as client:
            return str(client.get_run(self.run_id).info.status)

    def log_params(self, params: Mapping[str, Scalar]) -> None:
        """Store parameters; long values are cut, with their length said.

        MLflow's parameters cannot change. Where a resumed run has another value (placement may
        differ), the old parameter stays and the new value becomes the tag `resumed/<key>`.

        Raises:
            TrackingError: the store refuses or cannot be reached.
        """
        wanted = store.params_of(params)
        with mlflow_client("log parameters", self.uri) as client:
            from mlflow.entities import Param

            stored = client.get_run(self.run_id).data.params if self.is_resumed else {}
            new = [Param(k, v) for k, v in wanted.items() if k not in stored]
            other = {f"resumed/{k}": v for k, v in wanted.items() if stored.get(k, v) != v}
            for some in store.batches(new, store.MAX_PER_BATCH):
                client.log_batch(self.run_id, params=some, synchronous=True)
        self.set_tags(other)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags on the run, replacing values of the same keys; long values are cut."""
        with mlflow_client("set tags", self.uri) as client:
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
            context: what for, such as `pretraining`.
        """
        with mlflow_client(f"log dataset {name!r}", self.uri) as client:
            from mlflow.entities import Dataset, DatasetInput, InputTag
            from mlflow.exceptions import MlflowException

            name, digest = (
                name[: store.MAX_DATASET_NAME_CHARS],
                fingerprint[: store.MAX_DIGEST_CHARS],
            )
            profile = json.dumps({"num_rows": num_rows, "fingerprint": fingerprint})
            source = json.dumps({"uri": hide_passwords(uri)})
            dataset = Dataset(name, digest, "uri", source, profile=profile)
            tag = InputTag("mlflow.data.context", context)
            inputs = [DatasetInput(dataset, tags=[tag])]
            try:
                client.log_inputs(self.run_id, datasets=inputs)
            except MlflowException as error:
                # two runs that log the same dataset at once both find none, and both insert it
                if not any(word in str(error).lower() for word in ("unique", "duplicate")):
                    raise
                client.log_inputs(self.run_id, datasets=inputs)

    def log_artifact(self, path: Path, folder: str = "") -> None:
        """Upload a file, or a folder with all in it, to `folder` among the run's artifacts."""
        with mlflow_client(f"store {path.name}", self.uri) as client:
            client.log_artifact(self.run_id, str(path), folder or None)

    def log_text(self, text: str, file: str) -> None:
        """Store `text` as the artifact `file` (a path like `tables/scores.md`)."""
        with mlflow_client(f"store {file}", self.uri) as client:
            client.log_text(self.run_id, hide_passwords(text), file)

    def finish(self, status: MlflowStatus) -> None:
        """Set the run's status; with one that is its last, its end time."""
        with mlflow_client(f"set the run to {status}", self.uri) as client:
            if status == "RUNNING":
                client.update_run(self.run_id, status=status)
            else:
                client.set_terminated(self.run_id, status)

    def delete(self) -> None:
        """Mark the run as deleted; `mlflow gc` removes such for good."""
        with mlflow_client("delete the run", self.uri) as client:
            client.delete_run(self.run_id)

    def _highest_step(self, client: MlflowClient, key: str) -> int:
        """Return the highest step that the store has for `key`, or one below every step."""
        if key not in self._highest:
            history = client.get_metric_history(self.run_id, key) if self.is_resumed else []
            self._highest[key] = max((metric.step for metric in history), default=-(2**63))
        return self._highest[key]


def _experiment_id(uri: str, name: str, artifact_location: str | None) -> str:
    with mlflow_client(f"open experiment {name!r}", uri) as client:
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
                f"experiment {name!r} is deleted in {hide_passwords(uri)}: restore it, "
                "or set tracking.experiment to another name"
            )
        return str(experiment.experiment_id)


@contextlib.contextmanager
def mlflow_client(action: str, uri: str) -> Iterator[MlflowClient]:
    """Give a client for `uri`; whatever MLflow or its stores raise becomes a `TrackingError`.

    It is a `TrackingUnavailableError` where the same may work later.
    """
    try:
        yield _client(uri)
    except (ConfigError, TrackingError):
        raise
    except Exception as error:
        where, reason = hide_passwords(uri), store.reason_of(error)
        kind = TrackingUnavailableError if store.is_for_now(error) else TrackingError
        raise kind(f"MLflow at {where} could not {action}: {reason}") from error


@functools.lru_cache(maxsize=16)
def _client(uri: str) -> MlflowClient:
    for variable, value in store.MLFLOW_ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    with store.quiet():
        from mlflow import MlflowClient

        return MlflowClient(tracking_uri=uri)  # which heeds $MLFLOW_REGISTRY_URI
