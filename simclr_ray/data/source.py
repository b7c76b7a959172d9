"""A parquet dataset opened: which rows there are, where they lie, and how to read some of them.

Opening reads the footers and, of a set that `prepare` did not make, ids and text labels. A `Source`
is small and pickles, so each Ray process gets a copy and reads the row groups that its part of the
plan names. Row numbers count over the files sorted by path: where a user's file has no id column
they are the ids (design, load-bearing 2). pyarrow only; Ray is not needed to read.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from simclr_ray.config.experiment import ColumnsConfig
from simclr_ray.config.uris import hide_passwords, recall
from simclr_ray.data.arrays import Int64s
from simclr_ray.data.classes import LabelColumn, as_integers
from simclr_ray.data.columns import (
    PATH_COLUMN,
    check_images,
    find_label_column,
    has_integer_ids,
    has_paths,
    leave_ids,
    lists_apart,
    say_large_groups,
    why_no_keys,
)
from simclr_ray.data.files import read_images
from simclr_ray.data.folder_input import index_folder
from simclr_ray.data.footer import (
    FolderValue,
    Footer,
    RowGroup,
    all_name_files,
    bytes_of_rows,
    find_index,
    fingerprint_of,
    read_footers,
    row_groups_of,
    sampled_files,
)
from simclr_ray.data.listing import REMOTE_THREADS, list_parquet, part_split
from simclr_ray.data.mixed_folders import check_meant
from simclr_ray.data.partitions import with_folder_values
from simclr_ray.data.slices import cut_groups, joined_groups
from simclr_ray.data.tables import (
    DatasetFile,
    RowTable,
    iter_tables,
    read_file_column,
    read_first_rows,
    read_table,
    take_rows,
)
from simclr_ray.errors import DataError
from simclr_ray.storage.filesystem import cache_folder, filesystem, is_local


@dataclass(frozen=True)
class Source:
    """A parquet dataset whose footers were read and whose columns were checked.

    Attributes:
        uri: Where it lies.
        files: Its files that have rows, sorted by path.
        row_groups: Their row groups, in order; those of a list in slices of few rows.
        num_rows: M.
        row_bytes: Of a row on average, its image included.
        columns: Which columns hold what.
        has_ids: The id column tells rows apart; else rows are numbered.
        label: How labels are read; None: there are none.
        unlabelled: Why there are none, as a clause.
        has_paths: Rows say which file they were.
        image_root: Where images that are named by path lie; empty: beside the parquet.
        index: File with ids and labels alone, of a prepared set; empty: there is none.
        fingerprint: 16 hex digits of all that decides the rows.
        names_files: Images are files of their own, and the rows their names.
        num_groups: Groups of images that pairs are of; 0: each image is its own pair.
        folder_values: Of each file, the columns in names of its folders.
    """

    uri: str
    files: tuple[str, ...]
    row_groups: tuple[RowGroup, ...]
    num_rows: int
    row_bytes: float
    columns: ColumnsConfig
    has_ids: bool
    label: LabelColumn | None
    unlabelled: str
    has_paths: bool
    image_root: str
    index: str
    fingerprint: str
    names_files: bool = False
    num_groups: int = 0
    folder_values: tuple[tuple[FolderValue, ...], ...] = ()

    @property
    def shown_uri(self) -> str:
        """What messages call it: a folder of image files, not the list that was made of it."""
        root = self.image_root
        if not root or "://" in root or "://" in self.uri:
            return hide_passwords(root if "://" in root else self.uri)
        return str(Path(self.files[0]).parent.joinpath(root).resolve())

    @property
    def num_pairs(self) -> int:
        """Positive pairs of an epoch: one a group, or one an image."""
        return self.num_groups or self.num_rows

    @property
    def has_labels(self) -> bool:
        """Whether there is a label column with labels in it."""
        return self.label is not None

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes in label order; empty without names."""
        return self.label.names if self.label else ()

    @classmethod
    def open(cls, uri: str, columns: ColumnsConfig | None = None, limit: int = 0) -> Source:
        """Return the dataset at `uri`: a parquet file, or a folder of them at any depth.

        Of a folder of image files a list is made, which lies in the user's cache; `train.resolve`
        puts it where all nodes see it.

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
        listing = list_parquet(fs, root, uri, columns)
        if not listing.files:
            uri = index_folder(uri, str(cache_folder("lists")))
            fs, root = filesystem(uri)
            listing = list_parquet(fs, root, uri, columns)
        every = read_footers(fs, listing.files)
        check_meant(fs, root, uri, listing.others, every, columns.image)
        footers = [footer for footer in every if any(footer.group_rows)]
        if not footers:
            raise DataError(f"{uri} holds no rows")
        of_files = (columns.image, columns.id, PATH_COLUMN)
        footers = with_folder_values(footers, part_split(fs, root)[0], of_files)
        check_images(footers, columns.image)
        say_large_groups(footers, columns)
        roots = list(dict.fromkeys(footer.image_root for footer in footers))
        if len(roots) > 1:
            raise DataError(lists_apart(uri, roots))
        groups = row_groups_of(footers, limit)
        are_files = all_name_files(footers, columns.image)
        sampled = sampled_files(footers, fs, columns.image, limit)
        source = cls(
            uri=uri,
            files=tuple(f.path for f in footers),
            row_groups=cut_groups(groups) if are_files else groups,
            num_rows=groups[-1].first_row + groups[-1].num_rows,
            row_bytes=bytes_of_rows(footers, columns.image, sampled),
            columns=columns,
            has_ids=has_integer_ids(footers, columns),
            label=None,
            unlabelled="",
            has_paths=has_paths(footers),
            image_root=recall(footers[0].image_root),  # processes that get it need the password
            names_files=are_files,
            index=find_index(fs, root, every, columns),
            fingerprint=fingerprint_of(every, root, columns, limit, sampled.digest),
            folder_values=tuple(footer.folder_values for footer in footers),
        )
        label, why, no_keys = _columns_read(source, footers)
        if source.has_ids and no_keys:
            source = _without_ids(source, no_keys)
        return replace(source, label=label, unlabelled=why)

    def read_group(self, index: int, *, labels: bool = True) -> RowTable:
        """Return row group `index` of `row_groups`, its rows in order.

        Args:
            index: Of the group.
            labels: Whether to read the labels, where there are any.

        Raises:
            DataError: the file is gone, changed, or broken.
        """
        group = self.row_groups[index]
        table = self._read(group, self._wanted(labels=labels))
        return self._rows(table, np.arange(group.num_rows, dtype=np.int64) + group.first_row, group)

    def read_slices(self, index: int, num_rows: int) -> Iterator[RowTable]:
        """Yield all of row group `index`, so many rows at a time; what was yielded is not held.

        Raises:
            DataError: the file is gone, changed, or broken.
        """
        group = self.row_groups[index]
        first = group.first_row
        for table in iter_tables(self._file(group.file), group, num_rows, self._wanted()):
            positions = np.arange(table.num_rows, dtype=np.int64) + first
            first += table.num_rows
            yield self._rows(table, positions, group)

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
        owner = self.groups_of(wanted)
        ids = np.empty(len(wanted), dtype=np.int64)
        labels = np.empty(len(wanted), dtype=np.int64) if self.has_labels else None
        images: list[bytes | None] = [None] * len(wanted)
        paths: list[str | None] = [None] * len(wanted)
        for index in np.unique(owner):
            group = self.row_groups[index]
            places = np.flatnonzero(owner == index)
            places = places[np.argsort(wanted[places], kind="stable")]
            own = wanted[places] - group.first_row
            # no name for what is read: a large row group goes before its images are taken out
            taken = take_rows(self._read(group, self._wanted()), own, self.files[group.file])
            part = self._rows(taken, wanted[places], group)
            ids[places] = part.ids
            if labels is not None and part.labels is not None:
                labels[places] = part.labels
            for at, place in enumerate(places):
                images[place] = part.images[at]
                paths[place] = part.paths[at] if part.paths else None
        return RowTable(ids, images, labels, paths if self.has_paths else None)

    def schema_of(self, file: int) -> pa.Schema:
        """Return the columns of a file, those in the names of its folders included."""
        return self._file(file).schema()

    def groups_of(self, rows: Int64s) -> Int64s:
        """Return the index of the row group of each row, int64 [m]."""
        firsts = np.array([group.first_row for group in self.row_groups])
        return np.searchsorted(firsts, rows, side="right") - 1

    def read_first_images(self, index: int, num: int) -> list[bytes | None]:
        """Return the images of the first `num` rows of row group `index`, and read little more.

        Raises:
            DataError: the file is gone, changed, or broken.
        """
        group, name = self.row_groups[index], self.columns.image
        path, (fs, _) = self.files[group.file], filesystem(self.uri)
        if self.names_files:  # names are few bytes
            few = self.read_column(group, name).slice(0, num)
            return read_images(few, fs, path, self.image_root)
        column = read_first_rows(self._file(group.file), group, name, num)
        return read_images(column, fs, path, self.image_root)

    def labels(self) -> Int64s:
        """Return the label of every row, int64 [num_rows], -1 where null; reads no image.

        Raises:
            DataError: the dataset has no labels.
        """
        if self.label is None:
            raise DataError(f"{self.shown_uri} {self.unlabelled}")
        if self.index:
            column = self.read_index(self.label.name)
            return self.label.read(column, 0, self.index)
        parts = zip(self.read_columns(self.label.name), self.row_groups, strict=True)
        return np.concatenate(
            [self.label.read(part, g.file, self.files[g.file]) for part, g in parts]
        )

    def label_of(self) -> Callable[[Int64s], Int64s]:
        """Return what finds the labels of ids: int64 [m] -> int64 [m], -1 where null.

        Raises:
            DataError: the dataset has no labels.
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
        if self.index:
            return _integers(self.read_index(self.columns.id), self.index, self.columns.id)
        name = self.columns.id
        parts = zip(self.read_columns(name), self.row_groups, strict=True)
        return np.concatenate([_integers(part, self.files[g.file], name) for part, g in parts])

    def _wanted(self, *, labels: bool = True) -> list[str]:
        wanted = [self.columns.image]
        if self.has_ids:
            wanted.append(self.columns.id)
        if self.label is not None and labels:
            wanted.append(self.label.name)
        if self.has_paths:
            wanted.append(PATH_COLUMN)
        return list(dict.fromkeys(wanted))

    def read_columns(self, name: str) -> list[pa.ChunkedArray]:
        """Return a column of each row group; of a bucket many at a time."""
        threads = 1 if is_local(filesystem(self.uri)[0]) else REMOTE_THREADS
        wholes = joined_groups(self.row_groups)
        with ThreadPoolExecutor(threads) as pool:
            parts = list(pool.map(functools.partial(self.read_column, name=name), wholes))
        part_of = {(g.file, g.group): part for g, part in zip(wholes, parts, strict=True)}
        groups = self.row_groups
        return [part_of[g.file, g.group].slice(g.offset, g.num_rows) for g in groups]

    def read_column(self, group: RowGroup, name: str) -> pa.ChunkedArray:
        """Return a column of a row group. Raises `DataError` as `read_group`."""
        return self._read(group, [name]).column(name)

    def read_index(self, name: str) -> pa.ChunkedArray:
        """Return a column of the rows, from the one file of a prepared set that has it for all."""
        fs, _ = filesystem(self.uri)
        return read_file_column(fs, self.index, name).slice(0, self.num_rows)

    def _rows(self, table: pa.Table, positions: Int64s, group: RowGroup) -> RowTable:
        path = self.files[group.file]
        fs, _ = filesystem(self.uri)
        images = read_images(table.column(self.columns.image), fs, path, self.image_root)
        ids, labels, paths = positions.astype(np.int64), None, None
        if self.has_ids:
            ids = _integers(table.column(self.columns.id), path, self.columns.id)
        if self.label is not None and self.label.name in table.column_names:
            labels = self.label.read(table.column(self.label.name), group.file, path)
        if self.has_paths:
            paths = table.column(PATH_COLUMN).to_pylist()
        return RowTable(ids, images, labels, paths)

    def _read(self, group: RowGroup, columns: Sequence[str]) -> pa.Table:
        """Return columns of the group's rows that are in the dataset (see `limit`)."""
        return read_table(self._file(group.file), group, columns)

    def _file(self, file: int) -> DatasetFile:
        return DatasetFile(self.uri, self.files[file], self.fingerprint, self.folder_values[file])


