"""Which files lie below a path or URI, and which of them are parquet or images.

Links are followed. What is passed over is counted by reason, so that nothing is lost without a
word; what cannot be listed is an error. Everything goes through `pyarrow.fs`, but for local
folders: its selector neither says which folder it may not read nor notices a link to itself.
"""

from __future__ import annotations

import errno
import functools
import logging
import os
import stat
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import pyarrow as pa
import pyarrow.fs as pafs

from simclr_ray.augment.decode import FIRST_BYTES, format_of, missing_decoder
from simclr_ray.config.logging import warn_once
from simclr_ray.config.wording import counted
from simclr_ray.data.splits import choose_split
from simclr_ray.errors import DataError
from simclr_ray.storage.filesystem import is_local, one_line

# Requests to a bucket take tens of milliseconds and no processor; local files do neither.
REMOTE_THREADS = 16
OLD_MANIFEST = "manifest.json"  # of sets prepared by earlier releases, which no reader skips
PARQUET_SUFFIXES = (".parquet", ".parq", ".pq")
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
# Believed without a look into the file; contents decide for all others, and when decoding.
IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff",
    ".ppm", ".pgm", ".pbm", ".pnm", ".avif", ".jp2", ".j2k", ".npy",
)  # fmt: skip

log = logging.getLogger(__name__)


class Listed(NamedTuple):
    """A file that was found: its path on the file system and its size in bytes."""

    path: str
    size: int


class Listing(NamedTuple):
    """Files sorted by path, and how many others there are, by reason."""

    files: list[Listed]
    left_out: Counter[str]

    def say(self, uri: str) -> None:
        """Log what is left out, once for the same listing."""
        if self.left_out:
            warn_once(log, f"{uri}: {left_out_line(self.left_out)}")


def left_out_line(left_out: Counter[str]) -> str:
    """Return `left out 8 files: 5 .txt, 3 .dcm (install simclr-ray[dicom])`."""
    reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.most_common())
    return f"left out {counted(left_out.total(), 'file')}: {reasons}"


def list_files(fs: pafs.FileSystem, root: str, uri: str) -> Listing:
    """Return the file `root`, or all below the folder `root`, sorted by path.

    Names that begin with a dot are skipped: they are other programs' own.

    Raises:
        DataError: There is nothing at `uri`, or a folder that cannot be listed.
    """
    left_out: Counter[str] = Counter()
    try:
        info = fs.get_file_info(root)
        if info.type == pafs.FileType.NotFound:
            raise DataError(f"{uri}: no such file or folder")
        if info.type == pafs.FileType.File:
            return Listing([Listed(root, info.size)], left_out)
        if is_local(fs):
            files: list[Listed] = []
            at = Path(root).stat()
            _walk(root, ((at.st_dev, at.st_ino),), files, left_out)
            return Listing(sorted(files), left_out)
        entries = fs.get_file_info(pafs.FileSelector(root, recursive=True))
    except OSError as error:
        raise DataError(f"{uri} cannot be listed: {one_line(error)}") from error
    files = [Listed(i.path, i.size) for i in entries if i.type == pafs.FileType.File]
    return Listing(sorted(f for f in files if not _is_hidden(f.path, root, ".")), left_out)


def list_parquet(fs: pafs.FileSystem, root: str, uri: str) -> list[Listed]:
    """Return the file `root`, or parquet below the folder `root`, sorted by path; none: no parquet.

    Names that begin with a dot or underscore are skipped, as everywhere in the parquet world:
    they are half-written files and notes. Other files are left out and said. Of `FOLDER#SPLIT`
    the files of one split are returned.

    Raises:
        DataError: There is nothing at `uri`, a folder that cannot be listed, or several splits
            and none is named.
    """
    folder, split = part_split(fs, root)
    listing = all_parquet(fs, folder, uri)
    if not listing.files:
        return []
    listing.say(uri)
    shown = uri.rpartition("#")[0] if split else uri
    kept = set(choose_split([f.path for f in listing.files], folder, split, shown))
    return [file for file in listing.files if file.path in kept]


def part_split(fs: pafs.FileSystem, root: str) -> tuple[str, str]:
    """Return a folder and the split of `FOLDER#SPLIT`; a path that exists is one."""
    folder, mark, split = root.rpartition("#")
    if not mark or not split or "/" in split or not folder:
        return root, ""
    return (root, "") if fs.get_file_info(root).type != pafs.FileType.NotFound else (folder, split)


