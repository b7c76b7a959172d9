"""Rows that lie anywhere, brought together by shard: an external partition, for groups of images.

A shard of groups wants rows of all row groups; were each to read them, every shard would read the
whole set. So would many shards of one large row group, which is read whole for each. Therefore row
groups are read once, in runs that fit in memory, and written again with the rows of each shard
together; a shard then reads its piece of each run. A row group that does not fit is read by pages,
and each slice of it is a piece. All is read twice and written twice, whatever its size, and a task
holds a run, a slice or a shard.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from simclr_ray.data.arrays import Int64s
from simclr_ray.data.classes import NO_LABEL
from simclr_ray.data.inputs import MAX_SHARD_BYTES, ParquetTask
from simclr_ray.data.items import Item, ShardTask
from simclr_ray.data.ray_tasks import run_tasks
from simclr_ray.data.source import Source
from simclr_ray.data.tables import RowTable
from simclr_ray.errors import DataError, one_line
from simclr_ray.storage.filesystem import address_below, filesystem, open_whole

FOLDER = "_regroup"  # below the output, until its shards are written
MOST_READS = 2  # sets that shards read themselves, before rows are brought together
SCHEMA = pa.schema(
    [
        pa.field("row", pa.int64()),
        pa.field("id", pa.int64()),
        pa.field("image", pa.large_binary()),
        pa.field("label", pa.int64()),
        pa.field("path", pa.string()),
    ]
)


class SpanPiece(NamedTuple):
    """Rows that lie together, in the order in which they are written to a file.

    `ends` are those of the rows of each shard that has any.
    """

    uri: str
    rows: Int64s
    ends: tuple[int, ...]

    def is_written(self) -> bool:
        """Return whether the file is there, or has no rows to hold."""
        fs, path = filesystem(self.uri)
        return not len(self.rows) or fs.get_file_info(path).type == pafs.FileType.File

    def write(self, rows: RowTable, places: Int64s) -> None:
        """Write the rows, those of a shard as a row group.

        Args:
            rows: Them, in any order, and maybe others.
            places: Of the rows to be written, among those.
        """
        fs, path = filesystem(self.uri)
        with (
            open_whole(fs, path) as stream,
            pq.ParquetWriter(stream, SCHEMA, compression="none", use_dictionary=False) as writer,
        ):
            begin = 0
            for end in self.ends:
                # a shard at a time: a copy of all would be as large as the piece
                writer.write_table(self._table(rows, places[begin:end], begin), end - begin)
                begin = end

    def _table(self, rows: RowTable, places: Int64s, begin: int) -> pa.Table:
        labels = np.full(len(places), NO_LABEL) if rows.labels is None else rows.labels[places]
        listed = places.tolist()
        columns: list[Any] = [
            self.rows[begin : begin + len(places)],
            rows.ids[places],
            [rows.images[place] for place in listed],
            labels,
            [rows.paths[place] if rows.paths else None for place in listed],
        ]
        return pa.table(dict(zip(SCHEMA.names, columns, strict=True)), schema=SCHEMA)


@dataclass(frozen=True)
class SpanTask:
    """A run of row groups, whose rows are written again, shard by shard; picklable.

    Attributes:
        source: The dataset.
        pieces: One; or of a row group that is too large to be held, one of each slice of it.
        group: The index of that row group.
        slice_rows: Of a slice; the last has fewer.
    """

    source: Source
    pieces: tuple[SpanPiece, ...]
    group: int
    slice_rows: int

    def write(self) -> None:
        """Write the pieces that were not written before.

        Raises:
            DataError: A file cannot be read.
        """
        if all(piece.is_written() for piece in self.pieces):
            return
        if len(self.pieces) == 1 or self.source.names_files:  # names are held, files are not
            for piece in self.pieces:
                if not piece.is_written():
                    rows = self.source.read_rows(piece.rows)
                    piece.write(rows, np.arange(len(piece.rows)))
            return
        slices = self.source.read_slices(self.group, self.slice_rows)
        first = self.source.row_groups[self.group].first_row
        for piece in self.pieces:
            self._write_slice(piece, next(slices), first)
            first += self.slice_rows

    def _write_slice(self, piece: SpanPiece, rows: RowTable, first: int) -> None:
        """Write a piece; no name of the caller's holds its rows while the next ones are read."""
        if not piece.is_written():
            piece.write(rows, piece.rows - first)


