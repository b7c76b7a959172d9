"""A parquet dataset opened: which rows there are, where they lie, and how to read some of them.

Opening reads the footers and nothing else. A `Source` is small and pickles, so each Ray process
gets a copy and reads the row groups that its part of the plan names. Row numbers count over the
files sorted by path: where a user's file has no id column they are the ids (design, load-bearing
2). pyarrow only; Ray is not needed to read.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from simclr_ray import config as cfg
from simclr_ray.config.experiment import ColumnsConfig
from simclr_ray.data.files import list_parquet, read_images
from simclr_ray.data.footer import Footer, read_footers
from simclr_ray.errors import DataError
from simclr_ray.storage.filesystem import filesystem, is_local, one_line

Int64s = npt.NDArray[np.int64]
NO_LABEL = -1

logger = logging.getLogger(__name__)


class RowGroup(NamedTuple):
    """One row group: its file and place in it, and which rows of the dataset it holds."""

    file: int
    group: int
    first_row: int
    num_rows: int


class RowTable(NamedTuple):
    """Some rows: ids int64 [m], encoded images (None where there is none), labels int64 [m]."""

    ids: Int64s
    images: list[bytes | None]
    labels: Int64s | None


@dataclass(frozen=True)
class Source:
    """A parquet dataset whose footers were read and whose columns were checked."""

    uri: str
    files: tuple[str, ...]
    row_groups: tuple[RowGroup, ...]
    num_rows: int
    row_bytes: float  # of the files, on average
    columns: ColumnsConfig
    has_ids: bool
    has_labels: bool
    class_names: tuple[str, ...]
    fingerprint: str

    @classmethod
    def open(cls, uri: str, columns: ColumnsConfig | None = None, limit: int = 0) -> Source:
        """Return the dataset at `uri`: a parquet file, or a folder of them at any depth.

        Args:
            uri: a local path, or anything `pyarrow.fs` takes (`s3://`, `gs://`, `file://` ...).
            columns: which columns hold what; the default names when not given.
            limit: keep the first rows only, in file order; 0 keeps all.

        Raises:
            DataError: nothing there, no parquet, a broken file, no rows, or a column that is
                missing or of a type that cannot serve.
        """
        columns = columns or ColumnsConfig()
        fs, root = filesystem(uri)
        listed = list_parquet(fs, root, uri)
        footers = read_footers(fs, listed)
        has_ids, has_labels = _check_columns(footers, columns)
        groups = _row_groups(footers, limit)
        if not groups:
            raise DataError(f"{uri} holds no rows")
        return cls(
            uri=uri,
            files=tuple(f.path for f in footers),
            row_groups=groups,
            num_rows=groups[-1].first_row + groups[-1].num_rows,
            row_bytes=sum(f.size for f in footers) / sum(sum(f.group_rows) for f in footers),
            columns=columns,
            has_ids=has_ids,
            has_labels=has_labels,
            class_names=footers[0].class_names(columns.label) if has_labels else (),
            fingerprint=_fingerprint(footers, root, columns, limit),
        )

    def read_group(self, index: int, *, labels: bool = True) -> RowTable:
        """Return row group `index` of `row_groups`, its rows in order.

        Args:
            index: Of the group.
            labels: Whether to read the labels, where there are any.

        Raises:
            DataError: the file is gone, changed, or broken.
        """
        group = self.row_groups[index]
        table = self._read(group, self._wanted(self.columns.image, labels=labels))
        return self._rows(table, np.arange(group.num_rows, dtype=np.int64) + group.first_row, group)

    def read_rows(self, rows: npt.NDArray[np.integer]) -> RowTable:
        """Return the rows at positions `rows` (int [m], any order, repeats allowed), in that order.

        Each row group that holds a wanted row is read once, and one is in memory at a time: cheap
        for positions that lie together, whole files of reading for positions that do not.

        Raises:
            DataError: the file is gone, changed, or broken.
            IndexError: a position is outside `[0, num_rows)`.
        """
        wanted = np.asarray(rows, dtype=np.int64)
        if wanted.size and (wanted.min() < 0 or wanted.max() >= self.num_rows):
            raise IndexError(f"rows must be in [0, {self.num_rows})")
        first_rows = np.array([g.first_row for g in self.row_groups])
        owner = np.searchsorted(first_rows, wanted, side="right") - 1
        ids = np.empty(len(wanted), dtype=np.int64)
        labels = np.empty(len(wanted), dtype=np.int64) if self.has_labels else None
        images: list[bytes | None] = [None] * len(wanted)
        for index in np.unique(owner):
            group = self.row_groups[index]
            places = np.flatnonzero(owner == index)
            table = self._read(group, self._wanted(self.columns.image))
            part = self._rows(table.take(wanted[places] - group.first_row), wanted[places], group)
            ids[places] = part.ids
            if labels is not None and part.labels is not None:
                labels[places] = part.labels
            for place, image in zip(places, part.images, strict=True):
                images[place] = image
        return RowTable(ids, images, labels)

    def labels(self) -> Int64s:
        """Return the label of every row, int64 [num_rows], -1 where null; reads no image.

        Raises:
            DataError: the dataset has no label column.
        """
        if not self.has_labels:
            raise DataError(f"{self.uri} has no label column {self.columns.label!r}")
        return self._column(self.columns.label, NO_LABEL)

    def label_of(self) -> Callable[[Int64s], Int64s]:
        """Return what finds the labels of ids: int64 [m] -> int64 [m], -1 where null.

        Raises:
            DataError: the dataset has no label column.
        """
        labels = self.labels()
        if not self.has_ids:
            return labels.__getitem__
        ids = self.ids()
        order = np.argsort(ids, kind="stable")
        ids, labels = ids[order], labels[order]
        return lambda wanted: labels[np.searchsorted(ids, wanted)]

    def ids(self) -> Int64s:
        """Return the id of every row, int64 [num_rows]; reads no image."""
        if not self.has_ids:
            return np.arange(self.num_rows, dtype=np.int64)
        return self._column(self.columns.id, None)

    def _wanted(self, image: str, *, labels: bool = True) -> list[str]:
        wanted = [image]
        if self.has_ids:
            wanted.append(self.columns.id)
        if self.has_labels and labels:
            wanted.append(self.columns.label)
        return list(dict.fromkeys(wanted))

    def _column(self, name: str, null: int | None) -> Int64s:
        parts = [
            _integers(self._read(g, [name]).column(name), null, self.files[g.file], name)
            for g in self.row_groups
        ]
        return np.concatenate(parts)

    def _rows(self, table: pa.Table, positions: Int64s, group: RowGroup) -> RowTable:
        path = self.files[group.file]
        fs, _ = filesystem(self.uri)
        images = read_images(table.column(self.columns.image), fs, path)
        ids, labels = positions.astype(np.int64), None
        if self.has_ids:
            ids = _integers(table.column(self.columns.id), None, path, self.columns.id)
        if self.has_labels and self.columns.label in table.column_names:
            labels = _integers(table.column(self.columns.label), NO_LABEL, path, self.columns.label)
        return RowTable(ids, images, labels)

    def _read(self, group: RowGroup, columns: Sequence[str]) -> pa.Table:
        """Return those columns of the group's rows that are in the dataset (see `limit`)."""
        path = self.files[group.file]
        fs, _ = filesystem(self.uri)
        try:
            footer = _metadata(self.uri, path, self.fingerprint)
            with fs.open_input_file(path) as stream:
                # the columns of a group in one request where each takes a while
                file = pq.ParquetFile(stream, metadata=footer, pre_buffer=not is_local(fs))
                table = file.read_row_group(group.group, columns=list(columns), use_threads=False)
        except (OSError, pa.ArrowException) as error:
            raise DataError(
                f"{path}: row group {group.group} cannot be read: {one_line(error)}"
            ) from error
        if table.num_rows < group.num_rows:
            raise DataError(f"{path} changed while it was in use; start again")
        return table.slice(0, group.num_rows)


