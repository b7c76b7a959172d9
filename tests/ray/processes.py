"""Processes that this test session has started: another session may run beside it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from simclr_ray.distributed import ray_reaper

ENDED_S = 30.0  # for a cluster's processes to end by themselves


def named(part: str) -> list[int]:
    """Return the pids of those whose command line, as Ray sets it, contains `part`, by age."""
    return [p.pid for p in psutil.Process().children(recursive=True) if part in _command_line(p)]


@contextmanager
def marked(mark: str) -> Iterator[None]:
    """Have all processes that are started in the block, and what those start, bear a mark."""
    os.environ[ray_reaper.MARK] = mark
    try:
        yield
    finally:
        del os.environ[ray_reaper.MARK]


def end_left(mark: str, session: str, within_s: float = ENDED_S) -> list[str]:
    """Kill what is left of a cluster after some seconds; return what each was and did last.

    Args:
        mark: Of its processes.
        session: Folder of its logs, which its processes write to.
        within_s: In which they may end by themselves.
    """
    until = time.monotonic() + within_s
    while (left := _left(mark, session)) and time.monotonic() < until:
        time.sleep(0.2)
    lines = [_described(process, session) for process in left]
    for process in left:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGKILL)  # psutil looks whether the pid is another's now
    return lines


def _left(mark: str, session: str) -> list[psutil.Process]:
    """Return what is left of a cluster, this process aside, which has its log open."""
    left = []
    for pidfd in ray_reaper.belonging(mark, session):
        with suppress(psutil.NoSuchProcess):
            left.append(psutil.Process(_pid_of(pidfd)))
        os.close(pidfd)
    return [process for process in left if process.pid != os.getpid()]


def _pid_of(pidfd: int) -> int:
    """Return the pid that a pidfd is of; 0 where that has ended: no process of psutil's."""
    lines = Path(f"/proc/self/fdinfo/{pidfd}").read_text(encoding="ascii").splitlines()
    return max(int(dict(line.split(":", 1) for line in lines)["Pid"]), 0)


def _described(process: psutil.Process, session: str) -> str:
    """Return the title, state and age of a process, and the last lines of its log of Ray's."""
    try:
        age, state = time.time() - process.create_time(), process.status()
    except psutil.NoSuchProcess:
        return f"{process.pid}: ended just now"
    lines = [
        line
        for path in Path(session, "logs").glob(f"*[-_]{process.pid}.*")
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines()[-4:]
    ]
    return "\n".join([f"{process.pid}: {_command_line(process)}, {state}, {age:.0f} s old", *lines])


def _command_line(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline()).strip()  # Ray's titles end in blanks
    except psutil.NoSuchProcess:  # ended since it was listed; a zombie is one of these
        return ""
