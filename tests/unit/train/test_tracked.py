"""A run and its MLflow run: begun, delivered to, ended; and later, where MLflow was gone."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from ray.util.queue import Empty

from simclr_ray.config.experiment import Experiment
from simclr_ray.errors import RunError, TrackingError, TrackingUnavailableError
from simclr_ray.inference import registry
from simclr_ray.storage import lease
from simclr_ray.storage.metrics_log import read_records
from simclr_ray.storage.run_folder import METRICS, RunFolder
from simclr_ray.storage.run_record import RunRecord
from simclr_ray.tracking import runs, sender
from simclr_ray.tracking.delivery import STATE
from simclr_ray.tracking.runs import MetricPoint, TrackedRun
from simclr_ray.tracking.store import RegisteredEncoder
from simclr_ray.train import pipeline, tracked
from simclr_ray.train.health import HealthWatch
from simclr_ray.train.monitor import RunMonitor
from simclr_ray.train.outcome import Run
from simclr_ray.train.resolve import ResolvedExperiment, resolve
from simclr_ray.train.tracked import (
    deliver_queued,
    late_writes,
    open_tracker,
    remove_run,
    sync_run,
    tracked_run,
)
from tests.ray.images import write_shapes
from tests.unit.cli.in_turn import run_in_turn


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return one storage folder for the module: the first opening of a store takes seconds."""
    folder = tmp_path_factory.mktemp("tracked")
    write_shapes(folder / "train.parquet", 40)
    return folder


@pytest.fixture
def resolved(storage: Path, request: pytest.FixtureRequest) -> ResolvedExperiment:
    """Return an experiment of its own for each test."""
    given = {"data.train": storage / "train.parquet", "storage": storage / "runs"}
    sizes = {"batch_size": 16, "epochs": 1, "seed": abs(hash(request.node.name)) % 10**6}
    overrides = [f"{key}={value}" for key, value in (given | sizes).items()]
    return resolve(
        Experiment.load(
            "cifar10_study_cpu", *overrides, "data.test=''", "tracking.system_metrics=false"
        )
    )


