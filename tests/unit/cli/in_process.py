"""One command line in this process: its exit code, what it said, and what it left behind."""

from __future__ import annotations

import hashlib
import logging
import signal
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import ray

from simclr_ray.cli.main import main

LOADING = "loading "  # what takes seconds is said; it is no problem


class Ended(NamedTuple):
    """What one command has left."""

    code: int
    problems: list[str]  # lines on stderr
    stdout: str


def enter(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in a folder, as somebody whose shell names neither a cluster nor a store."""
    monkeypatch.chdir(folder)
    for variable in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(variable, raising=False)


def run(words: list[str], capsys: pytest.CaptureFixture[str]) -> Ended:
    """Return what `simclr-ray WORDS` does; fail where it leaves a file or starts Ray."""
    before = contents(Path.cwd())
    package = logging.getLogger("simclr_ray")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    logged = (package.level, package.propagate, list(package.handlers))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["simclr-ray", *words])
        patch.setattr(ray, "is_initialized", lambda: False)  # by tests before, in this process
        patch.setattr(ray, "init", lambda *_, **__: pytest.fail("Ray was started"))
        with pytest.raises(SystemExit) as stop:
            main()
    for number, handler in handlers.items():
        signal.signal(number, handler)
    package.level, package.propagate, package.handlers = logged[0], logged[1], logged[2]
    said = capsys.readouterr()
    assert contents(Path.cwd()) == before
    assert isinstance(stop.value.code, int)
    lines = [line for line in said.err.splitlines() if not line.startswith(LOADING)]
    return Ended(stop.value.code, lines, said.out)


def contents(folder: Path) -> dict[str, str]:
    """Return every file and folder below one, files with a hash of their bytes."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        if path.is_file()
        else "folder"
        for path in folder.rglob("*")
    }
