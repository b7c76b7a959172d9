"""A study over two Ray nodes and an MLflow server, without a working directory that they share."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from ray.cluster_utils import Cluster

from simclr_ray.studies.folder import StudyFolder
from tests.ray.images import write_shapes
from tests.ray.test_study import runs_of, study_file

pytestmark = [pytest.mark.long, pytest.mark.ray, pytest.mark.timeout(900)]

CPUS = 2  # of each node: neither holds the two workers of a trial


@pytest.fixture
def two_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Start two nodes, each in a folder of its own; give the address."""
    for name in ("head", "other"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "head")
    arguments: dict[str, Any] = {"num_cpus": CPUS, "object_store_memory": 256 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args=arguments)
    try:
        monkeypatch.chdir(tmp_path / "other")
        cluster.add_node(**arguments)
        yield cluster.address
    finally:
        cluster.shutdown()  # type: ignore[no-untyped-call] # Ray's


def test_trials_over_two_nodes_are_tracked_by_a_server(
    two_nodes: str, mlflow_server: str, tmp_path: Path
) -> None:
    write_shapes(tmp_path / "train.parquet", 130, row_group_size=100)
    write_shapes(tmp_path / "test.parquet", 60)
    scaling = {"num_workers": 2, "cpus_per_worker": 1.2, "cpus_per_data_actor": 0.3}
    given = {f"scaling.{key}": value for key, value in scaling.items()}
    source = study_file(tmp_path, "nodes", set={"tracking.uri": mlflow_server, **given})
    (tmp_path / "driver").mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "simclr_ray", "study", "run", str(source)],
        cwd=tmp_path / "driver",
        env=os.environ | {"RAY_ADDRESS": two_nodes, "RAY_AUTH_MODE": "disabled"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    folder = StudyFolder(str(tmp_path / "nodes" / "studies"), "s")
    assert [o.status for o in folder.outcomes()] == ["finished", "finished"]
    assert folder.state()["tracking_uri"] == mlflow_server
    runs = runs_of(folder)
    assert len(runs) == 5  # the study, two trials, an evaluation of each
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    files = MlflowClient(mlflow_server).list_artifacts(runs[""].info.run_id, "report")
    assert "report/report.html" in {f.path for f in files}
    for name in ("head", "other", "driver"):
        assert not list((tmp_path / name).iterdir()), f"something was left in {name}"
