"""Columns of a row group as an Arrow table; that of a list is kept while its slices are read."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from simclr_ray.data.arrays import Int64s
from simclr_ray.data.bytes_read import BYTES_READ, stored_bytes
from simclr_ray.data.footer import FolderValue, RowGroup, cached_footer
from simclr_ray.data.partitions import columns_of_file, with_columns, with_fields
from simclr_ray.errors import DataError, one_line
from simclr_ray.storage.filesystem import filesystem, is_local

PAGES_BYTES: Final = 4 * 2**20  # of a request for the next pages of a column
KEPT_BYTES: Final = 128 * 2**20  # names of a million files
_Key = tuple[str, str, str, int, tuple[str, ...]]


class _Tables:
    """The tables that were read last, within `KEPT_BYTES`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._tables: OrderedDict[_Key, pa.Table] = OrderedDict()

    def get(self, key: _Key) -> pa.Table | None:
        with self._lock:
            if key in self._tables:
                self._tables.move_to_end(key)
            return self._tables.get(key)

    def put(self, key: _Key, table: pa.Table) -> None:
        with self._lock:
            self._tables[key] = table
            while len(self._tables) > 1 and self._num_bytes() > KEPT_BYTES:
                self._tables.popitem(last=False)

    def _num_bytes(self) -> int:
        return sum(table.nbytes for table in self._tables.values())


_KEPT: Final = _Tables()


class DatasetFile(NamedTuple):
    """A file of a dataset.

    Attributes:
        uri: Of the dataset.
        path: Of the file, on its file system.
        fingerprint: Of the dataset.
        folder_values: Its columns that stand in the names of folders.
    """

    uri: str
    path: str
    fingerprint: str
    folder_values: tuple[FolderValue, ...]

    @property
    def footer(self) -> pq.FileMetaData:
        """What the file holds; raises `OSError` where it is gone."""
        return cached_footer(self.uri, self.path, self.fingerprint)

    def schema(self) -> pa.Schema:
        """Return its columns, those in the names of its folders included."""
        return with_fields(self.footer.schema.to_arrow_schema(), self.folder_values)


class RowTable(NamedTuple):
    """Some rows: ids int64 [m], encoded images (None where there is none), labels int64 [m].

    `paths` are the names of the files that the images were, where the dataset has them.
    """

    ids: Int64s
    images: list[bytes | None]
    labels: Int64s | None
    paths: list[str | None] | None = None


def read_table(file: DatasetFile, group: RowGroup, columns: Sequence[str]) -> pa.Table:
    """Return columns of the rows of `group`, which may be a slice of the file's row group.

    Args:
        file: That has them.
        group: A slice begins where another ended: the row group is read once for many of them.
        columns: Their names.

    Raises:
        DataError: The file is gone, changed, or broken.
    """
    stored = columns_of_file(file.folder_values, columns)
    table = _read_stored(file, group, stored) if stored else None
    return with_columns(table, file.folder_values, columns, group.num_rows)


def _read_stored(file: DatasetFile, group: RowGroup, columns: Sequence[str]) -> pa.Table:
    uri, path, fingerprint, _ = file
    key = (uri, path, fingerprint, group.group, tuple(columns))
    table = _KEPT.get(key)
    if table is None:
        fs, _ = filesystem(uri)
        with _as_data_error(path, group), fs.open_input_file(path) as stream:
            # the columns of a group in one request where each takes a while
            parquet = pq.ParquetFile(stream, metadata=file.footer, pre_buffer=not is_local(fs))
            table = parquet.read_row_group(group.group, columns=list(columns), use_threads=False)
            table = without_views(table)
            BYTES_READ.add(stored_bytes(file.footer, group.group, columns))
        if group.offset:
            _KEPT.put(key, table)
    if table.num_rows < group.offset + group.num_rows:
        raise _changed(path)
    return table.slice(group.offset, group.num_rows)


