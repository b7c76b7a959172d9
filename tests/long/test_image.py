"""The commands of the container file, in an empty environment in place of Ray's image.

The image itself is not built: that takes a registry and Docker. A copy of a Python that no
environment is made from stands for the one that the image brings.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.long.environments import uv
from tests.shell_blocks import ROOT

pytestmark = [pytest.mark.long, pytest.mark.timeout(1800)]
FILE = ROOT / "cluster" / "Dockerfile"
INSIDE = "/tmp/simclr-ray/"


def instructions() -> dict[str, list[str]]:
    """Return what follows each word of the file, lines that go on joined."""
    text = FILE.read_text(encoding="utf-8").replace("\\\n", "")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    found: dict[str, list[str]] = {}
    for line in lines:
        word, _, rest = line.partition(" ")
        found.setdefault(word, []).append(rest.strip())
    return found


def python_for_itself(folder: Path) -> Path:
    """Copy this Python, without what was installed into it, and return its folder of programs."""
    copied = folder / "python"
    shutil.copytree(sys.base_prefix, copied, symlinks=True, ignore=_installed)
    (copied / "bin" / "python").unlink(missing_ok=True)
    (copied / "bin" / "python").symlink_to(f"python3.{sys.version_info.minor}")
    programs = copied / "bin"
    _run([str(programs / "python"), "-m", "ensurepip"], {})
    (programs / "pip").unlink(missing_ok=True)
    (programs / "pip").symlink_to("pip3")
    return programs


def test_its_commands_make_an_installation_that_reads_its_launch_file(tmp_path: Path) -> None:
    said = instructions()
    assert set(said) == {"FROM", "COPY", "RUN"}
    given = tmp_path / "given"
    given.mkdir()
    _run([uv(), "build", "--wheel", "--out-dir", str(tmp_path / "dist"), str(ROOT)], {})
    *sources, where = shlex.split(said["COPY"][0])
    assert where == INSIDE
    for source in sources:
        base = tmp_path if source.startswith("dist/") else ROOT
        (file,) = base.glob(source)
        shutil.copy(file, given)
    programs = python_for_itself(tmp_path)
    env = {"PATH": f"{programs}:/usr/bin:/bin", "HOME": str(tmp_path)}
    for command in said["RUN"]:
        _run(["sh", "-euc", command.replace(INSIDE, f"{given}/")], env)

    own = str(programs / "simclr-ray")
    version = _run([own, "--version"], env)
    assert re.search(r"\b\d+\.\d+\.\d+\b", version)
    ray = _run([str(programs / "python"), "-c", "import ray; print(ray.__version__)"], env).strip()
    assert f"rayproject/ray:{ray}-py311-gpu" in said["FROM"][0]
    job = (ROOT / "cluster" / "kuberay-rayjob.yaml").read_text(encoding="utf-8")
    (entry,) = re.findall(r"entrypoint: >-\n((?:    .*\n)+)", job)
    words = [word for word in shlex.split(entry) if not word.startswith(("data.", "storage"))]
    shown = _run([own, "config", *words[2:]], env)
    assert "gpus_per_worker: 1" in shown
    assert "views" in _run([own, "doctor"], env, codes=(0, 1))


def _installed(folder: str, names: list[str]) -> list[str]:
    return [name for name in names if name in ("site-packages", "test", "__pycache__")]


def _run(words: list[str], env: dict[str, str], codes: tuple[int, ...] = (0,)) -> str:
    gone = ("PYTHONPATH", "VIRTUAL_ENV")
    whole = {k: v for k, v in os.environ.items() if k not in gone} | env
    done = subprocess.run(words, env=whole, capture_output=True, text=True, check=False)
    assert done.returncode in codes, done.stdout + done.stderr
    return done.stdout
