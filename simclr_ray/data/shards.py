"""One shard of prepared images: written whole or not at all, and known again by its footer.

A shard carries in its own footer the plan that it belongs to, the rows that were rejected, and a
hash of the images in it. So a rerun can tell a finished shard from a foreign one by reading its
footer alone, and the fingerprint of the dataset follows the images, not only their sizes.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import NamedTuple

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from simclr_ray.augment.decode import ImageError, image_size
from simclr_ray.data.classes import NO_LABEL
from simclr_ray.data.columns import PATH_COLUMN
from simclr_ray.data.items import Item, ShardTask
from simclr_ray.storage.filesystem import open_whole

SCHEMA_VERSION = 2  # 1 had no paths
MAX_GROUP_ROWS = 1000
# A reader holds a row group at a time: 32 MiB keeps two actors with windows of several small.
MAX_GROUP_BYTES = 32 * 2**20
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
        DataError: its source cannot be read.
        OSError: it cannot be written.
    """
    metadata = {
        "schema_version": str(SCHEMA_VERSION),
        "class_names": json.dumps(list(plan.class_names)) if plan.class_names else "",
        "plan": plan.plan,
        "shard": str(plan.index),
    }
    with (
        open_whole(fs, f"{folder}/{plan.file_name}") as stream,
        pq.ParquetWriter(
            stream,
            SCHEMA.with_metadata(metadata),
            compression={name: "none" if name == "image" else "snappy" for name in SCHEMA.names},
            use_dictionary=["label"],
            write_statistics=["id", "label"],
        ) as writer,
    ):
        groups = _Groups(writer)
        for item in plan.part.read():
            groups.add(item, plan.max_pixels)
        groups.flush()
        writer.add_key_value_metadata(
            {
                "rejected": json.dumps(groups.rejected),
                "content": groups.content.hexdigest(),
                "sizes": json.dumps(groups.sizes),
            }
        )
    return ShardReport(groups.num_rows, groups.rejected, groups.sizes)


def read_report(fs: pafs.FileSystem, path: str, plan: str) -> ShardReport | None:
    """Return the report of a finished shard of this plan, None for any other file."""
    try:
        with fs.open_input_file(path) as stream:
            metadata = pq.read_metadata(stream)
    except (OSError, pa.ArrowException):
        return None
    entries = metadata.metadata or {}
    if entries.get(b"plan", b"").decode() != plan or b"rejected" not in entries:
        return None
    rejected = [Rejected(*row) for row in json.loads(entries[b"rejected"])]
    sizes = json.loads(entries.get(b"sizes", b"null"))  # of shards before there was this: none
    return ShardReport(metadata.num_rows, rejected, SizeRange(*sizes) if sizes else None)


@dataclass
class _Groups:
    """Collects rows and writes them as row groups of bounded rows and bytes."""

    writer: pq.ParquetWriter
    num_rows: int = 0
    rejected: list[Rejected] = field(default_factory=list)
    sizes: SizeRange | None = None
    content: hashlib._Hash = field(default_factory=hashlib.sha256)
    _items: list[Item] = field(default_factory=list)
    _bytes: int = 0

    def add(self, item: Item, max_pixels: int) -> None:
        """Keep one good item, or note one bad."""
        try:
            size = _size(item, max_pixels)
        except ImageError as error:
            self.rejected.append(Rejected(item.id, item.name, str(error)))
            return
        assert item.encoded is not None
        self.sizes = size.united(self.sizes)
        if len(self._items) >= MAX_GROUP_ROWS or (
            self._items and self._bytes + len(item.encoded) > MAX_GROUP_BYTES
        ):
            self.flush()
        self._items.append(item)
        self._bytes += len(item.encoded)
        self.content.update(item.encoded)

    def flush(self) -> None:
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
        self.writer.write_table(pa.Table.from_arrays(columns, schema=SCHEMA), MAX_GROUP_ROWS)
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
