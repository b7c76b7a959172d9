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
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import pyarrow as pa
import pyarrow.fs as pafs

from simclr_ray.augment.decode import FIRST_BYTES, format_of, missing_decoder
from simclr_ray.config.experiment import ColumnsConfig
from simclr_ray.config.logging import warn_once
from simclr_ray.data.left_out import LISTS, LeftOut
from simclr_ray.data.splits import choose_split
from simclr_ray.errors import DataError, one_line
from simclr_ray.storage.filesystem import info_of, is_local, is_utf8

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
LIST_SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".txt", ".xlsx", ".xml")
# Hidden images of these are nobody's data: version control, notebooks, thumbnails, and what systems
# and programs, this one as well, keep for themselves.
LITTER = (
    "._", ".git", ".hg", ".svn", ".dvc", ".ipynb_checkpoints", ".cache", ".venv", ".DS_Store",
    ".Trash", ".thumbnails", ".AppleDouble", ".Spotlight-", ".fseventsd", ".part-", ".simclr_ray",
)  # fmt: skip

log = logging.getLogger(__name__)


class Listed(NamedTuple):
    """A file that was found: its path on the file system and its size in bytes."""

    path: str
    size: int


class Listing(NamedTuple):
    """Files sorted by path, and what else there is.

    Attributes:
        files: Of the kind that was looked for.
        left_out: What is passed over.
        hidden: Files that are or lie hidden.
        others: Files beside parquet.
    """

    files: list[Listed]
    left_out: LeftOut
    hidden: Sequence[Listed] = ()
    others: Sequence[Listed] = ()

    def say(self, uri: str) -> None:
        """Log what is left out, once for the same listing."""
        if self.left_out:
            warn_once(log, f"{uri}: {self.left_out.line()}")


def list_files(fs: pafs.FileSystem, root: str, uri: str) -> Listing:
    """Return the file `root`, or all below the folder `root`, sorted by path.

    What begins with a dot is apart: it is other programs' own, unless it holds images.

    Raises:
        DataError: There is nothing at `uri`, or a folder that cannot be listed.
    """
    left_out = LeftOut()
    try:
        info = fs.get_file_info(root)
        if info.type == pafs.FileType.NotFound:
            raise DataError(f"{uri}: no such file or folder")
        if info.type == pafs.FileType.File:
            return Listing([Listed(root, info.size)], left_out)
        if is_local(fs):
            walk = _Walk(root, left_out)
            at = Path(root).stat()
            walk.add(root, ((at.st_dev, at.st_ino),), is_hidden=False)
            return Listing(sorted(walk.files), left_out, walk.hidden)
        entries = fs.get_file_info(pafs.FileSelector(root, recursive=True))
    except OSError as error:
        raise DataError(f"{uri} cannot be listed: {one_line(error)}") from error
    files = [Listed(i.path, i.size) for i in entries if i.type == pafs.FileType.File]
    hidden = [f for f in files if _is_hidden(f.path, root, ".")]
    return Listing(sorted({*files} - {*hidden}), left_out, hidden)


def list_parquet(
    fs: pafs.FileSystem, root: str, uri: str, columns: ColumnsConfig | None = None
) -> Listing:
    """Return the file `root`, or parquet below the folder `root`, sorted by path; none: no parquet.

    Names that begin with a dot or underscore are skipped, as everywhere in the parquet world:
    they are half-written files and notes. Other files are left out and said. Of `FOLDER#SPLIT`
    the files of one split are returned.

    Args:
        fs: Where it lies.
        root: The file or folder there.
        uri: What messages call it.
        columns: A folder `label=train` is a class and no split where `label` holds labels.

    Raises:
        DataError: There is nothing at `uri`, a folder that cannot be listed, or several splits
            and none is named.
    """
    folder, split = part_split(fs, root)
    listing = all_parquet(fs, folder, uri)
    if not listing.files:
        return listing
    listing.say(uri)
    shown = uri.rpartition("#")[0] if split else uri
    columns = columns or ColumnsConfig()
    read = (columns.label, columns.group)
    kept = set(choose_split([f.path for f in listing.files], folder, split, shown, read))
    return listing._replace(files=[file for file in listing.files if file.path in kept])


