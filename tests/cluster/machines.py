"""Machines on this one: each with its own address, processes, `/tmp`, home and `/dev/shm`.

A machine is a set of Linux namespaces that live as long as its process 1. That one dies with the
thread that started it, so a session that is killed leaves no process; names and folders that it
leaves are found by their prefix and removed by the next session.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import psutil

PREFIX = "srn"  # of namespaces and interfaces, whose names have 15 letters at most
ROOT = Path("/var/tmp/simclr-ray-nodes")  # not /tmp, which each machine has its own of
REPOSITORY = Path(__file__).resolve().parents[2]
TOOLS = ("ip", "unshare", "nsenter", "setpriv", "mount")
TOKEN_LETTERS = 6  # of the name of a session
SHM_MIB = 1024
LOG_LINES = 30  # of the end of a log
START_S = 30.0
# settings of the session that tests, which the machines must not take for theirs
FOREIGN = ("RAY_", "MLFLOW_", "AWS_", "PYTEST_", "COV_", "COVERAGE_", "XDG_", "TMPDIR", "GLOO_")


class CannotBuild(Exception):  # noqa: N818 # a reason to skip
    """This machine lacks what the nodes are made of; the message says what."""


def check_able() -> None:
    """Raise `CannotBuild` where namespaces cannot be made here."""
    if not sys.platform.startswith("linux"):
        raise CannotBuild("nodes of their own need Linux namespaces")
    if os.geteuid() != 0:
        raise CannotBuild("nodes of their own need root: namespaces, mounts and a bridge")
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        raise CannotBuild(f"missing: {', '.join(missing)} (Debian: iproute2, util-linux, mount)")
    probe = ["unshare", "--net", "--mount", "--pid", "--uts", "--ipc", "--fork", "true"]
    done = subprocess.run(probe, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CannotBuild(f"namespaces are not permitted here: {done.stderr.strip()}")


def environment_of(given: Mapping[str, str]) -> dict[str, str]:
    """Return what a machine's processes inherit of an environment."""
    kept = {name: value for name, value in given.items() if not name.startswith(FOREIGN)}
    return kept | {
        "PYTHONPATH": str(REPOSITORY),
        "OMP_NUM_THREADS": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "PYTHONUNBUFFERED": "1",
    }


def shared_paths() -> list[Path]:
    """Return what Python and this package are read from, which all machines see."""
    paths = {REPOSITORY, *map(Path, (sys.prefix, sys.base_prefix, sys.exec_prefix))}
    return sorted(p for p in paths if not any(p != o and p.is_relative_to(o) for o in paths))


