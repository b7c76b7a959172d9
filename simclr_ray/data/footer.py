"""The footers of parquet files: what each file holds, or one sentence on why it cannot be used."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple, cast

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from simclr_ray import config as cfg
from simclr_ray.config import nearest
from simclr_ray.config.column_keys import column_key
from simclr_ray.config.experiment import ColumnsConfig
from simclr_ray.data.classes import is_text
from simclr_ray.data.contents import Sampled, sample_named_files
from simclr_ray.data.listing import REMOTE_THREADS, Listed
from simclr_ray.errors import DataError, one_line
from simclr_ray.storage.filesystem import filesystem, is_local

INDEX = "_labels.parquet"  # of a prepared set: ids, labels and groups of all rows, in order
MANIFEST = "_manifest.json"
MAGIC = b"PAR1"
# The footer's length (4 bytes, little endian) and the magic number end every file.
TAIL_BYTES = 8
ROWS_AT_ONCE, BYTES_AT_ONCE = 1024, 64 * 1024
BYTES_OF_NAMES = 1024  # of a row, all columns: with more it holds an image, and is not read to see
# Keys of the metadata of a list of images that lie elsewhere (`folder_input.index_folder`): where,
# their bytes, and a hash of their names, sizes and a sample of what they hold.
IMAGE_ROOT, IMAGE_BYTES, IMAGE_LISTING = "image_root", "image_bytes", "image_listing"


class RowGroup(NamedTuple):
    """A row group, or a slice of one: its place in its file, and which rows of the dataset it has.

    Attributes:
        file: Number of the file.
        group: Number of the file's row group.
        first_row: Of the dataset.
        num_rows: From there on.
        offset: Of the first row in the file's row group.
    """

    file: int
    group: int
    first_row: int
    num_rows: int
    offset: int = 0


class FolderValue(NamedTuple):
    """What the name of a folder says of all rows in it: of `label=cat`, the label.

    Attributes:
        name: Of the column.
        value: None: null.
        is_text: Whether the column is of text; else it is of integers.
    """

    name: str
    value: int | str | None
    is_text: bool

    @property
    def kind(self) -> pa.DataType:
        """The type of the column."""
        return pa.string() if self.is_text else pa.int64()


@dataclass(frozen=True)
class Footer:
    """What the footer of one file says.

    `digest` is a hash of its bytes; `is_empty` says of a column, or a field of one (`image.bytes`),
    whether its every value is null. `group_bytes` are those of row groups in memory, all columns.
    `folder_values` are the columns of the schema that stand in names of folders.
    """

    path: str
    size: int
    group_rows: tuple[int, ...]
    schema: pa.Schema
    digest: str
    is_empty: Callable[[str], bool]
    group_bytes: tuple[int, ...] = ()
    folder_values: tuple[FolderValue, ...] = ()

    @property
    def num_bytes(self) -> int:
        """Bytes of all rows, images that are named by path included where the file says so."""
        text = self.about(IMAGE_BYTES)
        return self.size + (int(text) if text.isdigit() else 0)

    @property
    def image_root(self) -> str:
        """Folder of images that are named by path: from the file's own, or a URI; else empty."""
        return self.about(IMAGE_ROOT)

    @property
    def is_thin(self) -> bool:
        """Whether its rows are so few bytes that they may be names alone.

        Of all columns: of one of a damaged footer Arrow 25 ends the process when it is asked.
        """
        return sum(self.group_bytes) <= BYTES_OF_NAMES * (sum(self.group_rows) + 1)

    def identity(self, root: str) -> list[object]:
        """Return what decides the rows: of a list the listing, wherever list and images lie."""
        listing = self.about(IMAGE_LISTING)
        if listing:
            return [listing, self.num_bytes - self.size, self.group_rows]
        return [self.path.removeprefix(root), self.size, self.group_rows, self.digest]

    def about(self, key: str) -> str:
        """Return an entry of the file's metadata; empty where there is none."""
        value: bytes = (self.schema.metadata or {}).get(key.encode(), b"")
        return value.decode("utf-8", "replace")

    def type_of(self, column: str) -> pa.DataType | None:
        """Return the type of a column, None where there is none of that name."""
        at = self.schema.get_field_index(column)
        return None if at < 0 else self.schema.field(at).type

    def lacks(self, column: str, role: str) -> str:
        """Return the sentence that column `column` is missing, with the columns that there are."""
        names = self.schema.names
        return (
            f"{self.path} has no {role} column {column!r}{nearest(column, names)}; "
            f"its columns: {', '.join(names) or 'none'}; "
            f"name the right one with {column_key(role)}=..."
        )

    def class_names(self, label: str) -> tuple[str, ...]:
        """Return the names of the classes in label order, as the file's metadata has them.

        Understood are the key `class_names` (a JSON list, or names with commas between) and the
        features that Hugging Face `datasets` writes. Empty when there is nothing of the kind.
        """
        text = self.about("class_names").strip()
        if text.startswith("["):
            listed = _json(text)
            return tuple(str(name) for name in listed) if isinstance(listed, list) else ()
        if text:
            return tuple(name.strip() for name in text.split(","))
        features = _json(self.about("huggingface") or "{}")
        for key in ("info", "features", label, "names"):
            features = features.get(key) if isinstance(features, dict) else None
        return tuple(str(name) for name in features) if isinstance(features, list) else ()


