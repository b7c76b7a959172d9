"""The folder of a study after its project was moved: outcomes, the MLflow store, the base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from simclr_ray.studies.folder import DEFINITION, StudyFolder, TrialOutcome
from simclr_ray.studies.plan import restored
from simclr_ray.studies.stored_points import studies_in

ID = "1" * 32


def study_in(root: Path) -> StudyFolder:
    """Return a study whose store lies beside the storage, as `tracking.uri` may say."""
    folder = StudyFolder(str(root / "runs" / "studies"), "s")
    folder.files.write_text(DEFINITION, "name: s\n")
    folder.files.write_text("base.yaml", f"storage: {root}/runs/studies/s/runs\n")
    (root / "mlflow.db").touch()
    return folder


def outcome_in(folder: StudyFolder, root: Path) -> TrialOutcome:
    run = {
        "folder": folder.run("t-0123abcd").uri,
        "tracking_uri": f"sqlite:///{root}/mlflow.db",
        "mlflow_run_id": ID,
    }
    return TrialOutcome("t", "finished", "", [], 0, {"m": 1.0}, {}, {}, run)


@pytest.mark.parametrize("release", ["this", "earlier"])
def test_outcomes_and_state_name_what_lies_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, release: str
) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    a.mkdir()
    monkeypatch.chdir(a)
    folder = study_in(a)
    outcome, uri = outcome_in(folder, a), f"sqlite:///{a}/mlflow.db"
    if release == "this":
        folder.write_outcome(outcome)
        folder.update_state(digest="d", tracking_uri=uri)
        for file in (folder.files.local or a).rglob("*.json"):
            assert str(a) not in file.read_text(), file
    else:
        place = a / "runs" / "studies" / "s"
        (place / "outcomes").mkdir()
        (place / "outcomes" / "t.json").write_text(json.dumps(outcome._asdict()))
        (place / "study.json").write_text(json.dumps({"digest": "d", "tracking_uri": uri}))
    assert folder.outcome("t") == outcome
    assert folder.state()["tracking_uri"] == uri
    a.rename(b)
    moved = StudyFolder.at(str(b / "runs" / "studies" / "s"))
    (read,) = moved.outcomes()
    assert read == outcome_in(moved, b)
    assert moved.state()["tracking_uri"] == f"sqlite:///{b}/mlflow.db"


def test_a_study_in_a_bucket_with_options_has_its_files_before_them(tmp_path: Path) -> None:
    options = "?endpoint_override=http://h:9000&scheme=http"  # a disk has none
    folder = StudyFolder(f"{tmp_path.as_uri()}/runs/studies{options}", "s")
    folder.files.write_text(DEFINITION, "name: s\n")
    outcome = outcome_in(folder, tmp_path)
    assert outcome.run["folder"] == f"{tmp_path.as_uri()}/runs/studies/s/runs/t-0123abcd{options}"
    folder.write_outcome(outcome)
    stored = json.loads((tmp_path / "runs/studies/s/outcomes/t.json").read_text())
    assert stored["run"]["folder"] == "runs/t-0123abcd"
    assert StudyFolder.at(folder.uri).outcomes() == [outcome]
    assert studies_in(f"{tmp_path.as_uri()}/runs{options}") == [folder.uri]
    assert folder.report == f"{tmp_path.as_uri()}/runs/studies/s/report{options}"
    tree = {"storage": folder.files.below("runs"), "tracking": {"uri": "http://mlflow"}}
    assert restored(tree, folder.uri)["storage"] == f"{tmp_path.as_uri()}/runs{options}"


@pytest.mark.parametrize("beside", [True, False])
def test_a_study_goes_on_with_the_store_and_the_images_that_moved_with_it(
    tmp_path: Path, *, beside: bool
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "mlflow.db").touch()
    old = "/nowhere/old"
    database = f"{old}/mlflow.db" if beside else f"{old}/runs/mlflow.db"
    tree: dict[str, Any] = {
        "storage": f"{old}/runs/studies/s/runs",
        "data": {"train": f"{old}/data", "test": "/elsewhere/test"},
        "tracking": {"uri": f"sqlite:///{database}", "only_params": ["seed"]},
    }
    here = restored(tree, f"{tmp_path}/runs/studies/s")
    assert here == {
        "storage": f"{tmp_path}/runs",
        "data": {"train": f"{tmp_path}/data", "test": "/elsewhere/test"},
        "tracking": {"uri": f"sqlite:///{tmp_path}/mlflow.db" if beside else ""},
    }
