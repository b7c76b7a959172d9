"""Numbers the groups of a column and orders rows by them: images of one thing come together."""

from __future__ import annotations

import hashlib
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from simclr_ray.augment.philox import integers
from simclr_ray.data.arrays import Int64s
from simclr_ray.data.classes import is_text

NAMED, NULL = 0, 1  # what is drawn of a group's key, and of the row of one without


class GroupColumn(NamedTuple):
    """The groups of some rows.

    Attributes:
        codes: int64 [m], of each row the number of its group, in the order of their first rows.
        keys: int64 [g], the value of each group, of text a hash of it, of null any.
        is_null: bool [g].
    """

    codes: Int64s
    keys: Int64s
    is_null: NDArray[np.bool_]


def number_groups(column: pa.ChunkedArray) -> GroupColumn:
    """Return the groups of a column of int64 or text; each null is one of its own."""
    nulls = column.is_null().to_numpy()
    names = None
    if is_text(column.type):
        encoded = pc.dictionary_encode(column).combine_chunks()
        names = encoded.dictionary.to_pylist()
        column = encoded.indices
    values = column.fill_null(0).to_numpy().astype(np.int64)
    distinct, codes = np.unique(values, return_inverse=True)
    codes = np.where(nulls, len(distinct) + np.arange(len(values)), codes)
    _, first, inverse = np.unique(codes, return_index=True, return_inverse=True)
    rank = np.empty(len(first), np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    keys = np.sort(first)
    own = values[keys]
    if names is not None:  # without a name, all are null
        own = np.array([_hash(text) for text in names] or [0], np.int64)[own]
    return GroupColumn(rank[inverse], own, nulls[keys])


def _hash(text: str) -> int:
    digest = hashlib.blake2b(text.encode(errors="surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def one_array(column: pa.ChunkedArray) -> pa.Array:
    """Return a column of int64 or text of any size in one piece, of which rows are taken.

    Arrow joins the chunks of a column anew each time that rows are taken of it.
    """
    return (column.cast(pa.large_string()) if is_text(column.type) else column).combine_chunks()


def cut_between_groups(groups: Int64s, most: int) -> list[tuple[int, int]]:
    """Return runs [first, last) of at most `most` rows that cut no group, larger of one group.

    Args:
        groups: int64 [m], the group of each row, those of a group together.
        most: Rows.
    """
    edges = [0, *(np.flatnonzero(np.diff(groups)) + 1).tolist(), len(groups)]
    runs, first = [], 0
    for begin, end in pairwise(edges):
        if end - first > most and begin > first:
            runs.append((first, begin))
            first = begin
    return [*runs, (first, len(groups))] if len(groups) else []


def grouped_order(column: pa.ChunkedArray, seed: int) -> tuple[Int64s, Int64s]:
    """Return rows [m] with the groups one after the other, shuffled by key, and the group of each.

    Args:
        column: The group of each row, int64 or text.
        seed: Of the order of the groups.
    """
    codes, keys, is_null = number_groups(column)
    nulls = np.flatnonzero(is_null)
    shuffled = integers(keys, seed=seed, epoch=0, sub=NAMED, purpose="members")
    own = integers(nulls, seed=seed, epoch=0, sub=NULL, purpose="members")
    shuffled[nulls] = own
    order = np.lexsort((codes, shuffled[codes])).astype(np.int64)
    return order, codes[order]