class Outage:
    """MLflow, as it is while it does not answer."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._patch = monkeypatch
        self.is_on = False
        client = runs._client

        def door_client(uri: str) -> MlflowClient:
            if self.is_on:
                raise MlflowException("API request failed: connection refused")
            return client(uri)

        monkeypatch.setattr(runs, "_client", door_client)
        monkeypatch.setattr(registry, "mlflow_client", runs.mlflow_client)

    @property
    def is_on(self) -> bool:
        """Whether it does not answer; while it does, there is time for that."""
        return self._is_on

    @is_on.setter
    def is_on(self, value: bool) -> None:
        self._is_on = value
        self._patch.setattr(sender, "PATIENCE_S", 0.3 if value else 30.0)
        self._patch.setattr(tracked, "STOPPED_PATIENCE_S", 0.3 if value else 30.0)


@pytest.fixture
def outage(monkeypatch: pytest.MonkeyPatch) -> Outage:
    return Outage(monkeypatch)


def record(step: int) -> dict[str, float]:
    return {"step": step, "epoch": step / 10, "total": 10, "train/mean_loss": 1.0}


def train(resolved: ResolvedExperiment, steps: Sequence[int]) -> None:
    """Log steps as a training does."""
    with tracked_run(resolved, open_tracker(resolved)) as run:
        for step in steps:
            run.log.append(METRICS, record(step))
            run.sender.wake()


def mlflow_of(folder: RunFolder) -> tuple[str, list[int]]:
    """Return status and steps in MLflow."""
    found = RunRecord.read(folder)
    client = MlflowClient(tracking_uri=found.tracking_uri)
    history = client.get_metric_history(found.mlflow_run_id, "train/mean_loss")
    status: str = client.get_run(found.mlflow_run_id).info.status
    return status, sorted(metric.step for metric in history)


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name.startswith("simclr_ray.t")]


def test_a_run_that_mlflow_leaves_ends_as_it_would_and_is_delivered_later(
    resolved: ResolvedExperiment, outage: Outage, caplog: pytest.LogCaptureFixture
) -> None:
    with tracked_run(resolved, open_tracker(resolved)) as run:
        run.log.append(METRICS, record(0))
        outage.is_on = True
        run.log.append(METRICS, record(1))
    *_, said = messages(caplog)
    assert "and the status FINISHED" in said
    assert said.endswith(f"to deliver it: simclr-ray run sync {resolved.folder.uri}")
    with pytest.raises(TrackingUnavailableError):
        sync_run(resolved.folder)
    outage.is_on = False
    assert mlflow_of(resolved.folder)[0] == "RUNNING"
    synced = sync_run(resolved.folder)
    assert synced.status == "FINISHED"
    assert mlflow_of(resolved.folder) == ("FINISHED", [0, 1])
    assert sync_run(resolved.folder) == (0, 0, "")


def test_a_new_run_needs_mlflow_and_one_that_was_begun_goes_on_without(
    resolved: ResolvedExperiment, outage: Outage, caplog: pytest.LogCaptureFixture
) -> None:
    outage.is_on = True
    with pytest.raises(TrackingUnavailableError, match="connection refused"):
        open_tracker(resolved)
    outage.is_on = False
    train(resolved, range(3))
    outage.is_on = True
    caplog.clear()
    train(resolved, range(2, 5))
    said = messages(caplog)
    assert "the run goes on, and is delivered later" in said[0]
    assert "to deliver it" in said[-1]
    outage.is_on = False
    assert mlflow_of(resolved.folder) == ("FINISHED", [0, 1, 2])
    train(resolved, [5])  # the next start delivers the rest
    assert mlflow_of(resolved.folder) == ("FINISHED", list(range(6)))


def test_mlflow_that_leaves_while_a_continued_run_is_opened_stops_it_not_either(
    resolved: ResolvedExperiment, outage: Outage
) -> None:
    train(resolved, [0])
    tracker = open_tracker(resolved)
    outage.is_on = True
    with tracked_run(resolved, tracker) as run:
        run.log.append(METRICS, record(1))
        outage.is_on = False
    assert mlflow_of(resolved.folder) == ("FINISHED", [0, 1])


@pytest.mark.parametrize(
    ("error", "status"), [(KeyboardInterrupt(), "KILLED"), (RunError("x"), "FAILED")]
)
def test_what_ends_a_run_is_what_is_told_and_its_status_follows(
    error: BaseException, status: str, resolved: ResolvedExperiment, outage: Outage
) -> None:
    def end() -> None:
        with tracked_run(resolved, open_tracker(resolved)) as run:
            run.log.append(METRICS, record(0))
            outage.is_on = True
            raise error

    with pytest.raises(type(error)):
        end()
    outage.is_on = False
    deliver_queued(resolved.folder)  # as the next start does where nothing is left to train
    assert mlflow_of(resolved.folder) == (status, [0])


def test_a_run_whose_driver_was_killed_is_shown_so_by_a_sync_and_runs_again_when_it_goes_on(
    resolved: ResolvedExperiment,
) -> None:
    folder = resolved.folder
    begun = tracked_run(resolved, open_tracker(resolved))
    run = begun.__enter__()
    run.log.append(METRICS, record(0))
    run.sender.delivery.give_up()
    run.sender._stop.set()
    run.sender.wake()
    run.sender._thread.join()
    assert mlflow_of(folder)[0] == "RUNNING"
    assert sync_run(folder).status == "KILLED"
    assert mlflow_of(folder) == ("KILLED", [0])
    with tracked_run(resolved, open_tracker(resolved)):
        assert mlflow_of(folder)[0] == "RUNNING"
    assert mlflow_of(folder)[0] == "FINISHED"


@pytest.mark.parametrize("lost", [b"", b"{"])
def test_a_run_whose_record_is_lost_goes_on_as_the_same_run_of_mlflow(
    resolved: ResolvedExperiment, lost: bytes
) -> None:
    folder = resolved.folder
    with tracked_run(resolved, open_tracker(resolved)) as run:
        run.log.append(METRICS, record(0))
    before = RunRecord.read(folder).mlflow_run_id
    folder.write_text("run.json", lost.decode())
    with tracked_run(resolved, open_tracker(resolved)) as run:
        run.log.append(METRICS, record(1))
    assert RunRecord.read(folder).mlflow_run_id == before
    assert mlflow_of(folder) == ("FINISHED", [0, 1])


def test_the_verb_says_what_it_delivered(resolved: ResolvedExperiment, outage: Outage) -> None:
    train(resolved, [])
    with late_writes(resolved.folder) as writes:
        outage.is_on = True
        writes.metrics({"final/trained/knn_top1": 0.5}, 8)
        writes.text("table", "scores.md")
        writes.status("KILLED")
    outage.is_on = False
    sync = ["run", "sync", resolved.folder.uri]
    with resolved.folder.lock():
        (refused,) = run_in_turn(sync, cwd=Path(resolved.folder.storage))
    assert refused.returncode == 1
    assert f"error: {resolved.folder.uri} is being run by process" in refused.stderr
    first, second = run_in_turn(sync, sync, cwd=Path(resolved.folder.storage))
    assert first.stdout == "delivered: 1 point, 1 other write, the status KILLED\n", first
    assert second.stdout == "delivered: 0 points\n"


def test_scores_of_a_second_evaluation_are_those_that_mlflow_shows(
    resolved: ResolvedExperiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(resolved, [])
    folder = resolved.folder
    found = RunRecord.read(folder)
    client = MlflowClient(tracking_uri=found.tracking_uri)
    began = time.time()
    for minutes, value in enumerate((0.5, 0.4, 0.45)):  # of other test images, after the same step
        monkeypatch.setattr(time, "time", lambda at=began + 60 * minutes: at)
        with late_writes(folder) as writes:
            writes.metrics({"final/trained/knn_top1": value, f"final/only/{value}": 1.0}, 8)
        shown = client.get_run(found.mlflow_run_id).data.metrics
        assert shown["final/trained/knn_top1"] == value
    history = client.get_metric_history(found.mlflow_run_id, "final/trained/knn_top1")
    assert [(point.step, point.value) for point in history] == [(8, 0.5), (8, 0.4), (8, 0.45)]
    assert sync_run(folder) == (0, 0, "")


class Inbox:
    """A queue as the driver's, without Ray."""

    def __init__(self) -> None:
        self.items: queue.Queue[Any] = queue.Queue()

    def put(self, item: Any) -> None:
        self.items.put(item)

    def get(self, timeout: float) -> Any:
        try:
            return self.items.get(timeout=timeout)
        except queue.Empty:
            raise Empty from None

    def get_nowait(self) -> Any:
        return self.get(timeout=1e-6)

    def shutdown(self, *, force: bool) -> None:
        assert force


