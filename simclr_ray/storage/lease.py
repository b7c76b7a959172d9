"""The lock of a run folder in a bucket: one driver at a time, by claims that are renewed.

pyarrow, by which all buckets are opened here, has no conditional writes, so that the lock needs
none; it needs listings that show what was written before, which S3, GCS, Azure, HDFS and MinIO
promise. All lies below `lock/` of the folder:

- `<id>`, a claim, of one driver and written by that alone. It `wants` the folder, then `holds` it.
- `<id>.taken` says that a claim counts no more. It stays there: a claim that a slow request writes
  once more after that is still one that was taken.

To take the folder a driver writes its claim and lists all. Where nobody else's is there it writes
that it holds, lists again, and holds where its claim is there and was not taken. Of two that come
at once the one that lists later sees the other. The holder renews its claim every `RENEW_S`, and
lists before and after: where the claim was taken or is gone it has lost the folder, and ends.

A claim that was not renewed for `LEASE_S`, by the times that the store gave both, is of a driver
that was killed or is cut off. Who comes marks it as taken, lists again, and passes it only where it
is taken and still as old: one that was renewed meanwhile is of a driver that lives and is given the
time to learn of it and end. So two go on at once only where the older one could not reach the store
for `LEASE_S`, or stood still; at most until `RENEW_S` after it can.
"""

from __future__ import annotations

import _thread
import json
import logging
import platform
import signal
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from typing import Any, Final, NamedTuple

import pyarrow.fs as pafs

from simclr_ray.config.logging import warn_once
from simclr_ray.errors import RunError, one_line
from simclr_ray.storage.filesystem import (
    address_below,
    entries_in,
    filesystem,
    is_local,
    remove_file,
)
from simclr_ray.storage.run_lock import LOCK, LockedError, this_process

RENEW_S: Final = 15.0
LEASE_S: Final = 60.0
POLL_S: Final = 1.0
# Until a claim that is left there, renewed just before, is old, was taken and is old once more.
MOST_LEASES: Final = 3
HOLDS, WANTS = "holds", "wants"
TAKEN, CLOCK = ".taken", ".clock"  # ends of names of what is no claim
HIDDEN: Final = "."  # begins the name of a file that is being written to a disk
log = logging.getLogger(__name__)
_mine: dict[tuple[str, int], Lease] = {}  # by folder and thread


class Claim(NamedTuple):
    """A claim of whoever holds a folder or wants it."""

    name: str
    renewed: datetime  # by the store's clock
    state: str
    who: str
    is_taken: bool

    def is_old(self, now: datetime) -> bool:
        """Return whether it was last renewed too long before a time of the store's clock."""
        return now - self.renewed > timedelta(seconds=LEASE_S)


@contextmanager
def hold(uri: str, wait_s: float = 0.0) -> Iterator[None]:
    """Hold the folder at a URI while the block runs; a thread may nest blocks.

    A holder that does not renew its claim is waited for until that is old enough to be taken,
    however short `wait_s`; one that does is told from it within `RENEW_S`. A block in the main
    thread is interrupted where the folder is lost.

    Raises:
        LockedError: Another process holds it, and still does after `wait_s` seconds.
        RunError: Another process has taken the folder since; or the store lists no claims.
        OSError: The store takes no claim.
    """
    key = (uri, threading.get_ident())
    if key in _mine:
        yield
        return
    lease = Lease(uri)
    lease.acquire(wait_s)
    _mine[key] = lease
    try:
        yield
        lease.check()
    except BaseException:  # an interrupt, and what other code makes of one
        lease.check()
        raise
    finally:
        del _mine[key]
        lease.release()


def is_lost(uri: str) -> bool:
    """Return whether this process held the folder at a URI and another one has taken it."""
    return any(bool(lease.lost) for (held, _), lease in list(_mine.items()) if held == uri)


def holder_of(uri: str) -> str:
    """Return who holds the folder at a URI, or nothing, as `ClaimStore.holder` does."""
    return ClaimStore.of(uri).holder()


def claims_at(uri: str) -> list[Claim]:
    """Return the claims on the folder at a URI."""
    return ClaimStore.of(uri).claims()


