"""Groups of images of one thing, such as frames, visits, seasons: which rows, and which pair.

An epoch visits each group once; view a is of one of its images and view b of another, both drawn
by (seed, epoch, group). A group lies whole within one row group, as `prepare` writes it, so that
whoever reads the row group can draw any pair, and each row group is still read once an epoch.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from simclr_ray.augment.philox import integers
from simclr_ray.config import nearest
from simclr_ray.config.column_keys import column_key
from simclr_ray.config.experiment import ColumnsConfig
from simclr_ray.config.logging import warn_once
from simclr_ray.config.wording import counted
from simclr_ray.data.arrays import Int64s
from simclr_ray.data.classes import as_integers, blank_as_null, is_text
from simclr_ray.data.columns import GROUP_COLUMN
from simclr_ray.data.footer import RowGroup, cached_footer
from simclr_ray.data.grouping import cut_between_groups, number_groups
from simclr_ray.data.slices import GROUP_ROWS, joined_groups, slice_of
from simclr_ray.data.source import Source
from simclr_ray.errors import DataError

log = logging.getLogger(__name__)

LOW, HALF = np.uint64(0xFFFFFFFF), np.uint64(32)
PAIR, STAND_INS = 0, 1  # what is drawn of a group
SETS_KEPT = 4


@dataclass(frozen=True)
class ImageGroups:
    """The groups of a dataset, numbered over its row groups; row numbers are the dataset's.

    Attributes:
        keys: int64 [G]: what stands in the column, of text a hash, of null any.
        offsets: [G + 1], into `members`.
        members: The rows of each group, one group after the other; None where that is their order.
        firsts: int64 [row groups + 1], the first group of each.
    """

    keys: Int64s
    offsets: NDArray[np.int32 | np.int64]
    members: NDArray[np.int32 | np.int64] | None
    firsts: Int64s

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self.keys)

    @property
    def sizes(self) -> Int64s:
        """Images of each group: int64 [G]."""
        return np.diff(self.offsets).astype(np.int64)

    def within(self, row_group: int) -> Int64s:
        """Return the groups of a row group."""
        return np.arange(self.firsts[row_group], self.firsts[row_group + 1])

    def rows(self, group: int) -> Int64s:
        """Return the rows of a group, int64 [m]."""
        return self._rows(np.arange(self.offsets[group], self.offsets[group + 1]))

    def pairs(self, groups: Int64s, *, seed: int, epoch: int) -> tuple[Int64s, Int64s]:
        """Return the rows of view a and of view b of each group, int64 [n] each.

        Each image of a group is as likely for view a, and each other one for view b; the two are
        one image only where the group has no other. A pure function of (seed, epoch, key of the
        group) and of its images.
        """
        first = self.offsets[groups].astype(np.int64)
        size = self.offsets[groups + 1].astype(np.int64) - first
        words = integers(self.keys[groups], seed=seed, epoch=epoch, sub=PAIR, purpose="members")
        a = _scaled(words >> HALF, size)
        b = (a + 1 + _scaled(words & LOW, size - 1)) % size
        return self._rows(first + a), self._rows(first + b)

    def stand_ins(self, group: int, *, seed: int, epoch: int) -> list[int]:
        """Return the rows of a group in the order in which they stand in for unusable ones."""
        rows, key = self.rows(group), self.keys[group : group + 1]
        start = integers(key, seed=seed, epoch=epoch, sub=STAND_INS, purpose="members")
        places = (np.arange(len(rows), dtype=np.uint64) ^ start).view(np.int64)
        draws = integers(places, seed=seed, epoch=epoch, sub=STAND_INS, purpose="members")
        order: list[int] = rows[np.argsort(draws, kind="stable")].tolist()
        return order

    def _rows(self, places: Int64s) -> Int64s:
        return places if self.members is None else self.members[places].astype(np.int64)


def _scaled(words: NDArray[np.uint64], size: Int64s) -> Int64s:
    """Return 32-bit words as numbers below `size`, each as likely up to size/2³²; 0 below 1."""
    return ((words * size.astype(np.uint64)) >> HALF).astype(np.int64)


def open_grouped(uri: str, columns: ColumnsConfig, limit: int = 0) -> Source:
    """Return the dataset for training: with its groups counted, where `columns.group` is given.

    Rows that `limit` keeps of a group that it cuts are left out as well, and that is said.

    Raises:
        DataError: Same as `Source.open`; or there is no such column, it can be no group, or the
            images of a group do not lie in one row group.
    """
    source = Source.open(uri, columns, limit)
    if not columns.group:
        return source
    _check_column(source)
    source = replace(source, row_groups=joined_groups(source.row_groups))
    source = _whole_groups(source, limit)
    if source.names_files:
        source = replace(source, row_groups=_cut_between_groups(source))
    return replace(source, num_groups=len(groups_of(source)))


_GROUPS: OrderedDict[tuple[str, str, str, int], ImageGroups] = OrderedDict()


def groups_of(source: Source) -> ImageGroups:
    """Return the groups of a dataset that `open_grouped` opened; a process reads them once.

    Raises:
        DataError: A file cannot be read, or a group lies in several row groups.
    """
    key = (source.uri, source.fingerprint, source.columns.group, source.num_rows)
    if key not in _GROUPS:
        _GROUPS[key] = _read_groups(source)
        while len(_GROUPS) > SETS_KEPT:
            _GROUPS.popitem(last=False)
    return _GROUPS[key]


def groups_line(source: Source) -> str:
    """Return `4,000 groups of 1 to 12 images`."""
    sizes = groups_of(source).sizes
    return groups_text(len(sizes), int(sizes.min()), int(sizes.max()))


def groups_text(number: int, least: int, most: int) -> str:
    """Return so many groups and the images of each in words."""
    shown = counted(most, "image") if least == most else f"{least:,} to {counted(most, 'image')}"
    return f"{counted(number, 'group')} of {shown}"


def group_column(source: Source) -> pa.ChunkedArray:
    """Return the group of every row, as int64 or text.

    Raises:
        DataError: There is no such column, or it can be no group.
    """
    _check_column(source)
    return pa.chunked_array([chunk for part in _plain_parts(source) for chunk in part.chunks])


def group_kind(source: Source) -> Literal["int64", "string"]:
    """Return whether groups are named by int64 or by text.

    Raises:
        DataError: There is no such column, or it can be no group.
    """
    return "string" if is_text(_check_column(source)) else "int64"


def _read_groups(source: Source) -> ImageGroups:
    parts = [number_groups(part) for part in _plain_parts(source)]
    kind = np.dtype(np.int32 if source.num_rows < 2**31 else np.int64)
    firsts = np.cumsum([0, *(len(part.keys) for part in parts)])
    keys = np.concatenate([part.keys for part in parts])
    named = keys[~np.concatenate([part.is_null for part in parts])]
    scattered = len(named) - len(np.unique(named))
    if scattered:
        raise DataError(_scattered(source, scattered, len(keys) - scattered))
    sizes = np.concatenate([np.bincount(p.codes, minlength=len(p.keys)) for p in parts])
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(kind)
    ordered = all((np.diff(part.codes) >= 0).all() for part in parts)
    members = None
    if not ordered:
        rows = zip(parts, source.row_groups, strict=True)
        members = np.concatenate(
            [(g.first_row + np.argsort(p.codes, kind="stable")).astype(kind) for p, g in rows]
        )
    return ImageGroups(keys, offsets, members, firsts)


def _scattered(source: Source, pieces: int, groups: int) -> str:
    return (
        f"{source.shown_uri}: {column_key('group')}={source.columns.group}: the images of a "
        f"group must lie in one row group, and those of {counted(groups, 'group')} lie in "
        f"{groups + pieces:,} pieces; write them so: {prepare_line(source)}; then train on "
        f"that with data.columns.group={GROUP_COLUMN}"
    )


def prepare_line(source: Source) -> str:
    """Return the command that writes a dataset with each group in one row group."""
    usual = ColumnsConfig()
    roles = {name: getattr(source.columns, name) for name in ColumnsConfig.model_fields}
    options = [f"columns.{k}={v}" for k, v in roles.items() if v != getattr(usual, k)]
    uri = source.uri.rstrip("/")
    to = f"{uri.removesuffix('.parquet').replace('#', '-')}-grouped"
    return " ".join(["simclr-ray prepare", uri, to, *options])


def _whole_groups(source: Source, limit: int) -> Source:
    """Return the dataset without the rows at its end that a limit keeps of a cut group."""
    last = source.row_groups[-1]
    path = source.files[last.file]
    footer = cached_footer(source.uri, path, source.fingerprint)
    whole = last._replace(num_rows=footer.row_group(last.group).num_rows)
    if whole.num_rows == last.num_rows:
        return source
    name = source.columns.group
    borders = _borders(_plain(source.read_column(whole, name), source))
    borders = borders[borders <= last.num_rows]
    kept = int(borders[-1]) if len(borders) else 0
    groups = source.row_groups[:-1] + ((last._replace(num_rows=kept),) if kept else ())
    num_rows = last.first_row + kept
    if not groups:
        raise DataError(f"{source.shown_uri}: data.limit={limit} holds no whole group; raise it")
    if kept < last.num_rows:
        warn_once(
            log,
            f"{source.shown_uri}: data.limit={limit}: the first {num_rows:,} rows are used, "
            "whose groups are whole",
        )
    return replace(source, row_groups=groups, num_rows=num_rows)


def _borders(column: pa.ChunkedArray) -> Int64s:
    """Return the numbers of first rows that hold groups whole, ascending; the last is of all."""
    codes = number_groups(column).codes
    ends = np.zeros(len(codes), np.int64)
    np.maximum.at(ends, codes, np.arange(len(codes)))  # of each group, its last row
    reach = np.maximum.accumulate(ends[codes])  # of the groups that begin up to a row
    return np.flatnonzero(reach == np.arange(len(codes))).astype(np.int64) + 1


def _cut_between_groups(source: Source) -> tuple[RowGroup, ...]:
    """Return the row groups of a list in slices of few rows that hold their groups whole."""
    if all(group.num_rows <= GROUP_ROWS for group in source.row_groups):
        return source.row_groups
    slices: list[RowGroup] = []
    for whole, column in zip(source.row_groups, _plain_parts(source), strict=True):
        borders = _borders(column)
        blocks = np.searchsorted(borders, np.arange(whole.num_rows), side="right")
        runs = cut_between_groups(blocks, GROUP_ROWS)
        slices += [slice_of(whole, first, last - first) for first, last in runs]
    return tuple(slices)


def _check_column(source: Source) -> pa.DataType:
    """Return the type of the group column, or raise `DataError` where a file has none that can."""
    name = source.columns.group
    kind: pa.DataType = pa.null()
    # of a prepared set all files have one schema
    for file, path in enumerate(source.files[:1] if source.index else source.files):
        schema = source.schema_of(file)
        at = schema.get_field_index(name)
        if at < 0:
            hint = " (of a folder of images: `prepare` with groups=folders)"
            raise DataError(
                f"{path} has no group column {name!r}{nearest(name, schema.names)}; its columns: "
                f"{', '.join(schema.names)}; name the right one with {column_key('group')}=..."
                + (hint if source.image_root else "")
            )
        kind = schema.field(at).type
        if not (pa.types.is_integer(kind) or is_text(kind)):
            raise DataError(
                f"{path}: group column {name!r} has type {kind}, which is neither integer nor text"
            )
    return kind


def _parts(source: Source) -> Iterator[pa.ChunkedArray]:
    """Yield the group column of each row group; of a prepared set from the one file that has it."""
    name = source.columns.group
    if source.index and name == GROUP_COLUMN:
        whole = source.read_index(name)
        for group in source.row_groups:
            yield whole.slice(group.first_row, group.num_rows)
        return
    yield from source.read_columns(name)


def _plain_parts(source: Source) -> Iterator[pa.ChunkedArray]:
    """Yield the group column of each row group as int64 or text; say how much text is blank."""
    num_blank = 0
    for part in _parts(source):
        plain = _plain(part, source)
        num_blank += plain.null_count - part.null_count if is_text(part.type) else 0
        yield plain
    if num_blank:
        warn_once(
            log,
            f"{source.shown_uri}: {num_blank:,} of {source.num_rows:,} rows have blank text "
            f"in column {source.columns.group!r}: each is a group of its own",
        )


def _plain(column: pa.ChunkedArray, source: Source) -> pa.ChunkedArray:
    """Return a group column as int64 or text, blank text as null."""
    if is_text(column.type):
        return blank_as_null(column)
    return as_integers(column, source.uri, source.columns.group)
