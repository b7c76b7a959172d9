"""The lock of a folder in an S3 bucket, among processes: one at a time, and a killed one's is free.

The bucket is moto's, which shows what was written at once, as S3 has promised since 2020.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from benchmarks.bucket import KEYS, Bucket, serving
from simclr_ray.storage.lease import claims_at
from tests.cluster.needs import needing_this_machine

pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]

HASTE = "lease.RENEW_S, lease.LEASE_S, lease.POLL_S = 1.0, 6.0, 0.2"
HOLDS_IT = f"""
import sys, time
from simclr_ray.storage import lease
{HASTE}
with lease.hold(sys.argv[1]):
    print("holds", flush=True)
    time.sleep(600)
"""
TAKES_TURNS = f"""
import os, sys, time
from simclr_ray.storage import lease
{HASTE}
for _ in range(3):
    with lease.hold(sys.argv[1], wait_s=300):
        mark = os.open(sys.argv[2], os.O_CREAT | os.O_EXCL)  # fails where another is inside
        time.sleep(0.05)
        os.close(mark)
        os.unlink(sys.argv[2])
"""


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    for name in (*KEYS, "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)  # `serving` sets them; undone after the test
    with ExitStack() as stack:
        with needing_this_machine():
            served = stack.enter_context(serving(tmp_path / "packages"))
        served.put("any", [])
        yield served


def started(program: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ,
    )  # fmt: skip


def test_processes_take_turns_and_what_a_killed_one_left_is_taken_over(
    bucket: Bucket, tmp_path: Path
) -> None:
    uri = f"{bucket.uri}/study"
    turns = [started(TAKES_TURNS, uri, str(tmp_path / "inside")) for _ in range(3)]
    for process in turns:
        _, said = process.communicate(timeout=400)
        assert process.returncode == 0, said
    first = started(HOLDS_IT, uri)
    assert first.stdout is not None
    assert first.stdout.readline() == "holds\n"
    second = started(HOLDS_IT, uri)
    _, said = second.communicate(timeout=60)
    assert f"LockedError: process {first.pid} on " in said
    first.kill()
    first.communicate()
    began = time.monotonic()
    third = started(HOLDS_IT, uri)
    assert third.stdout is not None
    assert third.stdout.readline() == "holds\n"
    sys.stdout.write(f"taken over {time.monotonic() - began:.0f} s after the holder was killed\n")
    (claim,) = claims_at(uri)
    assert f"process {third.pid}" in claim.who
    third.kill()
    third.communicate()
