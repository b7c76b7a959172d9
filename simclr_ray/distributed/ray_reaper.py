"""Ends what is left of a local Ray when the process that started it is gone, however it went.

Ray has its servers die with the process that starts them (`PR_SET_PDEATHSIG`). The two agents of
its node see that it is dead, and then try for 60 s to tell a driver so through a server that is
dead as well (`publish_error_to_driver`, Ray 2.60: no setting shortens it); a worker that is stopped
sees nothing.

Processes of one Ray, and those that they start, have `MARK=…` in the environment that they were
started with, or write to a log of its session: by a title Ray overwrites parts of the environment.
Nothing else is touched, whatever the process ids say. `start` runs this file by its path in a bare
interpreter, 5 MB for as long as the cluster lives: it imports little, and no package.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import time

TYPE_CHECKING = False  # the module `typing` itself is 1 MB
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import IO

MARK = "SIMCLR_RAY_CLUSTER"
GRACE_S = 3.0  # Ray's workers end by themselves within this
GIVE_UP_S = 30.0
LOOK_EVERY_S = 60.0  # whether the cluster is there still


def start(mark: str) -> IO[bytes] | None:
    """Start a process that ends those with `MARK=mark` after this one; None: it did not start.

    It is no child of this process, belongs to no terminal, and ends with the cluster.

    Returns:
        Where to write the folder of Ray's session, once that is known, and then to close.
    """
    import subprocess  # 1.3 MB, which the process itself does not need

    if not (sys.executable and hasattr(os, "pidfd_open")):  # pidfd: Linux >= 5.3
        return None
    command = [sys.executable, "-I", "-S", __file__, str(os.getpid()), mark]
    try:
        started = subprocess.Popen(
            command, cwd="/", stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        is_up = started.wait(GIVE_UP_S) == 0
    except (OSError, subprocess.SubprocessError):
        return None
    return started.stdin if is_up else None


def belonging(mark: str, session: str) -> Iterator[int]:
    """Yield an open pidfd of each process of that Ray; the caller closes it."""
    for entry in os.listdir("/proc"):
        if not entry.isdecimal():
            continue
        try:
            # opened first: what is read then is of this process, not of a later one with its id
            pidfd = os.pidfd_open(int(entry))
        except OSError:
            continue
        if _is_marked(entry, mark) or (session and _writes_to(entry, session)):
            yield pidfd
        else:
            os.close(pidfd)


def _is_marked(pid: str, mark: str) -> bool:
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:  # a zombie's is empty
            return f"{MARK}={mark}".encode() in file.read().split(b"\0")
    except OSError:  # of another user, or gone
        return False


def _writes_to(pid: str, folder: str) -> bool:
    """Return whether a file below `folder` is open for writing: who reads a log is none of Ray."""
    try:
        numbers = os.listdir(f"/proc/{pid}/fd")
    except OSError:  # of another user, or gone
        return False
    return any(_is_written(pid, number, folder) for number in numbers)


def _is_written(pid: str, number: str, folder: str) -> bool:
    try:
        if not os.readlink(f"/proc/{pid}/fd/{number}").startswith(f"{folder}/"):
            return False
        with open(f"/proc/{pid}/fdinfo/{number}", encoding="ascii") as file:
            flags = dict(line.split(":", 1) for line in file)["flags"]
    except OSError:  # closed since
        return False
    return bool(int(flags, 8) & (os.O_WRONLY | os.O_RDWR))


def _end(mark: str, session: str) -> None:
    """Wait until none is left; kill those that are after `GRACE_S`."""
    began = time.monotonic()
    while time.monotonic() < began + GIVE_UP_S:
        left = list(belonging(mark, session))
        for pidfd in left:
            if time.monotonic() > began + GRACE_S:
                _kill(pidfd)
            os.close(pidfd)
        if not left:
            return
        time.sleep(0.2)


def _kill(pidfd: int) -> None:
    try:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    except OSError:  # gone since
        return


def _watch(driver: int, mark: str, source: int) -> str:
    """Return when the driver or its cluster is gone; gives the session that `source` has named."""
    session, events = "", select.poll()
    events.register(driver, select.POLLIN)
    events.register(source, select.POLLIN | select.POLLHUP)
    while True:
        ready = {fd for fd, _ in events.poll(1000 * LOOK_EVERY_S)}
        if source in ready:
            session += (read := os.read(source, 4096)).decode()
            if not read:
                events.unregister(source)
        if driver in ready:
            return session
        if not ready:
            left = list(belonging(mark, session))
            for pidfd in left:
                os.close(pidfd)
            if not left:
                return session


def main(driver_pid: int, mark: str) -> None:
    """Watch from a process that has no parent; returns in the caller once that is there."""
    driver = os.pidfd_open(driver_pid)  # which waits for this process, so it is no other
    if os.fork():
        return
    session = _watch(driver, mark, sys.stdin.fileno())
    _end(mark, session)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
