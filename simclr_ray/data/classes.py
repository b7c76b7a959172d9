"""Which class a value of a label column is: by its name where there are names, else by its number.

Datasets number their classes as they like, each file of one even. So numbers are compared only
where a side has nothing else: `align_labels` gives several datasets one numbering, by name.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from simclr_ray.config.column_keys import column_key
from simclr_ray.config.logging import warn_once
from simclr_ray.config.wording import counted
from simclr_ray.data.arrays import Int64s
from simclr_ray.errors import DataError, one_line

NO_LABEL: Final = -1
NO_INT64: Final = "does not fit int64: it has a number of 2^63 or more"
SHOWN = 5  # names in a message

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LabelColumn:
    """How the labels of a dataset are read.

    Attributes:
        name: Of the column.
        names: Of the classes, by label; empty where a dataset has numbers alone.
        is_text: The column holds the names themselves.
        label_of_file: Of each file, the label of its number k; empty where all number alike.
        renumbered: Labels as read, ascending, and what is said in their place; empty: themselves.
    """

    name: str
    names: tuple[str, ...] = ()
    is_text: bool = False
    label_of_file: tuple[tuple[int, ...], ...] = ()
    renumbered: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())

    def read(self, column: pa.ChunkedArray, file: int, path: str) -> Int64s:
        """Return the labels of a column of file number `file`: int64 [m], -1 for null and below.

        Raises:
            DataError: A value is no integer, or a number that the file has no name for.
        """
        if self.is_text:
            labels = pc.index_in(as_text(column), pa.array(self.names, pa.string()))
        else:
            labels = as_integers(column, path, self.name)
        values: Int64s = labels.fill_null(NO_LABEL).cast(pa.int64()).to_numpy()
        if self.label_of_file:
            table = self.label_of_file[file]
            values = self._looked_up(values, range(len(table)), table, path)
        before, after = self.renumbered
        if before:
            return self._looked_up(values, before, after, path)
        if self.names and not self.is_text:
            every = range(len(self.names))
            return self._looked_up(values, every, every, path)
        return np.maximum(values, NO_LABEL)

    def _looked_up(
        self, values: Int64s, before: Sequence[int], after: Sequence[int], path: str
    ) -> Int64s:
        """Return what stands in place of each value, -1 for what is below 0."""
        at = np.searchsorted(before, values).clip(max=len(before) - 1)
        unknown = values[(np.asarray(before)[at] != values) & (values >= 0)]
        if unknown.size:
            raise DataError(
                f"{path}: column {self.name!r} has label {unknown.max()}, which is none of the "
                f"{counted(len(before), 'class', 'classes')} that there are; mend the names "
                f"(class_names), or leave labels out by {column_key('label')}="
            )
        return np.where(values < 0, NO_LABEL, np.asarray(after)[at])


def is_text(kind: pa.DataType | None) -> bool:
    """Return whether a column of this type holds names."""
    if kind is not None and pa.types.is_dictionary(kind):
        kind = kind.value_type
    if kind is None:
        return False
    views = pa.types.is_string_view(kind)
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or views)


def is_number(kind: pa.DataType | None) -> bool:
    """Return whether a column of this type may hold numbers of classes."""
    return kind is not None and (
        pa.types.is_integer(kind) or pa.types.is_boolean(kind) or pa.types.is_floating(kind)
    )


def as_text(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return a column of names, or a dictionary of them, as strings."""
    return column.cast(pa.string())


