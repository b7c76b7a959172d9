"""Images of the test split that are trained on too, found by where they lie: nothing is decoded.

A copy under another name is found by `inspect --against`, which decodes all of them.
"""

from __future__ import annotations

import os
import posixpath
from collections.abc import Iterator
from typing import Final, NamedTuple
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs

from simclr_ray.config.experiment import ColumnsConfig, DataConfig
from simclr_ray.data.files import names_of, target_of
from simclr_ray.data.slices import joined_groups
from simclr_ray.data.source import Source
from simclr_ray.errors import DataError
from simclr_ray.storage.filesystem import filesystem, is_local

FILE: Final = "file://"


def overlap_line(data: DataConfig) -> str:
    """Return what to say of test images that are in `data.eval_train` or `data.train` too.

    Empty where there are none, or no test split. Files are compared, or the images themselves where
    each is a file of its own; and whole splits by their fingerprints, wherever they lie. What the
    scores learn from with labels is said before what is trained on without.

    Raises:
        DataError: A split cannot be read.
    """
    if not data.test:
        return ""
    test = Source.open(data.test, data.columns)
    limits = {data.train: data.limit, data.eval_train: 0}  # the latter is read whole, if the same
    splits = dict.fromkeys(filter(None, (data.eval_train, data.train)))
    parts = [_part_within(test, uri, data.columns, limits[uri]) for uri in splits]
    common = [(num, place) for num, place in parts if num]
    if not common:
        return ""
    counts = [
        f"all {n:,}" if n == test.num_rows else f"{n:,} of {test.num_rows:,}" for n, _ in common
    ]
    line = f"{counts[0]} images of {test.shown_uri} are in {common[0][1]} too"
    for count, (_, place) in zip(counts[1:], common[1:], strict=True):
        line += f", and {count} in {place}"
    return f"{line}: scores flatter"


def _part_within(test: Source, uri: str, columns: ColumnsConfig, limit: int) -> tuple[int, str]:
    """Return how many test images are in a split that is learned from, and what it is called."""
    other = Source.open(uri, columns)
    read = Source.open(uri, columns, limit) if limit else other
    is_copy = test.fingerprint == other.fingerprint  # of which a limit keeps the first rows
    return read.num_rows if is_copy else num_within(test, read), other.shown_uri


def num_within(source: Source, other: Source) -> int:
    """Return how many rows of a dataset lie where rows of another do.

    Example: of `photos/test` all lie within `photos`.
    """
    if source.names_files != other.names_files:
        return 0
    if not source.names_files:
        rows_of = _rows_of_groups(other)
        within = ((num, rows_of.get(place, 0)) for place, num in _rows_of_groups(source).items())
        return sum(min(pair) for pair in within)
    folders = _Folders()
    places = pa.chunked_array(_places(other, folders), pa.string()).unique()
    return sum(
        pc.sum(pc.is_in(part, value_set=places, skip_nulls=True)).as_py() or 0
        for part in _places(source, folders)
    )


def _rows_of_groups(source: Source) -> dict[tuple[str, int], int]:
    """Return of each row group, by the place of its file, how many rows are read: the first."""
    fs, _ = filesystem(source.uri)
    places = [os.path.realpath(path) if is_local(fs) else path for path in source.files]
    return {(places[g.file], g.group): g.num_rows for g in source.row_groups}


def _places(source: Source, folders: _Folders) -> Iterator[pa.Array]:
    """Yield of each row group where its images lie, one place of each row."""
    fs, _ = filesystem(source.uri)
    for group in joined_groups(source.row_groups):
        path, column = source.files[group.file], source.read_column(group, source.columns.image)
        inside = folders.of_list(fs, path, source.image_root)
        places = [inside.place_of(name) if name else None for name in names_of(column)]
        yield pa.array(places, pa.string())


class _Folder(NamedTuple):
    """A folder of images: its place without links, and which of its entries are links."""

    place: str
    links: frozenset[str]


class _Folders:
    """Folders of images that were looked at, of several lists."""

    def __init__(self) -> None:
        self._lists: dict[tuple[str, str], _List] = {}

    def of_list(self, fs: pafs.FileSystem, path: str, root: str) -> _List:
        key = (path.rpartition("/")[0], root)
        return self._lists.setdefault(key, _List(fs, path, root))


class _List:
    """The folders that names of a list lead to: each is looked at once, not each of its files."""

    def __init__(self, fs: pafs.FileSystem, path: str, root: str) -> None:
        self._fs, self._path, self._root = fs, path, root
        self._folders: dict[str, _Folder] = {}

    def place_of(self, name: str) -> str:
        """Return where an image lies: one place, by whatever name and links it is reached."""
        above, slash, base = name.rpartition("/")
        above += slash
        folder = self._folders.get(above)
        if folder is None:
            folder = self._folders[above] = self._look_at(above)
        if "%" in base and name.startswith(FILE):
            base = unquote(base)
        place = f"{folder.place}/{base}"
        return os.path.realpath(place) if base in folder.links else place

    def _look_at(self, above: str) -> _Folder:
        place = above
        try:
            fs, path = target_of(f"{above}.", self._fs, self._path, self._root)
            if not is_local(fs):
                return _Folder(f"{fs.type_name}:{posixpath.normpath(path)}", frozenset())
            place = os.path.realpath(path).rstrip("/")
            with os.scandir(place or "/") as entries:
                links = frozenset(entry.name for entry in entries if entry.is_symlink())
        except (DataError, OSError, ValueError):  # no folder that is there: bad rows
            links = frozenset()
        return _Folder(place, links)
