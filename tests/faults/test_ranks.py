"""A rank that is stopped, or killed again and again: named, with its cause, and what follows."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.ray import processes
from tests.ray.driver import Driver, own_ray
from tests.ray.images import write_splits
from tests.ray.test_pretrain import losses_of, tree_of

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.long]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_splits(tmp_path_factory.mktemp("ranks"), 330)


def started(
    folder: Path,
    storage: str,
    workers: int,
    *,
    epochs: int = 3,
    env: Mapping[str, str] | None = None,
    **scaling: float,
) -> Driver:
    tree: dict[str, Any] = tree_of(folder, storage, workers, "float64")
    tree["scaling"] = tree["scaling"] | scaling
    tree |= {"checkpoint": {"every_steps": 2}, "epochs": epochs}
    return Driver(folder / f"{storage}.yaml", tree, env)


def test_a_stopped_rank_is_named_within_20_s_and_ended(folder: Path, ray_cluster: str) -> None:
    driver = started(folder, "stopped", 2, stalled_s=22.0)
    driver.wait(lambda: driver.step >= 4)
    stopped_at = time.monotonic()
    os.kill(processes.named("RayTrainWorker")[-1], signal.SIGSTOP)
    driver.wait(lambda: "has not answered for" in driver.said)
    assert time.monotonic() - stopped_at < 20 + 5  # so long a beat may have just gone out
    driver.wait(lambda: "rank 1 on " in driver.said)
    driver.wait(lambda: "is ended, and the run goes on" in driver.said)
    assert driver.end() == 0, driver.said
    said = driver.said
    assert "Traceback" not in said
    assert "all ranks start again after step" in said
    assert sorted(losses_of(Path(driver.folder.uri))) == list(range(1, 31))


def test_failures_are_counted_anew_after_a_checkpoint_and_end_with_what_to_do(
    folder: Path, ray_cluster: str
) -> None:
    driver = started(folder, "killed", 1, max_failures=1)
    for _ in range(2):  # with a checkpoint between, each is the first
        before = driver.step
        driver.wait(lambda: driver.step > before)  # noqa: B023 - called at once
        os.kill(processes.named("RayTrainWorker")[-1], signal.SIGKILL)
        said = "(1 of 1 times without a further checkpoint)"
        times = driver.said.count(said)
        driver.wait(lambda: driver.said.count(said) > times)  # noqa: B023 - the same
    ready = driver.said.count("ready after")
    driver.wait(lambda: driver.said.count("ready after") > ready)
    os.kill(processes.named("RayTrainWorker")[-1], signal.SIGKILL)  # before its next checkpoint
    assert driver.end() == 75, driver.said
    last = driver.said.splitlines()[-1]
    assert "without a further checkpoint (scaling.max_failures=1)" in last
    assert last.endswith("the same command goes on from there")


def test_processes_that_end_before_they_are_up_are_not_started_without_end(
    folder: Path, ray_cluster: str
) -> None:
    driver = started(folder, "before", 1, max_failures=1)
    driver.kill_each("RayTrainWorker")
    assert driver.process.returncode == 75, driver.said
    said = driver.said
    assert "Traceback" not in said
    assert "ended before it was up" in said.splitlines()[-1]


def test_where_ray_ends_its_own_process_of_a_run_the_same_command_goes_on(
    folder: Path, ray_cluster: str
) -> None:
    driver = started(folder, "controller", 1)
    driver.wait(lambda: driver.step >= 4)
    os.kill(processes.named("TrainController")[-1], signal.SIGKILL)
    assert driver.end() == 75, driver.said
    said = driver.said
    assert "Traceback" not in said
    assert said.splitlines()[-1].startswith("error: Ray has ended the run: ")
    driver = started(folder, "controller", 1)
    assert driver.end() == 0, driver.said
    assert sorted(set(losses_of(Path(driver.folder.uri)))) == list(range(1, 31))


def test_what_a_node_out_of_memory_ends_goes_on_when_there_is_room(
    folder: Path,
) -> None:
    memory, gib = psutil.virtual_memory(), 2**30
    if memory.available < 14 * gib:
        # memory is eaten until Ray ends processes: on a smaller machine the kernel would choose
        # first, and might end what else runs there
        pytest.skip("8 GiB beside a run, far from the machine's end: it has too little memory")
    limit = (memory.total - memory.available + 8 * gib) / memory.total
    env = own_ray() | {"RAY_memory_usage_threshold": f"{limit:.3f}"}
    driver = started(folder, "memory", 2, epochs=30, env=env)
    driver.wait(lambda: driver.step >= 4)
    other = subprocess.Popen([sys.executable, "-c", f"a = b'1' * {8 * gib}; input()"], stdin=-1)
    try:
        driver.wait(lambda: "has run out of memory" in driver.said)
    finally:
        other.kill()
        other.wait()
    code, said = driver.end(), driver.said
    assert "Traceback" not in said
    assert f"most has process {other.pid}" in said
    assert code in {0, 75}, said
    if code == 75:  # Ray has ended its own process of the run as well
        assert "error: Ray has ended the run: " in said.splitlines()[-1]
        assert said.splitlines()[-1].endswith("; the same command goes on")
        driver = started(folder, "memory", 2, epochs=30, env=own_ray())
        assert driver.end() == 0, driver.said
    assert sorted(losses_of(Path(driver.folder.uri))) == list(range(1, 301))