def part_split(fs: pafs.FileSystem, root: str) -> tuple[str, str]:
    """Return a folder and the split of `FOLDER#SPLIT`; a path that exists is one."""
    folder, mark, split = root.rpartition("#")
    if not mark or not split or "/" in split or not folder:
        return root, ""
    is_there = info_of(fs, root).type != pafs.FileType.NotFound
    return (root, "") if is_there else (folder.rstrip("/") or "/", split)


def all_parquet(fs: pafs.FileSystem, root: str, uri: str) -> Listing:
    """Return the parquet of all splits, and what else there is; see `list_parquet`."""
    files, left_out, *_ = list_files(fs, root, uri)
    if [f.path for f in files] == [root]:
        _check_parquet(fs, files[0], uri)
        return Listing(files, left_out)
    files = [f for f in files if not _is_hidden(f.path, root, "_")]
    parquet = [f for f in files if suffix_of(f.path) in PARQUET_SUFFIXES]
    others = [f for f in files if suffix_of(f.path) not in PARQUET_SUFFIXES]
    for file in others:
        name = PurePosixPath(file.path)
        if name.name != OLD_MANIFEST:
            left_out.add(name.suffix.lower() or "without an ending", below(root, file.path))
    return Listing(parquet, left_out, others=others)


def _check_parquet(fs: pafs.FileSystem, file: Listed, uri: str) -> None:
    """Raise `DataError` for a single file of another kind, which says what takes that kind."""
    suffix = suffix_of(file.path)
    if suffix in PARQUET_SUFFIXES or not file.size:
        return  # what is wrong with it, its footer says
    try:
        with fs.open_input_file(file.path) as stream:
            first = stream.read(FIRST_BYTES)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{uri} cannot be read: {one_line(error)}") from error
    if first.startswith(b"PAR1"):
        return
    kind = format_of(first)
    if suffix in TAR_SUFFIXES:
        what = f"a tar: simclr-ray prepare {uri} OUT makes parquet of its images"
    elif kind is not None:
        what = f"one image ({kind.name}): give the folder of images; `embed` takes single ones"
    elif suffix in LIST_SUFFIXES:
        what = (
            f"a list ({suffix}): give the folder of the images; of a list, labels and paths are "
            "read once it is written as parquet, with the columns image (paths) and label"
        )
    elif suffix == ".arrow":
        what = "an Arrow file: give `prepare` the folder that `datasets` saved it in"
    elif first.startswith((b"PK\x03\x04", b"\x1f\x8b", b"7z\xbc\xaf", b"BZh", b"\xfd7zXZ")):
        what = "an archive: unpack it, and give the folder"
    else:
        what = "none that is read; give parquet, or a folder of images"
    raise DataError(f"{uri} is no parquet file but {what}")


def below(root: str, path: str) -> str:
    """Return the name of a file below a folder."""
    return path.removeprefix(root).strip("/")


def list_images(fs: pafs.FileSystem, root: str, uri: str) -> Listing:
    """Return the images below the folder `root`, sorted by path.

    Endings of images are believed, and files with others, or none, are opened: their first bytes
    decide. A file that cannot be opened is kept, so that it is counted as bad, with its name.

    Raises:
        DataError: There is nothing at `uri`, or a folder that cannot be listed.
    """
    files, left_out, hidden, _ = list_files(fs, root, uri)
    doubtful = [f for f in files if suffix_of(f.path) not in IMAGE_SUFFIXES]
    reasons = dict(zip(doubtful, _why_left_out(fs, doubtful), strict=True))
    for file, reason in reasons.items():
        if reason:
            left_out.add(reason, below(root, file.path))
    for file in sorted(hidden):
        if suffix_of(file.path) in IMAGE_SUFFIXES and not _is_litter(below(root, file.path)):
            _count_hidden(below(root, file.path), left_out)
    return Listing([f for f in files if not reasons.get(f)], left_out)