def test_the_local_log_does_not_wait_for_an_mlflow_that_is_slow(
    resolved: ResolvedExperiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = threading.Event()
    log_points = TrackedRun.log_points

    def slow(run: TrackedRun, points: Sequence[MetricPoint]) -> None:
        ends.wait(10.0)
        log_points(run, points)

    monkeypatch.setattr(TrackedRun, "log_points", slow)
    inbox = Inbox()
    seen: list[dict[str, float]] = []
    lags: list[float] = []
    health = HealthWatch(resolved.config, resolved.warmup_steps)
    with (
        tracked_run(resolved, open_tracker(resolved)) as run,
        RunMonitor(inbox, run, seen.append, resolved, health),  # type: ignore[arg-type] # no Ray
    ):
        for step in range(30):
            began = time.monotonic()
            inbox.put(record(step))
            while len(seen) <= step:
                time.sleep(0.001)
            lags.append(time.monotonic() - began)
            assert run.log.records(METRICS)[-1]["step"] == step
        assert mlflow_of(resolved.folder) == ("RUNNING", [])
        ends.set()
    assert max(lags) < 5.0
    assert mlflow_of(resolved.folder) == ("FINISHED", list(range(30)))


def test_a_remote_folder_has_log_and_position_and_is_synced_from_anywhere(
    resolved: ResolvedExperiment, storage: Path, outage: Outage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "RENEW_S", 0.5)  # who asks waits as long for a sign of the holder
    uri = f"sqlite:///{storage}/runs/mlflow.db"
    tracking = resolved.config.tracking.model_copy(update={"uri": uri})
    update = {"storage": (storage / "bucket").as_uri(), "tracking": tracking}
    there = ResolvedExperiment(resolved.config.model_copy(update=update), resolved.source)
    folder = there.folder
    assert folder.local is None
    train(there, range(3))
    assert {METRICS, STATE} <= set(folder.names(""))
    assert mlflow_of(folder) == ("FINISHED", [0, 1, 2])
    table = storage / "views.png"
    table.write_bytes(b"\x89PNG")
    outage.is_on = True
    train(there, range(2, 5))
    with late_writes(folder) as writes:
        writes.file(table)
        writes.metrics({"final/x": 1.0}, 5)
    outage.is_on = False
    assert sync_run(folder) == (3, 2, "")  # points; parameters and a file
    assert mlflow_of(folder) == ("FINISHED", list(range(5)))
    client = MlflowClient(tracking_uri=uri)
    run_id = RunRecord.read(folder).mlflow_run_id
    assert [file.path for file in client.list_artifacts(run_id)] == ["views.png"]
    client.update_run(run_id, status="RUNNING")  # as a kill leaves it
    state = (folder.read_text(STATE) or "").replace("FINISHED", "RUNNING")
    folder.write_text(STATE, state)
    with folder.lock(), ThreadPoolExecutor(1) as pool:  # a thread may nest
        for verb in (sync_run, remove_run):
            with pytest.raises(RunError, match="is being run by process"):
                pool.submit(verb, folder).result()
    assert mlflow_of(folder)[0] == "RUNNING"
    assert sync_run(folder) == (0, 0, "KILLED")  # written just now, and by nobody who runs
    assert mlflow_of(folder)[0] == "KILLED"
    assert remove_run(folder) == ""
    assert not (storage / "bucket" / folder.name).exists()
    assert client.get_run(run_id).info.lifecycle_stage == "deleted"


def test_a_driver_that_lost_the_run_leaves_its_log_and_status_to_who_has_it(
    resolved: ResolvedExperiment, storage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "RENEW_S", 0.1)
    uri = f"sqlite:///{storage}/runs/mlflow.db"
    tracking = resolved.config.tracking.model_copy(update={"uri": uri})
    update = {"storage": (storage / "bucket").as_uri(), "tracking": tracking}
    there = ResolvedExperiment(resolved.config.model_copy(update=update), resolved.source)
    folder = there.folder

    def lose() -> None:
        with folder.lock(), tracked_run(there, open_tracker(there)) as run:
            (claim,) = lease.claims_at(folder.uri)
            lease.ClaimStore.of(folder.uri).take(claim.name)  # as one does that finds it old
            run.log.append(METRICS, record(0))
            threading.Event().wait(60)

    with pytest.raises(RunError, match="was taken over by process"):
        lose()
    assert mlflow_of(folder)[0] == "RUNNING"
    assert folder.read_text(METRICS) is None


def test_a_kill_of_a_remote_runs_driver_costs_no_point_that_mlflow_has(
    resolved: ResolvedExperiment, storage: Path
) -> None:
    """The uploaded log may be shorter than what MLflow has, and the position beyond its end."""
    uri = f"sqlite:///{storage}/runs/mlflow.db"
    tracking = resolved.config.tracking.model_copy(update={"uri": uri})
    update = {"storage": (storage / "bucket").as_uri(), "tracking": tracking}
    there = ResolvedExperiment(resolved.config.model_copy(update=update), resolved.source)
    train(there, range(6))
    lines = (there.folder.read_text(METRICS) or "").splitlines(keepends=True)
    there.folder.write_text(METRICS, "".join(lines[:2]) + lines[2][:9])
    train(there, range(3, 8))
    assert mlflow_of(there.folder) == ("FINISHED", list(range(8)))
    steps = [r["step"] for r in read_records(there.folder.read_text(METRICS) or "")]
    assert steps == [0, 1, 3, 4, 5, 6, 7]


def test_scores_stay_when_mlflow_is_gone_and_a_registration_says_how_it_is_made_later(
    resolved: ResolvedExperiment, outage: Outage, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(resolved, range(3))
    folder = resolved.folder
    run = Run(folder.name, folder.uri, "step-00000003", "", {"step": 3})
    outage.is_on = True
    pipeline.publish(run, resolved, [])
    assert {"scores.json", "views.png", "curves.png"} <= set(folder.names(""))
    named = resolved.config.model_copy(
        update={"registry": resolved.config.registry.model_copy(update={"name": "my enc"})}
    )

    def gone(*_: object) -> None:
        raise TrackingUnavailableError("MLflow could not create model: no answer")

    monkeypatch.setattr(pipeline, "register_run", gone)
    later = f"simclr-ray model register {folder.uri} 'my enc' --alias newest"
    with pytest.raises(TrackingError, match=f"no answer; trained and evaluated.*{later}"):
        pipeline._registered(run, named)
    rule = "knn_top1 > champion"
    ruled = named.model_copy(
        update={"registry": named.registry.model_copy(update={"require": rule})}
    )
    with pytest.raises(TrackingUnavailableError) as unregistered:
        pipeline._registered(run, ruled)
    assert "not registered: run it again" in str(unregistered.value)
    assert "--alias" not in str(unregistered.value)  # which would move without the rule
    made = RegisteredEncoder("my enc", 4, "models:/my enc/4", "id")
    monkeypatch.setattr(pipeline, "register_run", lambda *_: made)
    monkeypatch.setattr(pipeline, "promote", lambda *_, **__: gone())
    with pytest.raises(TrackingUnavailableError) as unpromoted:
        pipeline._registered(run, ruled)
    uri = RunRecord.read(folder).tracking_uri
    assert str(unpromoted.value).endswith(
        "no answer; trained, evaluated and registered, but not promoted: simclr-ray model promote "
        f"'models:/my enc/4' newest --require 'knn_top1 > champion' --tracking-uri {uri}"
    )
    outage.is_on = False
    deliver_queued(folder)
    found = RunRecord.read(folder)
    artifacts = MlflowClient(tracking_uri=found.tracking_uri).list_artifacts(found.mlflow_run_id)
    assert {a.path for a in artifacts} == {
        "views.png",
        "curves.png",
        "experiment.yaml",
        "scores.md",
    }
