"""What a killed process leaves running ends, and nothing else does."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import psutil
import pytest

from simclr_ray.distributed import ray_reaper
from tests.ray import processes

# Starts what is to end: a process with the mark, its child in another process group, one that
# writes to a log of Ray's session; and what is not: another mark, a reader, another folder.
DRIVER = """
import os, subprocess, sys, time
from simclr_ray.distributed import ray_reaper

mark, session = sys.argv[1:]
with ray_reaper.start(mark) as reaper:
    reaper.write(session.encode())
child = "import subprocess; p = subprocess.Popen(['sleep', '60'], start_new_session=True);"
child += "print(p.pid, flush=True); p.wait()"
marked = subprocess.Popen(
    [sys.executable, "-c", child], stdout=subprocess.PIPE, text=True,
    env=os.environ | {ray_reaper.MARK: mark},
)
log = session + "/logs/a.out"
writes = subprocess.Popen(["sleep", "60"], stdout=open(log, "w"))
reads = subprocess.Popen(["sleep", "60"], stdin=open(log))
other = subprocess.Popen(["sleep", "60"], stdout=open(session + "0", "w"))
free = subprocess.Popen(["sleep", "60"], env=os.environ | {ray_reaper.MARK: mark + "0"})
print(marked.pid, marked.stdout.readline().strip(), writes.pid, flush=True)
print(reads.pid, other.pid, free.pid, flush=True)
time.sleep(60)
"""


def reapers(mark: str) -> list[psutil.Process]:
    return [p for p in psutil.process_iter(["cmdline"]) if mark in (p.info["cmdline"] or [])]


def is_running(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="this system has no pidfd")
def test_what_a_killed_process_marked_ends_and_nothing_else(tmp_path: Path) -> None:
    mark, session = tmp_path.name + str(os.getpid()), tmp_path / "session"
    (session / "logs").mkdir(parents=True)
    with subprocess.Popen(
        [sys.executable, "-c", DRIVER, mark, str(session)], stdout=subprocess.PIPE, text=True
    ) as driver:
        assert driver.stdout is not None
        ours, others = (
            [psutil.Process(int(pid)) for pid in driver.stdout.readline().split()] for _ in range(2)
        )
        (reaper,) = [p for p in reapers(mark) if p.pid != driver.pid]
        assert reaper.ppid() != driver.pid
        assert os.getsid(reaper.pid) != os.getsid(driver.pid)
        assert reaper.memory_full_info().pss < 8 * 2**20
        os.kill(ours[0].pid, signal.SIGSTOP)  # it could not end by itself
        driver.kill()
    try:
        psutil.wait_procs([*ours, reaper], timeout=ray_reaper.GRACE_S + 3)
        assert not any(is_running(process) for process in [*ours, reaper])
        assert all(is_running(process) for process in others)
    finally:
        for process in others:
            process.kill()


def test_the_reaper_ends_with_the_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_reaper, "LOOK_EVERY_S", 0.01)
    pidfd = os.pidfd_open(os.getpid())  # a driver that goes on
    source, end = os.pipe()
    os.write(end, b"/no/session")
    os.close(end)
    try:
        began = time.monotonic()
        assert ray_reaper._watch(pidfd, "nothing has this mark", source) == "/no/session"
        assert time.monotonic() - began < 5
    finally:
        os.close(pidfd)
        os.close(source)


def test_what_a_session_of_tests_leaves_is_named_and_killed_and_nothing_else(
    tmp_path: Path,
) -> None:
    sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
    ended = [sys.executable, "-c", "import time; time.sleep(0.3)"]
    with subprocess.Popen(sleep) as other:
        mark = uuid.uuid4().hex
        with processes.marked(mark):
            started = [subprocess.Popen(sleep), subprocess.Popen(ended)]
        assert ray_reaper.MARK not in os.environ
        (tmp_path / "logs").mkdir()
        core = tmp_path / "logs" / f"python-core-worker-00ff_{started[0].pid}.log"
        core.write_text("it began\nit exits\n")
        with (tmp_path / "driver.log").open("w") as own:  # as this process has of its cluster
            own.write("a line")
            left = processes.end_left(mark, str(tmp_path), within_s=2.0)
        pattern = rf"{started[0].pid}: {re.escape(' '.join(sleep))}, sleeping, \d+ s old"
        (line,) = left
        assert re.fullmatch(rf"{pattern}\nit began\nit exits", line)
        assert [process.wait(30) for process in started] == [-signal.SIGKILL, 0]
        assert other.poll() is None
        other.kill()
    assert processes.end_left(mark, str(tmp_path), within_s=0.0) == []