def iter_tables(
    file: DatasetFile, group: RowGroup, num_rows: int, columns: Sequence[str]
) -> Iterator[pa.Table]:
    """Yield columns of the rows of a whole row group, so many rows at a time, and hold no others.

    Args:
        file: That has them.
        group: Begins where the file's does.
        num_rows: Of a table; the last has fewer.
        columns: Their names, one of them stored in the file.

    Raises:
        DataError: The file is gone, changed, or broken.
    """
    fs, _ = filesystem(file.uri)
    stored, left = columns_of_file(file.folder_values, columns), group.num_rows
    with _as_data_error(file.path, group), fs.open_input_file(file.path) as stream:
        # with a buffer a column is read by pages, else whole
        parquet = pq.ParquetFile(
            stream, metadata=file.footer, buffer_size=PAGES_BYTES, pre_buffer=False
        )
        batches = parquet.iter_batches(
            num_rows, row_groups=[group.group], columns=stored, use_threads=False
        )
        BYTES_READ.add(stored_bytes(file.footer, group.group, stored))
        while left > 0 and (batch := next(batches, None)) is not None:
            table = without_views(pa.Table.from_batches([batch]).slice(0, left))
            left -= table.num_rows
            del batch  # else it is held beside the next one
            yield with_columns(table, file.folder_values, columns, table.num_rows)
            del table
    if left > 0:
        raise _changed(file.path)


def read_first_rows(file: DatasetFile, group: RowGroup, name: str, num: int) -> pa.ChunkedArray:
    """Return a column of the first `num` rows of a row group, and read little more.

    Raises:
        DataError: The file is gone, changed, or broken.
    """
    fs, _ = filesystem(file.uri)
    try:
        with fs.open_input_file(file.path) as stream:
            parquet = pq.ParquetFile(stream, metadata=file.footer)
            rows = min(num, group.num_rows)
            batches = parquet.iter_batches(rows, row_groups=[group.group], columns=[name])
            return pa.chunked_array([next(batches).column(0)])
    except (OSError, pa.ArrowException, StopIteration) as error:
        raise DataError(f"{file.path} cannot be read: {one_line(error)}") from error


@contextmanager
def _as_data_error(path: str, group: RowGroup) -> Iterator[None]:
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise DataError(
            f"{path}: row group {group.group} cannot be read: {one_line(error)}"
        ) from error


def _changed(path: str) -> DataError:
    return DataError(f"{path} changed while it was in use; start again")


def read_file_column(fs: pafs.FileSystem, path: str, name: str) -> pa.ChunkedArray:
    """Return a column of all rows of a file.

    Raises:
        DataError: The file is gone, changed, or broken.
    """
    try:
        with fs.open_input_file(path) as stream:
            return pq.read_table(stream, columns=[name]).column(name)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path} cannot be read: {one_line(error)}") from error


def take_rows(table: pa.Table, rows: Int64s, path: str) -> pa.Table:
    """Return rows of a table of `path`, ascending int64 [m], chunk by chunk.

    Arrow joins the chunks of a column before it takes of them, and of more than 2 GiB it cannot.

    Raises:
        DataError: They are too large.
    """
    parts, first = [], 0
    try:
        for batch in table.to_batches():
            begin, end = np.searchsorted(rows, [first, first + batch.num_rows])
            parts.append(batch.take(pa.array(rows[begin:end] - first)))
            first += batch.num_rows
        return pa.Table.from_batches(parts, table.schema)
    except pa.ArrowException as error:
        raise DataError(f"{path}: {len(rows):,} rows cannot be read: {one_line(error)}") from error


def without_views(table: pa.Table) -> pa.Table:
    """Return a table with views of text and bytes as these: Arrow 25 takes no rows of views."""
    schema = pa.schema([field.with_type(_plain(field.type)) for field in table.schema])
    return table if schema.types == table.schema.types else table.cast(schema)


def _plain(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_plain(field.type)) for field in kind])
    if pa.types.is_string_view(kind):
        return pa.large_string()
    return pa.large_binary() if pa.types.is_binary_view(kind) else kind
