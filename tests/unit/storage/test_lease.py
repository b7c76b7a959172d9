"""Two drivers of one folder in a bucket: one holds it, and what a killed one left is taken over.

`file://` is a store like another here. `tests/cluster/test_bucket_lock.py` has S3, and
`tests/ray/test_lost_lock.py` a task of Ray's. What takes a driver a minute is done by setting the
time of its claim back.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs
import pytest

from simclr_ray.config.logging import warn_once
from simclr_ray.errors import DataError, RunError
from simclr_ray.storage import lease
from simclr_ray.storage.lease import HOLDS, TAKEN, ClaimStore, Lease, claims_at, hold, holder_of
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


class Store(pafs.LocalFileSystem):  # type: ignore[misc] # pyarrow has no types
    """A store that calls `before` with the name and number of each write, before it does it."""

    def __init__(self, before: Callable[[str, int], None] | None = None) -> None:
        super().__init__()
        self.before, self.writes = before, 0

    def open_output_stream(self, path: str, *more: Any, **options: Any) -> Any:
        self.writes += 1
        if self.before is not None:
            self.before(path.rpartition("/")[2], self.writes)
        return super().open_output_stream(path, *more, **options)


class NoDeletes(Store):
    """A store that lets nobody delete."""

    def delete_file(self, path: str) -> None:
        raise PermissionError(f"{path}: AccessDenied")


class NoList(Store):
    """A store that lists nothing."""

    def get_file_info(self, paths: Any) -> Any:
        return [] if isinstance(paths, pafs.FileSelector) else super().get_file_info(paths)


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    warn_once.cache_clear()
    for name, seconds in {"RENEW_S": 0.2, "POLL_S": 0.02}.items():
        monkeypatch.setattr(lease, name, seconds)


@pytest.fixture
def by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have no thread renew a claim: a test calls `renew`."""
    monkeypatch.setattr(lease, "RENEW_S", 600.0)


def lease_on(folder: Path, store: Store | None = None) -> Lease:
    return Lease(folder.as_uri(), ClaimStore(store or Store(), str(folder)))


def set_back(folder: Path) -> None:
    """Have all claims look as old as those of drivers that were killed."""
    before = time.time() - 2 * lease.LEASE_S
    for file in (folder / LOCK).iterdir():
        os.utime(file, (before, before))


def untaken(folder: Path) -> list[str]:
    """Return the names of the claims that hold a folder, as others see it."""
    return [c.name for c in claims_at(folder.as_uri()) if c.state == HOLDS and not c.is_taken]


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
        assert folder.holder()
        with ThreadPoolExecutor(1) as pool:
            why = pool.submit(refused, folder).result()
        assert why.startswith(f"{folder.uri} is being run by process {os.getpid()} on ")
        assert folder.holder()
    assert not folder.holder()
    assert list((tmp_path / "r-1" / LOCK).iterdir()) == []


def refused(folder: RunFolder) -> str:
    try:
        with folder.lock():
            return ""
    except RunError as error:
        return str(error)


def test_of_many_at_once_never_two_hold_it_and_each_has_its_turn(
    tmp_path: Path,
) -> None:
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
    caplog.set_level("INFO")
    uri = tmp_path.as_uri()
    other = other_driver(uri)
    with pytest.raises(LockedError, match=f"process {other.pid} on "), hold(uri):
        pass
    assert f"process {other.pid}" in holder_of(uri)
    other.kill()
    other.communicate()
    with ThreadPoolExecutor(1) as pool:
        waits = pool.submit(held_by_me, uri)  # it does not renew: waited for, whatever is given
        while f"is claimed by process {other.pid}" not in caplog.text:
            assert not waits.done()
        set_back(tmp_path)
        assert waits.result(timeout=30)
    assert f"was left by process {other.pid}" in caplog.text
    assert claims_at(uri) == []


def held_by_me(uri: str) -> bool:
    with hold(uri):
        return f"process {os.getpid()}" in holder_of(uri)


def test_a_claim_is_read_whole_while_it_is_renewed(tmp_path: Path) -> None:
    store = ClaimStore(pafs.LocalFileSystem(), str(tmp_path))
    store.write("a", "holds")
    ends = threading.Event()

    def renew() -> None:
        while not ends.is_set():
            store.write("a", "holds")

    with ThreadPoolExecutor(1) as pool:
        renewing = pool.submit(renew)
        seen = {(claim.name, claim.who) for _ in range(500) for claim in store.claims()}
        ends.set()
        renewing.result()
    (seen_once,) = seen
    assert seen_once[1].startswith(f"process {os.getpid()} on ")


