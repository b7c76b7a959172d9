"""What this process may use of its machine: cores, memory, shared memory; container limits count.

A container or job sees all cores and all memory of its machine. What it may take of them its
control groups say, of which each one on the way to the root sets a limit of its own.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

CGROUPS: Final = Path("/sys/fs/cgroup")
OWN_GROUPS: Final = Path("/proc/self/cgroup")
SHARED: Final = Path("/dev/shm")  # nosec B108 # noqa: S108 - looked at only


def cores() -> int:
    """Return the cores that this process may use: by its affinity and its container's CPU limit."""
    if hasattr(os, "sched_getaffinity"):
        there = len(os.sched_getaffinity(0))
    else:
        there = os.cpu_count() or 1
    return max(1, min([there, *map(int, _cpu_limits())]))


def machine_memory() -> int:
    """Return the bytes of memory that this process may use: the machine's or its container's."""
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([whole, *_memory_limits()])


def free_shared_memory() -> int | None:
    """Return the bytes that are free in /dev/shm; None: there is none."""
    try:
        of = os.statvfs(SHARED)
    except OSError:
        return None
    return of.f_bsize * of.f_bavail


def _cpu_limits() -> Iterator[float]:
    for folder in _groups(""):
        quota, _, period = _text(folder / "cpu.max").partition(" ")
        if quota.isdigit() and period.isdigit():
            yield int(quota) / int(period)
    for folder in _groups("cpu"):
        quota, period = (_text(folder / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
        if quota.isdigit() and period.isdigit():  # no limit is -1
            yield int(quota) / int(period)


def _memory_limits() -> Iterator[int]:
    files = [folder / "memory.max" for folder in _groups("")]
    files += [folder / "memory.limit_in_bytes" for folder in _groups("memory")]
    # no limit is "max", or in version 1 more than any machine has
    yield from (int(text) for text in map(_text, files) if text.isdigit())


def _groups(controller: str) -> Iterator[Path]:
    """Yield the folders of this process's control groups, from its own up to the root.

    Within a container its own one is often the root, and is named by a path of the machine that
    is not there.

    Args:
        controller: Of version 1, such as `cpu`; empty: of version 2, whose groups have all.
    """
    root = CGROUPS / controller
    yield root
    for line in _text(OWN_GROUPS).splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controller in controllers.split(","):
            own = Path(path.lstrip("/"))
            yield from (root / group for group in (own, *own.parents) if group != Path())


def _text(path: Path) -> str:
    """Return what a small file says; nothing where it is not there, or not to be read."""
    with suppress(OSError):
        return path.read_text(encoding="ascii", errors="replace").strip()
    return ""