# By place, fingerprint and column of groups: how labels are read, why there are none, why ids are
# no keys. A dataset is opened many times in a process, and columns are read for this.
_COLUMNS_READ: dict[tuple[str, str, str], tuple[LabelColumn | None, str, str]] = {}


def _columns_read(source: Source, footers: Sequence[Footer]) -> tuple[LabelColumn | None, str, str]:
    """Return how labels are read, why there are none, and why the ids are no keys."""
    key = (source.uri, source.fingerprint, source.columns.group)
    if key not in _COLUMNS_READ:
        label, why = find_label_column(
            footers, source.columns, source.num_rows, source.read_columns
        )
        # of a prepared set `prepare` has seen to it
        no_keys, name = "", source.columns.id
        if source.has_ids and not source.index:
            parts = source.read_columns(name)
            no_keys = why_no_keys(parts, source.num_rows, name, source.shown_uri)
        _COLUMNS_READ[key] = label, why, no_keys
    return _COLUMNS_READ[key]


def _without_ids(source: Source, why: str) -> Source:
    """Return the dataset with rows numbered, since its id column does not tell them apart.

    Under its default name the column is left alone, and that is said: nobody asked for it.

    Raises:
        DataError: `data.columns.id` names it.
    """
    leave_ids(source.columns.id, why, source.shown_uri)
    return replace(source, has_ids=False)


def _integers(column: pa.ChunkedArray, path: str, name: str) -> Int64s:
    values: Int64s = as_integers(column, path, name).to_numpy()
    return values
