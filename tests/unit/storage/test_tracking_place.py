"""How run.json names the MLflow store: relative, so that both can be moved together."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from simclr_ray.storage.run_folder import CONFIG_FILE, RUN_FILE, RunFolder
from simclr_ray.storage.run_record import RunRecord

SERVER, UP = "http://host:5000", "../"


def record_of(uri: str) -> RunRecord:
    return RunRecord("1" * 32, uri, "f", "d")


def stored(folder: RunFolder) -> str:
    uri: str = json.loads(folder.read_text(RUN_FILE) or "")["tracking_uri"]
    return uri


@pytest.mark.parametrize(
    ("run", "text"),
    [
        ("runs/r", "sqlite:///../mlflow.db"),
        ("runs/studies/s/runs/r", f"sqlite:///{'../' * 4}mlflow.db"),
    ],
)
def test_a_store_in_the_storage_is_named_relative_and_found_after_a_move(
    tmp_path: Path, run: str, text: str
) -> None:
    uri = f"sqlite:///{tmp_path}/a/runs/mlflow.db"
    folder = RunFolder.at(str(tmp_path / "a" / run))
    record_of(uri).write(folder)
    assert stored(folder) == text
    assert RunRecord.read(folder).tracking_uri == uri
    (tmp_path / "a").rename(tmp_path / "b")
    moved = RunRecord.read(RunFolder.at(str(tmp_path / "b" / run)))
    assert moved.tracking_uri == f"sqlite:///{tmp_path}/b/runs/mlflow.db"


def test_a_store_beside_the_storage_is_named_relative_in_the_project(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = RunFolder.at(str(tmp_path / "runs" / "r"))
    record_of(f"sqlite:///{tmp_path}/track/mlflow.db").write(folder)
    assert stored(folder) == "sqlite:///../../track/mlflow.db"


@pytest.mark.parametrize("uri", [SERVER, "sqlite:////elsewhere/mlflow.db"])
def test_a_store_elsewhere_is_named_as_it_is(tmp_path: Path, uri: str) -> None:
    folder = RunFolder.at(str(tmp_path / "runs" / "r"))
    record_of(uri).write(folder)
    assert stored(folder) == uri
    assert RunRecord.read(folder).tracking_uri == uri


@pytest.mark.parametrize("is_here", [True, False])
def test_an_absolute_name_of_an_earlier_release_is_translated_if_the_store_is_here(
    tmp_path: Path, *, is_here: bool
) -> None:
    folder = RunFolder.at(str(tmp_path / "runs" / "r"))
    old = "/nowhere/old/runs"
    folder.write_text(CONFIG_FILE, f"storage: {old}\n")
    folder.write_text(RUN_FILE, json.dumps(record_of(f"sqlite:///{old}/mlflow.db").__dict__))
    if is_here:
        (tmp_path / "runs" / "mlflow.db").touch()
    place = f"{tmp_path}/runs" if is_here else old
    assert RunRecord.read(folder).tracking_uri == f"sqlite:///{place}/mlflow.db"