def images_among(fs: pafs.FileSystem, files: Sequence[Listed]) -> list[Listed]:
    """Return the images among files, as `list_images` tells them; endings of lists are believed."""
    others = (*PARQUET_SUFFIXES, *TAR_SUFFIXES, *LIST_SUFFIXES)
    files = [file for file in files if suffix_of(file.path) not in others]
    doubtful = [file for file in files if suffix_of(file.path) not in IMAGE_SUFFIXES]
    reasons = dict(zip(doubtful, _why_left_out(fs, doubtful), strict=True))
    return [file for file in files if not reasons.get(file)]


def _is_litter(name: str) -> bool:
    parts = name.split("/")
    is_half_written = parts[-1].startswith(".") and parts[-1].endswith(".tmp")
    return is_half_written or any(part.startswith(LITTER) for part in parts)


def _count_hidden(name: str, left_out: LeftOut) -> None:
    parts = name.split("/")
    at = next(i for i, part in enumerate(parts) if part.startswith("."))
    kind = "hidden" if at == len(parts) - 1 else "in hidden folders"
    left_out.add(kind, "/".join(parts[: at + 1]))


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
        is_list = suffix_of(file.path) in LIST_SUFFIXES
        return (LISTS if is_list else "not images") if first else "empty"
    missing = missing_decoder(kind)
    return f"{suffix_of(file.path) or kind.name} ({missing})" if missing else ""


class _Walk:
    """The files below a local folder, those that are hidden apart."""

    def __init__(self, root: str, left_out: LeftOut) -> None:
        self.root, self.left_out = root, left_out
        self.files: list[Listed] = []
        self.hidden: list[Listed] = []

    def add(self, folder: str, above: tuple[tuple[int, int], ...], *, is_hidden: bool) -> None:
        """Add the files below a folder. Raises `DataError` for one that cannot be listed."""
        try:
            with os.scandir(folder) as entries:
                listed = list(entries)
        except OSError as error:
            if is_hidden:  # of other programs, who may keep it from us
                return
            raise DataError(f"{folder} cannot be listed: {one_line(error)}") from error
        for entry in listed:
            hides = entry.name.startswith(".")
            if hides and entry.name.startswith(LITTER):
                continue
            hides = hides or is_hidden
            if not entry.name.isprintable() and not is_utf8(entry.name):
                self._leave_out("with names that are not UTF-8", "", is_hidden=hides)
            elif (status := self._status(entry, is_hidden=hides)) is None:
                continue
            elif stat.S_ISREG(status.st_mode):
                (self.hidden if hides else self.files).append(Listed(entry.path, status.st_size))
            elif not stat.S_ISDIR(status.st_mode):
                self._leave_out("no regular files", entry.path, is_hidden=hides)
            elif (here := (status.st_dev, status.st_ino)) in above:
                self._leave_out("links to a folder above", entry.path, is_hidden=hides)
            else:
                self.add(entry.path, (*above, here), is_hidden=hides)

    def _status(self, entry: os.DirEntry[str], *, is_hidden: bool) -> os.stat_result | None:
        """Return what a link points to; None, and counted, where it leads nowhere."""
        try:
            return entry.stat()
        except FileNotFoundError:
            self._leave_out("links to nothing", entry.path, is_hidden=is_hidden)
        except OSError as error:
            if error.errno != errno.ELOOP and not is_hidden:
                raise DataError(f"{entry.path} cannot be looked at: {one_line(error)}") from error
            self._leave_out("links to themselves", entry.path, is_hidden=is_hidden)
        return None

    def _leave_out(self, reason: str, path: str, *, is_hidden: bool) -> None:
        if not is_hidden:
            self.left_out.add(reason, below(self.root, path) if path else "")


def suffix_of(path: str) -> str:
    """Return the ending of a file's name in lower case; of tars, `.tar.gz` as well."""
    name = PurePosixPath(path.lower())
    return ".tar.gz" if name.name.endswith(".tar.gz") else name.suffix


def _is_hidden(path: str, root: str, first: str) -> bool:
    parts = path.removeprefix(root).strip("/").split("/")
    return any(part.startswith(first) for part in parts)
