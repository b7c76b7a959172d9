"""Process 1 of a machine of `machines`: it mounts what the machine sees, then reaps and waits.

Run in fresh mount, process, host name and IPC namespaces. Its one argument is JSON: `folder` (of
this machine), `name`, `shares` (folders that it sees as everyone does), `shm_mib`. Says "ready".
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NoReturn


def main() -> NoReturn:
    """Mount, say so, and adopt processes until this one is killed: then all others are."""
    _mount(json.loads(sys.argv[1]))
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    while True:  # an orphan that nobody reaps would seem to live on to those that look for it
        try:
            os.wait()
        except ChildProcessError:
            time.sleep(0.1)


def _mount(machine: dict[str, Any]) -> None:
    folder, home = Path(machine["folder"]), Path.home()
    hidden = (Path("/tmp"), home, Path("/dev/shm"))
    kept = [p for p in map(Path, machine["shares"]) if any(p.is_relative_to(h) for h in hidden)]
    stages = [folder / "stages" / str(index) for index in range(len(kept))]
    for path, stage in zip(kept, stages, strict=True):  # before their parents are hidden
        stage.mkdir(parents=True)
        _run("mount", "--rbind", path, stage)
    for name, target in (("tmp", Path("/tmp")), ("home", home)):
        (folder / name).mkdir()
        _run("mount", "--bind", folder / name, target)
    (folder / "tmp").chmod(0o1777)
    _run("mount", "-t", "tmpfs", "-o", f"size={machine['shm_mib']}m", "shm", "/dev/shm")
    _run("mount", "-t", "proc", "proc", "/proc")
    for path, stage in zip(kept, stages, strict=True):
        path.mkdir(parents=True, exist_ok=True)
        _run("mount", "--rbind", stage, path)
    _run("mount", "--bind", folder.parent / "hosts", "/etc/hosts")
    socket.sethostname(machine["name"])


def _run(*command: str | Path) -> None:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
