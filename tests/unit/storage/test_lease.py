"""Two drivers of one folder in a bucket: one holds it, and what a killed one left is taken over.

`file://` is a store like another here. `tests/cluster/test_bucket_lock.py` has S3.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from simclr_ray.errors import RunError
from simclr_ray.storage import lease
from simclr_ray.storage.lease import Lease, claims_at, hold, holder_of
from simclr_ray.storage.run_folder import RunFolder
from simclr_ray.storage.run_lock import LOCK, LockedError

HOLDS_IT = """
import sys, time
from simclr_ray.storage import lease
lease.RENEW_S = float(sys.argv[2])
with lease.hold(sys.argv[1]):
    print("holds", flush=True)
    time.sleep(600)
"""


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in {"RENEW_S": 0.2, "LEASE_S": 1.5, "POLL_S": 0.02}.items():
        monkeypatch.setattr(lease, name, seconds)


def other_driver(uri: str, renew_s: float = 0.2) -> subprocess.Popen[str]:
    """Start a process that holds a folder; return when it does."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDS_IT, uri, str(renew_s)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "holds\n"
    return process


def test_a_remote_folder_is_held_by_one_driver_at_a_time(tmp_path: Path) -> None:
    folder = RunFolder.of(tmp_path.as_uri(), "r-1")
    with folder.lock(), folder.lock():  # a thread may nest
        assert folder.is_locked()
        with ThreadPoolExecutor(1) as pool:
            why = pool.submit(refused, folder).result()
        assert why.startswith(f"{folder.uri} is being run by process {os.getpid()} on ")
        assert folder.is_locked()
    assert not folder.is_locked()
    assert list((tmp_path / "r-1" / LOCK).iterdir()) == []


def refused(folder: RunFolder) -> str:
    try:
        with folder.lock():
            return ""
    except RunError as error:
        return str(error)


def test_of_many_at_once_never_two_hold_it_and_each_has_its_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "LEASE_S", 60.0)
    inside, turns = threading.Lock(), []

    def take(number: int) -> None:
        with hold(tmp_path.as_uri(), wait_s=60):
            assert inside.acquire(blocking=False), "two hold it"
            time.sleep(0.002)
            turns.append(number)
            inside.release()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(take, range(24)))
    assert sorted(turns) == list(range(24))
    assert claims_at(tmp_path.as_uri()) == []


def test_what_a_killed_driver_left_is_taken_over_when_it_is_old(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    uri = tmp_path.as_uri()
    other = other_driver(uri)
    with pytest.raises(LockedError, match=f"process {other.pid} on "), hold(uri):
        pass
    assert f"process {other.pid}" in holder_of(uri)
    other.kill()
    other.communicate()
    began = time.monotonic()
    with hold(uri):  # it does not renew: waited for, whatever is given
        assert time.monotonic() - began > 1
        assert f"process {os.getpid()}" in holder_of(uri)
    assert f"was left by process {other.pid}" in caplog.text


@pytest.mark.parametrize("hours", [-1, 1])
def test_a_machine_whose_clock_is_off_takes_nobodys_folder(tmp_path: Path, hours: int) -> None:
    uri = tmp_path.as_uri()
    other = other_driver(uri)
    program = (
        "import datetime as d, sys\nfrom simclr_ray.storage import lease\n"
        "class Off(d.datetime):\n"
        "    now = classmethod(lambda c, tz=None: d.datetime.now(tz) + d.timedelta(hours=%d))\n"
        "lease.datetime, lease.LEASE_S, lease.RENEW_S = Off, 1.5, 0.2\n"
        "with lease.hold(sys.argv[1]): pass\n"
    )
    try:
        done = subprocess.run(
            [sys.executable, "-c", program % hours, uri],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert f"LockedError: process {other.pid} on " in done.stderr
    finally:
        other.kill()
        other.communicate()


def test_a_driver_that_was_stopped_for_long_ends_where_another_has_come(tmp_path: Path) -> None:
    uri = tmp_path.as_uri()
    program = HOLDS_IT.replace("lease.RENEW_S =", "lease.LEASE_S, lease.RENEW_S = 1.5,")
    other = subprocess.Popen(
        [sys.executable, "-c", program, uri, "0.2"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert other.stdout is not None
    assert other.stdout.readline() == "holds\n"
    other.send_signal(signal.SIGSTOP)
    with hold(uri):
        other.send_signal(signal.SIGCONT)
        _, said = other.communicate(timeout=20)
        assert "KeyboardInterrupt" in said  # as by Ctrl-C: what it does is saved
        assert "was taken by another process" in said
        assert f"process {os.getpid()}" in holder_of(uri)


def test_a_store_that_failed_for_long_costs_nothing_where_nobody_came(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri, write = tmp_path.as_uri(), Lease._write
    is_down = threading.Event()

    def fails(self: Lease) -> None:
        if is_down.is_set():
            raise OSError("slow down")
        write(self)

    monkeypatch.setattr(Lease, "_write", fails)
    with hold(uri):
        is_down.set()
        time.sleep(2)
        (claim,) = claims_at(uri)
        is_down.clear()
        deadline = time.monotonic() + 10
        while claims_at(uri)[0].renewed <= claim.renewed:
            assert time.monotonic() < deadline
            time.sleep(0.05)
