"""Which columns of a dataset's files can serve, and one sentence on each that cannot."""

from __future__ import annotations

import logging
import posixpath
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa

from simclr_ray.config.column_keys import column_key
from simclr_ray.config.experiment import ColumnsConfig
from simclr_ray.config.logging import warn_once
from simclr_ray.config.uris import hide_passwords
from simclr_ray.config.wording import GIB
from simclr_ray.data.classes import (
    NO_INT64,
    LabelColumn,
    as_integers,
    is_number,
    is_text,
    label_column,
)
from simclr_ray.data.files import is_bytes
from simclr_ray.data.footer import Footer
from simclr_ray.errors import DataError

PATH_COLUMN = "path"  # which file an image was, as `prepare` writes it
GROUP_COLUMN = "group"  # which thing it is of, likewise

MAX_GROUP_BYTES = 256 * 2**20  # of images; of larger ones it is said

log = logging.getLogger(__name__)


def check_images(footers: Sequence[Footer], name: str) -> None:
    """Raise `DataError` where a file has no column `name` that can hold images.

    One of nulls alone, which has no type, can where another file has one of images.
    """
    kinds = [footer.type_of(name) for footer in footers]
    has_images = any(kind is not None and _can_hold_images(kind) for kind in kinds)
    for footer, kind in zip(footers, kinds, strict=True):
        if kind is None:
            raise DataError(footer.lacks(name, "image"))
        is_empty = has_images and pa.types.is_null(kind)
        if not is_empty and not _can_hold_images(kind):
            raise DataError(
                f"{footer.path}: column {name!r} has type {kind}; an image column is binary, "
                "a struct of bytes and path, or a string with paths"
            )


