"""Environments of others' packages, which see those of this one: torch is not fetched anew."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path


def make_environment(folder: Path, packages: Sequence[str]) -> Callable[..., None]:
    """Make `folder/env` with these packages, and return what runs its Python with arguments.

    Nothing that it runs asks a hub for anything.
    """
    uv = shutil.which("uv") or str(Path(sys.executable).with_name("uv"))
    python = str(folder / "env" / "bin" / "python")
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "cache")}

    def run(*command: str) -> None:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr

    run(uv, "venv", "--python", sys.executable, str(folder / "env"))
    (site,) = (folder / "env" / "lib").glob("python*/site-packages")
    (site / "above.pth").write_text(sysconfig.get_path("purelib") + "\n")
    run(uv, "pip", "install", "--python", python, "--no-deps", *packages)
    return lambda *arguments: run(python, *arguments)
