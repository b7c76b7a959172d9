"""The only worker of a run on this machine: a process of its own; faults as under Ray Train."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

from simclr_ray import config as cfg
from simclr_ray.cli.signals import STOPPED_BY_SYSTEM
from simclr_ray.config.experiment import Experiment
from simclr_ray.train.driver import train_resolved
from simclr_ray.train.resolve import enter
from tests.ray.driver import Driver, own_ray
from tests.ray.images import write_splits
from tests.ray.test_pretrain import losses_of, tree_of

pytestmark = [pytest.mark.ray, pytest.mark.slow]
STEPS = 30


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_splits(tmp_path_factory.mktemp("single"), 330)


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[int, float]:
    """Return the losses of the same run in this process."""
    made = cfg.validate(Experiment, tree_in(folder, "in_process"))
    run = enter(made, train_resolved, in_process=True)
    return losses_of(Path(run.folder))


def tree_in(folder: Path, storage: str, **scaling: float) -> dict[str, Any]:
    tree: dict[str, Any] = tree_of(folder, storage, 1, "float64")
    tree["scaling"] = tree["scaling"] | scaling
    return tree | {"checkpoint": {"every_steps": 2}, "epochs": 3}


def started(folder: Path, storage: str, **scaling: float) -> Driver:
    return Driver(folder / f"{storage}.yaml", tree_in(folder, storage, **scaling), own_ray())


def test_a_killed_worker_starts_again_and_a_stop_is_gone_on_from_to_the_same_numbers(
    folder: Path, expected: dict[int, float]
) -> None:
    driver = started(folder, "killed")
    driver.wait(lambda: driver.step >= 4)
    roles = driver.roles()
    assert set(roles) == {"SingleWorker", "_QueueActor"}
    roles["SingleWorker"].kill()
    driver.wait(lambda: driver.said.count("ready after") == 2)
    driver.wait(lambda: driver.step >= 10)
    driver.process.send_signal(signal.SIGTERM)
    assert driver.end() == STOPPED_BY_SYSTEM, driver.said
    said = driver.said
    assert "rank 0 failed: " in said
    assert "all ranks start again after step" in said
    stopped_at = driver.step
    assert 10 <= stopped_at < STEPS
    driver = started(folder, "killed")
    assert driver.end() == 0, driver.said
    assert f"continuing after step {stopped_at} of {STEPS}" in driver.said
    assert losses_of(Path(driver.folder.uri)) == expected


@pytest.mark.long
def test_a_worker_that_fails_too_often_ends_the_run_by_its_cause(folder: Path) -> None:
    driver = started(folder, "again", max_failures=1)
    driver.wait(lambda: driver.step >= 4)
    driver.kill_each("ray::SingleWorker")
    said = driver.said
    assert driver.process.returncode == 75, said
    assert "Traceback" not in said
    last = said.splitlines()[-1]
    assert "without a further checkpoint (scaling.max_failures=1), last rank 0: " in last
    assert last.endswith("the same command goes on from there")


@pytest.mark.long
def test_a_worker_that_stands_still_is_ended_and_the_run_goes_on(
    folder: Path, expected: dict[int, float]
) -> None:
    driver = started(folder, "stopped", stalled_s=22.0)
    driver.wait(lambda: driver.step >= 4)
    driver.roles()["SingleWorker"].send_signal(signal.SIGSTOP)
    driver.wait(lambda: "has not answered for" in driver.said)
    driver.wait(lambda: "is ended, and the run goes on" in driver.said)
    assert driver.end() == 0, driver.said
    assert "Traceback" not in driver.said
    assert losses_of(Path(driver.folder.uri)) == expected