def say_large_groups(footers: Sequence[Footer], columns: ColumnsConfig) -> None:
    """Warn of a row group of images that is large: for any of them all is read and held.

    Sizes are of all columns together. Nothing is said of a file with columns that are not read,
    which may be what is large.
    """
    read = {columns.image, columns.id, columns.label, columns.group, PATH_COLUMN}
    sizes = [
        (size, num_rows, footer)
        for footer in footers
        if read.union(value.name for value in footer.folder_values).issuperset(footer.schema.names)
        and not is_text(footer.type_of(columns.image))
        for size, num_rows in zip(footer.group_bytes, footer.group_rows, strict=True)
        if size > MAX_GROUP_BYTES
    ]
    if sizes:
        size, num_rows, footer = max(sizes, key=lambda item: item[0])
        fitting = max(1, num_rows * MAX_GROUP_BYTES // (2 * size))
        warn_once(
            log,
            f"{footer.path}: a row group of {size / GIB:.1f} GiB is read and held whole for any "
            f"of its images: write it with row_group_size={fitting}",
        )


def lists_apart(uri: str, roots: Sequence[str]) -> str:
    """Return the sentence that lists of images of several folders are no one dataset."""
    shown = " and ".join(hide_passwords(root) or "beside them" for root in roots[:2])
    return (
        f"{uri} holds lists of images that lie in several places ({shown}): give one of the lists, "
        "or the folder of the images"
    )


def has_paths(footers: Sequence[Footer]) -> bool:
    """Return whether every file says which file each image was."""
    return all(is_text(footer.type_of(PATH_COLUMN)) for footer in footers)


def has_integer_ids(footers: Sequence[Footer], columns: ColumnsConfig) -> bool:
    """Return whether the id column is there, as integers, in all files.

    A column of nulls counts as absent, and so does one that is `data.columns.group`. Under its
    default name one that is no integer is left alone, and said.

    Raises:
        DataError: Only some files have it, or `data.columns.id` names one that cannot serve.
    """
    name, required = columns.id, columns.id != ColumnsConfig().id
    if name in ("", columns.group) or _is_empty(footers, name):
        return False
    return _all_usable(footers, "id", name, pa.types.is_integer, "an integer", required=required)


def find_label_column(
    footers: Sequence[Footer],
    columns: ColumnsConfig,
    num_rows: int,
    parts: Callable[[str], Sequence[pa.ChunkedArray]],
) -> tuple[LabelColumn | None, str]:
    """Return how labels are read, or None and why there are none.

    Args:
        footers: Of all files.
        columns: Which column holds labels.
        num_rows: M.
        parts: Reads a column of every row group.

    Raises:
        DataError: Only some files have the column, or `data.columns.label` names one that cannot
            serve.
    """
    name, usual = columns.label, ColumnsConfig().label
    if not name:
        return None, f"has no labels: {column_key('label')} is empty"
    if _is_empty(footers, name) and any(f.type_of(name) is not None for f in footers):
        return None, f"has no labels: all {num_rows:,} of column {name!r} are null"
    required = name != usual
    if not _all_usable(footers, "label", name, _can_label, "a number or a name", required=required):
        return None, f"has no label column {name!r}{_why_none(footers, name)}"
    kinds = [footer.type_of(name) or pa.null() for footer in footers]
    names = [footer.class_names(name) for footer in footers]
    try:
        label = label_column(name, kinds, names, lambda: parts(name), _place_of(footers))
    except DataError as error:
        if required:
            raise
        warn_once(log, f"labels are not used: {error}")
        return None, f"has no labels that can be used: {error}"
    if label.is_text and not label.names:
        return None, f"has no labels: all {num_rows:,} of column {name!r} are null or blank"
    return label, ""


def _why_none(footers: Sequence[Footer], name: str) -> str:
    """Return why a label column does not serve, or where labels may stand instead."""
    kinds = {str(footer.type_of(name)) for footer in footers if footer.type_of(name) is not None}
    if kinds:
        return f" of numbers or names: its type is {' and '.join(sorted(kinds))}"
    if any(f"/{name}=" in footer.path for footer in footers):
        return f": give the folder that holds the folders {name}=..., which say it"
    values = dict.fromkeys(value for footer in footers for value in footer.folder_values)
    counts = Counter(value.name for value in values)
    other = next((other for other, number in counts.items() if number > 1), "")
    return f": folders are called {other}=...: {column_key('label')}={other}" if other else ""


def why_no_keys(parts: Sequence[pa.ChunkedArray], num_rows: int, name: str, place: str) -> str:
    """Return why a column of ids does not tell rows apart; nothing where it does."""
    nulls = sum(part.null_count for part in parts)
    if nulls:
        return f"{num_rows:,} rows, {nulls:,} of them null"
    try:
        ids = np.concatenate([as_integers(part, place, name).to_numpy() for part in parts])
    except DataError:
        return NO_INT64
    distinct = len(np.unique(ids))
    return "" if distinct == len(ids) else f"{len(ids):,} rows, {distinct:,} distinct ids"


def leave_ids(name: str, why: str, place: str) -> None:
    """Say that a column of ids under its default name is not used; nobody asked for it.

    Raises:
        DataError: `data.columns.id` names it.
    """
    if name != ColumnsConfig().id:
        raise DataError(
            f"{place}: {column_key('id')}={name}: {why}; ids tell images apart: "
            f"name another column, or none ({column_key('id')}=) to number the rows"
        )
    warn_once(log, f"{place}: column {name!r}: {why}: not used, rows are numbered")


def _place_of(footers: Sequence[Footer]) -> str:
    """Return the file, or the folder that all files lie in."""
    paths = [footer.path for footer in footers]
    return paths[0] if len(paths) == 1 else posixpath.commonpath(paths)


def _can_label(kind: pa.DataType) -> bool:
    return is_number(kind) or is_text(kind)


def _can_hold_images(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        fields = {f.name: f.type for f in kind}
        return is_bytes(fields.get("bytes")) or is_text(fields.get("path"))
    return is_bytes(kind) or is_text(kind)


def _is_empty(footers: Sequence[Footer], name: str) -> bool:
    """Return whether a column holds nothing but nulls in every file, or is in none."""
    return all(not footer.group_rows or footer.is_empty(name) for footer in footers)


def _of_folders(footers: Sequence[Footer], name: str) -> str:
    """Return that other files have a column by the name of their folder, as a clause."""
    has_it = any(value.name == name for footer in footers for value in footer.folder_values)
    return f", or move the file into a folder {name}=..., as others are" if has_it else ""


def _all_usable(
    footers: Sequence[Footer],
    role: str,
    name: str,
    fits: Callable[[pa.DataType], bool],
    wanted: str,
    *,
    required: bool,
) -> bool:
    kinds = [footer.type_of(name) for footer in footers]
    usable = [kind is not None and fits(kind) for kind in kinds]
    if any(usable):  # a file of nulls alone has no type
        usable = [u or k == pa.null() for u, k in zip(usable, kinds, strict=True)]
    if all(usable):
        return True
    odd_one = footers[usable.index(False)]
    kind = odd_one.type_of(name)
    if kind is None and (required or any(usable)):
        raise DataError(odd_one.lacks(name, role) + _of_folders(footers, name))
    if kind is not None and (required or any(usable)):
        raise DataError(f"{odd_one.path}: {role} column {name!r} has type {kind}, not {wanted}")
    if kind is not None:
        warn_once(log, f"{odd_one.path}: column {name!r} has type {kind}: not used as the {role}")
    return False
