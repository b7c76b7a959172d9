"""`kill -9` of the driver: the Ray that it started dies with it, and the next start goes on."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import psutil
import pytest

from simclr_ray.storage.run_folder import RunFolder
from simclr_ray.storage.run_record import RunRecord
from tests.ray.driver import Driver, own_ray
from tests.ray.images import write_splits
from tests.ray.test_pretrain import losses_of, tree_of
from tests.unit.distributed.test_ray_reaper import is_running

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.long]
WITHIN_S = 10.0


def statuses(folder: RunFolder) -> list[str]:
    """Return the status of every MLflow run of the store."""
    uri = RunRecord.read(folder).tracking_uri
    with closing(sqlite3.connect(uri.removeprefix("sqlite:///"))) as store:
        return [row[0] for row in store.execute("select status from runs")]


@pytest.mark.parametrize("workers", [1, 2])
def test_ray_dies_with_a_killed_driver_and_the_next_start_ends_its_mlflow_run(
    workers: int, tmp_path: Path
) -> None:
    tree = tree_of(write_splits(tmp_path, 330), "runs", workers, "float64")
    tree["checkpoint"] = {"every_steps": 2}
    driver = Driver(tmp_path / "t.yaml", tree, own_ray())
    driver.wait(lambda: "step 1" in driver.said)
    processes = psutil.Process(driver.process.pid).children(recursive=True)
    names = " ".join(process.name() for process in processes)
    assert "raylet" in names
    assert "DashboardAgent" in names
    driver.process.kill()
    driver.process.wait()
    psutil.wait_procs(processes, timeout=WITHIN_S)
    assert not [process for process in processes if is_running(process)]
    assert statuses(driver.folder) == ["RUNNING"]
    again = Driver(tmp_path / "t.yaml", tree, own_ray())
    assert again.end() == 0, again.said
    assert statuses(driver.folder) == ["FINISHED"]
    assert sorted(losses_of(Path(driver.folder.uri))) == list(range(1, 31))