def blank_as_null(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return a column of names as strings, those of no characters or of spaces alone as null."""
    text = as_text(column)
    is_blank = pc.equal(pc.utf8_trim_whitespace(text), "")
    return pc.if_else(is_blank, pa.scalar(None, pa.string()), text)


def as_integers(column: pa.ChunkedArray, path: str, name: str) -> pa.ChunkedArray:
    """Return numbers as int64; NaN, by which pandas says null, becomes null.

    Raises:
        DataError: A value has a fraction or does not fit.
    """
    if pa.types.is_floating(column.type):
        column = pc.if_else(pc.is_nan(column), None, column)
    try:
        return column.cast(pa.int64())
    except pa.ArrowInvalid as error:
        if pa.types.is_integer(column.type):
            raise DataError(f"{path}: column {name!r} {NO_INT64}") from error
        problem = one_line(error)
        raise DataError(f"{path}: column {name!r} does not hold integers: {problem}") from error


def label_column(
    name: str,
    kinds: Sequence[pa.DataType],
    names_of_files: Sequence[tuple[str, ...]],
    values: Callable[[], Sequence[pa.ChunkedArray]],
    place: str,
) -> LabelColumn:
    """Return how a column of usable types is read.

    Args:
        name: Of the column.
        kinds: Its type in each file; null counts for any.
        names_of_files: Of each file, the names of its classes by number; empty: it has none.
        values: Reads the column of every row group; called for text and for numbers that may be no
            labels.
        place: What the files are called in messages.

    Raises:
        DataError: Some files hold names and others numbers, or some name their classes differently
            and others not at all.
    """
    texts = [is_text(kind) for kind in kinds if not pa.types.is_null(kind)]
    if any(texts):
        if not all(texts):
            raise DataError(f"column {name!r} holds names in some files and numbers in others")
        return _text_column(name, values(), place)
    if any(pa.types.is_floating(kind) or pa.types.is_uint64(kind) for kind in kinds):
        for part in values():
            as_integers(part, place, name)  # fails here for fractions, and above 2^63
    name_lists = [names for names in names_of_files if names]
    num_nameless = len(names_of_files) - len(name_lists)
    if all(names == name_lists[0] for names in name_lists):
        if name_lists and num_nameless:
            nameless = counted(num_nameless, "file")
            warn_once(log, f"{nameless} without names of classes: labels go by their numbers")
        return LabelColumn(name, name_lists[0] if name_lists else ())
    if num_nameless:
        raise DataError(
            f"files name their classes differently and {num_nameless} not at all: what numbers in "
            f"column {name!r} mean is not known; write names as text"
        )
    union = tuple(dict.fromkeys(n for names in names_of_files for n in names))
    number = {class_name: label for label, class_name in enumerate(union)}
    table = tuple(tuple(number[n] for n in names) for names in names_of_files)
    warn_once(log, f"files number their classes differently: labels of {name!r} go by name")
    return LabelColumn(name, union, label_of_file=table)


def _text_column(name: str, parts: Sequence[pa.ChunkedArray], place: str) -> LabelColumn:
    """Return how a column of names is read; blank text is no name, and that is said."""
    distinct: set[str | None] = set()
    num_rows = num_blank = 0
    for part in parts:
        names = blank_as_null(part)
        distinct |= {*names.unique().to_pylist()}
        num_rows += len(names)
        num_blank += names.null_count - part.null_count
    if num_blank:
        warn_once(
            log,
            f"{place}: column {name!r}: {num_blank:,} of {num_rows:,} labels are blank text: "
            "no label",
        )
    return LabelColumn(name, tuple(sorted(value for value in distinct if value)), is_text=True)


def distinct_labels(labels: Int64s) -> tuple[int, ...]:
    """Return the labels that occur, ascending, without -1."""
    return tuple(int(label) for label in np.unique(labels) if label >= 0)


def class_keys(column: LabelColumn, labels: Int64s) -> dict[int, str]:
    """Return what each label is called: names, all of them, or the numbers that occur, as text."""
    if column.names:
        return dict(enumerate(column.names))
    return {label: str(label) for label in distinct_labels(labels)}


def renumber(column: LabelColumn, keys: Mapping[int, str], classes: Sequence[str]) -> LabelColumn:
    """Return the column read as labels of `classes`; a key that is none of them gets -1."""
    if column.is_text:  # names are looked up among the classes themselves
        return replace(column, names=tuple(classes))
    number = {key: label for label, key in enumerate(classes)}
    pairs = sorted((label, number.get(key, NO_LABEL)) for label, key in keys.items())
    if all(before == after for before, after in pairs):
        return replace(column, names=tuple(classes) if column.names else ())
    before, after = zip(*pairs, strict=True)
    return replace(column, names=tuple(classes), renumbered=(before, after))


def number_classes(
    keys: Sequence[Mapping[int, str]], named: Sequence[bool], uris: Sequence[str]
) -> tuple[tuple[str, ...], str]:
    """Return the classes of several datasets, those of the first before others; and what to say.

    Args:
        keys: Of each dataset, what its labels are called.
        named: Whether it has names of classes.
        uris: Where each lies.
    """
    notes = []
    if any(named) and not all(named):
        nameless = [uri for uri, has_names in zip(uris, named, strict=True) if not has_names]
        notes = [f"{', '.join(nameless)} has no names of classes: labels are compared as numbers"]
    first = list(dict.fromkeys(keys[0].values()))
    in_first, classes = set(first), dict.fromkeys(first)
    for uri, theirs in zip(uris[1:], keys[1:], strict=True):
        others = set(theirs.values())
        missing = [key for key in first if key not in others]
        alone = [key for key in theirs.values() if key not in in_first]
        notes += [f"{uri} has no {_shown(missing)}"] if missing else []
        notes += [f"{uris[0]} has no {_shown(alone)}, which {uri} has"] if alone else []
        classes |= dict.fromkeys(theirs.values())
    return tuple(classes), "; ".join(notes)


def _shown(names: Sequence[Any]) -> str:
    shown = ", ".join(map(str, names[:SHOWN]))
    more = len(names) - SHOWN
    listed = f"{shown} and {more} more" if more > 0 else shown
    return f"class {listed}" if len(names) == 1 else f"classes {listed}"
