"""From a path or URI to a file system and the path on it: a bucket serves as well as a folder."""

from __future__ import annotations

import functools
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.fs as pafs

from simclr_ray.errors import DataError


@functools.lru_cache(maxsize=64)
def filesystem(uri: str) -> tuple[pafs.FileSystem, str]:
    """Return the file system of a local path or URI, and the path on it.

    Raises:
        DataError: pyarrow knows no such scheme, or cannot reach it.
    """
    if "://" not in uri:
        return pafs.LocalFileSystem(), Path(uri).expanduser().absolute().as_posix()
    try:
        fs, path = pafs.FileSystem.from_uri(uri)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{uri} cannot be opened: {one_line(error)}") from error
    return fs, path.rstrip("/")


def cache_folder(part: str) -> Path:
    """Return this user's folder for copies that can be fetched again; it need not be there."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "simclr_ray" / part


def is_local(fs: pafs.FileSystem) -> bool:
    """Return whether `fs` is the disk of this machine."""
    return isinstance(fs, pafs.LocalFileSystem)


def one_line(error: Exception) -> str:
    """Return the message of a foreign error on one line."""
    return " ".join(str(error).split())