class ClaimStore:
    """The files below `lock/` of a folder."""

    def __init__(self, files: pafs.FileSystem, root: str) -> None:
        self.files, self.place = files, f"{root}/{LOCK}"

    @classmethod
    def of(cls, uri: str) -> ClaimStore:
        """Return the store of the folder at a URI; raise `DataError` where it cannot be opened."""
        return cls(*filesystem(uri))

    def claims(self) -> list[Claim]:
        """Return the claims; one that cannot be read counts as a holder's."""
        entries = [entry for entry in entries_in(self.files, self.place) if entry.is_file]
        names = {entry.base_name for entry in entries}
        claims = []
        for entry in entries:
            name = entry.base_name
            if not (name.endswith((TAKEN, CLOCK)) or name.startswith(HIDDEN)):
                with suppress(FileNotFoundError):  # gone again
                    claims.append(self._read(entry, is_taken=entry.base_name + TAKEN in names))
        return claims

    def _read(self, entry: pafs.FileInfo, *, is_taken: bool) -> Claim:
        tree: Any = None
        try:
            with self.files.open_input_stream(entry.path) as stream:
                tree = json.loads(stream.read())
        except FileNotFoundError:
            raise
        except (OSError, ValueError) as error:
            log.debug("%s cannot be read: %s", entry.path, one_line(error))
        tree = tree if isinstance(tree, dict) else {}
        state, who = str(tree.get("state", HOLDS)), str(tree.get("who", "another process"))
        return Claim(entry.base_name, entry.mtime or datetime.now(UTC), state, who, is_taken)

    def has(self, name: str) -> bool:
        """Return whether a claim is there and was not taken."""
        names = {entry.base_name for entry in entries_in(self.files, self.place)}
        return name in names and name + TAKEN not in names

    def write(self, name: str, state: str) -> None:
        """Write a claim of this process."""
        self._put(name, {"state": state, "who": this_process()})

    def take(self, name: str) -> None:
        """Say that a claim counts no more, and for whom."""
        self._put(name + TAKEN, {"who": this_process()})

    def taker_of(self, name: str) -> str:
        """Return who has taken a claim, as far as that can be read."""
        path = f"{self.place}/{name}{TAKEN}"
        unreadable = suppress(OSError, ValueError, KeyError, TypeError)
        with unreadable, self.files.open_input_stream(path) as stream:
            return str(json.loads(stream.read())["who"])
        return "another process, which has removed the claim of this one"

    def remove(self, name: str) -> None:
        """Remove a claim, if it is there."""
        remove_file(self.files, f"{self.place}/{name}")

    def holder(self) -> str:
        """Return who holds the folder, or nothing.

        How old a claim is, is told by the store's clock, read off a file that is written beside it
        and removed. Where that cannot be written this machine's clock is taken, and that is said.
        """
        holders = [claim for claim in self.claims() if claim.state == HOLDS]
        if not holders:
            return ""
        try:
            now = self.now()
        except OSError as error:
            now = datetime.now(UTC)
            why = f"nothing can be written there ({one_line(error)})"
            warn_once(log, f"{self.place}: ages of claims are by this machine's clock, since {why}")
        return next((claim.who for claim in holders if not claim.is_old(now)), "")

    def now(self) -> datetime:
        """Return the time by the store's clock; raise `OSError` where it takes no file."""
        name = f"{platform.node()}{CLOCK}"
        self._put(name, {})
        written: datetime | None = self.files.get_file_info(f"{self.place}/{name}").mtime
        with suppress(OSError):  # the next time it is written anew
            self.remove(name)
        if written is None:
            raise OSError(f"{self.place}/{name} has no time")
        return written

    def _put(self, name: str, tree: dict[str, str]) -> None:
        path, is_disk = f"{self.place}/{name}", is_local(self.files)
        if is_disk:  # a bucket has no folders
            self.files.create_dir(self.place, recursive=True)
        # On a disk a file is seen while it is written, and half of a claim names nobody.
        beside = f"{self.place}/{HIDDEN}{uuid.uuid4().hex}.{name}" if is_disk else path
        try:
            with self.files.open_output_stream(beside) as stream:
                stream.write(json.dumps(tree).encode())
            if is_disk:
                self.files.move(beside, path)
        except BaseException:
            if is_disk:
                with suppress(OSError):
                    remove_file(self.files, beside)
            raise


