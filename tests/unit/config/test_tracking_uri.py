"""Which MLflow stores several machines can share, and where their servers listen."""

from __future__ import annotations

import pytest

from simclr_ray.config.tracking_uri import (
    file_store_problem,
    server_of,
    unknown_store_problem,
)


@pytest.mark.parametrize(
    "uri", ["", "sqlite:////nfs/mlflow.db", "file:///nfs/mlruns", "file:mlruns", "/nfs/mlruns"]
)
def test_a_file_is_no_store_for_several_machines(uri: str) -> None:
    assert "no store for several machines" in file_store_problem(uri)


@pytest.mark.parametrize(
    "uri",
    [
        "http://head:5000", "https://mlflow.example", "postgresql://u:p@db/mlflow", "databricks",
        "databricks-uc", "databricks://profile",
    ],
)  # fmt: skip
def test_a_server_is_one(uri: str) -> None:
    assert file_store_problem(uri) == ""


@pytest.mark.parametrize(
    ("uri", "problem"),
    [
        ("htp://mlflow", "got htp://mlflow; MLflow has no htp:// store"),
        ("mlflow:5000", "got mlflow:5000; a server is http://mlflow:5000"),
        ("sqlite://me:hunter2@/m.db", "a file is sqlite:///me:***@/m.db"),
        ("http://[::1", "got http://[::1; "),
        ("a" * 5000, "a file is sqlite:///aaa"),
        ("sqlite:////x/m.db?timeout=60", "of SQLite without options: sqlite:////x/m.db"),
        ("http://mlflow", ""),
        ("postgresql://db/mlflow?sslmode=require", ""),
        ("mysql+pymysql://u:p@db/m", ""),
        ("mssql://db/m", ""),
        ("databricks-uc", ""),
        ("sqlite:////nfs/mlflow.db", ""),
        ("file:///nfs/mlruns", ""),
    ],
)
def test_a_scheme_that_mlflow_has_not_is_no_store(uri: str, problem: str) -> None:
    shown = unknown_store_problem(uri)
    assert (problem in shown) if problem else (shown == "")
    assert "hunter2" not in shown


@pytest.mark.parametrize(
    ("uri", "server"),
    [
        ("http://head:5000/path", ("head", 5000)),
        ("https://me:secret@mlflow.example", ("mlflow.example", 443)),
        ("postgresql+psycopg2://u:p@db/mlflow", ("db", 5432)),
        ("http://[::1]:5000", ("::1", 5000)),
        ("http://head:port", None),
        ("http://[::1", None),
        ("databricks", None),
        ("databricks://profile", None),
        ("sqlite:////nfs/mlflow.db", None),
        ("", None),
    ],
)
def test_host_and_port_of_a_server_are_read_from_its_address(
    uri: str, server: tuple[str, int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    assert server_of(uri) == server


def test_what_a_proxy_reaches_no_socket_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", "http://proxy:3128")
    monkeypatch.setenv("no_proxy", "inner.example")
    assert server_of("https://mlflow.example") is None
    assert server_of("https://inner.example") == ("inner.example", 443)
