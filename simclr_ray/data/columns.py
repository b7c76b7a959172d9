"""Which columns of a dataset's files can serve, and one sentence on each that cannot."""

from __future__ import annotations

import logging
import posixpath
from collections.abc import Callable, Sequence

import pyarrow as pa

from simclr_ray.config.experiment import ColumnsConfig
from simclr_ray.config.logging import warn_once
from simclr_ray.config.wording import column_key
from simclr_ray.data.classes import LabelColumn, is_number, is_text, label_column
from simclr_ray.data.footer import Footer
from simclr_ray.errors import DataError

PATH_COLUMN = "path"  # which file an image was, as `prepare` writes it
GROUP_COLUMN = "group"  # which thing it is of, likewise

log = logging.getLogger(__name__)


def check_image(footer: Footer, name: str) -> None:
    """Raise `DataError` where a file has no column `name` that can hold images."""
    kind = footer.type_of(name)
    if kind is None:
        raise DataError(footer.lacks(name, "image"))
    if not _can_hold_images(kind):
        raise DataError(
            f"{footer.path}: column {name!r} has type {kind}; an image column is binary, "
            "a struct of bytes and path, or a string with paths"
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
        return None, f"has no label column {name!r}"
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


def _place_of(footers: Sequence[Footer]) -> str:
    """Return the file, or the folder that all files lie in."""
    paths = [footer.path for footer in footers]
    return paths[0] if len(paths) == 1 else posixpath.commonpath(paths)


def _can_label(kind: pa.DataType) -> bool:
    return is_number(kind) or is_text(kind)


def _can_hold_images(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        fields = {f.name: f.type for f in kind}
        return _is_bytes(fields.get("bytes")) or is_text(fields.get("path"))
    return _is_bytes(kind) or is_text(kind)


def _is_bytes(kind: pa.DataType | None) -> bool:
    return kind is not None and (pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _is_empty(footers: Sequence[Footer], name: str) -> bool:
    """Return whether a column holds nothing but nulls in every file, or is in none."""
    return all(not footer.group_rows or footer.is_empty(name) for footer in footers)


def _all_usable(
    footers: Sequence[Footer],
    role: str,
    name: str,
    fits: Callable[[pa.DataType], bool],
    wanted: str,
    *,
    required: bool,
) -> bool:
    usable = [fits(footer.type_of(name) or pa.null()) for footer in footers]
    if all(usable):
        return True
    odd_one = footers[usable.index(False)]
    kind = odd_one.type_of(name)
    if kind is None and (required or any(usable)):
        raise DataError(odd_one.lacks(name, role))
    if kind is not None and (required or any(usable)):
        raise DataError(f"{odd_one.path}: {role} column {name!r} has type {kind}, not {wanted}")
    if kind is not None:
        warn_once(log, f"{odd_one.path}: column {name!r} has type {kind}: not used as the {role}")
    return False