class Lease:
    """A claim of this process on a folder, and the thread that renews it.

    Attributes:
        lost: By whom the claim was taken; empty while it holds.
    """

    def __init__(self, uri: str, store: ClaimStore | None = None) -> None:
        self.uri, self.store = uri, store or ClaimStore.of(uri)
        self.name, self.lost = uuid.uuid4().hex, ""
        self._is_over = threading.Event()
        self._holder = threading.current_thread()
        # as in a task of Ray's, where a signal would stay pending
        self._is_deaf = signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ())
        self._thread: threading.Thread | None = None

    def acquire(self, wait_s: float) -> None:
        """Hold the folder, or raise as `hold` does."""
        began, first_seen = time.monotonic(), dict[str, datetime]()
        try:
            while (rivals := self.rivals()) is not None:
                self._refuse(rivals, first_seen, time.monotonic() - began, wait_s)
                time.sleep(POLL_S)
        except BaseException:
            self._withdraw()
            raise
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)
        self._thread.start()

    def _refuse(
        self, rivals: Sequence[Claim], seen: dict[str, datetime], waited: float, wait_s: float
    ) -> None:
        """Raise where the folder is not to be had: its holder lives, or nothing goes on."""
        holders = [claim for claim in rivals if claim.state == HOLDS]
        for claim in holders:
            if claim.name not in seen:
                log.info("%s is claimed by %s", self.uri, claim.who)
            seen.setdefault(claim.name, claim.renewed)
        renews = any(seen[c.name] < c.renewed and not c.is_taken for c in holders)
        if waited < wait_s or not (renews or waited > MOST_LEASES * LEASE_S):
            return
        if rivals:
            raise LockedError((holders or rivals)[0].who)
        raise RunError(f"{self.uri} cannot be locked: its store lists nothing written just before")

    def rivals(self) -> Sequence[Claim] | None:
        """Try to hold the folder; return the claims that stand against it, or None where it does.

        There are none where the own claim is not listed, or was taken while this process stood
        still: it is to be tried again.
        """
        self.store.write(self.name, WANTS)
        claims = self.store.claims()
        own = next((claim for claim in claims if claim.name == self.name), None)
        if own is None:
            return []
        if own.is_taken:
            self._withdraw()
            self.name = uuid.uuid4().hex
            return []
        others = [c for c in claims if c.name != self.name]
        rivals = [c for c in others if not self._passes(c, own.renewed)]
        if not rivals:
            self.store.write(self.name, HOLDS)
            return None if self.store.has(self.name) else []
        if min(rivals).name < self.name or any(claim.state == HOLDS for claim in rivals):
            self._withdraw()  # of two that only want it, the first by name stays
        return rivals

    def _passes(self, claim: Claim, now: datetime) -> bool:
        """Return whether a claim of another counts no more; see to it where it is old."""
        if not claim.is_old(now):
            return False
        if claim.is_taken:
            with suppress(OSError):  # it stays, and is passed again
                self.store.remove(claim.name)
            return True
        log.warning("%s was left by %s; it is taken over", self.uri, claim.who)
        self.store.take(claim.name)
        return False  # it may have been renewed meanwhile

    def release(self) -> None:
        """Let go of the folder."""
        self._is_over.set()
        if self._thread is not None:
            self._thread.join()
        self._withdraw()

    def check(self) -> None:
        """Raise `RunError` where another process has taken the folder."""
        if self.lost:
            raise RunError(
                f"{self.uri} was taken over by {self.lost}: for {LEASE_S:.0f} s this one had not "
                "renewed its claim, as where the store does not answer or the machine sleeps"
            )

    def renew(self) -> None:
        """Renew the claim, and note where it was taken, before that or on its way."""
        if self.store.has(self.name):
            self.store.write(self.name, HOLDS)
        if not self.store.has(self.name):
            self.lost = self.store.taker_of(self.name)

    def _keep(self) -> None:
        """Renew the claim until it is over, or lost."""
        renewed_at, is_late = time.monotonic(), False
        while not self._is_over.wait(RENEW_S):
            try:
                self.renew()
                renewed_at, is_late = time.monotonic(), False
            except Exception as error:  # noqa: BLE001 - whatever it is, it may be over next time
                log.debug("the claim on %s is not renewed: %s", self.uri, one_line(error))
                if not is_late and time.monotonic() - renewed_at > LEASE_S / 2:
                    is_late = True
                    log.warning(
                        "the claim on %s could not be renewed for %.0f s (%s); after %.0f s "
                        "another driver may take it", self.uri,
                        time.monotonic() - renewed_at, one_line(error), LEASE_S,
                    )  # fmt: skip
            if self.lost:
                log.warning("%s was taken over by %s; this one ends", self.uri, self.lost)
                self._interrupt()
                return

    def _interrupt(self) -> None:
        """Interrupt who holds the folder, as Ctrl-C does; only a main thread can be."""
        if self._holder is not threading.main_thread():
            return
        if self._is_deaf:
            _thread.interrupt_main()
        elif self._holder.ident is not None:  # this one ends a wait in the system as well
            signal.pthread_kill(self._holder.ident, signal.SIGINT)

    def _withdraw(self) -> None:
        """Remove the claim of this process; one that stays is old in a minute."""
        try:
            self.store.remove(self.name)
        except OSError as error:
            warn_once(
                log,
                f"a claim of this driver stays in {address_below(self.uri, LOCK)}, and the next "
                f"one waits for {LEASE_S:.0f} s ({one_line(error)}); permit to delete what lies "
                "there",
            )