def all_parquet(fs: pafs.FileSystem, root: str, uri: str) -> Listing:
    """Return the parquet of all splits, and what else there is; see `list_parquet`."""
    files, left_out = list_files(fs, root, uri)
    if [f.path for f in files] == [root]:
        return Listing(files, left_out)
    files = [f for f in files if not _is_hidden(f.path, root, "_")]
    parquet = [f for f in files if suffix_of(f.path) in PARQUET_SUFFIXES]
    others = [PurePosixPath(f.path) for f in files if suffix_of(f.path) not in PARQUET_SUFFIXES]
    reasons = (p.suffix.lower() or "without an ending" for p in others if p.name != OLD_MANIFEST)
    left_out.update(reasons)
    return Listing(parquet, left_out)


def list_images(fs: pafs.FileSystem, root: str, uri: str) -> Listing:
    """Return the images below the folder `root`, sorted by path.

    Endings of images are believed, and files with others, or none, are opened: their first bytes
    decide. A file that cannot be opened is kept, so that it is counted as bad, with its name.

    Raises:
        DataError: There is nothing at `uri`, or a folder that cannot be listed.
    """
    files, left_out = list_files(fs, root, uri)
    doubtful = [f for f in files if suffix_of(f.path) not in IMAGE_SUFFIXES]
    reasons = dict(zip(doubtful, _why_left_out(fs, doubtful), strict=True))
    left_out.update(reason for reason in reasons.values() if reason)
    return Listing([f for f in files if not reasons.get(f)], left_out)


def _why_left_out(fs: pafs.FileSystem, files: Sequence[Listed]) -> list[str]:
    """Return why each file is no image that can be read; nothing where it is one."""
    look = functools.partial(_why, fs)
    if is_local(fs) or len(files) < 2:
        return [look(file) for file in files]
    with ThreadPoolExecutor(REMOTE_THREADS) as pool:
        return list(pool.map(look, files))


def _why(fs: pafs.FileSystem, file: Listed) -> str:
    if suffix_of(file.path) in TAR_SUFFIXES:
        return f"{suffix_of(file.path)} (of shards, which `prepare` reads by themselves)"
    try:
        with fs.open_input_file(file.path) as stream:
            first = stream.read(FIRST_BYTES)
    except (OSError, pa.ArrowException):
        return ""
    kind = format_of(first)
    if kind is None:
        return "not images" if first else "empty"
    missing = missing_decoder(kind)
    return f"{suffix_of(file.path) or kind.name} ({missing})" if missing else ""


def _walk(
    folder: str, above: tuple[tuple[int, int], ...], files: list[Listed], left_out: Counter[str]
) -> None:
    """Add the files below a local folder. Raises `DataError` for one that cannot be listed."""
    try:
        with os.scandir(folder) as entries:
            listed = [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise DataError(f"{folder} cannot be listed: {one_line(error)}") from error
    for entry in listed:
        if not entry.name.isprintable() and not _is_utf8(entry.name):
            left_out["with names that are not UTF-8"] += 1
            continue
        try:
            status = entry.stat()  # of what a link points to
        except FileNotFoundError:
            left_out["links to nothing"] += 1
            continue
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise DataError(f"{entry.path} cannot be looked at: {one_line(error)}") from error
            left_out["links to themselves"] += 1
            continue
        if stat.S_ISREG(status.st_mode):
            files.append(Listed(entry.path, status.st_size))
        elif not stat.S_ISDIR(status.st_mode):
            left_out["no regular files"] += 1
        elif (here := (status.st_dev, status.st_ino)) in above:
            left_out["links to a folder above"] += 1
        else:
            _walk(entry.path, (*above, here), files, left_out)


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:  # a surrogate stands for a byte of another encoding
        return False
    return True


def suffix_of(path: str) -> str:
    """Return the ending of a file's name in lower case; of tars, `.tar.gz` as well."""
    name = PurePosixPath(path.lower())
    return ".tar.gz" if name.name.endswith(".tar.gz") else name.suffix


def _is_hidden(path: str, root: str, first: str) -> bool:
    parts = path.removeprefix(root).strip("/").split("/")
    return any(part.startswith(first) for part in parts)
