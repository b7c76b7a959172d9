"""The lock of a run folder in a bucket: one driver at a time, by claims that are renewed.

pyarrow, by which all buckets are opened here, has no conditional writes, so that the lock needs
none. Whoever wants the folder writes a claim of its own below `lock/`, then lists the claims, and
holds the folder where nobody else's is there. Of two that come at once the one that lists later
sees the other, in a store whose listings show all that was written before: S3, GCS, Azure, HDFS and
MinIO promise it.

A claim is renewed every `RENEW_S`. One that was not for `LEASE_S` is of a process that was killed,
or is cut off, and is taken away; so old is a claim by times that the store itself gave, so that no
machine's clock counts. A holder that could not renew its own for so long goes on only where nobody
has come meanwhile. What it writes between the last renewal and then may meet a new holder's.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import signal
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from typing import Final, NamedTuple

import pyarrow.fs as pafs

from simclr_ray.storage.filesystem import filesystem, one_line
from simclr_ray.storage.run_lock import LOCK, LockedError

RENEW_S: Final = 15.0
LEASE_S: Final = 60.0
POLL_S: Final = 1.0
HOLDS, WANTS = "holds", "wants"
log = logging.getLogger(__name__)
_mine: set[tuple[str, int]] = set()  # folders that threads of this process hold


class Claim(NamedTuple):
    """A claim of whoever holds a folder or wants it."""

    name: str
    renewed: datetime  # by the store's clock
    state: str
    who: str


@contextmanager
def hold(uri: str, wait_s: float = 0.0) -> Iterator[None]:
    """Hold the folder at a URI while the block runs; a thread may nest blocks.

    A holder that does not renew its claim is waited for until that is old enough to be taken away,
    however short `wait_s`; one that does is told from it within `RENEW_S`.

    Raises:
        LockedError: Another process holds it, and still does after `wait_s` seconds.
        OSError: The store takes no claim.
    """
    key = (uri, threading.get_ident())
    if key in _mine:
        yield
        return
    lease = Lease(uri)
    lease.acquire(wait_s)
    _mine.add(key)
    try:
        yield
    finally:
        _mine.discard(key)
        lease.release()


def holder_of(uri: str) -> str:
    """Return who holds the folder at a URI, or nothing. Only looks, by this machine's clock."""
    now = datetime.now(UTC)
    fresh = [c for c in claims_at(uri) if now - c.renewed < timedelta(seconds=2 * LEASE_S)]
    return next((claim.who for claim in fresh if claim.state == HOLDS), "")


def claims_at(uri: str) -> list[Claim]:
    """Return the claims on the folder at a URI."""
    files, root = filesystem(uri)
    entries = files.get_file_info(pafs.FileSelector(f"{root}/{LOCK}", allow_not_found=True))
    return [_read(files, entry) for entry in entries if entry.is_file]


def _read(files: pafs.FileSystem, entry: pafs.FileInfo) -> Claim:
    tree = {}
    # gone again, or half written
    with suppress(OSError, ValueError), files.open_input_stream(entry.path) as stream:
        tree = json.loads(stream.read())
    renewed = entry.mtime or datetime.now(UTC)
    state, who = str(tree.get("state", WANTS)), str(tree.get("who", "another process"))
    return Claim(entry.base_name, renewed, state, who)


class Lease:
    """A claim of this process on a folder, and the thread that renews it."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.name = uuid.uuid4().hex
        self._state = WANTS
        self._renewed_at = 0.0
        self._is_over = threading.Event()
        self._thread: threading.Thread | None = None

    def acquire(self, wait_s: float) -> None:
        """Hold the folder, or raise `LockedError` with who does."""
        began, first_seen = time.monotonic(), dict[str, datetime]()
        try:
            while rivals := self._rivals():
                holders = [claim for claim in rivals if claim.state == HOLDS]
                for claim in holders:
                    if claim.name not in first_seen:
                        log.info("%s is claimed by %s", self.uri, claim.who)
                    first_seen.setdefault(claim.name, claim.renewed)
                renews = any(first_seen[claim.name] < claim.renewed for claim in holders)
                if holders or min(claim.name for claim in rivals) < self.name:
                    self._remove(self.name)  # of two that only want it, the first by name stays
                waited = time.monotonic() - began
                if waited >= wait_s and (renews or waited > 2 * LEASE_S):
                    raise LockedError((holders or rivals)[0].who)
                time.sleep(POLL_S)
        except BaseException:
            self._remove(self.name)
            raise
        self._state = HOLDS
        self._write()
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Let go of the folder."""
        self._is_over.set()
        if self._thread is not None:
            self._thread.join()
        self._remove(self.name)

    def _rivals(self) -> list[Claim]:
        """Write the claim; return those of others, after those that are too old are taken away."""
        while True:
            self._write()
            claims = claims_at(self.uri)
            own = [claim for claim in claims if claim.name == self.name]
            others = [claim for claim in claims if claim.name != self.name]
            old = [c for c in others if own and _is_old(c, own[0])]
            for claim in old:
                log.warning("%s was left by %s; it is taken over", self.uri, claim.who)
                self._remove(claim.name)
            if own and not old:  # else they have come or gone meanwhile: look again
                return others

    def _keep(self) -> None:
        """Renew the claim until it is over, or lost."""
        while not self._is_over.wait(RENEW_S):
            try:
                if time.monotonic() - self._renewed_at > LEASE_S and self._is_lost():
                    log.error("%s was taken by another process; this one ends", self.uri)
                    os.kill(os.getpid(), signal.SIGINT)  # as Ctrl-C: what there is is saved
                    return
                self._write()
            except OSError as error:  # a store that does not answer now
                log.debug("the claim on %s is not renewed: %s", self.uri, one_line(error))

    def _is_lost(self) -> bool:
        """Return whether another process has come since the claim was renewed."""
        claims = claims_at(self.uri)
        is_there = any(claim.name == self.name for claim in claims)
        return not is_there or any(c.name != self.name and c.state == HOLDS for c in claims)

    def _write(self) -> None:
        files, root = filesystem(self.uri)
        who = f"process {os.getpid()} on {platform.node()}"
        if isinstance(files, pafs.LocalFileSystem):
            files.create_dir(f"{root}/{LOCK}", recursive=True)
        with files.open_output_stream(f"{root}/{LOCK}/{self.name}") as stream:
            stream.write(json.dumps({"state": self._state, "who": who}).encode())
        self._renewed_at = time.monotonic()

    def _remove(self, name: str) -> None:
        files, root = filesystem(self.uri)
        with suppress(OSError):  # it is gone, or counts as old in a minute
            files.delete_file(f"{root}/{LOCK}/{name}")


def _is_old(claim: Claim, own: Claim) -> bool:
    """Return whether a claim was last renewed too long before one that was just written."""
    return own.renewed - claim.renewed > timedelta(seconds=LEASE_S)