def ip(*arguments: str) -> str:
    """Run `ip` and return what it says. Raises `CannotBuild` where it refuses."""
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise CannotBuild(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


@dataclass
class Machine:
    """One set of namespaces. `Network.machine` makes it; `stop` ends it."""

    name: str
    address: str
    folder: Path
    namespace: str
    link: str  # the bridge's end of its cable
    env: dict[str, str]
    init: subprocess.Popen[str] | None = None
    logs: list[IO[bytes]] = field(default_factory=list)
    _pid: int = 0  # of process 1, as this machine sees it

    def start(self, bridge: str, *, prefix: int, shares: Sequence[Path]) -> None:
        """Plug it in and start its process 1. Raises `CannotBuild`."""
        self.folder.mkdir()
        ip("netns", "add", self.namespace)
        ip("link", "add", self.link, "type", "veth", "peer", "eth0", "netns", self.namespace)
        ip("link", "set", self.link, "master", bridge, "up")
        ip("-n", self.namespace, "address", "add", f"{self.address}/{prefix}", "dev", "eth0")
        for device in ("lo", "eth0"):
            ip("-n", self.namespace, "link", "set", device, "up")
        told = {
            "folder": str(self.folder),
            "name": self.name,
            "shares": [str(path) for path in shares],
            "shm_mib": SHM_MIB,
        }
        program = [sys.executable, "-S", str(Path(__file__).with_name("machine_init.py"))]
        with (self.folder / "init.log").open("wb") as log:
            self.init = subprocess.Popen(
                [
                    *("setpriv", "--pdeathsig", "KILL", "ip", "netns", "exec", self.namespace),
                    *("unshare", "--mount", "--pid", "--uts", "--ipc", "--fork", "--kill-child"),
                    *(*program, json.dumps(told)),
                ],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=self.env,
            )
        assert self.init.stdout is not None
        if self.init.stdout.readline() != "ready\n":
            raise CannotBuild(f"{self.name}: {(self.folder / 'init.log').read_text().strip()}")
        (first,) = psutil.Process(self.init.pid).children()
        self._pid = first.pid

    @property
    def is_running(self) -> bool:
        """Return whether its process 1 lives."""
        return self.init is not None and self.init.poll() is None

    def popen(
        self, command: Sequence[str], *, env: Mapping[str, str] | None = None, log: str = ""
    ) -> subprocess.Popen[str]:
        """Start a command in its home; `log` names the file of its output in `folder`, else pipes.

        What is returned ends with the command and gives its exit code; signals go by `signal`.
        """
        if not self.is_running:
            raise RuntimeError(f"{self.name} is down")
        enter = ["nsenter", "--target", str(self._pid), "--all", f"--wdns={Path.home()}"]
        output: IO[bytes] | int = subprocess.PIPE
        if log:
            output = (self.folder / f"{log}.log").open("ab")
            self.logs.append(output)
        return subprocess.Popen(
            [*enter, *command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT if log else subprocess.PIPE,
            text=True,
            env=self.env | dict(env or {}),
        )

    def run(
        self,
        command: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        timeout_s: float = 300.0,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in its home to its end; return its exit code and output."""
        process = self.popen(command, env=env)
        try:
            out, err = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            self.signal(process, signal.SIGKILL)
            process.communicate()
            raise
        return subprocess.CompletedProcess(list(command), process.returncode, out, err)

    def signal(self, process: subprocess.Popen[str], number: int) -> None:
        """Send a signal to a command that `popen` started."""
        with suppress(psutil.NoSuchProcess):
            for child in psutil.Process(process.pid).children():
                child.send_signal(number)

    def told(self) -> str:
        """Return the last lines of its logs."""
        ends = []
        for path in sorted(self.folder.glob("*.log")):
            lines = path.read_text(errors="replace").splitlines()[-LOG_LINES:]
            ends.append("\n".join([f"--- {self.name}: {path.name}", *lines]))
        return "\n".join(ends)

    def kill_processes(self) -> None:
        """Kill all of its processes; it stays up, so that its ports refuse."""
        self.run([sys.executable, "-S", "-c", "import os; os.kill(-1, 9)"])

    def stop(self) -> None:
        """Kill all of its processes and take it off the bridge. Idempotent."""
        if self.init is not None:
            self.init.kill()  # and by it process 1, and by that all others
            self.init.wait()
            assert self.init.stdout is not None
            self.init.stdout.close()
        for log in self.logs:
            log.close()
        if self._pid:
            _wait_for_end(self._pid)
        remove_namespace(self.namespace)


def _wait_for_end(pid: int) -> None:
    """Return when a process 1 has ended, which waits for its others; who reaps it may be slow."""
    deadline = time.monotonic() + START_S
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        while process.status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
            time.sleep(0.01)


def namespaces() -> list[str]:
    """Return the names of all network namespaces."""
    return [line.split()[0] for line in ip("netns", "list").splitlines() if line.strip()]


def links() -> list[str]:
    """Return the names of this machine's network interfaces."""
    return [row["ifname"] for row in json.loads(ip("-json", "link", "show"))]


def remove_namespace(name: str) -> None:
    """Kill what lives in a network namespace and remove it, its cable too. Idempotent."""
    if name not in namespaces():
        return
    deadline = time.monotonic() + START_S
    while pids := ip("netns", "pids", name).split():
        for pid in map(int, pids):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if time.monotonic() > deadline:
            raise RuntimeError(f"processes {pids} of {name} do not end")
        time.sleep(0.02)
    ip("netns", "delete", name)


def leftovers(token: str = "") -> dict[str, list[str]]:
    """Return what there is of a session, or of all: processes, namespaces, links, folders, mounts.

    A kind that has none is left out.
    """
    mark = PREFIX + token
    names = [name for name in namespaces() if name.startswith(mark)]
    folders = [str(p) for p in ROOT.glob(f"{token or ''}*") if p.is_dir()]
    found = {
        "processes": [pid for name in names for pid in ip("netns", "pids", name).split()],
        "namespaces": names,
        "links": [name for name in links() if name.startswith(mark)],
        "folders": folders,
        "mounts": [
            line.split()[1]
            for line in Path("/proc/self/mounts").read_text().splitlines()
            if f"{ROOT}/{token}" in line or f"/netns/{mark}" in line
        ],
    }
    for process in psutil.process_iter(["cmdline", "environ"]):
        told = [*(process.info["cmdline"] or []), *(process.info["environ"] or {}).values()]
        if process.pid != os.getpid() and any(f"{ROOT}/{token}" in part for part in told):
            found["processes"].append(str(process.pid))
    return {kind: sorted(set(those)) for kind, those in found.items() if those}


def remove_session(token: str) -> None:
    """Remove namespaces, links and folder of a session. Idempotent."""
    for name in namespaces():
        if name.startswith(PREFIX + token):
            remove_namespace(name)
    for name in links():
        if name.startswith(PREFIX + token):
            with suppress(CannotBuild):  # gone with its other end
                ip("link", "delete", name)
    shutil.rmtree(ROOT / token, ignore_errors=True)


@contextmanager
def session_folder(token: str) -> Iterator[Path]:
    """Give this session's folder, held by a lock that the system drops when this process ends.

    What sessions left that no longer hold theirs is removed first; this one's, at the end.
    """
    with _gate():
        _remove_dead()
        folder = ROOT / token
        folder.mkdir(mode=0o711)
        held = (folder / "held").open("w")
        fcntl.flock(held, fcntl.LOCK_EX)
    try:
        yield folder
    finally:
        held.close()
        with _gate():
            remove_session(token)


@contextmanager
def _gate() -> Iterator[None]:
    """Hold others off that make or remove sessions; `ROOT` is there inside, if empty not after."""
    handle = os.open(ROOT.parent, os.O_RDONLY)  # no file of ours, which would have to be removed
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        ROOT.mkdir(mode=0o711, exist_ok=True)
        yield
        with suppress(OSError):  # another session's folder lies in it
            ROOT.rmdir()
    finally:
        os.close(handle)


def _remove_dead() -> None:
    """Remove what sessions left that ended without it."""
    alive = set()
    for folder in [path for path in ROOT.iterdir() if path.is_dir()]:
        with (folder / "held").open("w") as held:
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                alive.add(folder.name)
                continue
        remove_session(folder.name)
    marked = [name for name in (*namespaces(), *links()) if name.startswith(PREFIX)]
    tokens = {name[len(PREFIX) : len(PREFIX) + TOKEN_LETTERS] for name in marked}
    for token in tokens - alive:
        remove_session(token)