def read_footers(fs: pafs.FileSystem, files: Sequence[Listed]) -> list[Footer]:
    """Return the footer of each file, in order; a bucket is asked for many at a time.

    Raises:
        DataError: a file is empty, cut short, no parquet, or cannot be read.
    """
    if is_local(fs) or len(files) == 1:
        return [read_footer(fs, file) for file in files]
    with ThreadPoolExecutor(REMOTE_THREADS) as pool:
        return list(pool.map(lambda file: read_footer(fs, file), files))


def read_footer(fs: pafs.FileSystem, file: Listed) -> Footer:
    """Return the footer of one file.

    Raises:
        DataError: the file is empty, cut short, no parquet, or cannot be read.
    """
    try:
        with fs.open_input_file(file.path) as stream:
            raw = _footer_bytes(stream, file)
            stream.seek(0)
            parquet = pq.ParquetFile(stream)
            metadata, schema = parquet.metadata, parquet.schema_arrow
    except (OSError, pa.ArrowException, UnicodeError) as error:
        raise DataError(f"{file.path} cannot be read: {one_line(error)}") from error
    parts = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    groups = tuple(part.num_rows for part in parts)
    digest = hashlib.sha256(raw).hexdigest()[:16]
    is_empty = functools.cache(functools.partial(_holds_nulls_only, fs, file.path, schema))
    sizes = tuple(part.total_byte_size for part in parts)
    return Footer(file.path, file.size, groups, schema, digest, is_empty, sizes)


def fingerprint_of(
    footers: Sequence[Footer], root: str, columns: ColumnsConfig, limit: int, contents: str
) -> str:
    """Return 16 hex digits over all that decides the rows; where the folder lies does not.

    Sizes and footers stand for the contents: a footer holds the offsets and statistics of every
    chunk, and reading the images to hash them would cost as much as an epoch.

    Args:
        footers: Of all files.
        root: Where they lie.
        columns: Which column holds what.
        limit: Rows that count; 0: all.
        contents: Digest of a sample of the files that rows name (`sampled_files`).
    """
    if len(footers) == 1 and footers[0].path == root:
        root = root.rpartition("/")[0]
    elif not footers[0].path.startswith(root):  # FOLDER#SPLIT
        root = root.rpartition("#")[0]
    roles = cfg.to_tree(columns)
    del roles["group"]  # groups choose pairs of the rows, and no rows
    tree = {
        "files": [footer.identity(root) for footer in footers],
        "columns": roles,
        "limit": limit,
    }
    if contents:
        tree["contents"] = contents
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:16]


def sampled_files(
    footers: Sequence[Footer], fs: pafs.FileSystem, column: str, limit: int
) -> Sampled:
    """Return a sample of the files that rows name; empty where no row does, or a listing has it.

    Raises:
        DataError: A list of files cannot be read.
    """
    groups = [
        (footers[group.file].path, group.group, group.num_rows)
        for group in row_groups_of(footers, limit)
        if _is_unlisted(footers[group.file], column)
    ]
    if not groups:
        return Sampled("", 0)
    return sample_named_files(groups, fs, column, footers[0].image_root)


def bytes_of_rows(footers: Sequence[Footer], column: str, sampled: Sampled) -> float:
    """Return the bytes of a row on average, those of the files that rows name included."""
    num_bytes = sum(footer.num_bytes for footer in footers)
    naming = sum(sum(f.group_rows) for f in footers if _is_unlisted(f, column))
    num_rows = sum(sum(footer.group_rows) for footer in footers)
    return (num_bytes + naming * sampled.mean_bytes) / num_rows


