"""What goes up to an MLflow server: each weight once, and again where the server fails."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import requests
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import PERMISSION_DENIED

from simclr_ray.tracking import store, uploads
from simclr_ray.tracking.runs import mlflow_client
from simclr_ray.tracking.uploads import upload_model, with_retries
from tests.mlflow_server import between


def answer(status: int) -> requests.HTTPError:
    response = requests.Response()
    response.status_code = status
    return requests.HTTPError("what the server says", response=response)


@pytest.mark.parametrize(
    ("error", "for_now"),
    [
        *((answer(status), True) for status in (408, 429, 500, 502, 503)),
        *((answer(status), False) for status in (400, 401, 403, 404, 413)),
        (requests.ConnectionError("gone"), True),
        (MlflowException("no answer"), True),  # an internal error
        (MlflowException("no", error_code=PERMISSION_DENIED), False),
    ],
)
def test_what_may_work_later_is_told_from_what_will_not(error: Exception, *, for_now: bool) -> None:
    assert store.is_for_now(error) is for_now


def test_what_a_server_refuses_for_good_is_raised_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("it waited"))
    calls: list[int] = []

    def refuse() -> None:
        calls.append(1)
        raise answer(413)

    with pytest.raises(requests.HTTPError):
        with_retries(refuse, "upload")
    assert len(calls) == 1


def test_waits_double_and_the_last_error_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)

    def fail() -> None:
        raise answer(503)

    with pytest.raises(requests.HTTPError):
        with_retries(fail, "upload")
    assert waits == [1, 2, 4, 8, 16, 32, 64]
    results = iter([answer(500), answer(429), None])

    def third() -> str:
        if error := next(results):
            raise error
        return "done"

    assert with_retries(third, "upload") == "done"


@pytest.mark.slow
def test_a_server_that_fails_two_of_three_uploads_gets_each_file_once(
    mlflow_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads, "FIRST_WAIT_S", 0.01)
    # MLflow's own wait before its one retry, whose unit is seconds
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_JITTER", "0")
    files = {"MLmodel": 100, "artifacts/encoder/encoder.pt2": 3_000_000, "code/a.py": 50}
    for name, size in files.items():
        (tmp_path / "m" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "m" / name).write_bytes(bytes(size))
    with between(mlflow_server) as proxy:
        proxy.fails = 2
        with mlflow_client("upload", proxy.uri) as client:
            experiment = client.create_experiment("e")
            run = client.create_run(experiment)
            model = client.create_logged_model(experiment, "m", source_run_id=run.info.run_id)
            before = proxy.bytes_up
            upload_model(client, model.model_id, tmp_path / "m")
        assert proxy.refused == 2 * len(files)
        assert proxy.bytes_up - before == sum(files.values())
    here = MlflowClient(mlflow_server)
    (encoder,) = here.list_logged_model_artifacts(model.model_id, "artifacts/encoder")
    assert encoder.file_size == 3_000_000
