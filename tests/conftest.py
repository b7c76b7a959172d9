"""Shared fixtures: where the real images are, and the one Ray cluster of a test session."""

from __future__ import annotations

import collections
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

DATA_VARIABLE = "SIMCLR_RAY_DATA"


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
    """Start the one Ray cluster of this test session and return its address."""
    import ray

    from simclr_ray.distributed.ray_cluster import QUIET

    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    # one machine is not preempted, and the watcher costs a process a run: as `connect` sets it
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    ray.init(
        address="local",
        num_cpus=4,
        object_store_memory=512 * 2**20,
        include_dashboard=True,
        log_to_driver=False,
        logging_level=logging.ERROR,
        # a worker of Ray's yields to any other process by default, here to the tests beside
        _system_config={**QUIET, "worker_niceness": 0},
    )
    address: str = ray.get_runtime_context().gcs_address
    os.environ["RAY_ADDRESS"] = address
    yield address
    os.environ.pop("RAY_ADDRESS", None)
    ray.shutdown()


@pytest.fixture
def mlflow_server(tmp_path: Path) -> Iterator[str]:
    """Run `mlflow server` with served artifacts in a process group of its own; give its URI."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port),
        "--backend-store-uri", f"sqlite:///{tmp_path}/server.db", "--workers", "1",
        "--artifacts-destination", str(tmp_path / "served"), "--serve-artifacts",
    ]  # fmt: skip
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
    )
    assert process.stderr is not None
    try:
        lines = []
        for line in process.stderr:
            lines.append(line)
            told = "".join(lines)
            # on its own, either may come before the port is open
            if "Application startup complete" in told and "Uvicorn running on" in told:
                break
        else:
            pytest.fail("the server did not start:\n" + "".join(lines))
        rest = collections.deque[str](maxlen=1)  # read on, or the server blocks on a full pipe
        reader = threading.Thread(target=rest.extend, args=(process.stderr,), daemon=True)
        reader.start()
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    reader.join()
    process.stderr.close()
