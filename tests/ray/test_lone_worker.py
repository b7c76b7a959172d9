"""The only worker of a run on this machine: its own process alone; faults as under Ray Train."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from simclr_ray import config as cfg
from simclr_ray.cli.signals import STOPPED_BY_SYSTEM
from simclr_ray.config.experiment import Experiment
from simclr_ray.storage import checkpoint
from simclr_ray.train.driver import train_resolved
from simclr_ray.train.resolve import enter, resolve
from tests.ray.images import write_splits
from tests.ray.test_pretrain import losses_of, tree_of

pytestmark = [pytest.mark.ray, pytest.mark.slow]
WAIT_S = 200.0
STEPS = 30


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_splits(tmp_path_factory.mktemp("lone"), 330)


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[int, float]:
    """Return the losses of the same run in this process."""
    run = enter(experiment(folder, "alone"), train_resolved, alone=True)
    return losses_of(Path(run.folder))


def experiment(folder: Path, storage: str, **scaling: float) -> Experiment:
    tree: dict[str, Any] = tree_of(folder, storage, 1, "float64")
    tree["scaling"] = tree["scaling"] | scaling
    tree["checkpoint"] = {"every_steps": 2}
    tree["epochs"] = 3
    return cfg.validate(Experiment, tree)


class Driver:
    """A `pretrain` that starts Ray for itself, and what it says."""

    def __init__(self, made: Experiment) -> None:
        self.folder = resolve(made).folder
        config = Path(f"{made.storage}.yaml")
        config.write_text(cfg.dump_yaml(cfg.to_tree(made)))
        self.said = Path(f"{made.storage}.log")
        own = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "simclr_ray", "pretrain", str(config)],
            stdout=subprocess.DEVNULL, stderr=self.said.open("w"), env=own,
        )  # fmt: skip

    @property
    def step(self) -> int:
        """Of the newest checkpoint."""
        names = self.folder.checkpoints() if Path(self.folder.uri).exists() else []
        return checkpoint.step_of(names[0]) if names else 0

    def roles(self) -> dict[str, psutil.Process]:
        """Return the processes of Ray that do something of ours, by their title."""
        found = {}
        for process in psutil.Process(self.process.pid).children(recursive=True):
            try:
                title = " ".join(process.cmdline())
            except psutil.NoSuchProcess:
                continue
            if title.startswith("ray::") and "Agent" not in title and "IDLE" not in title:
                found[title.removeprefix("ray::").split(".")[0]] = process
        return found

    def wait(self, until: Callable[[], bool]) -> None:
        deadline = time.monotonic() + WAIT_S
        while not until():
            assert self.process.poll() is None, self.said.read_text()
            assert time.monotonic() < deadline, self.said.read_text()
            time.sleep(0.05)

    def end(self) -> int:
        return self.process.wait(timeout=WAIT_S)


def test_a_killed_worker_starts_again_and_a_stop_is_gone_on_from_to_the_same_numbers(
    folder: Path, expected: dict[int, float]
) -> None:
    made = experiment(folder, "killed")
    driver = Driver(made)
    driver.wait(lambda: driver.step >= 4)
    roles = driver.roles()
    assert set(roles) == {"LoneWorker", "_QueueActor"}
    roles["LoneWorker"].kill()
    driver.wait(lambda: driver.said.read_text().count("ready after") == 2)
    driver.wait(lambda: driver.step >= 10)
    driver.process.send_signal(signal.SIGTERM)
    assert driver.end() == STOPPED_BY_SYSTEM, driver.said.read_text()
    said = driver.said.read_text()
    assert "rank 0 failed: " in said
    assert "all ranks start again after step" in said
    stopped_at = driver.step
    assert 10 <= stopped_at < STEPS
    driver = Driver(made)
    assert driver.end() == 0, driver.said.read_text()
    assert f"continuing after step {stopped_at} of {STEPS}" in driver.said.read_text()
    assert losses_of(Path(driver.folder.uri)) == expected


@pytest.mark.long
def test_a_worker_that_fails_too_often_ends_the_run_by_its_cause(folder: Path) -> None:
    driver = Driver(experiment(folder, "again", max_failures=1))
    driver.wait(lambda: driver.step >= 4)
    killed: set[int] = set()
    deadline = time.monotonic() + WAIT_S
    while driver.process.poll() is None:
        assert time.monotonic() < deadline, driver.said.read_text()
        worker = driver.roles().get("LoneWorker")
        if worker and worker.pid not in killed:
            worker.kill()
            killed.add(worker.pid)
        time.sleep(0.01)
    said = driver.said.read_text()
    assert driver.process.returncode == 75, said
    assert "Traceback" not in said
    last = said.splitlines()[-1]
    assert "without a further checkpoint (scaling.max_failures=1), last rank 0: " in last
    assert last.endswith("the same command goes on from there")


@pytest.mark.long
def test_a_worker_that_stands_still_is_ended_and_the_run_goes_on(
    folder: Path, expected: dict[int, float]
) -> None:
    driver = Driver(experiment(folder, "stopped", stalled_s=22.0))
    driver.wait(lambda: driver.step >= 4)
    driver.roles()["LoneWorker"].send_signal(signal.SIGSTOP)
    driver.wait(lambda: "has not answered for" in driver.said.read_text())
    driver.wait(lambda: "is ended, and the run goes on" in driver.said.read_text())
    assert driver.end() == 0, driver.said.read_text()
    assert "Traceback" not in driver.said.read_text()
    assert losses_of(Path(driver.folder.uri)) == expected
