"""The wheel holds the compiled views of its architecture, and is made without a compiler too."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from simclr_ray.augment import native_build
from tests.unit.augment.test_native import PROBE, needs_compiler

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("hatchling") is None, reason="no hatchling here"),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other wheels hold no library"),
]

ROOT = Path(__file__).resolve().parents[3]
LEVELS = tuple(native_build.X86_LEVELS) if platform.machine() == "x86_64" else (platform.machine(),)
FOLDER = Path("simclr_ray", "augment")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of what a source distribution holds, with a library of an older source."""
    copy = tmp_path_factory.mktemp("tree")
    for name in ("pyproject.toml", "hatch_build.py", "README.md", "LICENSE", ".gitignore"):
        shutil.copy(ROOT / name, copy)
    ignored = shutil.ignore_patterns("__pycache__", "*.so")
    for folder in ("simclr_ray", "tune_configs"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=ignored)
    (copy / FOLDER / "_native_0123456789abcdef_x86-64.so").touch()
    return copy


def hatchling(tree: Path, *arguments: str, **environment: str) -> list[str]:
    """Run hatchling's own command in `tree`; return the lines it says beside what it made."""
    given = {k: v for k, v in os.environ.items() if k != native_build.SETTING}
    done = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", *arguments],
        cwd=tree,
        env={**given, **environment},
        check=False,
        capture_output=True,
        text=True,
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    return [line for line in said.splitlines() if not line.endswith(".whl")]


def build(tree: Path, **environment: str) -> tuple[Path, list[str]]:
    """Return the one wheel that is made of `tree`, and what was said."""
    shutil.rmtree(tree / "dist", ignore_errors=True)
    said = hatchling(tree, "-t", "wheel", "-d", "dist", **environment)
    (wheel,) = (tree / "dist").iterdir()
    return wheel, said


def libraries(wheel: Path) -> list[str]:
    return [Path(n).name for n in zipfile.ZipFile(wheel).namelist() if n.endswith(".so")]


@needs_compiler
def test_a_wheel_holds_a_library_for_each_level_and_uses_it(tree: Path, tmp_path: Path) -> None:
    wheel, said = build(tree)
    assert wheel.name.endswith(f"-py3-none-linux_{platform.machine()}.whl")
    assert sorted(libraries(wheel)) == sorted(map(native_build.library_name, LEVELS))
    assert not said
    zipfile.ZipFile(wheel).extractall(tmp_path)
    probe = PROBE + "print(native.loaded().detail, native.__file__)"
    outputs = [
        subprocess.run(
            [sys.executable, "-c", probe],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(tmp_path), native_build.SETTING: setting},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for setting in ("package", "off")
    ]
    package, off = (output.splitlines() for output in outputs)
    assert package[0].startswith("True ")
    assert off[0] == package[0].replace("True", "False")
    assert package[1].startswith("from the package, ")
    assert package[1].endswith(str(tmp_path / FOLDER / "native.py"))


@pytest.mark.parametrize("environment", [{"CC": "false"}, {native_build.SETTING: "off"}])
def test_without_a_compiler_or_when_asked_for_the_wheel_is_pure(
    environment: dict[str, str], tree: Path
) -> None:
    wheel, said = build(tree, **environment)
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not libraries(wheel)
    assert len(said) == (1 if "CC" in environment else 0), said


@needs_compiler
def test_an_editable_installation_has_its_libraries_beside_the_source(tree: Path) -> None:
    hatchling(tree, "-t", "wheel:editable", "--hooks-only")
    beside = [path.name for path in (tree / FOLDER).glob("_native_*.so")]
    assert sorted(beside) == sorted(map(native_build.library_name, LEVELS))
    pure, _ = build(tree, **{native_build.SETTING: "off"})
    assert not libraries(pure)
