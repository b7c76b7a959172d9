"""Put the compiled views into the wheel (hatchling's build hook).

On Linux the wheel is `py3-none-linux_<arch>` and holds `native.c` compiled for this architecture;
an editable installation gets the libraries beside the source. With SIMCLR_RAY_NATIVE=off, on other
systems and where compiling fails it is `py3-none-any` without them: no installation ever fails for
want of a compiler, views are then made by torch or compiled on the machine that makes them.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

FOLDER = "simclr_ray/augment"


class NativeBuildHook(BuildHookInterface[Any]):
    """Compiles `native.c` for wheels, and leaves source distributions alone."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile; name what was made, and the wheel's tag, in `build_data`."""
        if self.target_name != "wheel" or not sys.platform.startswith("linux"):
            return
        native_build = _load(Path(self.root, FOLDER, "native_build.py"))
        if os.environ.get(native_build.SETTING) == "off":
            return
        self._scratch = tempfile.TemporaryDirectory()
        try:
            made = native_build.build_for_package(Path(self._scratch.name))
        except native_build.NativeBuildError as error:
            self.app.display_warning(f"views will be made by torch, slower on CPU: {error}")
            return
        if version == "editable":
            _replace(Path(self.root, FOLDER), made)
            return
        build_data["force_include"].update({str(p): f"{FOLDER}/{p.name}" for p in made})
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-linux_{platform.machine()}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:  # noqa: ARG002 - hatchling's signature
        """Remove what was compiled outside of the source tree."""
        if hasattr(self, "_scratch"):
            self._scratch.cleanup()


def _load(path: Path) -> ModuleType:
    """Return a module of the package without importing the package, which needs torch."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _replace(folder: Path, made: list[Path]) -> None:
    """Put the libraries into `folder` in place of those of an earlier source."""
    for path in folder.glob("_native_*.so"):
        if path.name not in {p.name for p in made}:
            path.unlink()
    for path in made:
        scratch = folder / f".{path.name}.{os.getpid()}"
        scratch.write_bytes(path.read_bytes())
        scratch.chmod(0o755)
        scratch.replace(folder / path.name)  # a process may have the old one loaded
