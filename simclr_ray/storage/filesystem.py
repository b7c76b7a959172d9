"""From a path or URI to a file system and the path on it: a bucket serves as well as a folder.

And files that appear whole or not at all, on either.
"""

from __future__ import annotations

import errno
import functools
import os
import tempfile
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.fs as pafs

from simclr_ray.config.uris import hide_passwords, recall, remember
from simclr_ray.errors import DataError, one_line
from simclr_ray.storage.hub import SCHEME, hub_filesystem

# What pyarrow opens by itself; by `fsspec+…` it would import a package that the URI names.
SCHEMES = ("file", "s3", "gs", "gcs", "abfs", "abfss", "hdfs", "viewfs")
COPY_BYTES, COPY_THREADS = 2**24, 8
HALF_WRITTEN_S = 600.0  # after which what is half written is left by a killed process


@functools.lru_cache(maxsize=64)
def filesystem(uri: str) -> tuple[pafs.FileSystem, str]:
    """Return the file system of a local path or URI, and the path on it.

    A password that it names is used, and shown nowhere.

    Raises:
        DataError: It is of none of `SCHEMES`, or cannot be reached; or there is no name, or one
            that is not UTF-8.
    """
    uri = recall(remember(uri))
    if not uri.strip("/ ").rpartition(":")[2] and uri not in ("/", "file:///"):
        raise DataError(f"{uri!r} is no path: it names nothing")
    where = uri if "://" in uri else Path(uri).expanduser().absolute().as_posix()
    if not is_utf8(where):  # Arrow has no other names
        raise DataError(f"{where!a}: the name is not UTF-8; give the file or folder another")
    if "://" not in uri:
        return pafs.LocalFileSystem(), where
    if uri.startswith(SCHEME):
        return hub_filesystem(), uri.removeprefix(SCHEME).rstrip("/")
    scheme = uri.partition("://")[0].lower()
    if scheme not in SCHEMES:
        allowed = ", ".join(f"{name}://" for name in SCHEMES)
        raise DataError(f"{hide_passwords(uri)} cannot be opened: not one of {allowed}, hf://")
    address, mark, split = uri.partition("#")  # which `from_uri` would drop
    try:
        fs, path = pafs.FileSystem.from_uri(address)
    except (OSError, pa.ArrowException, ImportError, ValueError) as error:  # of a scheme's package
        shown = hide_passwords(f"{uri} cannot be opened: {one_line(error)}")
        raise DataError(shown) from None  # its own message may hold the password
    return fs, path.rstrip("/") + mark + split


def is_utf8(name: str) -> bool:
    """Return whether a name is text that any file can hold."""
    try:
        name.encode()
    except UnicodeEncodeError:  # a surrogate stands for a byte of another encoding
        return False
    return True


