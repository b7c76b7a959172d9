"""Images of the test split that are trained on too, found by where they lie: nothing is decoded.

A copy under another name is found by `inspect --against`, which decodes all of them.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from typing import Final
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.compute as pc

from simclr_ray.config.experiment import DataConfig
from simclr_ray.data.source import Source
from simclr_ray.storage.filesystem import filesystem, is_local

FILE: Final = "file://"


def overlap_line(data: DataConfig) -> str:
    """Return what to say of test images that are in `data.train` or `data.eval_train` too.

    Empty where there are none, or no test split. Files are compared, or the images themselves where
    each is a file of its own; and whole splits by their fingerprints, wherever they lie.

    Raises:
        DataError: A split cannot be read.
    """
    if not data.test:
        return ""
    test = Source.open(data.test, data.columns)
    for uri in filter(None, dict.fromkeys((data.train, data.eval_train))):
        other = Source.open(uri, data.columns)
        num = test.num_rows
        if test.fingerprint != other.fingerprint:
            read = Source.open(uri, data.columns, data.limit if uri == data.train else 0)
            num = num_within(test, read)
        if num:
            part = "all" if num == test.num_rows else f"{num:,} of"
            images = f"{part} {test.num_rows:,} images of {test.shown_uri}"
            return f"{images} are in {other.shown_uri} too: scores flatter"
    return ""


def num_within(source: Source, other: Source) -> int:
    """Return how many rows of a dataset lie where rows of another do.

    Example: of `photos/test` all lie within `photos`.
    """
    places = pa.chunked_array(_places(other), pa.string()).unique()
    num = 0
    for part, group in zip(_places(source), source.row_groups, strict=True):
        within = pc.sum(pc.is_in(part, value_set=places, skip_nulls=True)).as_py() or 0
        num += within if source.names_files else within * group.num_rows
    return num


def _places(source: Source) -> Iterator[pa.Array]:
    """Yield of each row group where its images lie: one place, or one of each row."""
    fs, _ = filesystem(source.uri)
    for group in source.row_groups:
        path = source.files[group.file]
        folder, _, name = (_real(path) if is_local(fs) else path).rpartition("/")
        if not source.names_files:
            yield pa.array([f"{folder}/{name}"], pa.string())
            continue
        named = source.read_column(group, source.columns.image).combine_chunks().cast(pa.string())
        root = source.image_root
        if root.startswith(FILE):
            root = _real(unquote(root.removeprefix(FILE)))
        elif "://" not in root:
            root = f"{folder}/{root}".rstrip("/")
            root = _real(root) if is_local(fs) else root
        if pc.any(pc.starts_with(named, FILE)).as_py():
            texts = [t and unquote(t.removeprefix(FILE)) for t in named.to_pylist()]
            named = pa.array(texts, pa.string())
        is_whole = pc.match_substring_regex(named, "^/|://")
        yield pc.if_else(is_whole, named, pc.binary_join_element_wise(root, named, "/"))


@functools.cache
def _real(path: str) -> str:
    """Return a local path without links."""
    return os.path.realpath(path)
