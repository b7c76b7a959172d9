"""MLflow killed, slow and locked under a run, and the run killed under MLflow: nothing is lost."""

from __future__ import annotations

import logging
import signal
import sqlite3
import statistics
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest
from mlflow import MlflowClient

from simclr_ray.config.experiment import Experiment
from simclr_ray.storage.metrics_log import read_records
from simclr_ray.storage.run_folder import METRICS
from simclr_ray.storage.run_record import RunRecord
from simclr_ray.train.resolve import ResolvedExperiment, resolve
from simclr_ray.train.tracked import Tracked, open_tracker, sync_run, tracked_run
from tests.mlflow_server import between, free_port, serving
from tests.ray.images import write_shapes

pytestmark = [pytest.mark.long]


def experiment(folder: Path, uri: str = "") -> ResolvedExperiment:
    if not (folder / "train.parquet").exists():
        write_shapes(folder / "train.parquet", 40)
    given = {"data.train": folder / "train.parquet", "storage": folder / "runs"}
    sizes = {"batch_size": 16, "epochs": 1, "tracking.uri": uri or "''"}
    overrides = [f"{key}={value}" for key, value in (given | sizes).items()]
    return resolve(Experiment.load("cifar10_study_cpu", *overrides, "data.test=''"))


def log_step(run: Tracked, step: int) -> float:
    """Log a step as the monitor does; return how long that took, in seconds."""
    began = time.monotonic()
    names = ("train/mean_loss", "train/lr", "train/images_per_s")
    run.log.append(METRICS, {"step": step, "epoch": step / 100, **dict.fromkeys(names, 1.0)})
    run.sender.wake()
    return time.monotonic() - began


def steps_in_mlflow(resolved: ResolvedExperiment) -> tuple[str, list[int]]:
    """Return the status, and the steps of a metric, repeated ones as often as they are there."""
    found = RunRecord.read(resolved.folder)
    client = MlflowClient(tracking_uri=found.tracking_uri)
    steps = [
        sorted(metric.step for metric in client.get_metric_history(found.mlflow_run_id, key))
        for key in ("train/mean_loss", "train/lr", "train/images_per_s")
    ]
    assert steps[0] == steps[1] == steps[2]
    return str(client.get_run(found.mlflow_run_id).info.status), steps[0]


def ours(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if "tracking" in r.name]


def test_a_server_that_is_killed_for_a_minute_has_every_point_once_at_the_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.INFO, logger="simclr_ray")
    port = free_port()
    with serving(tmp_path, port) as uri:
        resolved = experiment(tmp_path, uri)
        begun = tracked_run(resolved, open_tracker(resolved))
        run = begun.__enter__()
        for step in range(50):
            log_step(run, step)
            time.sleep(0.1)
    slowest = 0.0
    for step in range(50, 350):
        slowest = max(slowest, log_step(run, step))
        time.sleep(0.2)
    with serving(tmp_path, port):
        for step in range(350, 400):
            log_step(run, step)
            time.sleep(0.1)
        begun.__exit__(None, None, None)
        assert steps_in_mlflow(resolved) == ("FINISHED", list(range(400)))
    assert slowest < 0.5
    begins, ends = ours(caplog)
    assert "no answer" in begins
    assert begins.endswith("the run goes on, and its points are delivered later")
    late = int(ends.split(": ")[1].split()[0].replace(",", ""))
    assert ends.startswith("MLflow takes the run's points again: ")
    assert late >= 3 * 300  # and those of the machine
    shown = capfd.readouterr()
    assert "Traceback" not in shown.out + shown.err
    assert "Retrying" not in shown.out + shown.err


def test_a_database_locked_for_a_minute_has_every_point_once_at_the_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """MLflow waits 20 s for the lock, and then raises: what was sent then is sent again."""
    caplog.set_level(logging.INFO, logger="simclr_ray")
    resolved = experiment(tmp_path)
    slowest = 0.0
    with (
        tracked_run(resolved, open_tracker(resolved)) as run,
        closing(sqlite3.connect(tmp_path / "runs" / "mlflow.db", isolation_level=None)) as other,
    ):
        other.execute("BEGIN EXCLUSIVE")
        for step in range(300):
            slowest = max(slowest, log_step(run, step))
            time.sleep(0.2)
        other.execute("ROLLBACK")
    assert slowest < 0.5
    assert steps_in_mlflow(resolved) == ("FINISHED", list(range(300)))
    begins, *_ = ours(caplog)
    assert "database is locked" in begins
    assert len(ours(caplog)) <= 2
    shown = capfd.readouterr()
    assert "Traceback" not in shown.out + shown.err


def test_a_server_that_answers_after_ten_seconds_delays_no_record(
    tmp_path: Path, mlflow_server: str
) -> None:
    lags: list[float] = []
    with between(mlflow_server) as proxy:
        proxy.delay_s = 10.0
        resolved = experiment(tmp_path, mlflow_server)
        tracker = open_tracker(resolved)
        assert tracker is not None
        with tracked_run(resolved, tracker) as run:
            run.sender.delivery.run.uri = proxy.uri
            for step in range(400):
                lags.append(log_step(run, step))
                time.sleep(0.1)
    assert max(lags) < 0.5
    assert statistics.median(lags) < 0.01
    assert steps_in_mlflow(resolved) == ("FINISHED", list(range(400)))


DRIVER = """
import sys, time
from pathlib import Path
from tests.faults.test_tracking import experiment, log_step
from simclr_ray.train.tracked import open_tracker, tracked_run

folder, first = Path(sys.argv[1]), int(sys.argv[2])
resolved = experiment(folder)
with tracked_run(resolved, open_tracker(resolved)) as run:
    print("ready", flush=True)
    for step in range(first, 10**6):
        log_step(run, step)
        time.sleep(0.002)
"""


def test_drivers_that_are_killed_at_any_moment_leave_every_point_once_after_a_sync(
    tmp_path: Path,
) -> None:
    resolved, last = experiment(tmp_path), 0
    for seconds in (0.7, 1.3, 2.1, 2.9):
        program = [sys.executable, "-c", DRIVER, str(tmp_path), str(max(0, last - 100))]
        driver = subprocess.Popen(program, stdout=subprocess.PIPE, text=True)
        assert driver.stdout is not None
        assert driver.stdout.readline() == "ready\n"
        time.sleep(seconds)
        driver.kill()
        assert driver.wait() == -signal.SIGKILL
        driver.stdout.close()
        last = max(record_steps(resolved))
    assert steps_in_mlflow(resolved)[0] == "RUNNING"
    assert sync_run(resolved.folder).status == "KILLED"
    assert steps_in_mlflow(resolved) == ("KILLED", list(range(last + 1)))
    assert sync_run(resolved.folder) == (0, 0, "")


def record_steps(resolved: ResolvedExperiment) -> list[int]:
    return [int(r["step"]) for r in read_records(resolved.folder.read_text(METRICS) or "")]
