"""Tar shards of WebDataset as an input of `prepare`: one file, a folder or bucket, `{0..9}`.

Shards are gone through twice: once for what they hold, since rows and classes must be known before
anything is written, and once for the images. Each part is some images that lie together, read in
one go and then shuffled, so that memory does not depend on the size of a shard. Of a `.tar.gz` a
part must be unpacked from the beginning: large ones are better kept unpacked.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import posixpath
import re
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow.fs as pafs

from simclr_ray.config.experiment import ColumnsConfig
from simclr_ray.config.wording import counted
from simclr_ray.data.arrays import Int64s
from simclr_ray.data.classes import NO_LABEL
from simclr_ray.data.contents import Piece, evenly, pieces_of_file, sample_digest
from simclr_ray.data.items import Item, ShardTask
from simclr_ray.data.left_out import LeftOut
from simclr_ray.data.listing import (
    IMAGE_SUFFIXES,
    PARQUET_SUFFIXES,
    REMOTE_THREADS,
    TAR_SUFFIXES,
    below,
    list_files,
    part_split,
    suffix_of,
)
from simclr_ray.data.splits import choose_split, choose_split_folder, split_of
from simclr_ray.data.tar_index import BROKEN, TarIndex, TarRow, label_keys, open_tar, read_index
from simclr_ray.errors import DataError, one_line
from simclr_ray.storage.filesystem import filesystem, info_of

MAX_PART_BYTES = 256 * 2**20  # a task holds its part to shuffle it
MAX_SHARDS = 1_000_000  # of an expression with braces
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")

log = logging.getLogger(__name__)


class TarShard(NamedTuple):
    """A tar: path or URI that names its file system, its path there, and what it is called."""

    base: str
    path: str
    name: str
    size: int


class TarImage(NamedTuple):
    """An image of a shard: its id, where it lies, its label."""

    id: int
    name: str
    offset: int
    size: int
    label: int


def expand_braces(text: str) -> list[str]:
    """Return what `{a,b}` and `{000..146}` stand for, in order; numbers keep their zeros.

    Raises:
        DataError: They stand for too many.
    """
    match = _BRACES.search(text)
    if match is None:
        return [text]
    before, inner, after = text[: match.start()], match[1], text[match.end() :]
    if span := _RANGE.fullmatch(inner):
        low, high = int(span[1]), int(span[2])
        if abs(high - low) >= MAX_SHARDS:
            raise DataError(f"{text} stands for more than {MAX_SHARDS:,} files")
        width = len(span[1]) if span[1].startswith("0") or len(span[1]) == len(span[2]) else 0
        step = 1 if low <= high else -1
        choices = [f"{n:0{width}d}" for n in range(low, high + step, step)]
    else:
        choices = inner.split(",")
    return [before + c + rest for c in choices for rest in expand_braces(after)]


def first_of(uri: str) -> str:
    """Return a URI, the first where braces stand for several; a path may have braces in it."""
    return expand_braces(uri)[0] if "://" in uri else uri


def find_tars(kind_or_path: str, split: str = "") -> list[TarShard]:
    """Return the tar shards that a path, URI or expression with braces names; none: it names none.

    A folder that holds images or parquet beside tars is one of these.

    Args:
        kind_or_path: Of a folder, or of shards.
        split: Whose shards of a folder are wanted, where their names say it.

    Raises:
        DataError: A file that is named is not there, a folder cannot be listed, or it holds
            several splits and none is named.
    """
    if "{" in kind_or_path and not Path(kind_or_path).expanduser().exists():
        uris = expand_braces(kind_or_path)
        places = [(uri, *filesystem(uri)) for uri in uris]
        with ThreadPoolExecutor(REMOTE_THREADS) as pool:
            infos = list(pool.map(lambda place: info_of(place[1], place[2]), places))
        gone = [u for u, info in zip(uris, infos, strict=True) if info.type != pafs.FileType.File]
        if gone:
            are = f"{len(gone)} of {counted(len(uris), 'file')}"
            raise DataError(f"{kind_or_path}: {are} not there; the first: {gone[0]}")
        named = [(u, p, i.size) for (u, _, p), i in zip(places, infos, strict=True)]
        if split and any(split_of(path, "") for _, path, _ in named):
            kept = {*choose_split([path for _, path, _ in named], "", split, kind_or_path)}
            named = [shard for shard in named if shard[1] in kept]
        return _named(named)
    fs, root = filesystem(kind_or_path)
    if part_split(fs, root)[1]:
        return []
    files, left_out, *_ = list_files(fs, root, kind_or_path)
    tars = [file for file in files if suffix_of(file.path) in TAR_SUFFIXES]
    endings = {suffix_of(file.path) for file in files}
    if not tars or endings & {*IMAGE_SUFFIXES, *PARQUET_SUFFIXES}:
        return []
    for file in files:
        if (suffix := suffix_of(file.path)) not in TAR_SUFFIXES:
            left_out.add(suffix or "without an ending", below(root, file.path))
    if left_out:
        log.warning("%s: %s", kind_or_path, left_out.line())
    if not split or any(split_of(file.path, root) for file in tars):
        kept = {*choose_split([file.path for file in tars], root, split, kind_or_path)}
        tars = [file for file in tars if file.path in kept]
    return _named([(kind_or_path, file.path, file.size) for file in tars])


def _named(tars: Sequence[tuple[str, str, int]]) -> list[TarShard]:
    """Return shards named from the folder that all lie in, sorted."""
    folder = posixpath.commonpath([posixpath.dirname(path) for _, path, _ in tars])
    shards = (TarShard(base, path, posixpath.relpath(path, folder), s) for base, path, s in tars)
    return sorted(shards, key=lambda shard: shard.name)


@dataclass(frozen=True)
class TarInput:
    """The images of some tar shards; the id is the place among all, in the order of the members."""

    shards: tuple[TarShard, ...]
    images: tuple[tuple[TarImage, ...], ...]  # of each shard
    class_names: tuple[str, ...]
    listing: str

    @classmethod
    def open(
        cls,
        uri: str,
        shards: Sequence[TarShard],
        columns: ColumnsConfig,
        limit: int = 0,
        split: str = "",
    ) -> TarInput:
        """Return the images of shards, which are read for it from begin to end.

        Args:
            uri: What they are called in messages.
            shards: Sorted.
            columns: See `tar_index.read_index`.
            limit: Keep the first only; 0 keeps all.
            split: Whose images are wanted, where folders of the members, and no names of shards,
                say it.

        Raises:
            DataError: A shard is broken, none holds an image, what `columns` names is not there,
                or there are several splits and none is named.
        """
        with ThreadPoolExecutor(REMOTE_THREADS) as pool:
            indices = list(pool.map(lambda s: read_index(s.base, s.path, s.name, columns), shards))
        left_out = LeftOut().update(index.left_out for index in indices)
        if not any(index.rows for index in indices):
            others = f" ({left_out.line()})" if left_out else ""
            raise DataError(f"{uri}: {counted(len(shards), 'tar')} without images{others}")
        _say(uri, shards, indices, left_out)
        if not any(split_of(shard.name, "") for shard in shards):
            _keep_split(uri, indices, split)
        rows = [row for index in indices for row in index.rows]
        labels, class_names = _choose_labels(uri, rows, label_keys(columns), columns)
        digest = hashlib.sha256()
        images: list[tuple[TarImage, ...]] = []
        first = 0
        for shard, index in zip(shards, indices, strict=True):
            kept = index.rows[: limit - first] if limit else index.rows
            if limit and first >= limit:
                kept = []
            here = tuple(
                TarImage(first + at, row.name, row.offset, row.size, labels[first + at])
                for at, row in enumerate(kept)
            )
            digest.update(repr((shard.name, shard.size, here)).encode())
            images.append(here)
            first += len(here)
        packed = {shard for shard, index in zip(shards, indices, strict=True) if index.is_packed}
        digest.update(sample_digest(_sample(shards, images, packed)).encode())
        return cls(tuple(shards), tuple(images), class_names, digest.hexdigest())

    @property
    def identity(self) -> dict[str, object]:
        """Names, sizes, labels and a sample of the members; where shards lie does not matter."""
        return {"kind": "tar", "n": self.num_rows, "listing": self.listing}

    @property
    def num_rows(self) -> int:
        """Number of images."""
        return sum(len(images) for images in self.images)

    def parts(self, rows_per_shard: int, seed: int) -> list[ShardTask]:
        """Return images that lie together, of shards in shuffled order; each part is shuffled."""
        rng = np.random.default_rng(seed)
        rows = [
            (shard, image)
            for shard in rng.permutation(len(self.shards)).tolist()
            for image in self.images[shard]
        ]
        parts: list[ShardTask] = []
        for part in _cut(rows, rows_per_shard):
            pieces = [
                TarPiece(self.shards[shard], tuple(image for _, image in run))
                for shard, run in itertools.groupby(part, key=lambda row: row[0])
            ]
            parts.append(TarTask(tuple(pieces), rng.permutation(len(part))))
        return parts


def _sample(
    shards: Sequence[TarShard], images: Sequence[Sequence[TarImage]], packed: AbstractSet[TarShard]
) -> list[Piece]:
    """Return a sample of the members that are kept; of packed shards, pieces of their files."""
    kept = [(shard, here) for shard, here in zip(shards, images, strict=True) if here]
    members = [(shard, image) for shard, here in kept if shard not in packed for image in here]
    pieces = [
        Piece(filesystem(shard.base)[0], shard.path, image.offset, image.size)
        for shard, image in evenly(members)
    ]
    for shard in evenly([shard for shard, _ in kept if shard in packed]):
        pieces += pieces_of_file(filesystem(shard.base)[0], shard.path)
    return pieces


def _cut(rows: list[tuple[int, TarImage]], most: int) -> Iterator[list[tuple[int, TarImage]]]:
    """Yield pieces of at most `most` rows, and of bounded bytes."""
    part: list[tuple[int, TarImage]] = []
    num_bytes = 0
    for row in rows:
        size = row[1].size
        if part and (len(part) == most or num_bytes + size > MAX_PART_BYTES):
            yield part
            part, num_bytes = [], 0
        part.append(row)
        num_bytes += size
    yield part


def _keep_split(uri: str, indices: Sequence[TarIndex], split: str) -> None:
    """Keep the rows of a split, where the folders of the members name several."""
    chosen = choose_split_folder([row.name for i in indices for row in i.rows], split, uri)
    if chosen is None:
        return
    kept = {f"{chosen.folder}/{name}".lstrip("/") for name in chosen.names}
    for index in indices:
        index.rows = [row for row in index.rows if row.name in kept]


def _say(
    uri: str, shards: Sequence[TarShard], indices: Sequence[TarIndex], left_out: LeftOut
) -> None:
    """Log what is left out, what looks cut short, and samples of several images."""
    if left_out:
        log.warning("%s: %s", uri, left_out.line())
    endless = [s.name for s, index in zip(shards, indices, strict=True) if not index.has_end]
    if endless:
        log.warning(
            "%s: %s no end mark and may be cut short; the first: %s",
            uri, f"{counted(len(endless), 'tar')} {'has' if len(endless) == 1 else 'have'}",
            endless[0],
        )  # fmt: skip
    crowded = sum(index.num_crowded for index in indices)
    if crowded:
        log.warning(
            "%s: %s several images: each becomes a row with the label of its sample; one is "
            "chosen by its ending, as in columns.image=jpg",
            uri, f"{counted(crowded, 'sample')} {'holds' if crowded == 1 else 'hold'}",
        )  # fmt: skip


def _choose_labels(
    uri: str, rows: Sequence[TarRow], keys: Sequence[str], columns: ColumnsConfig
) -> tuple[list[int], tuple[str, ...]]:
    """Return the label of each image and the names of classes, and say where they are from.

    One key serves all samples: numbers of two would be of two meanings.
    """
    there = [at for at in range(len(keys)) if any(row.labels[at] is not None for row in rows)]
    if not there:
        if columns.label and columns.label != ColumnsConfig().label:
            raise DataError(f"{uri}: no sample has a label by columns.label={columns.label}")
        if columns.label:
            log.warning("%s: no sample has a label, in .cls or as label or class of .json", uri)
        return [NO_LABEL] * len(rows), ()
    at, rest = there[0], [_key_name(keys[other]) for other in there[1:]]
    unused = f"; {' and '.join(rest)} not used (columns.label)" if rest else ""
    log.info("%s: labels are from %s%s", uri, _key_name(keys[at]), unused)
    stated = [row.labels[at] for row in rows]
    values = [None if isinstance(value, int) and value < 0 else value for value in stated]
    nothing = sum(value is None for value in values)
    if nothing:
        log.warning("%s: %s of %d without a label", uri, counted(nothing, "image"), len(rows))
    texts = [value for value in values if isinstance(value, str)]
    if not texts:
        return [v if isinstance(v, int) else NO_LABEL for v in values], ()
    if len(texts) + nothing < len(values):
        log.warning("%s: labels are numbers and text: all are taken as names", uri)
    names = tuple(sorted({str(value) for value in values if value is not None}))
    number = {name: label for label, name in enumerate(names)}
    return [NO_LABEL if value is None else number[str(value)] for value in values], names


def _key_name(key: str) -> str:
    return ".cls" if key == "cls" else f"{key} of .json"


class TarPiece(NamedTuple):
    """Images of one shard that lie together."""

    shard: TarShard
    images: tuple[TarImage, ...]

    def read(self) -> list[Item]:
        """Return the images, read in the order in which they lie.

        Raises:
            DataError: The shard cannot be read, or has changed.
        """
        shard, items, last = self.shard, [], ""
        try:
            with open_tar(shard.base, shard.path) as stream:
                for image in self.images:
                    last = image.name
                    stream.seek(image.offset)
                    encoded = stream.read(image.size)
                    if len(encoded) < image.size:
                        raise EOFError("cut short; it changed while it was in use")
                    path = f"{shard.name}/{image.name}"
                    items.append(Item(image.id, path, encoded, image.label, path))
        except BROKEN as error:
            why = one_line(error)
            raise DataError(f"{shard.path}: member {last!r} cannot be read: {why}") from error
        return items


@dataclass(frozen=True)
class TarTask:
    """Some images of tar shards, and the order in which they are stored."""

    pieces: tuple[TarPiece, ...]
    order: Int64s

    def read(self) -> Iterator[Item]:
        """Yield the images with the bytes as they are."""
        items = [item for piece in self.pieces for item in piece.read()]
        for at in self.order.tolist():
            yield items[at]
