"""Where a result comes from: library versions, the commit of the code, hashes of files."""

from __future__ import annotations

import functools
import hashlib
import subprocess
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Final

SOURCES: Final = (".py", ".yaml", ".c")


def version_of(package: str) -> str:
    """Return the installed version of a package, or `absent`."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "absent"


def versions_of(packages: Iterable[str]) -> dict[str, str]:
    """Return name -> installed version, or `absent`, of every package."""
    return {name: version_of(name) for name in packages}


def code_commit() -> str:
    """Return the commit of the checkout this package runs from, `-dirty` if changed, or nothing.

    Nothing for an installed package, even where its environment lies inside of another checkout.
    """
    package = Path(__file__).resolve().parents[1]
    try:
        top = _git(package, "rev-parse", "--show-toplevel")
        if Path(top).resolve() != package.parent:
            return ""
        changed = _git(package, "status", "--porcelain", "--untracked-files=no", "--", ".")
        return _git(package, "rev-parse", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return ""


@functools.cache
def code_digest() -> str:
    """Return 12 hex digits of the SHA-256 of this package's sources: names and contents."""
    package, digest = Path(__file__).resolve().parents[1], hashlib.sha256()
    for path in sorted(package.rglob("*")):
        if path.suffix in SOURCES:
            digest.update(f"{path.relative_to(package).as_posix()}\0".encode())
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:12]


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(  # nosec B607
        ["git", "-C", str(folder), *arguments],  # noqa: S607 - as the user's shell finds it
        capture_output=True, text=True, check=True, timeout=20,
    )  # fmt: skip
    return done.stdout.strip()


def sha256(path: Path) -> str:
    """Return the hex SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