@dataclass(frozen=True)
class RegroupedTask:
    """The rows of a shard, from the pieces that hold some of them: (URI, row group) each."""

    pieces: tuple[tuple[str, int], ...]
    rows: Int64s
    groups: list[int | str | None]

    def read(self) -> Iterator[Item]:
        """Yield the rows in the order in which they are to be stored."""
        table = pa.concat_tables([_piece(uri, group) for uri, group in self.pieces])
        order = np.argsort(table["row"].to_numpy())
        places = order[np.searchsorted(table["row"].to_numpy(), self.rows, sorter=order)]
        columns = [table[name] for name in SCHEMA.names]
        for place, group in zip(places.tolist(), self.groups, strict=True):
            row, key, image, label, path = (column[place].as_py() for column in columns)
            yield Item(key, path or f"row {row}", image, label, path or "", group)


def _piece(uri: str, group: int) -> pa.Table:
    fs, path = filesystem(uri)
    try:
        with fs.open_input_file(path) as stream:
            return pq.ParquetFile(stream).read_row_group(group, use_threads=False)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path} cannot be read: {one_line(error)}") from error


def bring_together(parts: Sequence[ShardTask], out: str) -> list[ShardTask]:
    """Return shards that read no more than is theirs; rows are written below `out` where needed.

    Args:
        parts: All shards of an input.
        out: Folder or URI for the pieces.

    Raises:
        DataError: A file cannot be read.
    """
    shards = [part for part in parts if isinstance(part, ParquetTask)]
    if len(shards) < len(parts) or not shards:
        return list(parts)
    source = shards[0].source
    most = max(group.num_rows for group in source.row_groups) * source.row_bytes
    if shards[0].groups is None and most <= MAX_SHARD_BYTES:  # shards lie side by side
        return list(parts)
    starts = np.array([g.first_row for g in source.row_groups])
    reads = sum(len(np.unique(np.searchsorted(starts, s.rows, side="right"))) for s in shards)
    if reads <= MOST_READS * len(starts):
        return list(parts)
    shard_of = np.full(source.num_rows, -1, np.int64)
    for index, shard in enumerate(shards):
        shard_of[shard.rows] = index
    fs, folder = filesystem(out)
    fs.create_dir(folder, recursive=True)
    pieces: list[list[tuple[str, int]]] = [[] for _ in shards]
    work = []
    for number, run in enumerate(_runs(source)):
        task = _run_task(source, run, shard_of, out, number)
        for piece in task.pieces:
            begins = [0, *piece.ends[:-1]]
            for group, begin in enumerate(begins if piece.ends else ()):
                pieces[shard_of[piece.rows[begin]]].append((piece.uri, group))
        work.append(task.write)
    for _ in run_tasks(work):
        pass
    return [
        RegroupedTask(tuple(own), shard.rows, shard.groups or [None] * len(shard.rows))
        for own, shard in zip(pieces, shards, strict=True)
    ]


def _run_task(source: Source, run: range, shard_of: Int64s, out: str, number: int) -> SpanTask:
    """Return the task that brings together the rows of row groups.

    Args:
        source: The dataset.
        run: The row groups, by index.
        shard_of: Of each row of the dataset, -1 for none.
        out: Where the pieces go.
        number: Of the run.
    """
    groups = source.row_groups[run.start : run.stop]
    first, last = groups[0].first_row, groups[-1].first_row + groups[-1].num_rows
    most = max(int(MAX_SHARD_BYTES / source.row_bytes), 1)
    # of a slice the encoded rows are held twice, as Arrow has them and as Python does
    slice_rows = last - first if last - first <= most else max(most // 2, 1)
    pieces = []
    for at, begin in enumerate(range(first, last, slice_rows)):
        wanted = begin + np.flatnonzero(shard_of[begin : min(begin + slice_rows, last)] >= 0)
        wanted = wanted[np.argsort(shard_of[wanted], kind="stable")]
        _, counts = np.unique(shard_of[wanted], return_counts=True)
        uri = address_below(out, f"run-{number:05d}-{at:05d}.parquet")
        pieces.append(SpanPiece(uri, wanted, tuple(np.cumsum(counts).tolist())))
    return SpanTask(source, tuple(pieces), run.start, slice_rows)


def _runs(source: Source) -> Iterator[range]:
    """Yield runs of row groups that a task can hold, or of one, by index."""
    start, num_rows = 0, 0
    most = MAX_SHARD_BYTES / source.row_bytes
    for index, group in enumerate(source.row_groups):
        if index > start and num_rows + group.num_rows > most:
            yield range(start, index)
            start, num_rows = index, 0
        num_rows += group.num_rows
    yield range(start, len(source.row_groups))
