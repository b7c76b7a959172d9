"""One shard of prepared images: written whole or not at all, and known again by its footer.

A shard carries in its own footer the plan that it belongs to, the rows that were rejected, and a
hash of the images in it. So a rerun can tell a finished shard from a foreign one by reading its
footer alone, and the fingerprint of the dataset follows the images, not only their sizes.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from simclr_ray.augment.decode import ImageError, image_size
from simclr_ray.config.wording import MIB
from simclr_ray.data.arrays import Int64s
from simclr_ray.data.classes import NO_LABEL
from simclr_ray.data.columns import GROUP_COLUMN, PATH_COLUMN
from simclr_ray.data.items import Item, ShardTask
from simclr_ray.errors import DataError
from simclr_ray.storage.filesystem import open_whole

SCHEMA_VERSION = 2  # 1 had no paths
MAX_GROUP_ROWS = 1000
# A reader holds a row group at a time: 32 MiB keeps two actors with windows of several small.
MAX_GROUP_BYTES = 32 * 2**20
# A group of images of one thing lies in one row group, which is larger where it must be: up to
MAX_IMAGES_OF_A_GROUP = 10_000
MAX_BYTES_OF_A_GROUP = 512 * 2**20
GroupKind = Literal["", "int64", "string"]  # how groups are named; empty: there are none
SCHEMA = pa.schema(
    [
        pa.field("id", pa.int64(), nullable=False),
        pa.field("image", pa.binary(), nullable=False),
        pa.field("label", pa.int64()),
        pa.field(PATH_COLUMN, pa.string()),
    ]
)


class Rejected(NamedTuple):
    """An image that was left out: its id, what a person may call it, and why."""

    id: int
    name: str
    reason: str


class SizeRange(NamedTuple):
    """Least and largest width and height of some images, in pixels."""

    least_width: int
    most_width: int
    least_height: int
    most_height: int

    def united(self, other: SizeRange | None) -> SizeRange:
        """Return the range of both."""
        if other is None:
            return self
        pairs = zip((min, max, min, max), self, other, strict=True)
        return SizeRange(*(choose(mine, theirs) for choose, mine, theirs in pairs))


class ShardReport(NamedTuple):
    """What came of one shard; `sizes` are None without images."""

    num_rows: int
    rejected: list[Rejected]
    sizes: SizeRange | None = None

    @property
    def num_seen(self) -> int:
        """How many images were looked at, good and bad."""
        return self.num_rows + len(self.rejected)


@dataclass(frozen=True)
class ShardPlan:
    """Everything that decides the content of one shard; picklable."""

    index: int
    part: ShardTask
    plan: str
    class_names: tuple[str, ...]
    max_pixels: int
    groups: GroupKind = ""

    @property
    def file_name(self) -> str:
        """Name of the finished file."""
        return shard_name(self.index)


def shard_name(index: int) -> str:
    """Return `part-00012.parquet` for 12."""
    return f"part-{index:05d}.parquet"


def write_shard(plan: ShardPlan, fs: pafs.FileSystem, folder: str) -> ShardReport:
    """Write one shard and return what came of it; until it is whole, its name does not exist.

    Raises:
        DataError: its source cannot be read, or a group is too large for a row group.
        OSError: it cannot be written.
    """
    metadata = {
        "schema_version": str(SCHEMA_VERSION),
        "class_names": json.dumps(list(plan.class_names)) if plan.class_names else "",
        "plan": plan.plan,
        "shard": str(plan.index),
    }
    schema = schema_of(plan.groups)
    with (
        open_whole(fs, f"{folder}/{plan.file_name}") as stream,
        pq.ParquetWriter(
            stream,
            schema.with_metadata(metadata),
            compression={name: "none" if name == "image" else "snappy" for name in schema.names},
            use_dictionary=["label"],
            write_statistics=["id", "label"],
        ) as writer,
    ):
        groups = _Groups(writer, schema)
        for item in plan.part.read():
            groups.add(item, plan.max_pixels)
        groups.finish()
        writer.add_key_value_metadata(
            {
                "rejected": json.dumps(groups.rejected),
                "content": groups.content.hexdigest(),
                "sizes": json.dumps(groups.sizes),
            }
        )
    return ShardReport(groups.num_rows, groups.rejected, groups.sizes)


def schema_of(groups: GroupKind) -> pa.Schema:
    """Return the columns of a shard."""
    if not groups:
        return SCHEMA
    return SCHEMA.append(pa.field(GROUP_COLUMN, pa.int64() if groups == "int64" else pa.string()))


def check_group_sizes(groups: Int64s) -> None:
    """Raise `DataError` where a group of rows, int64 [m], has more than a row group may hold."""
    most = int(np.bincount(groups).max())
    if most > MAX_IMAGES_OF_A_GROUP:
        raise DataError(_too_large(f"of {most:,} images"))


def _too_large(group: str) -> str:
    """Return the sentence that refuses a group."""
    return (
        f"group {group} has more than {MAX_IMAGES_OF_A_GROUP:,} images or "
        f"{MAX_BYTES_OF_A_GROUP // MIB} MiB; a group lies in one row group, which is read whole: "
        "name a column of smaller groups"
    )


def read_report(fs: pafs.FileSystem, path: str, plan: str) -> ShardReport | None:
    """Return the report of a finished shard of this plan, None for any other file."""
    try:
        with fs.open_input_file(path) as stream:
            metadata = pq.read_metadata(stream)
    except (OSError, pa.ArrowException):
        return None
    entries = metadata.metadata or {}
    if entries.get(b"plan", b"") != plan.encode() or b"rejected" not in entries:
        return None
    try:
        rejected = [Rejected(*row) for row in json.loads(entries[b"rejected"])]
        bounds = json.loads(entries.get(b"sizes", b"null"))  # of shards before there was this: none
        sizes = SizeRange(*map(int, bounds)) if bounds else None
    except (ValueError, TypeError, OverflowError, RecursionError):  # of a broken disk
        return None
    return ShardReport(metadata.num_rows, rejected, sizes)


@dataclass
class _Groups:
    """Collects rows and writes them as row groups of bounded rows and bytes.

    Images of one thing, which come one after the other, are never parted.
    """

    writer: pq.ParquetWriter
    schema: pa.Schema
    num_rows: int = 0
    rejected: list[Rejected] = field(default_factory=list)
    sizes: SizeRange | None = None
    content: hashlib._Hash = field(default_factory=hashlib.sha256)
    _items: list[Item] = field(default_factory=list)
    _bytes: int = 0
    _open: list[Item] = field(default_factory=list)  # of the group that has begun
    _open_bytes: int = 0

    def add(self, item: Item, max_pixels: int) -> None:
        """Keep one good item, or note one bad."""
        try:
            size = _size(item, max_pixels)
        except ImageError as error:
            self.rejected.append(Rejected(item.id, item.name, str(error)))
            return
        assert item.encoded is not None
        self.sizes = size.united(self.sizes)
        if self._open and (item.group is None or item.group != self._open[-1].group):
            self._close()
        self._open.append(item)
        self._open_bytes += len(item.encoded)
        self.content.update(item.encoded)
        if len(self._open) > MAX_IMAGES_OF_A_GROUP or (
            len(self._open) > 1 and self._open_bytes > MAX_BYTES_OF_A_GROUP
        ):
            raise DataError(_too_large(f"{item.group!r}"))

    def finish(self) -> None:
        """Write what is left."""
        self._close()
        self._flush()

    def _close(self) -> None:
        """Add the images of the group that has ended."""
        if self._items and (
            len(self._items) + len(self._open) > MAX_GROUP_ROWS
            or self._bytes + self._open_bytes > MAX_GROUP_BYTES
        ):
            self._flush()
        self._items += self._open
        self._bytes += self._open_bytes
        self._open, self._open_bytes = [], 0

    def _flush(self) -> None:
        """Write what is collected as one row group."""
        if not self._items:
            return
        labels = [None if i.label == NO_LABEL else i.label for i in self._items]
        columns = [
            pa.array([i.id for i in self._items], pa.int64()),
            pa.array([i.encoded for i in self._items], pa.binary()),
            pa.array(labels, pa.int64()),
            pa.array([i.path or None for i in self._items], pa.string()),
        ]
        if GROUP_COLUMN in self.schema.names:
            kind = self.schema.field(GROUP_COLUMN).type
            columns.append(pa.array([i.group for i in self._items], kind))
        self.writer.write_table(pa.Table.from_arrays(columns, schema=self.schema), len(self._items))
        self.num_rows += len(self._items)
        self._items, self._bytes = [], 0


def _size(item: Item, max_pixels: int) -> SizeRange:
    """Return the size of an item's image.

    Raises:
        ImageError: It cannot be stored.
    """
    if item.encoded is None:
        raise ImageError("no image")
    height, width = image_size(item.encoded, max_pixels)
    return SizeRange(width, width, height, height)
