"""Space on the disks that a run writes to, and one line for a disk that takes no more.

The system's own errors name neither the place (a write knows no path) nor how much is missing.
"""

from __future__ import annotations

import errno
import os
import re
import resource
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final, NamedTuple

from simclr_ray.config.wording import GIB, MIB
from simclr_ray.errors import StorageDeniedError, StorageError

FULL: Final = (errno.ENOSPC, errno.EDQUOT)
MANY_FILES: Final = (errno.EMFILE, errno.ENFILE)
DENIED: Final = (errno.EACCES, errno.EPERM)
# Of the disk, whatever is written: others may be of one file, and of reading it.
OF_THE_DISK: Final = (*FULL, *MANY_FILES, errno.EROFS)
# What a disk or its owner can mend, after which the same command goes on: problem and remedy.
MENDABLE: Final = {
    errno.ENOSPC: ("no space left", "make room there"),
    errno.EDQUOT: ("the quota is used up", "make room there"),
    errno.EROFS: ("the file system is read-only", "have it writable"),
    errno.EACCES: ("permission to write is denied", "have it permitted"),
    errno.EPERM: ("writing is not permitted", "have it permitted"),
    errno.EMFILE: ("too many open files", "raise the limit (ulimit -n)"),
    errno.ENFILE: ("too many open files on this machine", "close some"),
    errno.EIO: ("the disk fails (input/output error)", "look at the disk"),
    errno.ESTALE: ("the mount is stale", "mount it again"),
}
# Arrow and safetensors raise errors of their own, and SQLite one without a number.
_NUMBER: Final = re.compile(r"\b(?:os error|errno) (\d+)", re.IGNORECASE)
_SQLITE_FULL: Final = "database or disk is full"


class Space(NamedTuple):
    """What a disk takes more of, for this user."""

    free: int  # bytes
    files: int | None  # None: their number is not limited


def space_at(path: str | Path) -> Space:
    """Return the space on the disk of a local path, which need not be there.

    Raises:
        OSError: The disk cannot be asked.
    """
    above = Path(path).absolute()
    while not above.exists() and above != above.parent:
        above = above.parent
    stat = os.statvfs(above)
    return Space(stat.f_bavail * stat.f_frsize, stat.f_favail if stat.f_files else None)


def bytes_in(folder: Path) -> int:
    """Return the bytes of the files in a folder; those that go meanwhile count for nothing."""
    total = 0
    for path in folder.rglob("*"):
        with suppress(OSError):
            total += path.stat().st_size if path.is_file() else 0
    return total


def sized(number: int) -> str:
    """Return bytes in words: `12 MiB`, `1.5 GiB`."""
    return f"{number / GIB:,.1f} GiB" if number >= GIB else f"{number / MIB:,.1f} MiB"


def error_number(error: BaseException) -> int:
    """Return the system's number of an error, also of one that only tells it; 0: it has none."""
    number = getattr(error, "errno", None)
    if isinstance(number, int):
        return number
    match = _NUMBER.search(str(error))
    if match:
        return int(match[1])
    return errno.ENOSPC if _SQLITE_FULL in str(error) else 0


def storage_error(error: BaseException, place: str | Path, needed: int = 0) -> StorageError | None:
    """Return an error of the system as a line: place, problem, space, remedy; None for others.

    Args:
        error: As it was raised.
        place: Path or URI that was written to, where the error names none.
        needed: Bytes that were to be written; 0: it is not known.
    """
    number = error_number(error)
    if number not in MENDABLE:
        return None
    problem, remedy = MENDABLE[number]
    where = str(getattr(error, "filename", None) or place)
    if number in MANY_FILES:
        most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        return StorageError(f"{where}: {problem}, this process may have {most:,}; {remedy}")
    if number in FULL:
        where, amounts = _fullest(where, error, needed)
        problem += amounts
        if where == tempfile.gettempdir():
            remedy += ", or set TMPDIR"
    kind = StorageDeniedError if number in DENIED else StorageError
    return kind(f"{where}: {problem}; {remedy}")


@contextmanager
def writing(
    place: str | Path, needed: int = 0, numbers: Collection[int] = tuple(MENDABLE)
) -> Iterator[None]:
    """Have what a disk does not take while the block runs raised as `StorageError`.

    Args:
        place: As for `storage_error`.
        needed: As for `storage_error`.
        numbers: Of errors that are meant; all others pass.
    """
    try:
        yield
    except StorageError:
        raise
    except Exception as error:
        explained = storage_error(error, place, needed) if error_number(error) in numbers else None
        if explained is None:
            raise
        raise explained from error


def _fullest(where: str, error: BaseException, needed: int) -> tuple[str, str]:
    """Return the place that is full, and its space in words; a bucket's is not known.

    An error without a path may be of the temporary folder, where much is written first.
    """
    spaces = []
    for place in (where, "" if getattr(error, "filename", None) else tempfile.gettempdir()):
        with suppress(OSError):
            if place and "://" not in place:
                spaces.append((space_at(place), place))
    wanted = [f"{sized(needed)} needed"] if needed else []
    space, fullest = min(spaces, key=lambda pair: pair[0].free, default=(None, where))
    if space is None or ("://" in where and space.free > max(needed, MIB)):
        return where, f" ({wanted[0]})" if wanted else ""
    no_files = ["no more files can be made"] if space.files == 0 else []
    return fullest, f" ({', '.join([f'{sized(space.free)} free', *wanted, *no_files])})"
