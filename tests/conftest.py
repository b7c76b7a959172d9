"""Shared fixtures: where the real images are, and the one Ray cluster of a test session."""

from __future__ import annotations

import functools
import logging
import os
import signal
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.mlflow_server import free_port, serving
from tests.ray import processes

DATA_VARIABLE = "SIMCLR_RAY_DATA"

# A shell has what it runs in the background ignore Ctrl-C, and what tests start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def tracking_uri_stays() -> Iterator[None]:
    """Fail a test that leaves another tracking URI behind: later tests would log there."""
    before = os.environ.get("MLFLOW_TRACKING_URI")
    yield
    assert os.environ.get("MLFLOW_TRACKING_URI") == before


@pytest.fixture(scope="session")
def image_root() -> Path:
    """Return the folder with `cifar10/`, `caltech101/` and `odd/`; skip, saying so, when unset."""
    value = os.environ.get(DATA_VARIABLE)
    if not value:
        # photographs of others are not ours to store; every rule they show has a test on drawn ones
        pytest.skip(f"{DATA_VARIABLE} is unset: this test needs real images")
    folder = Path(value)
    missing = [n for n in ("cifar10", "caltech101", "odd") if not (folder / n).is_dir()]
    assert not missing, f"{DATA_VARIABLE}={value} lacks {missing}"
    return folder


@pytest.fixture(scope="session")
def ray_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Start the one Ray cluster of this test session and return its address.

    Detached actors, as Ray Train and Ray Data start some, end with the cluster; what outlives it
    fails the session, by its command line.
    """
    import ray

    from simclr_ray.distributed import ray_reaper, ray_token
    from simclr_ray.distributed.ray_cluster import QUIET

    ray_token.create()  # as `connect` does; what tests start has it from the environment
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    # one machine is not preempted, and the watcher costs a process a run: as `connect` sets it
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    start = functools.partial(
        ray.init,
        address="local",
        num_cpus=4,
        object_store_memory=512 * 2**20,
        include_dashboard=True,
        log_to_driver=False,
        logging_level=logging.ERROR,
        # a worker of Ray's yields to any other process by default, here to the tests beside
        _system_config={**QUIET, "worker_niceness": 0},
    )
    mark = uuid.uuid4().hex
    reaper = ray_reaper.start(mark)  # where this session is killed; without the mark itself
    with processes.marked(mark):
        try:
            context: Any = start()
        except Exception:  # noqa: BLE001 - Ray has no type for it; `connect` tries twice as well
            ray.shutdown()
            context = start()
    session = str(context.address_info["session_dir"])
    if reaper:
        with reaper:
            reaper.write(session.encode())
    address: str = ray.get_runtime_context().gcs_address
    os.environ["RAY_ADDRESS"] = address
    yield address
    os.environ.pop("RAY_ADDRESS", None)
    ray.shutdown()
    left = processes.end_left(mark, session)
    assert not left, "\n".join(["of the session's Ray remained, and was killed:", *left])


@pytest.fixture
def mlflow_server(tmp_path: Path) -> Iterator[str]:
    """Run `mlflow server` with served artifacts in a process group of its own; give its URI."""
    with serving(tmp_path, free_port()) as uri:
        yield uri
