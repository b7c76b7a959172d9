"""Images that a column holds, or names by path: of a bucket as well as of a folder."""

from __future__ import annotations

import urllib.parse
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import cast

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs

from simclr_ray.data.listing import REMOTE_THREADS
from simclr_ray.errors import DataError
from simclr_ray.storage.filesystem import filesystem, is_local, one_line


def read_images(
    column: pa.ChunkedArray, fs: pafs.FileSystem, path: str, root: str = ""
) -> list[bytes | None]:
    """Return the encoded images of a column; None for a null, and for a named file that is gone.

    Args:
        column: binary, a struct of bytes and path (bytes win), or strings: paths, taken from the
            folder of the parquet file where relative, or URIs.
        fs: the file system of the parquet file.
        path: the parquet file.
        root: folder or URI that relative paths are taken from; a relative one begins at the file's.

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
    targets = [_target(str(named[i]), fs, path, root) for i in missing]
    for i, image in zip(missing, _read_all(targets), strict=True):
        images[i] = image
    return images


def _target(name: str, fs: pafs.FileSystem, path: str, root: str) -> tuple[pafs.FileSystem, str]:
    """Return where the image `name` of the parquet file `path` lies, below `root` where given."""
    if "://" in name:
        scheme, _, rest = name.partition("://")
        host, _, key = rest.partition("/")
        host_fs, base = filesystem(f"{scheme}://{host}/")
        key = urllib.parse.unquote(key) if scheme == "file" else key
        return host_fs, f"{base.rstrip('/')}/{key}"
    if name.startswith("/"):
        return fs, name
    if "://" in root:
        root_fs, base = filesystem(root)
        return root_fs, f"{base}/{name}"
    return fs, "/".join(part for part in (path.rpartition("/")[0], root, name) if part)


def _read_all(targets: Sequence[tuple[pafs.FileSystem, str]]) -> list[bytes | None]:
    if not targets or all(is_local(fs) for fs, _ in targets):
        return [read_file(target) for target in targets]
    with ThreadPoolExecutor(REMOTE_THREADS) as pool:
        return list(pool.map(read_file, targets))


def read_file(target: tuple[pafs.FileSystem, str]) -> bytes | None:
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
