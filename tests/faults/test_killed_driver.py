"""`kill -9` of the driver: the Ray that it started dies with it, and the next start goes on."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import psutil
import pytest

from simclr_ray import config as cfg
from simclr_ray.config.experiment import Experiment
from simclr_ray.storage.run_folder import RunFolder
from simclr_ray.storage.run_record import RunRecord
from simclr_ray.train.resolve import resolve
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
    config = tmp_path / "t.yaml"
    config.write_text(cfg.dump_yaml(tree))
    folder = resolve(cfg.validate(Experiment, tree)).folder
    own_ray = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    program = [sys.executable, "-m", "simclr_ray", "pretrain", str(config)]
    driver = subprocess.Popen(
        program, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=own_ray
    )
    assert driver.stderr is not None
    with driver.stderr:
        for line in driver.stderr:
            if "step 1" in line:
                break
        else:
            pytest.fail("it ended by itself")
        processes = psutil.Process(driver.pid).children(recursive=True)
        names = " ".join(process.name() for process in processes)
        assert "raylet" in names
        assert "DashboardAgent" in names
        os.kill(driver.pid, signal.SIGKILL)
        driver.wait()
    psutil.wait_procs(processes, timeout=WITHIN_S)
    assert not [process for process in processes if is_running(process)]
    assert statuses(folder) == ["RUNNING"]
    done = subprocess.run(
        program, capture_output=True, text=True, env=own_ray, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert statuses(folder) == ["FINISHED"]
    assert sorted(losses_of(Path(folder.uri))) == list(range(1, 31))
