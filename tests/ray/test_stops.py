"""Ctrl-C and what is left of a run: real signals to a real driver and all of its group."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from simclr_ray import config as cfg
from simclr_ray.cli.signals import STOPPED_BY_SYSTEM, STOPPED_BY_USER
from simclr_ray.config.experiment import Experiment
from simclr_ray.storage import checkpoint
from simclr_ray.storage.metrics_log import read_records
from simclr_ray.storage.run_folder import METRICS, RunFolder
from simclr_ray.storage.run_record import RunRecord
from simclr_ray.train.resolve import resolve
from simclr_ray.train.stop import is_requested
from tests.ray.images import write_splits
from tests.ray.test_pretrain import tree_of

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_splits(tmp_path_factory.mktemp("stops"), 330)


def stopped(
    folder: Path,
    storage: str,
    said: str,
    sent: signal.Signals,
    workers: int = 1,
    env: dict[str, str] | None = None,
) -> tuple[int, list[str], list[str]]:
    """Return exit code, lines and MLflow statuses of a run that gets a signal when it says that.

    A terminal sends Ctrl-C to the whole group, and so do `timeout` and systemd their signal.
    """
    tree = tree_of(folder, storage, workers, "float32")
    tree["epochs"] = 1 if said.startswith("evaluating") else 300
    config = folder / f"{storage}.yaml"
    config.write_text(cfg.dump_yaml(tree))
    # shells have background jobs ignore Ctrl-C, and nohup hangups; children inherit that
    signal.signal(signal.SIGINT, signal.default_int_handler)
    hangup = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    driver = subprocess.Popen(
        [sys.executable, "-m", "simclr_ray", "pretrain", str(config)],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env=env,
    )  # fmt: skip
    signal.signal(signal.SIGHUP, hangup)  # the tests go on when their terminal goes
    assert driver.stderr is not None
    lines: list[str] = []
    is_sent = False
    with driver.stderr:
        for line in driver.stderr:
            lines.append(line.rstrip())
            if said in line and not is_sent:
                is_sent = True
                os.killpg(driver.pid, sent)
    code = driver.wait(timeout=120)
    assert is_sent, lines
    record = RunRecord.read(resolve(cfg.validate(Experiment, tree)).folder)
    with closing(sqlite3.connect(record.tracking_uri.removeprefix("sqlite:///"))) as store:
        asked = "select status from runs where run_uuid = ?"
        return code, lines, [row[0] for row in store.execute(asked, (record.mlflow_run_id,))]


CONNECTED = """
import os, signal

def stop(*_):
    raise SystemExit(75)

signal.signal(signal.SIGTERM, stop)
from simclr_ray.distributed.ray_cluster import connect
connect()
os.kill(os.getpid(), signal.SIGTERM)
"""


def test_connecting_leaves_the_handler_of_sigterm_in_place(ray_cluster: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CONNECTED],
        env=os.environ | {"RAY_ADDRESS": ray_cluster},
        timeout=120,
        check=False,
    )
    assert done.returncode == STOPPED_BY_SYSTEM


@pytest.mark.parametrize("said", ["starting 1 worker", "step 1/", "evaluating step-"])
def test_ctrl_c_ends_in_130_leaves_the_run_killed_and_says_how_to_go_on(
    said: str, folder: Path, ray_cluster: str
) -> None:
    storage = f"stop{len(said)}"  # a path that says none of it: paths are in the log
    code, lines, statuses = stopped(folder, storage, said, signal.SIGINT)
    assert code == STOPPED_BY_USER, "\n".join(lines[-40:])
    assert statuses == ["KILLED"], "\n".join(lines)
    again = f"python -m simclr_ray pretrain {folder}/{storage}.yaml"
    assert lines[-1] == f"stopped; to continue: {again}"
    assert not any("Traceback" in line for line in lines)


@pytest.mark.parametrize(
    ("sent", "workers", "own_ray"),
    [
        (signal.SIGTERM, 2, False),
        (signal.SIGTERM, 1, True),  # which is of the same session
        pytest.param(signal.SIGHUP, 1, False, marks=pytest.mark.long),
    ],
    ids=lambda v: str(int(v)),
)
def test_a_schedulers_signal_costs_no_step_ends_in_75_and_leaves_the_run_killed(
    sent: signal.Signals, workers: int, own_ray: bool, folder: Path, ray_cluster: str
) -> None:
    storage = f"system{sent}{workers}"
    env = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} if own_ray else None
    code, lines, statuses = stopped(folder, storage, "step 1", sent, workers, env)
    assert code == STOPPED_BY_SYSTEM, lines
    assert statuses == ["KILLED"]
    assert lines[-1].startswith("stopped by the system; to continue: ")
    assert not any("Traceback" in line for line in lines)
    (run,) = (RunFolder.at(str(path.parent)) for path in folder.glob(f"{storage}/*/run.json"))
    records = read_records(run.read_text(METRICS) or "")
    last = max(record["step"] for record in records if "train/loss" in record)
    assert checkpoint.step_of(run.checkpoints()[0]) == last
    assert not is_requested(run)
