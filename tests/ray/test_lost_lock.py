"""A trial whose lock another driver has taken is ended, in a task of Ray's that hears no signal."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import ray
from ray.exceptions import RayTaskError

from simclr_ray.storage import lease
from simclr_ray.storage.lease import ClaimStore, claims_at, hold
from simclr_ray.storage.run_folder import RunFolder
from simclr_ray.train.failures import unwrap_error

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

PATIENCE_S = 120.0


@ray.remote(num_cpus=0, max_retries=0)
def trial(storage: str) -> str:
    """Hold a run's folder, as a trial does, until somebody interrupts it."""
    lease.RENEW_S = 0.2  # type: ignore[misc] # so that a test need not wait
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    assert signal.SIGINT in blocked, "the case that this test is for"
    ends_at = time.monotonic() + PATIENCE_S
    with RunFolder.of(storage, "r").lock():
        while time.monotonic() < ends_at:
            time.sleep(0.02)
    return "trained to its end"


def test_a_trial_that_lost_its_lock_ends_with_who_has_it(tmp_path: Path) -> None:
    uri = f"{tmp_path.as_uri()}/r"
    running = trial.remote(tmp_path.as_uri())
    ends_at = time.monotonic() + PATIENCE_S
    while not any(claim.state == lease.HOLDS for claim in claims_at(uri)):
        assert time.monotonic() < ends_at
        time.sleep(0.05)
    (claim,) = claims_at(uri)
    ClaimStore.of(uri).take(claim.name)  # as one does that finds it old
    with pytest.raises(RayTaskError) as ended:  # not at its end, where the lock is looked at too
        ray.get(running, timeout=PATIENCE_S / 2)
    said = str(unwrap_error(ended.value))
    assert said.startswith(f"{uri} was taken over by process {os.getpid()} on ")
    with hold(uri):
        pass
