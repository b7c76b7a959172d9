"""Columns of a row group as an Arrow table; that of a list is kept while its slices are read."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from simclr_ray.data.arrays import Int64s
from simclr_ray.data.bytes_read import BYTES_READ, stored_bytes
from simclr_ray.data.footer import RowGroup, cached_footer
from simclr_ray.errors import DataError, one_line
from simclr_ray.storage.filesystem import filesystem, is_local

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


def read_table(
    uri: str, path: str, fingerprint: str, group: RowGroup, columns: Sequence[str]
) -> pa.Table:
    """Return columns of the rows of `group`, which may be a slice of the file's row group.

    Args:
        uri: Of the dataset.
        path: Of the file, on its file system.
        fingerprint: Of the dataset.
        group: A slice begins where another ended: the row group is read once for many of them.
        columns: Their names.

    Raises:
        DataError: The file is gone, changed, or broken.
    """
    key = (uri, path, fingerprint, group.group, tuple(columns))
    table = _KEPT.get(key)
    if table is None:
        fs, _ = filesystem(uri)
        try:
            footer = cached_footer(uri, path, fingerprint)
            with fs.open_input_file(path) as stream:
                # the columns of a group in one request where each takes a while
                file = pq.ParquetFile(stream, metadata=footer, pre_buffer=not is_local(fs))
                table = file.read_row_group(group.group, columns=list(columns), use_threads=False)
                table = without_views(table)
                BYTES_READ.add(stored_bytes(footer, group.group, columns))
        except (OSError, pa.ArrowException) as error:
            raise DataError(
                f"{path}: row group {group.group} cannot be read: {one_line(error)}"
            ) from error
        if group.offset:
            _KEPT.put(key, table)
    if table.num_rows < group.offset + group.num_rows:
        raise DataError(f"{path} changed while it was in use; start again")
    return table.slice(group.offset, group.num_rows)


def read_first_rows(
    uri: str, path: str, fingerprint: str, group: RowGroup, name: str, num: int
) -> pa.ChunkedArray:
    """Return a column of the first `num` rows of a row group, and read little more.

    Raises:
        DataError: The file is gone, changed, or broken.
    """
    fs, _ = filesystem(uri)
    try:
        with fs.open_input_file(path) as stream:
            file = pq.ParquetFile(stream, metadata=cached_footer(uri, path, fingerprint))
            rows = min(num, group.num_rows)
            batches = file.iter_batches(rows, row_groups=[group.group], columns=[name])
            return pa.chunked_array([next(batches).column(0)])
    except (OSError, pa.ArrowException, StopIteration) as error:
        raise DataError(f"{path} cannot be read: {one_line(error)}") from error


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
