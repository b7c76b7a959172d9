"""Wheel and source distribution are whole, and what a package index takes."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.shell_blocks import ROOT

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    _run("build", "--outdir", str(folder), str(ROOT))
    return folder


def test_a_package_index_takes_both(dist: Path) -> None:
    files = sorted(str(path) for path in dist.iterdir())
    assert [Path(name).suffix for name in files] == [".whl", ".gz"] or len(files) == 2
    assert _run("twine", "check", "--strict", *files).count("PASSED") == 2


def test_the_wheel_has_every_file_of_the_package_and_the_sdist_can_build_it(dist: Path) -> None:
    tracked = subprocess.run(
        ["git", "ls-files", "simclr_ray", "tune_configs"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    (wheel,) = dist.glob("*.whl")
    (source,) = dist.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as archive:
        packed = set(archive.namelist())
    inside = {name.removeprefix("simclr_ray/tune_configs/") for name in packed}
    expected = {name for name in tracked if name.startswith("simclr_ray/")}
    assert expected <= packed
    assert {Path(name).name for name in tracked if name.startswith("tune_configs/")} <= inside
    assert not [name for name in packed if "tests/" in name or name.endswith(".pyc")]
    with tarfile.open(source) as archive:
        unpacked = {name.partition("/")[2] for name in archive.getnames()}
    assert {*tracked, "pyproject.toml", "hatch_build.py", "README.md", "LICENSE"} <= unpacked


def _run(module: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