@functools.lru_cache(maxsize=16_384)  # files; of each some kilobytes, and 64 to read it again
def _metadata(uri: str, path: str, fingerprint: str) -> pq.FileMetaData:
    """Return a footer, kept per process: row groups of one file are read many times."""
    del fingerprint  # only part of the key: a changed dataset must not meet an old footer
    fs, _ = filesystem(uri)
    with fs.open_input_file(path) as stream:
        return pq.read_metadata(stream)


def _row_groups(footers: Sequence[Footer], limit: int) -> tuple[RowGroup, ...]:
    groups: list[RowGroup] = []
    first_row = 0
    for file, footer in enumerate(footers):
        for group, num_rows in enumerate(footer.group_rows):
            kept = min(num_rows, limit - first_row) if limit else num_rows
            if kept > 0:
                groups.append(RowGroup(file, group, first_row, kept))
                first_row += kept
    return tuple(groups)


def _check_columns(footers: Sequence[Footer], columns: ColumnsConfig) -> tuple[bool, bool]:
    """Return (has ids, has labels), after checking that every file can serve."""
    for footer in footers:
        _check_image(footer, columns.image)
    defaults = ColumnsConfig()
    has_ids = _has_integers(footers, "id", columns.id, required=columns.id != defaults.id)
    wanted = columns.label not in ("", defaults.label)
    return has_ids, _has_integers(footers, "label", columns.label, required=wanted)


