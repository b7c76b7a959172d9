"""Columns that stand in the names of folders, as Spark, Ray and pyarrow partition a table (hive).

Of `label=cat/part-0.parquet` every row has the label `cat`: the folder says it, and the file has no
such column. What a file has itself is read from the file.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Final
from urllib.parse import unquote

import pyarrow as pa

from simclr_ray.data.footer import FolderValue, Footer

NULL: Final = "__HIVE_DEFAULT_PARTITION__"


def with_folder_values(
    footers: Sequence[Footer], folder: str, roles_of_files: Collection[str]
) -> list[Footer]:
    """Return the footers with the columns that names of folders below `folder` say.

    A column is of integers where all its values are, else of text.

    Args:
        footers: Of all files.
        folder: Names of folders above it say nothing of the rows.
        roles_of_files: Columns that only files themselves can have: images, ids, paths.
    """
    texts_of = [
        {
            name: value
            for name, value in _pairs(footer.path, folder)
            if name not in roles_of_files and footer.type_of(name) is None
        }
        for footer in footers
    ]
    texts = {
        name for pairs in texts_of for name, text in pairs.items() if text and not _is_int64(text)
    }
    return [
        _with(footer, [_value(*pair, is_text=pair[0] in texts) for pair in pairs.items()])
        for footer, pairs in zip(footers, texts_of, strict=True)
    ]


def columns_of_file(values: Sequence[FolderValue], columns: Sequence[str]) -> list[str]:
    """Return which columns are to be read from a file: those that its folders do not say."""
    names = {value.name for value in values}
    return [name for name in columns if name not in names]


def with_columns(
    table: pa.Table | None, values: Sequence[FolderValue], columns: Sequence[str], num_rows: int
) -> pa.Table:
    """Return a table of `columns`, those that the names of folders say among them.

    Args:
        table: The columns of the file; None where folders say all.
        values: What the names of its folders say.
        columns: All, in order.
        num_rows: Of the table.
    """
    of_folders = {
        value.name: pa.repeat(pa.scalar(value.value, value.kind), num_rows)
        for value in values
        if value.name in columns
    }
    if table is not None and not of_folders:
        return table
    return pa.table(
        {
            name: of_folders[name] if name in of_folders or table is None else table.column(name)
            for name in columns
        }
    )


def with_fields(schema: pa.Schema, values: Sequence[FolderValue]) -> pa.Schema:
    """Return the schema of a file with the columns that the names of its folders say."""
    for value in values:
        schema = schema.append(pa.field(value.name, value.kind))
    return schema


def _pairs(path: str, folder: str) -> Iterator[tuple[str, str | None]]:
    for part in path.removeprefix(folder).strip("/").split("/")[:-1]:
        name, mark, value = part.partition("=")
        if name and mark:
            yield unquote(name), None if value == NULL else unquote(value)


def _is_int64(text: str) -> bool:
    digits = text.removeprefix("-")
    return digits.isascii() and digits.isdigit() and -(2**63) <= int(text) < 2**63


def _value(name: str, text: str | None, *, is_text: bool) -> FolderValue:
    if is_text:
        return FolderValue(name, text, is_text)
    return FolderValue(name, int(text) if text else None, is_text)


def _with(footer: Footer, values: Sequence[FolderValue]) -> Footer:
    if not values:
        return footer
    is_null = {value.name: value.value is None for value in values}
    return replace(
        footer,
        schema=with_fields(footer.schema, values),
        is_empty=partial(_is_empty, is_null, footer.is_empty),
        folder_values=tuple(values),
    )


def _is_empty(is_null: dict[str, bool], in_file: Callable[[str], bool], name: str) -> bool:
    return is_null[name] if name in is_null else in_file(name)
