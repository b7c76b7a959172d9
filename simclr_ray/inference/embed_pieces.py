"""Rows of a dataset in pieces: each embedded by actors, and stored as it comes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, Literal, NamedTuple

import numpy as np
import pyarrow as pa

from simclr_ray.data.arrays import Int64s
from simclr_ray.data.source import Source
from simclr_ray.distributed.ray_cluster import connect
from simclr_ray.errors import DataError
from simclr_ray.evaluation.feature_columns import ERROR, kept_column
from simclr_ray.evaluation.ray_features import Encoding, devices_of_cluster, features_of, stream
from simclr_ray.inference.embedding_file import EMBEDDING, Parts
from simclr_ray.inference.encoder import NOT_FINITE

FIRST_ROWS, MOST_ROWS = 64, 512  # of a piece: the first are small, so that some come early
GROUP_BYTES: Final = 64 * 2**20  # row groups of more are not read in several pieces
DType = Literal["float32", "float16"]
OnRows = Callable[[int, int], None]


def cut_pieces(source: Source) -> list[Int64s]:
    """Return the rows of a dataset in their order, in pieces of one row group each.

    The first are small. A row group that is large is one piece: to read it again costs more.
    """
    pieces, most = [], FIRST_ROWS
    for group in source.row_groups:
        rows = group.first_row + np.arange(group.num_rows, dtype=np.int64)
        first = 0
        while first < len(rows):
            whole = source.row_bytes * group.num_rows > GROUP_BYTES
            last = len(rows) if whole else min(len(rows), first + most)
            pieces.append(rows[first:last])
            first, most = last, min(2 * most, MOST_ROWS)
    return pieces


class Layout(NamedTuple):
    """The columns of a file of embeddings.

    Attributes:
        key: Says which image a row is.
        width: F.
        keep: Are handed on.
        dtype: Of the embeddings.
    """

    key: str
    width: int
    keep: Sequence[str]
    dtype: DType

    def of(self, table: pa.Table) -> pa.Table:
        """Return what is stored of a piece; NaN where there is no image, or a number is not finite.

        Arrow writes fixed-size lists that are null to parquet, and cannot read them again (25.0).
        """
        reasons = table[ERROR].to_pylist()
        good = np.array([reason is None for reason in reasons])
        rows = np.full((len(good), self.width), np.nan, np.dtype(self.dtype))
        if good.any():
            features = features_of(table)
            with np.errstate(over="ignore"):  # float16 ends at 65,504
                rows[good] = features
            finite = np.zeros(len(good), bool)
            finite[good] = np.isfinite(features).all(axis=1)
            for row in np.flatnonzero(good & ~np.isfinite(rows).all(axis=1)):
                rows[row] = np.nan
                reasons[row] = f"{NOT_FINITE} in {self.dtype}" if finite[row] else NOT_FINITE
        return pa.table(
            {
                self.key: table[self.key],
                **{column: table[kept_column(column)] for column in self.keep},
                EMBEDDING: pa.FixedSizeListArray.from_arrays(
                    pa.array(rows.reshape(-1)), self.width
                ),
                ERROR: pa.array(reasons, pa.string()),
            }
        )


def embed_pieces(
    source: Source, parts: Parts, encoding: Encoding, layout: Layout, on_progress: OnRows
) -> list[Int64s]:
    """Write the pieces of a dataset that are not there yet; return the rows of all.

    Raises:
        DataError: A file cannot be read, or no row has an embedding; the pieces are gone then.
        StorageError: The disk takes no more.
        ClusterError: No cluster answers or starts, or its actors fail.
    """
    pieces = cut_pieces(source)
    missing = parts.missing(pieces)
    num_done = source.num_rows - sum(len(pieces[i]) for i in missing)
    on_progress(num_done, source.num_rows)
    if missing:
        connect()
        actors = devices_of_cluster()
        parts.make()  # after all that can be refused
        tables = stream(source, [pieces[i] for i in missing], encoding, actors)
        for index, table in zip(missing, tables, strict=True):
            parts.put(pieces[index], layout.of(table))
            num_done += table.num_rows
            on_progress(num_done, source.num_rows)
    _check_any(source, parts, pieces)
    return pieces


def _check_any(source: Source, parts: Parts, pieces: Sequence[Int64s]) -> None:
    """Raise `DataError` where no row has an embedding, and forget the pieces."""
    reason = ""
    for rows in pieces:
        for why in parts.read(rows)[ERROR].to_pylist():
            if why is None:
                return
            reason = reason or why
    parts.clear(is_whole=False)
    raise DataError(f"none of {source.num_rows} rows has an embedding: {reason}")
