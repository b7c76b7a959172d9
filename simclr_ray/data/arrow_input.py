"""A folder of Hugging Face `datasets` (`save_to_disk`) as an input of `prepare`.

It holds Arrow files, which `pyarrow` reads alone: `state.json` names them, and the metadata of
their schema, or `dataset_info.json`, the classes. A `DatasetDict` is a folder of such folders.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs

from simclr_ray.config.experiment import ColumnsConfig
from simclr_ray.data.arrays import Int64s
from simclr_ray.data.classes import NO_LABEL, LabelColumn
from simclr_ray.data.columns import check_images, find_label_column
from simclr_ray.data.contents import pieces_of_file, sample_digest
from simclr_ray.data.files import read_images
from simclr_ray.data.footer import Footer
from simclr_ray.data.items import Item, ShardTask, cut
from simclr_ray.data.splits import ask_for_split, usual_name
from simclr_ray.data.tables import without_views
from simclr_ray.errors import DataError, one_line
from simclr_ray.storage.filesystem import filesystem, info_of, is_local

MAX_PART_BYTES = 256 * 2**20  # a task holds its part to shuffle it
DICT_FILE, STATE_FILE, INFO_FILE = "dataset_dict.json", "state.json", "dataset_info.json"

log = logging.getLogger(__name__)


def find_arrow(uri: str, split: str) -> tuple[str, ...]:
    """Return the folder of a `save_to_disk` and its Arrow files, on its file system; else nothing.

    Args:
        uri: Path or URI.
        split: Which of a `DatasetDict`; empty: the only one.

    Raises:
        DataError: There is no such split, or several and none is named, or a file that says what
            there is cannot be read.
    """
    if "://" in uri and "{" in uri:  # of tar shards
        return ()
    fs, folder = filesystem(uri)
    splits = _read_json(fs, f"{folder}/{DICT_FILE}").get("splits")
    if isinstance(splits, list) and splits:
        same = {usual_name(str(name)): str(name) for name in splits}
        if not split and len(splits) > 1:
            raise DataError(ask_for_split(uri, {str(name): "" for name in splits}))
        chosen = split if split in splits else same.get(usual_name(split), "")
        if split and not chosen:
            raise DataError(f"{uri}: there is no split {split}; there are {', '.join(splits)}")
        folder = f"{folder}/{chosen or splits[0]}"
        split = ""
    state = _read_json(fs, f"{folder}/{STATE_FILE}").get("_data_files")
    if not isinstance(state, list):
        return ()
    if split:
        raise DataError(f"{uri} is one dataset, without splits: split={split} has no meaning")
    names = [str(entry["filename"]) for entry in state if isinstance(entry, dict)]
    return folder, *(f"{folder}/{name}" for name in names)


def _read_json(fs: pafs.FileSystem, path: str) -> dict[str, Any]:
    """Return a JSON object; an empty one where there is no such file."""
    if info_of(fs, path).type != pafs.FileType.File:
        return {}
    try:
        with fs.open_input_file(path) as stream:
            tree = json.loads(stream.read())
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {one_line(error)}") from error
    return tree if isinstance(tree, dict) else {}


@contextmanager
def _batches(base: str, path: str) -> Iterator[tuple[pa.Schema, Iterator[pa.RecordBatch]]]:
    """Give schema and batches of an Arrow file; a local one is mapped, not read."""
    fs, _ = filesystem(base)
    try:
        with pa.memory_map(path) if is_local(fs) else fs.open_input_file(path) as source:
            is_stream = source.read(6) != b"ARROW1"
            source.seek(0)
            if is_stream:  # as `datasets` writes them
                reader = pa.ipc.open_stream(source)
                yield reader.schema, iter(reader)
            else:
                file = pa.ipc.open_file(source)
                yield file.schema, (file.get_batch(i) for i in range(file.num_record_batches))
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path} cannot be read: {one_line(error)}") from error


def _footer(base: str, path: str, features: str) -> Footer:
    """Return what an Arrow file holds, as of a parquet file."""
    fs, _ = filesystem(base)
    with _batches(base, path) as (schema, batches):
        rows, nulls = [], np.zeros(len(schema), np.int64)
        for batch in batches:
            rows.append(batch.num_rows)
            nulls += [column.null_count for column in batch.columns]
    about = schema.metadata or {}
    if features and b"huggingface" not in about:
        schema = schema.with_metadata(about | {b"huggingface": features.encode()})
    empty = frozenset(n for n, nulls in zip(schema.names, nulls, strict=True) if nulls == sum(rows))
    size = fs.get_file_info(path).size
    digest = hashlib.sha256(repr((str(schema), size, rows)).encode()).hexdigest()[:16]
    return Footer(path, size, tuple(rows), schema, digest, empty.__contains__)


@dataclass(frozen=True)
class ArrowInput:
    """The rows of Arrow files, numbered in their order."""

    base: str
    files: tuple[str, ...]
    group_rows: tuple[tuple[int, ...], ...]  # of each file, of each batch
    image: str
    label: LabelColumn | None
    digest: str
    num_rows: int
    bytes_per_row: int

    @classmethod
    def open(
        cls, uri: str, arrow: Sequence[str], columns: ColumnsConfig, limit: int = 0
    ) -> ArrowInput:
        """Return the rows of what `find_arrow` found.

        Raises:
            DataError: There are none, a file is broken, or a column cannot serve.
        """
        fs, _ = filesystem(uri)
        folder, *files = arrow
        info = _read_json(fs, f"{folder}/{INFO_FILE}")
        features = json.dumps({"info": info}) if info else ""
        every = [_footer(uri, path, features) for path in files]
        footers = [footer for footer in every if any(footer.group_rows)]
        num_rows = sum(sum(footer.group_rows) for footer in footers)
        if not num_rows:
            raise DataError(f"{uri} holds no rows")
        columns = _image_column(uri, columns, footers[0])
        check_images(footers, columns.image)
        state = [(f.digest, f.path.rpartition("/")[2]) for f in every]
        sample = sample_digest([p for path in files for p in pieces_of_file(fs, path)])
        files = [footer.path for footer in footers]
        label, why = find_label_column(
            footers, columns, num_rows, lambda name: [_column(uri, path, name) for path in files]
        )
        if label is None:
            log.info("%s %s", uri, why)
        digest = hashlib.sha256(
            repr(state).encode()
            + json.dumps(_read_json(fs, f"{folder}/{STATE_FILE}"), sort_keys=True).encode()
            + repr((columns.image, label)).encode()
            + sample.encode()
        )
        rows = min(num_rows, limit) if limit else num_rows
        groups = tuple(footer.group_rows for footer in footers)
        size = sum(footer.size for footer in footers) // num_rows + 1
        return cls(uri, tuple(files), groups, columns.image, label, digest.hexdigest(), rows, size)

    @property
    def identity(self) -> dict[str, object]:
        """What the files say of themselves; where the folder lies does not matter."""
        return {"kind": "arrow", "n": self.num_rows, "listing": self.digest}

    @property
    def class_names(self) -> tuple[str, ...]:
        """As the dataset names them."""
        return self.label.names if self.label else ()

    def parts(self, rows_per_shard: int, seed: int) -> list[ShardTask]:
        """Return rows that lie together, files in shuffled order; each part is shuffled."""
        rng = np.random.default_rng(seed)
        count = max(min(rows_per_shard, MAX_PART_BYTES // self.bytes_per_row), 1)
        parts: list[ShardTask] = []
        ends = np.cumsum([sum(rows) for rows in self.group_rows])
        for file in rng.permutation(len(self.files)).tolist():
            first = int(ends[file]) - sum(self.group_rows[file])
            rows = np.arange(first, min(int(ends[file]), self.num_rows), dtype=np.int64)
            parts += [ArrowTask(self, file, first, rng.permutation(r)) for r in cut(rows, count)]
        return parts


@dataclass(frozen=True)
class ArrowTask:
    """Some rows of one Arrow file, in the order in which they are stored."""

    source: ArrowInput
    file: int
    first: int
    rows: Int64s

    def read(self) -> Iterator[Item]:
        """Yield the images with the bytes as they are."""
        source, path = self.source, self.source.files[self.file]
        fs, _ = filesystem(source.base)
        names = [source.image] + ([source.label.name] if source.label else [])
        low, high = int(self.rows.min()) - self.first, int(self.rows.max()) - self.first + 1
        table = _rows(source.base, path, names, low, high).take(self.rows - self.first - low)
        column = table.column(source.image)
        images = read_images(column, fs, path)
        labels = [NO_LABEL] * len(images)
        if source.label is not None:
            labels = source.label.read(table.column(source.label.name), self.file, path).tolist()
        for row, image, label, name in zip(
            self.rows.tolist(), images, labels, _paths(column), strict=True
        ):
            yield Item(row, name or f"row {row}", image, label, name or "")


def _paths(column: pa.ChunkedArray) -> list[str | None]:
    """Return which file each image was, where the column says it."""
    if not pa.types.is_struct(column.type) or column.type.get_field_index("path") < 0:
        return [None] * len(column)
    return cast("list[str | None]", pc.struct_field(column, "path").to_pylist())


def _rows(base: str, path: str, names: Sequence[str], low: int, high: int) -> pa.Table:
    """Return rows [low, high) of a file, one batch in memory at a time beside them."""
    kept, first = [], 0
    with _batches(base, path) as (schema, batches):
        for batch in batches:
            last = first + batch.num_rows
            if last > low and first < high:
                start = max(low - first, 0)
                kept.append(batch.select(list(names)).slice(start, min(high, last) - first - start))
            first = last
            if first >= high:
                break
        wanted = pa.schema([schema.field(name) for name in names])
        table = pa.Table.from_batches([b.cast(wanted) for b in kept], wanted)
    if table.num_rows < high - low:
        raise DataError(f"{path} changed while it was in use; start again")
    return without_views(table)


def _column(base: str, path: str, name: str) -> pa.ChunkedArray:
    with _batches(base, path) as (schema, batches):
        return pa.chunked_array([batch.column(name) for batch in batches], schema.field(name).type)


def _image_column(uri: str, columns: ColumnsConfig, footer: Footer) -> ColumnsConfig:
    """Return the columns with the one that is of type Image, where the usual name is none."""
    usual = ColumnsConfig().image
    if columns.image != usual or footer.type_of(usual) is not None:
        return columns
    try:
        features = cast("Any", json.loads(footer.about("huggingface")))["info"]["features"]
        images = [name for name, about in features.items() if about.get("_type") == "Image"]
    except (ValueError, LookupError, TypeError, AttributeError):
        return columns
    if len(images) != 1:
        return columns
    log.warning("%s: images are of column %r, the only one of them", uri, images[0])
    return columns.model_copy(update={"image": images[0]})