def _check_image(footer: Footer, name: str) -> None:
    kind = footer.type_of(name)
    if kind is None:
        raise DataError(footer.lacks(name, "image"))
    if not _can_hold_images(kind):
        raise DataError(
            f"{footer.path}: column {name!r} has type {kind}; an image column is binary, "
            "a struct of bytes and path, or a string with paths"
        )


def _can_hold_images(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        fields = {f.name: f.type for f in kind}
        return _is_bytes(fields.get("bytes")) or _is_text(fields.get("path"))
    return _is_bytes(kind) or _is_text(kind)


def _is_bytes(kind: pa.DataType | None) -> bool:
    return kind is not None and (pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _is_text(kind: pa.DataType | None) -> bool:
    return kind is not None and (pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _has_integers(footers: Sequence[Footer], role: str, name: str, *, required: bool) -> bool:
    """Return whether column `name` is there, as integers, in all files; in some only is an error.

    Under its default name a column that is absent or no integer is left alone: nobody asked for it.
    """
    if not name or all(name in f.empty_columns or not f.group_rows for f in footers):
        return False  # a label column of nothing but nulls is how an unlabelled set is stored
    usable = [pa.types.is_integer(f.type_of(name) or pa.null()) for f in footers]
    if all(usable):
        return True
    odd_one = footers[usable.index(False)]
    kind = odd_one.type_of(name)
    if kind is None and (required or any(usable)):
        raise DataError(odd_one.lacks(name, role))
    if kind is not None and (required or any(usable)):
        raise DataError(f"{odd_one.path}: {role} column {name!r} has type {kind}, not an integer")
    if kind is not None:
        _say_once(f"{odd_one.path}: column {name!r} has type {kind}: not used as the {role}")
    return False


@functools.lru_cache(maxsize=1024)
def _say_once(message: str) -> None:
    logger.warning(message)


def _integers(column: pa.ChunkedArray, null: int | None, path: str, name: str) -> Int64s:
    if column.null_count and null is None:
        raise DataError(f"{path}: column {name!r} has {column.null_count} nulls among the ids")
    try:
        filled = column.cast(pa.int64())
    except pa.ArrowInvalid as error:
        raise DataError(f"{path}: column {name!r} does not fit int64: {error}") from error
    if null is not None:
        filled = filled.fill_null(null)
    values: Int64s = filled.to_numpy()
    return values


def _fingerprint(footers: Sequence[Footer], root: str, columns: ColumnsConfig, limit: int) -> str:
    """Return 16 hex digits over all that decides the rows; where the folder lies does not.

    Sizes and footers stand for the contents: a footer holds the offsets and statistics of every
    chunk, and reading the images to hash them would cost as much as an epoch.
    """
    if len(footers) == 1 and footers[0].path == root:
        root = root.rpartition("/")[0]
    tree = {
        "files": [[f.path.removeprefix(root), f.size, f.group_rows, f.digest] for f in footers],
        "columns": cfg.to_tree(columns),
        "limit": limit,
    }
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:16]
