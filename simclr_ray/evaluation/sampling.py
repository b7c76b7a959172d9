"""Which rows of a split are evaluated where not all are, and by which rank: few reads.

A row group is read whole for any of its rows. So a sample of a large split is some whole row
groups, its classes as they fall, and ranks share a sample by row groups. A small split is read
whole, and its sample comes from all over it.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Final

import numpy as np

from simclr_ray.data.arrays import Int64s
from simclr_ray.data.classes import as_integers
from simclr_ray.data.source import Source

SMALL_GROUPS: Final = 64
SMALL_BYTES: Final = 2**30  # ten seconds from a bucket at 100 MB/s
# A rank with more rows than these, or than so many even parts, would be waited for.
QUICK_ROWS: Final = 512
MAX_TIMES_EVEN: Final = 2
SEED: Final = 0  # one for all runs, so that their scores are of the same rows


def sample_rows(source: Source, limit: int = 0) -> Int64s:
    """Return the rows of a sample, int64 [M], in order of id; the same ones each time.

    With a `limit` below the number of rows, of a small split one row is taken from each of `limit`
    equal runs of the rows in order of id, at a place fixed by the run's number alone. So the
    sample covers a split that is sorted by class, and a split whose classes take turns. Of a split
    of more than `SMALL_GROUPS` row groups or `SMALL_BYTES` whole row groups are drawn until there
    are `limit` rows: one that is sorted by class is covered in part.

    Args:
        source: The opened split.
        limit: Rows at most; 0 takes all.
    """
    is_part = 0 < limit < source.num_rows
    if is_part and not is_read_whole(source):
        drawn = np.sort(_rows_of_groups(source, limit))
        return drawn[np.argsort(_ids_of(source, drawn), kind="stable")]
    rows: Int64s = np.argsort(source.ids(), kind="stable")
    return rows[_spread(len(rows), limit)] if is_part else rows


def is_read_whole(source: Source) -> bool:
    """Return whether a sample of a split may need all its row groups: then it is spread.

    Of a list of files a row group holds names, which are few bytes.
    """
    num_bytes = source.row_bytes * source.num_rows
    is_small = len(source.row_groups) <= SMALL_GROUPS and num_bytes <= SMALL_BYTES
    return is_small or source.names_files


def _rows_of_groups(source: Source, limit: int) -> Int64s:
    """Return `limit` rows of whole row groups, the last of them cut."""
    parts, num = [], 0
    order = np.random.Generator(np.random.Philox(key=SEED)).permutation(len(source.row_groups))
    for index in order:
        group = source.row_groups[index]
        rows = np.arange(min(group.num_rows, limit - num), dtype=np.int64)
        parts.append(group.first_row + rows)
        num += len(rows)
        if num == limit:
            break
    return np.concatenate(parts)


def _ids_of(source: Source, rows: Int64s) -> Int64s:
    """Return the ids of some rows, int64 [m], by those of their row groups alone."""
    if not source.has_ids:
        return rows
    if source.index:
        return source.ids()[rows]
    groups, name = source.groups_of(rows), source.columns.id
    ids = np.empty_like(rows)
    for index in np.unique(groups):
        group, places = source.row_groups[index], np.flatnonzero(groups == index)
        column = as_integers(source.read_column(group, name), source.files[group.file], name)
        ids[places] = column.to_numpy()[rows[places] - group.first_row]
    return ids


def _spread(num_rows: int, limit: int) -> Int64s:
    """Return `limit` ascending places in [0, num_rows), one in each equal run."""
    borders = np.arange(limit + 1, dtype=np.int64) * num_rows // limit
    within = np.random.default_rng(0).random(limit)
    return borders[:-1] + (within * np.diff(borders)).astype(np.int64)


def rows_of_ranks(source: Source, rows: Int64s, num_ranks: int) -> list[Int64s]:
    """Return the rows of each rank: `rows` in their order in the files, cut between row groups.

    Where that would leave a rank with far more than the others, as of one large row group, they are
    cut evenly instead, and a row group is read by two ranks or more.
    """
    rows = np.sort(rows)
    even = np.arange(num_ranks + 1) * len(rows) // num_ranks
    borders = np.flatnonzero(np.diff(source.groups_of(rows))) + 1
    borders = np.concatenate([[0], borders, [len(rows)]])
    above = np.searchsorted(borders, even)  # the first border that is not below
    below = np.maximum(above - 1, 0)
    nearest = np.where(
        even - borders[below] < borders[above] - even, borders[below], borders[above]
    )
    most = max(QUICK_ROWS, MAX_TIMES_EVEN * -(-len(rows) // num_ranks))
    cuts = nearest if np.diff(nearest).max() <= most else even
    return [rows[first:last] for first, last in pairwise(cuts)]