def cache_folder(part: str) -> Path:
    """Return this user's folder for copies that can be fetched again; it need not be there."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "simclr_ray" / part


def is_local(fs: pafs.FileSystem) -> bool:
    """Return whether `fs` is the disk of this machine."""
    return isinstance(fs, pafs.LocalFileSystem)


def check_makeable(folder: Path) -> None:
    """Raise `OSError` where a local folder cannot be made or written to; leave nothing behind."""
    above = folder
    while not above.exists():
        above = above.parent
    with tempfile.TemporaryDirectory(dir=above, prefix=".simclr_ray-"):
        pass


def address_below(uri: str, name: str) -> str:
    """Return the path or URI of what lies below a folder; the options of a bucket stay last."""
    scheme, path, options = _parts_of(uri)
    folder = path.rstrip("/") + "/" if path else ""
    return f"{scheme}{folder}{name}{options}"


def split_address(uri: str) -> tuple[str, str]:
    """Return the path or URI of the folder that something lies in, options last, and its name."""
    scheme, path, options = _parts_of(uri)
    folder, slash, name = path.rstrip("/").rpartition("/")
    return f"{scheme}{folder or slash}{options}", name


def address_above(uri: str, levels: int) -> str:
    """Return the path or URI of the folder that is so many levels above; options stay last."""
    for _ in range(levels):
        uri, _ = split_address(uri)
    return uri


def _parts_of(uri: str) -> tuple[str, str, str]:
    """Return scheme with `://`, path with the bucket, and options with `?` of an address."""
    if "://" not in uri:
        return "", uri, ""
    address, mark, options = uri.partition("?")
    scheme, colon, path = address.partition("://")
    return scheme + colon, path, mark + options


def info_of(fs: pafs.FileSystem, path: str) -> pafs.FileInfo:
    """Return what lies at a path, if anything.

    Raises:
        DataError: The file system cannot be asked.
    """
    try:
        return fs.get_file_info(path)
    except DataError:  # the hub's, which names the path
        raise
    except OSError as error:
        raise DataError(f"{path} cannot be looked at: {one_line(error)}") from error


def entries_in(fs: pafs.FileSystem, path: str) -> list[pafs.FileInfo]:
    """Return what lies directly in a folder; nothing where there is none."""
    entries: list[pafs.FileInfo] = fs.get_file_info(pafs.FileSelector(path, allow_not_found=True))
    return entries


def remove_file(fs: pafs.FileSystem, path: str) -> None:
    """Remove a file; one that somebody else has just removed or renamed is no error.

    The tasks of a driver that was killed go on for a moment and clear up after themselves.
    """
    with suppress(FileNotFoundError):
        fs.delete_file(path)


def copy_in_bucket(fs: pafs.FileSystem, path: str, target: str) -> None:
    """Copy an object within a bucket: by a request where the bucket takes it, else through here.

    S3 copies 5 GiB in one request at most, and `pyarrow.fs.copy_files` asks it for no less.
    """
    try:
        fs.copy_file(path, target)
    except (OSError, pa.ArrowException):
        with fs.open_input_stream(path) as stored, open_large(fs, target) as copied:
            while chunk := stored.read(COPY_BYTES):
                copied.write(chunk)


def move_in_bucket(fs: pafs.FileSystem, path: str, target: str) -> None:
    """Move an object, or all that are in a folder, of which a bucket can rename neither."""
    if fs.get_file_info(path).is_file:
        copy_in_bucket(fs, path, target)
        remove_file(fs, path)
        return
    entries = fs.get_file_info(pafs.FileSelector(path, recursive=True))
    for folder in (path, *(e.path for e in entries if not e.is_file)):
        fs.create_dir(target + folder[len(path) :], recursive=True)
    stored = [entry.path for entry in entries if entry.is_file]
    with ThreadPoolExecutor(COPY_THREADS) as pool:
        list(pool.map(lambda one: copy_in_bucket(fs, one, target + one[len(path) :]), stored))
    fs.delete_dir(path)


@contextmanager
def open_whole(fs: pafs.FileSystem, path: str) -> Iterator[pa.NativeFile]:
    """Give a stream whose file gets its name when all is written.

    Another name in the same folder, then a rename; on a disk fsync between. A bucket shows an
    object when its stream is closed, which Arrow does on an error as well, so the other name is
    needed there too; a rename is a copy within the bucket, and not every bucket has one.
    """
    folder, slash, name = path.rpartition("/")
    hidden_path = f"{folder}{slash}.{name}.{uuid.uuid4().hex[:8]}.tmp"
    if not is_local(fs):
        try:
            with fs.open_output_stream(hidden_path) as stream:
                yield stream
            copy_in_bucket(fs, hidden_path, path)
        finally:
            with suppress(OSError):
                fs.delete_file(hidden_path)
        return
    target, hidden = Path(path), Path(hidden_path)
    try:
        with hidden.open("wb") as file:
            yield pa.PythonFile(file, mode="w")
            file.flush()
            os.fsync(file.fileno())
        hidden.replace(target)
    finally:
        hidden.unlink(missing_ok=True)
    _sync_folder(target.parent)


@contextmanager
def open_large(fs: pafs.FileSystem, path: str) -> Iterator[pa.NativeFile]:
    """Give a stream whose file appears whole or not at all, however large it is.

    In a bucket it is written at once, without the copy that `open_whole` makes: of more than 5 GiB
    that goes through this machine.
    """
    if is_local(fs):
        with open_whole(fs, path) as file:
            yield file
        return
    stream = fs.open_output_stream(path)
    try:
        yield stream
        stream.close()
    except BaseException:
        with suppress(OSError, pa.ArrowException):
            stream.close()  # which shows what there is
        with suppress(OSError):
            fs.delete_file(path)
        raise


def remove_half_written(folder: Path) -> None:
    """Remove what `open_whole` has left in a folder of a disk where its process was killed.

    Another process may write there now: what is young may be renamed in a moment.
    """
    for left in folder.glob(".*.tmp"):
        with suppress(OSError):
            if time.time() - left.stat().st_mtime > HALF_WRITTEN_S:
                left.unlink()


def make_parent(uri: str) -> None:
    """Make the folder that a file will lie in, so that long work does not end in its absence.

    Raises:
        DataError: As `filesystem`.
        OSError: It cannot be made, or not be written to.
    """
    fs, path = filesystem(uri)
    if not is_local(fs):
        return  # a bucket has no folders
    folder = Path(path).parent
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))


def write_text_whole(fs: pafs.FileSystem, path: str, text: str) -> None:
    """Write a text file that appears whole or not at all; it holds no password of a URI."""
    write_whole(fs, path, hide_passwords(text).encode())


def write_whole(fs: pafs.FileSystem, path: str, data: bytes) -> None:
    """Write a file that appears whole or not at all; of what is larger see `open_large`."""
    if not is_local(fs):  # in one request: nothing of it can fail halfway
        with fs.open_output_stream(path) as stream:
            stream.write(data)
        return
    with open_whole(fs, path) as stream:
        stream.write(data)


def read_file(fs: pafs.FileSystem, path: str, *, start: int = 0, last: int = 0) -> bytes | None:
    """Return the content of a file, or None where there is none.

    Args:
        fs: Where it lies.
        path: On it.
        start: Bytes to pass over.
        last: Bytes of the end that are wanted; 0: all.
    """
    try:
        opened = fs.open_input_file if start or last else fs.open_input_stream
        with opened(path) as stream:
            if start or last:
                stream.seek(max(start, stream.size() - last if last else 0))
            data: bytes = stream.read()
    except FileNotFoundError:
        return None
    return data


def _sync_folder(folder: Path) -> None:
    """Make a rename in `folder` last through a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
