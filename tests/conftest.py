"""Shared fixtures: where the real pictures are, and the one Ray cluster of a test session."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

DATA_VARIABLE = "SIMCLR_RAY_DATA"


@pytest.fixture(scope="session")
def pictures() -> Path:
    """Return the folder with `cifar10/`, `caltech101/` and `odd/`; skip, saying so, when unset."""
    value = os.environ.get(DATA_VARIABLE)
    if not value:
        # photographs of others are not ours to store; every rule they show has a test on drawn ones
        pytest.skip(f"{DATA_VARIABLE} is unset: this test needs real pictures")
    folder = Path(value)
    missing = [n for n in ("cifar10", "caltech101", "odd") if not (folder / n).is_dir()]
    assert not missing, f"{DATA_VARIABLE}={value} lacks {missing}"
    return folder


@pytest.fixture(scope="session")
def ray_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Start the one Ray cluster of this test session and return its address."""
    import ray

    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    ray.init(
        address="local",
        num_cpus=4,
        object_store_memory=512 * 2**20,
        include_dashboard=True,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    address: str = ray.get_runtime_context().gcs_address
    os.environ["RAY_ADDRESS"] = address
    yield address
    os.environ.pop("RAY_ADDRESS", None)
    ray.shutdown()
