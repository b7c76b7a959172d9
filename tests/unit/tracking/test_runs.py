"""Runs, metrics, parameters and lineage in a real SQLite store of MLflow."""

from __future__ import annotations

import math
import pickle
import socket
import time
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from simclr_ray.config.experiment import TrackingConfig
from simclr_ray.errors import ConfigError, TrackingError, TrackingUnavailableError
from simclr_ray.tracking import store as mlflow_store
from simclr_ray.tracking.runs import TrackedRun, Tracker


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return one storage folder for the module: the first opening of a store takes seconds."""
    return tmp_path_factory.mktemp("tracking") / "with space"


@pytest.fixture(autouse=True)
def _no_uri_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(mlflow_store.URI_VARIABLE, raising=False)


@pytest.fixture
def tracker(storage: Path) -> Tracker:
    return Tracker.open(TrackingConfig(), str(storage))


@pytest.fixture
def client(tracker: Tracker) -> MlflowClient:
    return MlflowClient(tracking_uri=tracker.uri)


def points(client: MlflowClient, run: TrackedRun, key: str) -> list[tuple[int, float]]:
    return [(m.step, m.value) for m in client.get_metric_history(run.run_id, key)]


def start(tracker: Tracker, name: str = "run", resume_id: str = "") -> TrackedRun:
    return tracker.start_run(name, params={}, tags={}, resume_id=resume_id)


def test_the_default_store_keeps_database_and_artifacts_in_the_storage_folder_from_any_directory(
    storage: Path, tracker: Tracker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = start(tracker)
    run.log_text("hello", "notes/a.txt")
    assert (storage / mlflow_store.DATABASE).is_file()
    stored = storage / mlflow_store.ARTIFACTS / run.run_id / "artifacts" / "notes" / "a.txt"
    assert stored.read_text() == "hello"
    assert list(tmp_path.iterdir()) == []


def test_opening_again_gives_the_same_experiment(storage: Path, tracker: Tracker) -> None:
    again = Tracker.open(TrackingConfig(), str(storage))
    assert (again.uri, again.experiment_id) == (tracker.uri, tracker.experiment_id)


def test_a_resumed_run_keeps_one_point_per_step(tracker: Tracker, client: MlflowClient) -> None:
    first = start(tracker)
    for step in range(5):
        first.log_metrics({"train/loss": 10.0 - step, "train/lr": 0.1}, step)
    first.finish("KILLED")
    second = start(tracker, resume_id=first.run_id)  # a new process, from the checkpoint of step 2
    for step in range(2, 8):
        second.log_metrics({"train/loss": 10.0 - step}, step)
    assert second.run_id == first.run_id
    assert points(client, second, "train/loss") == [(s, 10.0 - s) for s in range(8)]
    assert client.get_run(first.run_id).info.status == "RUNNING"


def test_a_restarted_worker_repeats_no_point_within_one_process(
    tracker: Tracker, client: MlflowClient
) -> None:
    run = start(tracker)
    for step in (0, 1, 2, 1, 2, 3):
        run.log_metrics({"train/loss": float(step)}, step)
    assert points(client, run, "train/loss") == [(s, float(s)) for s in range(4)]


def test_a_key_that_is_new_after_a_resume_is_logged_from_its_first_step(
    tracker: Tracker, client: MlflowClient
) -> None:
    first = start(tracker)
    first.log_metrics({"train/loss": 1.0}, 9)
    second = TrackedRun.attach(tracker.uri, first.run_id)
    second.log_metrics({"train/loss": 2.0, "eval/knn_top1": 0.5}, 3)
    assert points(client, second, "train/loss") == [(9, 1.0)]
    assert points(client, second, "eval/knn_top1") == [(3, 0.5)]


def test_non_finite_metrics_do_not_stop_a_run(tracker: Tracker, client: MlflowClient) -> None:
    run = start(tracker)
    run.log_metrics({"nan": math.nan, "up": math.inf, "down": -math.inf, "one": 1.0}, 0)
    stored = client.get_run(run.run_id).data.metrics
    assert math.isnan(stored["nan"])
    assert stored["up"] > 1e300
    assert stored["down"] < -1e300
    assert stored["one"] == 1.0


def test_more_metrics_than_one_request_takes_all_arrive(
    tracker: Tracker, client: MlflowClient
) -> None:
    run = start(tracker)
    run.log_metrics({f"m/{i}": float(i) for i in range(1203)}, 0)
    assert client.get_run(run.run_id).data.metrics == {f"m/{i}": float(i) for i in range(1203)}


def test_hundreds_of_dotted_parameters_arrive_and_long_values_are_cut(
    tracker: Tracker, client: MlflowClient
) -> None:
    params: dict[str, str | int | float | bool] = {f"a.b{i}.c": i for i in range(250)}
    run = tracker.start_run("p", params={**params, "long": "x" * 9000, "empty": ""}, tags={})
    stored = client.get_run(run.run_id).data.params
    assert {k: stored[k] for k in params} == {k: str(v) for k, v in params.items()}
    assert len(stored["long"]) == mlflow_store.MAX_PARAM_CHARS
    assert stored["long"].endswith("(9000 characters)")
    assert stored["empty"] == ""


def test_a_parameter_that_a_resumed_run_has_otherwise_becomes_a_tag(
    tracker: Tracker, client: MlflowClient
) -> None:
    first = tracker.start_run("p", params={"seed": 0, "scaling.num_workers": 1}, tags={})
    tracker.start_run(
        "p",
        params={"seed": 0, "scaling.num_workers": 2, "new": True},
        tags={"digest": "abc"},
        resume_id=first.run_id,
    )
    data = client.get_run(first.run_id).data
    assert data.params == {"seed": "0", "scaling.num_workers": "1", "new": "True"}
    assert data.tags["resumed/scaling.num_workers"] == "2"
    assert "resumed/seed" not in data.tags
    assert data.tags["digest"] == "abc"


def test_a_dataset_is_an_input_of_the_run_by_its_fingerprint(
    tracker: Tracker, client: MlflowClient
) -> None:
    run = start(tracker)
    run.log_dataset("cifar10", "s3://bucket/cifar10", "f" * 64, 50_000, "train")
    inputs = client.get_run(run.run_id).inputs
    assert inputs is not None
    (found,) = inputs.dataset_inputs
    assert found.dataset.name == "cifar10"
    assert found.dataset.digest == "f" * mlflow_store.MAX_DIGEST_CHARS
    assert "s3://bucket/cifar10" in found.dataset.source
    assert '"num_rows": 50000' in str(found.dataset.profile)
    assert [(t.key, t.value) for t in found.tags] == [("mlflow.data.context", "train")]


def test_files_folders_and_trees_become_artifacts(
    tracker: Tracker, client: MlflowClient, tmp_path: Path
) -> None:
    run = start(tracker)
    (tmp_path / "curves.png").write_bytes(b"png")
    run.log_artifact(tmp_path / "curves.png", "figures")
    run.log_text("a:\n  b: 1\n", "config.yaml")
    assert [f.path for f in client.list_artifacts(run.run_id, "figures")] == ["figures/curves.png"]
    assert [f.path for f in client.list_artifacts(run.run_id)] == ["config.yaml", "figures"]


def test_a_child_run_hangs_under_its_parent_and_ends_as_told(
    tracker: Tracker, client: MlflowClient
) -> None:
    parent = start(tracker, "study")
    child = tracker.start_run("trial", params={}, tags={}, parent_id=parent.run_id)
    child.set_tags({"stop reason?": "median"})
    child.finish("FAILED")
    run = client.get_run(child.run_id)
    assert run.data.tags["mlflow.parentRunId"] == parent.run_id
    assert run.data.tags["stop reason_"] == "median"
    assert run.info.status == "FAILED"
    assert client.get_run(parent.run_id).info.status == "RUNNING"


def test_a_run_can_be_pickled_and_goes_on_where_it_is_unpickled(
    tracker: Tracker, client: MlflowClient
) -> None:
    run = start(tracker)
    run.log_metrics({"loss": 1.0}, 0)
    copy: TrackedRun = pickle.loads(pickle.dumps(run))  # noqa: S301 - our own object
    copy.log_metrics({"loss": 9.0}, 0)
    copy.log_metrics({"loss": 0.5}, 1)
    assert points(client, run, "loss") == [(0, 1.0), (1, 0.5)]


def test_a_server_that_is_not_there_is_reported_in_one_sentence_within_seconds(
    tmp_path: Path,
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = time.monotonic()
    with pytest.raises(
        TrackingError, match=r"http://u:\*\*\*@127\.0\.0\.1:\d+ could not open .*no answer"
    ):
        Tracker.open(TrackingConfig(uri=f"http://u:secret@127.0.0.1:{port}"), str(tmp_path))
    assert time.monotonic() - started < 60  # MLflow's own retries go on for minutes


def test_an_unknown_run_cannot_be_resumed(tracker: Tracker) -> None:
    with pytest.raises(TrackingError, match="could not start run"):
        start(tracker, resume_id="0" * 32)


def test_a_deleted_experiment_is_refused_with_what_to_do(
    storage: Path, client: MlflowClient
) -> None:
    gone = Tracker.open(TrackingConfig(experiment="gone"), str(storage))
    client.delete_experiment(gone.experiment_id)
    with pytest.raises(TrackingError, match=r"'gone' is deleted.*restore it"):
        Tracker.open(TrackingConfig(experiment="gone"), str(storage))


def test_remote_storage_needs_a_tracking_uri() -> None:
    with pytest.raises(ConfigError, match=r"tracking\.uri: is empty"):
        mlflow_store.store_uri("", "s3://bucket/runs")
    assert mlflow_store.store_uri("http://host:5000", "s3://bucket/runs") == "http://host:5000"


def test_the_setting_wins_over_the_environment_and_that_over_the_default(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    default = f"sqlite:///{tmp_path}/runs/mlflow.db"
    assert mlflow_store.store_uri("", "runs") == default
    assert mlflow_store.store_uri("", f"file://{tmp_path}/runs") == default
    monkeypatch.setenv(mlflow_store.URI_VARIABLE, "http://env:1")
    assert mlflow_store.store_uri("", "runs") == "http://env:1"
    assert mlflow_store.store_uri("sqlite:///my.db", "runs") == f"sqlite:///{tmp_path}/my.db"
    with pytest.raises(ConfigError, match=r"of SQLite without options: sqlite:///my\.db$"):
        mlflow_store.store_uri("sqlite:///my.db?timeout=60", "runs")
    # of a run of an earlier release, which took it, and kept its points for this file
    assert mlflow_store.sqlite_file("sqlite:////x/my.db?timeout=60") == Path("/x/my.db")


@pytest.mark.parametrize("alias", ["latest", "Latest", "v3", "V12"])
def test_aliases_that_mlflow_reserves_are_refused_beforehand(alias: str) -> None:
    with pytest.raises(ConfigError, match=r"registry\.alias: .* reserved"):
        mlflow_store.check_model("enc", alias)


@pytest.mark.parametrize(
    ("name", "alias", "key"),
    [
        ("team/enc", "best", "registry.name"),
        ("a:b", "best", "registry.name"),
        ("a@b", "best", "registry.name"),
        ("Tom's", "best", "registry.name"),
        (" enc", "best", "registry.name"),
        ("e" * 251, "best", "registry.name"),
        ("tab\tname", "best", "registry.name"),
        ("enc", "a/b", "registry.alias"),
        ("enc", "", "registry.alias"),
    ],
)
def test_what_a_model_uri_cannot_hold_is_refused_beforehand(
    name: str, alias: str, key: str
) -> None:
    with pytest.raises(ConfigError, match=key):
        mlflow_store.check_model(name, alias)


def test_usual_names_are_taken() -> None:
    for name in ("enc", "team.enc-2", "my encoder", "größe_1"):
        mlflow_store.check_model(name, "best-1")


def test_a_run_whose_start_fails_halfway_is_not_left_running(
    tracker: Tracker, client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise TrackingUnavailableError("the server went away")

    monkeypatch.setattr(TrackedRun, "log_params", fail)
    with pytest.raises(TrackingUnavailableError, match="went away"):
        start(tracker, "halfway")
    wanted = "attributes.run_name = 'halfway'"
    (run,) = client.search_runs([tracker.experiment_id], wanted)
    assert run.info.status == "FAILED"


def test_a_dataset_that_another_run_logs_at_once_is_logged_by_both(
    tracker: Tracker, client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual, failures = MlflowClient.log_inputs, ["UNIQUE constraint failed: datasets.digest"]

    def log_inputs(this: MlflowClient, *arguments: Any, **given: Any) -> None:
        if failures:
            raise MlflowException(f"(sqlite3.IntegrityError) {failures.pop()}")
        usual(this, *arguments, **given)

    monkeypatch.setattr(MlflowClient, "log_inputs", log_inputs)
    run = start(tracker)
    run.log_dataset("train", "data/train", "f" * 16, 3, "pretraining")
    inputs = client.get_run(run.run_id).inputs
    assert inputs is not None
    assert [given.dataset.name for given in inputs.dataset_inputs] == ["train"]
    failures.append("disk I/O error")
    with pytest.raises(TrackingError, match="disk I/O error"):
        run.log_dataset("train", "data/train", "f" * 16, 3, "pretraining")
