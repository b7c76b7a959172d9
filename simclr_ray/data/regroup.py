"""Rows that lie anywhere, brought together by shard: an external partition, for groups of images.

A shard of groups wants rows of all row groups; were each to read them, every shard would read the
whole set. So would many shards of one large row group, which is read whole for each. Therefore row
groups are read once, in runs that fit in memory, and written again with the rows of each shard
together; a shard then reads its piece of each run. All is read twice and written twice, whatever
its size, and a task holds a run or a shard.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from simclr_ray.data.arrays import Int64s
from simclr_ray.data.classes import NO_LABEL
from simclr_ray.data.footer import RowGroup
from simclr_ray.data.inputs import MAX_SHARD_BYTES, ParquetTask
from simclr_ray.data.items import Item, ShardTask
from simclr_ray.data.ray_tasks import run_tasks
from simclr_ray.data.source import Source
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


@dataclass(frozen=True)
class RunTask:
    """A run of row groups, whose rows are written again, shard by shard; picklable."""

    source: Source
    rows: Int64s  # those that shards want, in the order in which they are written
    ends: tuple[int, ...]  # of the rows of each shard that has any

    def write(self, uri: str) -> None:
        """Write the rows, those of a shard as a row group, unless it was done before.

        Raises:
            DataError: A file cannot be read.
        """
        fs, path = filesystem(uri)
        if fs.get_file_info(path).type == pafs.FileType.File:
            return
        rows = self.source.read_rows(self.rows)
        labels = np.full(len(self.rows), NO_LABEL) if rows.labels is None else rows.labels
        paths = rows.paths or [None] * len(self.rows)
        columns: list[Any] = [self.rows, rows.ids, rows.images, labels, paths]
        with (
            open_whole(fs, path) as stream,
            pq.ParquetWriter(stream, SCHEMA, compression="none", use_dictionary=False) as writer,
        ):
            begin = 0
            for end in self.ends:
                # a shard at a time: a copy of all would be as large as the run
                shard = [column[begin:end] for column in columns]
                table = pa.table(dict(zip(SCHEMA.names, shard, strict=True)), schema=SCHEMA)
                writer.write_table(table, end - begin)
                begin = end


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
        first, last = run[0].first_row, run[-1].first_row + run[-1].num_rows
        wanted = first + np.flatnonzero(shard_of[first:last] >= 0)
        wanted = wanted[np.argsort(shard_of[wanted], kind="stable")]
        if not len(wanted):
            continue
        owners, counts = np.unique(shard_of[wanted], return_counts=True)
        uri = address_below(out, f"run-{number:05d}.parquet")
        for group, owner in enumerate(owners.tolist()):
            pieces[owner].append((uri, group))
        task = RunTask(source, wanted, tuple(np.cumsum(counts).tolist()))
        work.append(partial(task.write, uri))
    for _ in run_tasks(work):
        pass
    return [
        RegroupedTask(tuple(own), shard.rows, shard.groups or [None] * len(shard.rows))
        for own, shard in zip(pieces, shards, strict=True)
    ]


def _runs(source: Source) -> Iterator[list[RowGroup]]:
    """Yield runs of row groups that a task can hold."""
    run: list[RowGroup] = []
    most = MAX_SHARD_BYTES / source.row_bytes
    for group in source.row_groups:
        if run and sum(g.num_rows for g in run) + group.num_rows > most:
            yield run
            run = []
        run.append(group)
    yield run
