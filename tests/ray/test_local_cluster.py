"""The Ray that a command starts: who may use it, and what a killed driver leaves of it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
import ray

from simclr_ray.distributed import ray_cluster as ray_cluster_module
from simclr_ray.distributed import ray_reaper
from simclr_ray.distributed.cluster_health import cluster_result
from simclr_ray.distributed.ray_token import MODE, TOKEN
from tests.unit.distributed.test_ray_reaper import is_running

pytestmark = [pytest.mark.ray, pytest.mark.slow]

DRIVER = """
import os, time
from simclr_ray.distributed.ray_cluster import connect

connect()
import ray
from ray._private.worker import _global_node

@ray.remote
def worker():
    import subprocess
    return os.getpid(), subprocess.Popen(["sleep", "300"], start_new_session=True).pid

print(ray.get_runtime_context().gcs_address, _global_node.get_session_dir_path(), flush=True)
print(*ray.get(worker.remote()), os.environ["RAY_AUTH_TOKEN"], flush=True)
time.sleep(300)
"""

# Asks for the nodes, as Ray's own clients do, and says what came of it.
CLIENT = """
import sys
from ray._raylet import GcsClient
try:
    print(len(GcsClient(address=sys.argv[1]).get_all_node_info(timeout=10)))
except Exception as error:
    print(type(error).__name__)
"""


class Local(NamedTuple):
    """A driver that has started Ray."""

    driver: subprocess.Popen[str]
    address: str
    session: Path
    token: str
    processes: list[psutil.Process]


def environment(**added: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    return kept | {"PYTHONPATH": str(Path.cwd())} | added


@pytest.fixture
def local(tmp_path: Path) -> Iterator[Local]:
    with subprocess.Popen(
        [sys.executable, "-c", DRIVER], stdout=subprocess.PIPE, text=True,
        env=environment(HOME=str(tmp_path)),
    ) as driver:  # fmt: skip
        assert driver.stdout is not None
        address, session = driver.stdout.readline().split()
        worker, its_child, token = driver.stdout.readline().split()
        running = psutil.Process(driver.pid).children(recursive=True)
        assert {int(worker), int(its_child)} <= {process.pid for process in running}
        yield Local(driver, address, Path(session), token, running)
        driver.kill()


def nodes_for(address: str, **added: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", CLIENT, address],
        env=environment(**added), capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    return done.stdout.strip()


def test_it_asks_for_a_token_that_is_in_no_file_and_dies_with_its_driver(
    local: Local, tmp_path: Path
) -> None:
    """One cluster for all of it: each takes four seconds to start."""
    assert nodes_for(local.address, **{MODE: "token", TOKEN: local.token}) == "1"
    assert nodes_for(local.address, **{MODE: "token", TOKEN: "0" * 64}) != "1"
    assert nodes_for(local.address, **{MODE: "disabled"}) != "1"
    assert not (tmp_path / ".ray").exists()
    written = [path for path in local.session.rglob("*") if path.is_file()]
    assert written
    assert not any(local.token.encode() in path.read_bytes() for path in written)
    for process in local.processes:  # which any user of the machine may read
        with suppress(psutil.NoSuchProcess):
            assert local.token not in " ".join(process.cmdline())

    began = time.monotonic()
    local.driver.kill()
    local.driver.wait()
    psutil.wait_procs(local.processes, timeout=ray_reaper.GRACE_S + 7)
    left = [process for process in local.processes if is_running(process)]
    assert not left, left
    assert time.monotonic() - began < ray_reaper.GRACE_S + 7


FAILS_ONCE = """
import ray
from simclr_ray.distributed import ray_cluster
from simclr_ray.distributed.cluster_health import cluster_result

start, starts = ray_cluster.init, []

def init(**options):
    context = start(**options)
    starts.append([node["NodeID"] for node in ray.nodes()])
    if len(starts) == 1:  # as where a raylet was not up in time: half of it runs
        raise Exception("The current node timed out during startup.")
    return context

ray_cluster.init = init
ray_cluster.connect()

@ray.remote
def works():
    return 7

print(len(starts), starts[0] != starts[1], len(ray.nodes()), ray.get(works.remote()))
print(ray_cluster.is_local(), ray.get(ray.remote(ray_cluster.is_local).remote()))
print(cluster_result(), ray.get(ray.remote(cluster_result).remote()))
"""


def test_a_start_that_fails_is_made_again_and_leaves_one_ray_known_as_local_to_all(
    tmp_path: Path,
) -> None:
    """A trial of a study runs in a worker, and is tagged by no `doctor --cluster` there either."""
    done = subprocess.run(
        [sys.executable, "-c", FAILS_ONCE], capture_output=True, text=True, timeout=180,
        env=environment(HOME=str(tmp_path)), check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    first, *local = done.stdout.splitlines()
    assert first.split() == ["2", "True", "1", "7"]
    assert local == ["True True", "None None"]


def test_a_cluster_that_was_joined_is_local_to_none_of_its_processes(ray_cluster: str) -> None:
    assert not ray_cluster_module.is_local()
    assert not ray.get(ray.remote(ray_cluster_module.is_local).remote())
    assert ray.get(ray.remote(cluster_result).remote()) == cluster_result() is not None
