"""A `pretrain` command in a process of its own, to be killed, stopped or waited for."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from simclr_ray import config as cfg
from simclr_ray.config.experiment import Experiment
from simclr_ray.storage import checkpoint
from simclr_ray.train.resolve import resolve
from tests.ray import processes

WAIT_S = 400.0
LOOK_S = 0.02


def own_ray() -> dict[str, str]:
    """Return an environment in which a command starts Ray for itself."""
    return {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}


class Driver:
    """The process, its run's folder and what it says; a second one goes on in the same file.

    Args:
        config: The file that the experiment is written to; what is said goes beside it.
        tree: The experiment, as in a file.
        env: Of the process; that of the tests where it is None, with their Ray.
    """

    def __init__(
        self, config: Path, tree: dict[str, Any], env: Mapping[str, str] | None = None
    ) -> None:
        config.write_text(cfg.dump_yaml(tree))
        self.folder = resolve(cfg.validate(Experiment, tree)).folder
        self.log = config.with_suffix(".log")
        with self.log.open("a") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "simclr_ray", "pretrain", str(config)],
                stdout=subprocess.DEVNULL, stderr=out, env=env,
            )  # fmt: skip

    @property
    def said(self) -> str:
        """All of it, so far."""
        return self.log.read_text()

    @property
    def step(self) -> int:
        """Of the newest checkpoint."""
        names = self.folder.checkpoints() if Path(self.folder.uri).exists() else []
        return checkpoint.step_of(names[0]) if names else 0

    def below(self) -> dict[psutil.Process, str]:
        """Return the processes that it has started, with their command lines as Ray sets them."""
        found = {}
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                found[process] = " ".join(process.cmdline())
        return found

    def roles(self) -> dict[str, psutil.Process]:
        """Return the processes of Ray that do something of ours, by their title."""
        return {
            title.removeprefix("ray::").split(".")[0]: process
            for process, title in self.below().items()
            if title.startswith("ray::") and "Agent" not in title and "IDLE" not in title
        }

    def wait(self, until: Callable[[], bool]) -> None:
        """Return when something holds; an `AssertionError` says that it ended before."""
        deadline = time.monotonic() + WAIT_S
        while not until():
            assert self.process.poll() is None, self.said
            assert time.monotonic() < deadline, self.said
            time.sleep(LOOK_S)

    def end(self) -> int:
        """Return its exit code, when it has ended."""
        return self.process.wait(timeout=WAIT_S)

    def kill_all(self) -> None:
        """Kill it and all that it has started, as the end of a machine does."""
        for process in reversed([*self.below(), psutil.Process(self.process.pid)]):
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()

    def kill_each(self, title: str) -> None:
        """Kill every process of a title as soon as it is there, until the command ends.

        Among all of this test session, whose Ray the command may have joined.
        """
        killed: set[int] = set()
        deadline = time.monotonic() + WAIT_S
        while self.process.poll() is None:
            assert time.monotonic() < deadline, self.said
            for pid in set(processes.named(title)) - killed:
                os.kill(pid, signal.SIGKILL)
                killed.add(pid)
            time.sleep(LOOK_S / 2)