def names_files(footer: Footer, column: str) -> bool:
    """Return whether images are files of their own: by text, or by a struct that holds no bytes.

    Raises:
        DataError: The file cannot be read.
    """
    kind = footer.type_of(column)
    if kind is None or not pa.types.is_struct(kind):
        return is_text(kind)
    fields = {field.name: field.type for field in kind}
    if not is_text(fields.get("path")) or "bytes" not in fields:
        return is_text(fields.get("path"))
    return footer.is_thin and footer.is_empty(f"{column}.bytes")


def all_name_files(footers: Sequence[Footer], column: str) -> bool:
    """Return whether images are files of their own in all files that have any."""
    typed = [f for f in footers if (kind := f.type_of(column)) is None or kind != pa.null()]
    return all(names_files(footer, column) for footer in typed)


def _is_unlisted(footer: Footer, column: str) -> bool:
    """Return whether rows name files; the list of a folder has their sample in its listing."""
    return names_files(footer, column) and not footer.about(IMAGE_LISTING)


def find_index(
    fs: pafs.FileSystem, root: str, footers: Sequence[Footer], columns: ColumnsConfig
) -> str:
    """Return the file with ids and labels of a prepared set, unless its manifest says otherwise."""
    usual = ColumnsConfig()
    if (columns.id, columns.label) != (usual.id, usual.label):
        return ""
    try:
        with fs.open_input_file(f"{root}/{MANIFEST}") as stream:
            manifest = json.loads(stream.read())
    except (OSError, ValueError):
        return ""
    if not isinstance(manifest, dict) or not manifest.get("has_index"):
        return ""
    contents = sampled_files(footers, fs, usual.image, 0).digest
    whole = fingerprint_of(footers, root, usual, 0, contents)
    return f"{root}/{INDEX}" if manifest.get("fingerprint") == whole else ""


def _footer_bytes(stream: pa.NativeFile, file: Listed) -> bytes:
    if file.size == 0:
        raise DataError(f"{file.path} is empty: 0 bytes")
    if file.size < len(MAGIC) + TAIL_BYTES or stream.read(len(MAGIC)) != MAGIC:
        raise DataError(f"{file.path} is no parquet file")
    stream.seek(file.size - TAIL_BYTES)
    tail = stream.read(TAIL_BYTES)
    length = int.from_bytes(tail[:4], "little")
    if tail[4:] != MAGIC or length + TAIL_BYTES > file.size:
        raise DataError(f"{file.path} is truncated: it begins as parquet but has no footer")
    stream.seek(file.size - TAIL_BYTES - length)
    raw: bytes = stream.read(length)
    return raw


def _holds_nulls_only(fs: pafs.FileSystem, path: str, schema: pa.Schema, name: str) -> bool:
    """Return whether a file has a column or field, and only nulls in it; read to its first value.

    Statistics would say it without reading, where there are some; but of a broken footer Arrow 25
    ends the process when it is asked for them.
    """
    at = schema.get_field_index(name)
    column, _, field = ("", "", "") if at >= 0 else name.rpartition(".")
    if at < 0 and schema.get_field_index(column) < 0:
        return False
    if at >= 0 and pa.types.is_null(schema.field(at).type):
        return True
    try:
        with fs.open_input_file(path) as stream:
            file = pq.ParquetFile(stream, buffer_size=BYTES_AT_ONCE)  # else chunks are read whole
            batches = file.iter_batches(ROWS_AT_ONCE, columns=[name])
            parts = (b.column(0).field(field) if field else b.column(0) for b in batches)
            return all(part.null_count == len(part) for part in parts)
    except (OSError, pa.ArrowException, UnicodeError) as error:
        raise DataError(f"{path} cannot be read: {one_line(error)}") from error


def _json(text: str) -> object:
    try:
        return cast("object", json.loads(text))
    except ValueError:
        return None


@functools.lru_cache(maxsize=16_384)  # files; of each some kilobytes, and 64 to read it again
def cached_footer(uri: str, path: str, fingerprint: str) -> pq.FileMetaData:
    """Return a footer, kept per process: row groups of one file are read many times."""
    del fingerprint  # only part of the key: a changed dataset must not meet an old footer
    fs, _ = filesystem(uri)
    with fs.open_input_file(path) as stream:
        return pq.read_metadata(stream)


def row_groups_of(footers: Sequence[Footer], limit: int = 0) -> tuple[RowGroup, ...]:
    """Return the row groups of files, in order; `limit` keeps the first rows only."""
    groups: list[RowGroup] = []
    first_row = 0
    for file, footer in enumerate(footers):
        for group, num_rows in enumerate(footer.group_rows):
            kept = min(num_rows, limit - first_row) if limit else num_rows
            if kept > 0:
                groups.append(RowGroup(file, group, first_row, kept))
                first_row += kept
    return tuple(groups)
