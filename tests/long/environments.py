"""Environments of others' packages: of their own, or ones which see those of this one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path


def bare_environment(folder: Path, packages: Sequence[str]) -> Path:
    """Make `folder/env` with these packages and what they need, and return its Python."""
    python = folder / "env" / "bin" / "python"
    _run([uv(), "venv", "--python", sys.executable, str(folder / "env")])
    _run([uv(), "pip", "install", "--python", str(python), *packages])
    return python


def make_environment(folder: Path, packages: Sequence[str]) -> Callable[..., None]:
    """Make `folder/env` with these packages, and return what runs its Python with arguments.

    It sees the packages of this environment: torch is not fetched anew. Nothing that it runs asks
    a hub for anything.
    """
    python = str(folder / "env" / "bin" / "python")
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "cache")}
    _run([uv(), "venv", "--python", sys.executable, str(folder / "env")])
    (site,) = (folder / "env" / "lib").glob("python*/site-packages")
    (site / "above.pth").write_text(sysconfig.get_path("purelib") + "\n")
    _run([uv(), "pip", "install", "--python", python, "--no-deps", *packages])
    return lambda *arguments: _run([python, *arguments], offline)


def uv() -> str:
    """Return the program that makes environments."""
    return shutil.which("uv") or str(Path(sys.executable).with_name("uv"))


def _run(command: Sequence[str], added: dict[str, str] | None = None) -> None:
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        command, env=environment | (added or {}), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
