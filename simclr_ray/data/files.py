"""Where files lie: a path or URI to a file system, its parquet files, and images named by path.

Everything goes through `pyarrow.fs`, so a bucket serves as well as a folder.
"""

from __future__ import annotations

import urllib.parse
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, cast

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs

from simclr_ray.errors import DataError
from simclr_ray.storage.filesystem import filesystem, is_local, one_line

# Requests to a bucket take tens of milliseconds and no processor; local files do neither.
REMOTE_THREADS = 16


class Listed(NamedTuple):
    """A file that was found: its path on the file system and its size in bytes."""

    path: str
    size: int


def list_parquet(fs: pafs.FileSystem, root: str, uri: str) -> list[Listed]:
    """Return the parquet file `root`, or those below the folder `root`, sorted by path.

    Names that begin with a dot or underscore are skipped, as everywhere in the parquet world:
    they are half-written files and notes.

    Raises:
        DataError: there is nothing at `uri`, or no parquet in it.
    """
    try:
        info = fs.get_file_info(root)
        if info.type == pafs.FileType.NotFound:
            raise DataError(f"{uri}: no such file or folder")
        if info.type == pafs.FileType.File:
            return [Listed(root, info.size)]
        entries = fs.get_file_info(pafs.FileSelector(root, recursive=True))
    except OSError as error:
        raise DataError(f"{uri} cannot be listed: {one_line(error)}") from error
    files = [i for i in entries if i.type == pafs.FileType.File and _is_data(i.path, root)]
    if not files:
        raise DataError(f"{uri} is a folder without parquet files (*.parquet)")
    return sorted(Listed(i.path, i.size) for i in files)


def read_images(column: pa.ChunkedArray, fs: pafs.FileSystem, path: str) -> list[bytes | None]:
    """Return the encoded images of a column; None for a null, and for a named file that is gone.

    Args:
        column: binary, a struct of bytes and path (bytes win), or strings: paths, taken from the
            folder of the parquet file where relative, or URIs.
        fs: the file system of the parquet file.
        path: the parquet file.

    Raises:
        DataError: a named file system cannot be reached.
    """
    kind = column.type
    if pa.types.is_struct(kind):
        names = [f.name for f in kind]
        nothing = [None] * len(column)
        whole = pc.struct_field(column, "bytes").to_pylist() if "bytes" in names else nothing
        named = pc.struct_field(column, "path").to_pylist() if "path" in names else nothing
    elif pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return cast("list[bytes | None]", column.to_pylist())
    else:
        whole, named = [None] * len(column), column.to_pylist()
    images: list[bytes | None] = list(whole)
    missing = [i for i, image in enumerate(whole) if image is None and named[i] is not None]
    targets = [_target(str(named[i]), fs, path) for i in missing]
    for i, image in zip(missing, _read_all(targets), strict=True):
        images[i] = image
    return images


def _target(name: str, fs: pafs.FileSystem, path: str) -> tuple[pafs.FileSystem, str]:
    """Return where the image `name` of the parquet file `path` lies."""
    if "://" in name:
        scheme, _, rest = name.partition("://")
        host, _, key = rest.partition("/")
        host_fs, base = filesystem(f"{scheme}://{host}/")
        key = urllib.parse.unquote(key) if scheme == "file" else key
        return host_fs, f"{base.rstrip('/')}/{key}"
    if name.startswith("/"):
        return fs, name
    return fs, f"{path.rpartition('/')[0]}/{name}"


def _read_all(targets: Sequence[tuple[pafs.FileSystem, str]]) -> list[bytes | None]:
    if not targets or all(is_local(fs) for fs, _ in targets):
        return [_read_one(target) for target in targets]
    with ThreadPoolExecutor(REMOTE_THREADS) as pool:
        return list(pool.map(_read_one, targets))


def _read_one(target: tuple[pafs.FileSystem, str]) -> bytes | None:
    """Return a file, or None when it cannot be had: one bad row, counted as such by the reader."""
    fs, path = target
    try:
        with fs.open_input_file(path) as stream:
            content: bytes = stream.read()
            return content
    except (FileNotFoundError, PermissionError):
        return None
    except (OSError, pa.ArrowException) as error:
        if is_local(fs):  # a folder, a name too long, a bad sector: of this file alone
            return None
        raise DataError(f"{path} cannot be read: {one_line(error)}") from error


def _is_data(path: str, root: str) -> bool:
    parts = path.removeprefix(root).strip("/").split("/")
    return path.endswith(".parquet") and not any(p.startswith((".", "_")) for p in parts)