@pytest.mark.parametrize("hours", [-1, 1])
def test_a_machine_whose_clock_is_off_takes_nobodys_folder(tmp_path: Path, hours: int) -> None:
    uri = tmp_path.as_uri()
    other = other_driver(uri)
    program = (
        "import datetime as d, sys\nfrom simclr_ray.storage import lease\n"
        "class Off(d.datetime):\n"
        "    now = classmethod(lambda c, tz=None: d.datetime.now(tz) + d.timedelta(hours=%d))\n"
        "lease.datetime, lease.RENEW_S = Off, 0.2\n"
        "print(lease.holder_of(sys.argv[1]))\n"
        "with lease.hold(sys.argv[1]): pass\n"
    )
    try:
        done = subprocess.run(
            [sys.executable, "-c", program % hours, uri],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert f"process {other.pid} on " in done.stdout
        assert f"LockedError: process {other.pid} on " in done.stderr
    finally:
        other.kill()
        other.communicate()
    set_back(tmp_path)
    assert holder_of(uri) == ""


def test_where_the_store_s_clock_cannot_be_had_this_machine_s_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError("AccessDenied")

    with hold(tmp_path.as_uri()):
        seen = ClaimStore(Store(refuse), str(tmp_path)).holder()
    assert f"process {os.getpid()}" in seen
    assert "by this machine's clock" in caplog.text
    assert "AccessDenied" in caplog.text


def test_a_driver_that_was_stopped_for_long_ends_where_another_has_come(tmp_path: Path) -> None:
    uri = tmp_path.as_uri()
    other = subprocess.Popen(
        [sys.executable, "-c", HOLDS_IT, uri, "0.2"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert other.stdout is not None
    assert other.stdout.readline() == "holds\n"
    other.send_signal(signal.SIGSTOP)
    set_back(tmp_path)
    with hold(uri):
        other.send_signal(signal.SIGCONT)
        try:
            _, said = other.communicate(timeout=60)
        finally:
            other.kill()
        assert "KeyboardInterrupt" in said  # as by Ctrl-C
        assert f"RunError: {uri} was taken over by process {os.getpid()} on " in said
        assert f"process {os.getpid()}" in holder_of(uri)
    assert claims_at(uri) == []


def test_a_block_in_another_thread_fails_at_its_end_where_the_folder_was_lost(
    tmp_path: Path,
) -> None:
    uri = tmp_path.as_uri()
    inside, taken = threading.Event(), threading.Event()

    def work() -> bool:
        with hold(uri):
            inside.set()
            assert taken.wait(30)
            deadline = time.monotonic() + 30
            while not lease.is_lost(uri) and time.monotonic() < deadline:
                pass
            return True

    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(work)
        assert inside.wait(30)
        (claim,) = claims_at(uri)
        ClaimStore.of(uri).take(claim.name)
        taken.set()
        with pytest.raises(RunError, match=f"taken over by process {os.getpid()} on "):
            done.result()


@pytest.mark.usefixtures("by_hand")
def test_a_renewal_that_arrives_after_a_take_over_holds_nothing(tmp_path: Path) -> None:
    second = lease_on(tmp_path)

    def delay(_: str, number: int) -> None:
        if number == 3:  # wants, holds, and the first renewal
            set_back(tmp_path)
            second.acquire(0)

    first = lease_on(tmp_path, Store(delay))
    first.acquire(0)
    first.renew()
    assert {c.name for c in claims_at(tmp_path.as_uri())} == {first.name, second.name}
    assert f"process {os.getpid()}" in first.lost
    assert untaken(tmp_path) == [second.name]
    second.renew()
    assert not second.lost
    third = lease_on(tmp_path)
    set_back(tmp_path)
    third.acquire(0)
    assert untaken(tmp_path) == [third.name]
    for ended in (first, second, third):
        ended.release()
    assert claims_at(tmp_path.as_uri()) == []


@pytest.mark.usefixtures("by_hand")
def test_a_driver_that_slept_writes_nothing_after_a_take_over(tmp_path: Path) -> None:
    first, second = lease_on(tmp_path), lease_on(tmp_path)
    first.acquire(0)
    set_back(tmp_path)
    second.acquire(0)
    first.renew()
    assert first.lost
    assert [c.name for c in claims_at(tmp_path.as_uri())] == [second.name]


@pytest.mark.usefixtures("by_hand")
def test_one_that_renews_while_it_is_taken_over_is_waited_for_until_it_ends(
    tmp_path: Path,
) -> None:
    first = lease_on(tmp_path)

    def wake(name: str, _: int) -> None:
        if name.endswith(TAKEN):
            first.renew()

    second = lease_on(tmp_path, Store(wake))
    first.acquire(0)
    set_back(tmp_path)
    for _ in range(3):
        assert [c.name for c in second.rivals() or ()] == [first.name]
    first.renew()
    assert first.lost
    assert second.rivals()  # it lives, and ends now
    first.release()
    assert second.rivals() is None
    assert untaken(tmp_path) == [second.name]


@pytest.mark.usefixtures("by_hand")
def test_one_that_stands_still_between_looking_and_holding_does_not_hold(tmp_path: Path) -> None:
    second = lease_on(tmp_path)

    def stall(_: str, number: int) -> None:
        if number == 2:  # it wants, has found nobody, and is about to hold
            set_back(tmp_path)
            second.acquire(0)

    first = lease_on(tmp_path, Store(stall))
    name = first.name
    assert first.rivals() == []
    assert untaken(tmp_path) == [second.name]
    assert first.rivals() == []  # and begins anew
    assert first.name != name
    assert [c.name for c in first.rivals() or ()] == [second.name]


def test_where_nothing_may_be_deleted_it_is_said_and_a_folder_is_taken_over_all_the_same(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    left = lease_on(tmp_path)
    left.store.write(left.name, HOLDS)
    set_back(tmp_path)
    store = NoDeletes()
    with_no_deletes = lease_on(tmp_path, store)
    with_no_deletes.acquire(0)
    assert untaken(tmp_path) == [with_no_deletes.name]
    assert store.writes <= 5
    with_no_deletes.release()
    assert "permit to delete what lies there" in caplog.text
    set_back(tmp_path)
    with hold(tmp_path.as_uri()):
        assert len(untaken(tmp_path)) == 1


def test_a_store_that_does_not_list_what_was_written_locks_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "LEASE_S", 0.1)
    store = NoList()
    with pytest.raises(RunError, match="cannot be locked: its store lists nothing"):
        lease_on(tmp_path, store).acquire(0)
    assert store.writes < 30


def test_a_claim_that_cannot_be_completed_is_removed(tmp_path: Path) -> None:
    def refuse(_: str, number: int) -> None:
        if number == 2:
            raise OSError("slow down")

    with pytest.raises(OSError, match="slow down"):
        lease_on(tmp_path, Store(refuse)).acquire(0)
    assert claims_at(tmp_path.as_uri()) == []


def test_a_claim_that_cannot_be_read_counts_as_a_holder_s(tmp_path: Path) -> None:
    (tmp_path / LOCK).mkdir()
    (tmp_path / LOCK / "0").write_text("[")
    assert holder_of(tmp_path.as_uri()) == "another process"
    (rival,) = lease_on(tmp_path).rivals() or ()
    assert rival.state == HOLDS


def test_a_store_that_failed_for_long_is_said_once_and_costs_nothing_where_nobody_came(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(lease, "RENEW_S", 0.01)
    monkeypatch.setattr(lease, "LEASE_S", 0.1)
    is_down, failed = threading.Event(), []

    def fail(*_: object) -> None:
        if is_down.is_set():
            failed.append(1)
            raise DataError("no credentials")  # not an `OSError`

    held = lease_on(tmp_path, Store(fail))
    held.acquire(0)
    is_down.set()
    deadline = time.monotonic() + 30
    while len(failed) < 20:
        assert time.monotonic() < deadline
    (claim,) = claims_at(tmp_path.as_uri())
    is_down.clear()
    while claims_at(tmp_path.as_uri())[0].renewed <= claim.renewed:
        assert time.monotonic() < deadline
    held.release()
    assert not held.lost
    assert caplog.text.count("could not be renewed for ") == 1
    assert "no credentials" in caplog.text
