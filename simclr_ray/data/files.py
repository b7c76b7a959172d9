"""Images that a column holds, or names by path: of a bucket as well as of a folder."""

from __future__ import annotations

import base64
import binascii
import contextlib
import errno
import os
import urllib.parse
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import cast

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs

from simclr_ray.augment.decode import (
    FIRST_BYTES,
    format_of,
    instead_of_image,
    stands_for_image,
)
from simclr_ray.data.bytes_read import BYTES_READ
from simclr_ray.data.listing import REMOTE_THREADS
from simclr_ray.errors import DataError, one_line
from simclr_ray.storage.filesystem import filesystem, is_local

LEAST_BASE64 = 64  # characters; shorter text may be a name


def read_images(
    column: pa.ChunkedArray, fs: pafs.FileSystem, path: str, root: str = ""
) -> list[bytes | None]:
    """Return the encoded images of a column; None for a null.

    For a named file that cannot be had there are bytes whose decoding raises why.

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
    elif is_bytes(kind):
        return cast("list[bytes | None]", column.to_pylist())
    else:
        whole, named = [None] * len(column), column.to_pylist()
    images: list[bytes | None] = list(whole)
    missing = [i for i, image in enumerate(whole) if image is None and named[i] is not None]
    targets = [target_of(str(named[i]), fs, path, root) for i in missing]
    for i, image in zip(missing, _read_all(targets), strict=True):
        stand_in = _stand_in(str(named[i])) if stands_for_image(image) else None
        images[i] = stand_in or image
    return images


def names_of(column: pa.ChunkedArray) -> list[str | None]:
    """Return the paths that a column of strings holds, or a struct in its field `path`."""
    if pa.types.is_struct(column.type):
        column = pc.struct_field(column, "path")
    return cast("list[str | None]", column.to_pylist())


def is_bytes(kind: pa.DataType | None) -> bool:
    """Return whether a column of this type holds encoded images."""
    if kind is None:
        return False
    views = pa.types.is_binary_view(kind)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or views)


def _stand_in(text: str) -> bytes | None:
    """Return what stands for an image where its path is plainly something else."""
    if not text:
        return instead_of_image("empty")
    if text.startswith("data:image"):
        return instead_of_image("text that holds an image, not a path")
    head = text[: 4 * FIRST_BYTES].encode()
    if len(text) >= LEAST_BASE64:
        with contextlib.suppress(binascii.Error):
            if format_of(base64.b64decode(head[: len(head) // 4 * 4], validate=True)):
                return instead_of_image("base64 text, not bytes or a path")
    return None


def target_of(name: str, fs: pafs.FileSystem, path: str, root: str) -> tuple[pafs.FileSystem, str]:
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


def states_of_files(
    column: pa.ChunkedArray, fs: pafs.FileSystem, path: str, root: str = ""
) -> Iterator[str]:
    """Yield place, size and time of the last change of each file that a column names.

    Of a bucket the place alone: its sizes are part of a list's own identity, and to ask for the
    time of each object takes a request.

    Args:
        column: strings, or a struct of paths, as `read_images` takes them.
        fs: the file system of the parquet file.
        path: the parquet file.
        root: as in `read_images`.
    """
    for name in names_of(column):
        file_fs, target = target_of(str(name), fs, path, root)
        state = ""
        if is_local(file_fs):
            target = os.path.realpath(target)
            with contextlib.suppress(OSError, ValueError):
                status = os.stat(target)  # noqa: PTH116 - of many, and Path costs as much again
                state = f"{status.st_size} {status.st_mtime_ns}"
        yield f"{target}\0{state}\n"


def _read_all(targets: Sequence[tuple[pafs.FileSystem, str]]) -> list[bytes]:
    if not targets or all(is_local(fs) for fs, _ in targets):
        return [read_file(target) for target in targets]
    with ThreadPoolExecutor(REMOTE_THREADS) as pool:
        return list(pool.map(read_file, targets))


def read_file(target: tuple[pafs.FileSystem, str]) -> bytes:
    """Return a file, or what stands for its image where it cannot be had: one bad row.

    Raises:
        DataError: A store of files cannot be reached.
    """
    fs, path = target
    try:
        with fs.open_input_file(path) as stream:
            content: bytes = stream.read()
            BYTES_READ.add(len(content))
            return content
    except (FileNotFoundError, NotADirectoryError):
        return instead_of_image("no such file")
    except PermissionError:
        return instead_of_image("a file that may not be read")
    except (OSError, pa.ArrowException) as error:
        if is_local(fs):  # a folder, a name too long, a bad sector: of this file alone
            return instead_of_image(_reason(fs, path, error))
        raise DataError(f"{path} cannot be read: {one_line(error)}") from error


def _reason(fs: pafs.FileSystem, path: str, error: Exception) -> str:
    """Return why a local file cannot be read."""
    number = getattr(error, "errno", None)
    if number == errno.ENAMETOOLONG or "\0" in path:
        return "text that is no path"
    if fs.get_file_info(path).type == pafs.FileType.Directory:
        return "a folder, not a file"
    return f"a file that cannot be read: {os.strerror(number)}" if number else "unreadable file"
