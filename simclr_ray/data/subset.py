"""A class-balanced share of a labelled dataset, fixed by a seed: what 1 % and 10 % are (§B.5).

The rows are copied, encoded bytes and ids as they are, into one parquet of their own, so that a
run on them is a run like any other, and which they were stays on record.
"""

from __future__ import annotations

import hashlib
import json
import logging
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from simclr_ray.config.wording import counted
from simclr_ray.data.arrays import Int64s
from simclr_ray.data.classes import NO_LABEL
from simclr_ray.data.source import Source
from simclr_ray.errors import DataError
from simclr_ray.storage.filesystem import address_below, filesystem, open_whole

log = logging.getLogger(__name__)

GROUP_ROWS = 500
# A share p of n images has the standard error √(p(1-p)/n): of these at most half a percent.
MOST_TEST_ROWS: Final = 10_000


def balanced_rows(labels: Int64s, label_fraction: float, seed: int, per_class: int = 0) -> Int64s:
    """Return the rows of a class-balanced part, ascending: of each class equally many.

    That many is `label_fraction` of the labelled rows over the number of classes, at least 1, or
    `per_class`; a class that has fewer gives all it has.

    Args:
        labels: int64 [M], below 0: none.
        label_fraction: In (0, 1]; not asked about with `per_class`.
        seed: Which rows.
        per_class: Of each class; 0: by `label_fraction`.

    Raises:
        DataError: There are no labels, or fewer labelled rows asked for than classes.
    """
    labelled = np.flatnonzero(labels >= 0)
    classes = np.unique(labels[labelled])
    wanted = per_class * len(classes) or round(label_fraction * len(labelled))
    if not len(classes) or wanted < len(classes):
        raise DataError(
            f"{label_fraction:g} of {len(labelled)} labelled rows are {wanted}, fewer than the "
            f"{len(classes)} classes; ask for a larger share"
        )
    if label_fraction == 1 and not per_class:
        return labelled
    each = max(1, round(wanted / len(classes)))
    order = np.random.Generator(np.random.Philox(key=seed)).permutation(labelled)
    chosen = [order[labels[order] == label][:each] for label in classes]
    return np.sort(np.concatenate(chosen))


def rows_left(labels: Int64s, chosen: Int64s, seed: int, most: int = MOST_TEST_ROWS) -> Int64s:
    """Return labelled rows that were not chosen, ascending: all, or `most` drawn alike.

    Args:
        labels: int64 [M], below 0: none.
        chosen: Rows that a classifier learns from.
        seed: Which rows; another stream than that of `balanced_rows`.
        most: Rows at most.
    """
    rest = np.setdiff1d(np.flatnonzero(labels >= 0), chosen)
    if len(rest) <= most:
        return rest
    draws = np.random.Generator(np.random.Philox(key=seed).jumped())
    return np.sort(draws.choice(rest, most, replace=False))


def _say_fewer(labels: Int64s, per_class: int) -> None:
    """Say how many classes have fewer labels than are asked for."""
    _, counts = np.unique(labels[labels >= 0], return_counts=True)
    if few := int((counts < per_class).sum()):
        log.warning(
            "%s of %d with fewer than %d labels: the fewest are %d",
            counted(few, "class", "classes"), len(counts), per_class, counts.min(),
        )  # fmt: skip


def write_subset(
    source: Source,
    label_fraction: float,
    seed: int,
    storage: str,
    *,
    per_class: int = 0,
    others: bool = False,
) -> str:
    """Return the path or URI of the rows' parquet below `storage`, written if it is not there.

    Its columns are called as those of `source`.

    Args:
        source: The labelled images.
        label_fraction: As in `balanced_rows`.
        seed: As there.
        storage: Folder or URI.
        per_class: As there.
        others: Of the other labelled rows those of `rows_left` instead; where there are none,
            nothing is written and "" is returned.

    Raises:
        DataError: As `balanced_rows`, or a file cannot be read.
    """
    labels = source.labels()
    rows = balanced_rows(labels, label_fraction, seed, per_class)
    if not others:
        _say_fewer(labels, per_class)
    if others:
        num_rest = int((labels >= 0).sum()) - len(rows)
        rows = rows_left(labels, rows, seed)
        if not len(rows):
            log.warning("no labelled image is left to test on")
            return ""
        log.info(
            "tested on %s of the %s labelled images that were not chosen",
            f"{len(rows):,}", f"{num_rest:,}",
        )  # fmt: skip
    chosen = [per_class] if per_class else [label_fraction]
    identity = json.dumps(
        [source.fingerprint, *chosen, seed, NO_LABEL, *["others", len(rows)] * others]
    )
    digest = hashlib.sha256(identity.encode()).hexdigest()[:8]
    much = f"{per_class}-each" if per_class else f"{label_fraction:g}"
    name = f"{'not-' if others else ''}labelled-{much}-seed{seed}-{digest}.parquet"
    uri = address_below(storage, name)
    fs, path = filesystem(uri)
    if fs.get_file_info(path).is_file:
        return uri
    fs.create_dir(path.rpartition("/")[0], recursive=True)
    names = (source.columns.id, source.columns.image, source.columns.label)
    schema = pa.schema(list(zip(names, (pa.int64(), pa.binary(), pa.int64()), strict=True)))
    about = {"class_names": json.dumps(list(source.class_names))} if source.class_names else {}
    with (
        open_whole(fs, path) as stream,
        pq.ParquetWriter(stream, schema.with_metadata(about)) as writer,
    ):
        for start in range(0, len(rows), GROUP_ROWS):
            part = source.read_rows(rows[start : start + GROUP_ROWS])
            writer.write_table(pa.table([part.ids, part.images, part.labels], schema=schema))
    return uri
