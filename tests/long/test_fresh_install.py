"""The built wheel in empty environments, outside the checkout: the README's Python example.

On Linux with a C compiler the wheel brings the compiled views, and they are what runs.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from simclr_ray.augment import native_build
from tests.long.environments import uv

pytestmark = pytest.mark.long

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = ("PYTHONPATH", "VIRTUAL_ENV", native_build.SETTING)  # would change what is tested


@pytest.mark.timeout(1500)
@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_the_readme_example_runs_from_the_wheel(tmp_path: Path, python: str) -> None:
    dist, venv, work = tmp_path / "dist", tmp_path / "venv", tmp_path / "work"
    work.mkdir()
    _run([uv(), "build", "--wheel", "--out-dir", str(dist)], ROOT)
    (wheel,) = dist.glob("*.whl")
    try:
        _run([uv(), "venv", "--no-python-downloads", "--python", python, str(venv)], work)
    except AssertionError as error:
        # an interpreter is the system's to install; one of the bounds is that of this environment
        pytest.skip(f"no Python {python} here: {error}")
    install = [uv(), "pip", "install", "--python", str(venv / "bin" / "python")]
    lock = ROOT / "requirements.lock"
    _run([*install, "--require-hashes", "-r", str(lock)], work)
    _run([*install, "--no-deps", str(wheel)], work)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (example,) = (block for block in blocks if block.startswith("import simclr_ray as sr"))
    for name in ("a.jpg", "b.png"):  # the reader's own
        Image.new("RGB", (40, 30), (200, 120, 40)).save(work / name)
    use = """
import torch
h = encoder(torch.rand(3, 3, 32, 32))
print("features", tuple(h.shape), sr.__file__)
from simclr_ray.augment import native
print("views", native.loaded().detail)
"""
    (work / "example.py").write_text(example + use)
    output = _run([str(venv / "bin" / "python"), "example.py"], work)
    assert "| trained encoder" in output
    assert f"features (3, 128) {venv}" in output
    if sys.platform.startswith("linux") and native_build.find_compiler():
        assert wheel.name.endswith(f"-py3-none-linux_{platform.machine()}.whl")
        assert "views from the package" in output


def _run(command: list[str], folder: Path) -> str:
    environment = {k: v for k, v in os.environ.items() if k not in ENVIRONMENT}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
