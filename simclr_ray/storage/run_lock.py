"""The lock of a local run folder: one driver at a time, freed by the kernel when its process ends.

`filelock` holds the file `lock`; who holds it stands in `lock.holder` beside it, since a waiting
process may open, and with some releases of filelock truncate, the locked file itself. The holder's
text is removed with the lock, so that to look at a folder nobody runs touches no lock at all.
"""

from __future__ import annotations

import errno
import logging
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from filelock import FileLock, Timeout

from simclr_ray.errors import RunError, one_line
from simclr_ray.storage.space import storage_error

LOCK, HOLDER = "lock", "lock.holder"
POLL_S = 0.5
NO_LOCKS: Final = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOLCK)
log = logging.getLogger(__name__)


class LockedError(Exception):
    """Another process holds the lock; the text names it: `process PID on HOST`."""


def is_seen(folder: Path, holder: str, wait_s: float = 0.0) -> bool:
    """Return whether `folder` is the one whose lock a process holds, or is by the end of a wait.

    Args:
        folder: As this machine has it.
        holder: As `text_of` gives it on the machine of the process.
        wait_s: A client of NFS may remember for some seconds that there was no such file.
    """
    deadline = time.monotonic() + wait_s
    while text_of(folder) != holder:
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_S)
    return True


def text_of(folder: Path) -> str:
    """Return the holder's text in `folder`, or nothing; whether it lives is not looked at."""
    with suppress(OSError):
        return (folder / HOLDER).read_text(encoding="utf-8")
    return ""


@contextmanager
def hold(folder: Path, wait_s: float = 0.0) -> Iterator[None]:
    """Hold the lock of `folder`, which is made, while the block runs; a thread may nest blocks.

    On a file system that knows no locks nothing is held, as nobody else could hold it either.

    Raises:
        LockedError: Another process holds it, and still does after `wait_s` seconds.
    """
    above = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    lock, holder = FileLock(folder / LOCK, is_singleton=True), folder / HOLDER
    if lock.is_locked:  # by this thread: others have a state of their own
        yield
        return
    if not _acquires(lock, 0.0):
        if wait_s:
            log.warning("%s is held by %s; waiting %g s", folder, _text(holder), wait_s)
        if not wait_s or not _acquires(lock, wait_s):
            raise LockedError(_text(holder))
    try:
        holder.write_text(this_process(), encoding="utf-8")
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()
        with suppress(OSError):  # it may have been moved meanwhile
            if above and {entry.name for entry in folder.iterdir()} <= {LOCK}:
                (folder / LOCK).unlink(missing_ok=True)  # what was refused leaves nothing behind
                for place in above:
                    place.rmdir()


def this_process() -> str:
    """Return what this process is called where it holds something."""
    return f"process {os.getpid()} on {platform.node()}"


def holder_of(folder: Path) -> str:
    """Return who holds the lock of `folder`, or nothing.

    A holder's text without a lock is what a killed process left behind. To find that out takes the
    lock for an instant, once: the text is removed then. A user who may not write there is told the
    text as it stands.
    """
    holder = folder / HOLDER
    if not holder.exists():
        return ""
    lock = FileLock(folder / LOCK)
    try:
        if not _acquires(lock, 0.0):
            return _text(holder)
        try:
            holder.unlink(missing_ok=True)
        finally:
            lock.release()
    except (PermissionError, RunError):
        return _text(holder)
    return ""


def _acquires(lock: FileLock, wait_s: float) -> bool:
    """Return whether the lock could be taken within `wait_s`."""
    try:
        lock.acquire(timeout=wait_s, poll_interval=POLL_S)
    except Timeout:
        return False
    except PermissionError:
        raise
    except OSError as error:
        if error.errno not in NO_LOCKS:  # of a disk or server that fails now, and has locks
            problem = f"{lock.lock_file} cannot be locked: {error.strerror or one_line(error)}"
            raise storage_error(error, lock.lock_file) or RunError(problem) from error
        log.warning("%s: its file system knows no locks; two drivers may meet", lock.lock_file)
    return True


def _text(holder: Path) -> str:
    """Return the holder's text; between lock and text there are some microseconds."""
    try:
        return holder.read_text(encoding="utf-8") or "another process"
    except FileNotFoundError:
        return "another process"
