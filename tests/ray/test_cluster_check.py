"""The workers of `doctor --cluster` have a limit, wherever they wait, and leave nothing."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

import pytest
import ray

from simclr_ray.config.experiment import ScalingConfig
from simclr_ray.errors import ClusterError
from simclr_ray.train.cluster_check import check_workers

pytestmark = pytest.mark.ray

WITHIN_S = 8.0
TWO = ScalingConfig(num_workers=2)


class Holder:
    """An actor that takes what it is given."""

    def is_there(self) -> bool:
        """Return that it is."""
        return True


def test_workers_that_wait_for_room_are_given_up_in_time_also_where_signals_are_blocked(
    ray_cluster: str, tmp_path: Path
) -> None:
    """Ray blocks SIGINT in what it starts, its jobs as well."""
    cpus = ray.cluster_resources()["CPU"]  # type: ignore[no-untyped-call] # Ray's
    wait_for_free(cpus)  # what earlier tests have ended
    holder: Any = ray.remote(num_cpus=cpus)(Holder).remote()
    handler = signal.getsignal(signal.SIGINT)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        assert ray.get(holder.is_there.remote(), timeout=120)
        began = time.monotonic()
        with pytest.raises(ClusterError, match="2 workers did not report within 8 s"):
            check_workers(TWO, str(tmp_path), WITHIN_S)
        took = time.monotonic() - began
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        ray.kill(holder)
    assert took < WITHIN_S + 2
    assert signal.getsignal(signal.SIGINT) is handler
    assert not list(tmp_path.iterdir()), "nothing is left in the storage"
    wait_for_free(cpus)  # nor on the cluster


def wait_for_free(cpus: float) -> None:
    until = time.monotonic() + 30
    while time.monotonic() < until and free_cpus() < cpus:
        time.sleep(0.2)
    assert free_cpus() == cpus


def free_cpus() -> float:
    available: dict[str, float] = ray.available_resources()  # type: ignore[no-untyped-call] # Ray's
    return available.get("CPU", 0.0)
