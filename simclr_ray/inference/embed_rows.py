"""Embeddings of a whole dataset, as parquet: by all devices of the cluster, resumed midway."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs

from simclr_ray.config.experiment import ColumnsConfig
from simclr_ray.data.classes import Int64s, is_text
from simclr_ray.data.files import states_of_files
from simclr_ray.data.folder_input import index_files, index_folder
from simclr_ray.data.footer import cached_footer
from simclr_ray.data.listing import all_parquet
from simclr_ray.data.source import Source
from simclr_ray.distributed.ray_cluster import connect
from simclr_ray.errors import ConfigError, ConfigIssue, DataError
from simclr_ray.evaluation.ray_features import (
    ERROR,
    ID,
    PATH,
    ROW,
    Encoding,
    devices_of_cluster,
    features_of,
    kept_column,
    stream,
)
from simclr_ray.inference.embed import load_encoder
from simclr_ray.inference.embedding_file import Embedded, EmbeddingFile, Parts, are_embeddings
from simclr_ray.inference.encoder import Encoder
from simclr_ray.storage.filesystem import filesystem, info_of

EMBEDDING: Final = "embedding"
FIRST_ROWS, MOST_ROWS = 64, 512  # of a piece: the first are small, so that some come early
GROUP_BYTES: Final = 64 * 2**20  # row groups of more are not read in several pieces
DType = Literal["float32", "float16"]
OnProgress = Callable[[int, int], None]


class _Layout(NamedTuple):
    """The columns of a file of embeddings.

    Attributes:
        key: Says which image a row is.
        width: F.
        keep: Are handed on.
        dtype: Of the embeddings.
    """

    key: str
    width: int
    keep: Sequence[str]
    dtype: DType

    def of(self, table: pa.Table) -> pa.Table:
        """Return what is stored of a piece; NaN where there is no image.

        Arrow writes fixed-size lists that are null to parquet, and cannot read them again (25.0).
        """
        good = np.array([reason is None for reason in table[ERROR].to_pylist()])
        rows = np.full((len(good), self.width), np.nan, np.dtype(self.dtype))
        if good.any():
            rows[good] = features_of(table)
        return pa.table(
            {
                self.key: table[self.key],
                **{column: table[kept_column(column)] for column in self.keep},
                EMBEDDING: pa.FixedSizeListArray.from_arrays(
                    pa.array(rows.reshape(-1)), self.width
                ),
                ERROR: table[ERROR],
            }
        )


def embed_rows(
    model: str | Path,
    where: str | Sequence[str],
    out: str,
    *,
    columns: ColumnsConfig | None = None,
    keep: Sequence[str] = (),
    dtype: DType = "float32",
    batch_size: int = 256,
    tracking_uri: str = "",
    overwrite: bool = False,
    on_progress: OnProgress | None = None,
) -> Embedded:
    """Write the embedding of each image of a dataset, in its order, as a parquet file.

    Its columns are `path`, `id`, or `row`, the number, where rows have neither; those of `keep`;
    `embedding`, a list of F numbers, NaN where there is no image; and `error`, why. A run that was
    ended goes on where it stood; what is finished is not made again.

    Args:
        model: As in `load_encoder`.
        where: Parquet, or a folder of parquet or of images, by path or URI; or image files.
        out: The file, by path or URI.
        columns: Which columns of parquet hold what.
        keep: Columns of parquet that are handed on.
        dtype: Of the numbers.
        batch_size: Images per forward pass.
        tracking_uri: As in `load_encoder`.
        overwrite: Also where `out` holds other embeddings, or other data.
        on_progress: Gets the rows that are done, and of how many.

    Raises:
        ConfigError: As in `load_encoder`, or a column of `keep` is not there.
        CheckpointError: As in `load_encoder`.
        TrackingError: As in `load_encoder`.
        DataError: The images cannot be read, none of them is an image, or `out` cannot be written
            or holds something else.
        StorageError: The disk takes no more; the same call goes on.
        ClusterError: No cluster answers or starts, or its actors fail.

    Example:
        >>> made = embed_rows("runs/photos-1a2b3c4d", "photos", "photos.parquet")
        >>> pq.read_table("photos.parquet").column_names
        ['path', 'embedding', 'error']
    """
    encoder, file = load_encoder(model, tracking_uri=tracking_uri), EmbeddingFile(out)
    stored = file.digest(overwrite=overwrite)
    with file.place():
        source = open_rows(where, file, columns)
        check_columns(source, keep)
        identity = _identity(encoder, source, keep, dtype, batch_size)
        digest = hashlib.sha256(identity.encode()).hexdigest()[:12]
        if stored not in ("", digest) and not overwrite:
            raise file.taken("embeddings by another model or settings, or of other images")
    if stored == digest:
        file.clear()  # of a run that was ended at the very end
        return file.summary()
    pieces, parts = cut_pieces(source), file.parts(digest)
    encoding = Encoding(
        [encoder.network], encoder.size, encoder.decoder, batch_size, keep=tuple(keep)
    )
    layout = _Layout(key_of(source), encoder.feature_dim, encoding.keep, dtype)
    _embed_missing(source, pieces, parts, encoding, layout, on_progress or (lambda *_: None))
    _check_any(source, parts, len(pieces))
    file.write(parts, len(pieces), digest)
    return file.summary()


def open_rows(
    where: str | Sequence[str], file: EmbeddingFile, columns: ColumnsConfig | None = None
) -> Source:
    """Return the images of a dataset, of a folder, or of files, as rows.

    Of what is no parquet a list is written beside the file, where all nodes see it. Files of
    embeddings among images are not in the way.

    Raises:
        DataError: There are none, or they cannot be read, or the file is to lie among parquet.
    """
    if not isinstance(where, str):
        return Source.open(index_files(where, file.lists), columns)
    fs, root = filesystem(where)
    if info_of(fs, root).type == pafs.FileType.Directory:
        paths = [listed.path for listed in all_parquet(fs, root, where).files]
        if are_embeddings(fs, paths):
            return Source.open(index_folder(where, file.lists), columns)
        if fs.equals(file.fs) and file.path.startswith(f"{root.rstrip('/')}/"):
            raise DataError(f"{file.uri} lies in the dataset {where}; write it beside that")
    source = Source.open(where, columns)
    if fs.equals(file.fs) and file.path in source.files:
        raise DataError(f"{file.uri} holds the images themselves; choose another file")
    return source


def check_columns(source: Source, keep: Sequence[str]) -> None:
    """Raise `ConfigError` for columns that cannot be handed on."""
    if not keep:
        return
    schemas = [schema_of(source, path) for path in source.files]
    names, taken = schemas[0].names, {key_of(source), EMBEDDING, ERROR}
    issues = []
    for name in keep:
        if name in taken:
            problem = "is written anyway, or would take the place of one that is"
            issues.append(ConfigIssue("--keep", f"{name!r} {problem}"))
        elif name not in names:
            problem = f"there is no column {name!r}; the columns: {', '.join(names)}"
            issues.append(ConfigIssue("--keep", problem))
        else:
            kinds = [
                schema.field(name).type if name in schema.names else None for schema in schemas
            ]
            other = next((i for i, kind in enumerate(kinds) if kind != kinds[0]), 0)
            if other:
                problem = (
                    f"{name!r} is {kinds[0]} in {source.files[0]}, and in {source.files[other]}"
                )
                issues.append(ConfigIssue("--keep", f"{problem} {kinds[other] or 'not there'}"))
    if issues:
        raise ConfigError(issues)


def schema_of(source: Source, path: str) -> pa.Schema:
    """Return the schema of a file of a dataset."""
    return cached_footer(source.uri, path, source.fingerprint).schema.to_arrow_schema()


def cut_pieces(source: Source) -> list[Int64s]:
    """Return the rows of a dataset in their order, in pieces of one row group each.

    The first are small. A row group that is large is one piece: to read it again costs more.
    """
    pieces, most = [], FIRST_ROWS
    for group in source.row_groups:
        rows = group.first_row + np.arange(group.num_rows, dtype=np.int64)
        first = 0
        while first < len(rows):
            whole = source.row_bytes * group.num_rows > GROUP_BYTES
            last = len(rows) if whole else min(len(rows), first + most)
            pieces.append(rows[first:last])
            first, most = last, min(2 * most, MOST_ROWS)
    return pieces


def _embed_missing(
    source: Source,
    pieces: Sequence[Int64s],
    parts: Parts,
    encoding: Encoding,
    layout: _Layout,
    on_progress: OnProgress,
) -> None:
    """Write the pieces that are not there yet."""
    missing = parts.missing(len(pieces))
    num_done = source.num_rows - sum(len(pieces[i]) for i in missing)
    on_progress(num_done, source.num_rows)
    if not missing:
        return
    connect()
    actors = devices_of_cluster()
    parts.make()  # after all that can be refused
    tables = stream(source, [pieces[i] for i in missing], encoding, actors)
    for index, table in zip(missing, tables, strict=True):
        parts.put(index, layout.of(table))
        num_done += table.num_rows
        on_progress(num_done, source.num_rows)


def _check_any(source: Source, parts: Parts, num: int) -> None:
    """Raise `DataError` where no row has an embedding, and forget the pieces."""
    reason = ""
    for index in range(num):
        for why in parts.read(index)[ERROR].to_pylist():
            if why is None:
                return
            reason = reason or why
    parts.file.clear()
    raise DataError(f"none of {source.num_rows} rows is an image: {reason}")


def key_of(source: Source) -> str:
    """Return the column that says which image a row is."""
    if source.has_paths:
        return PATH
    return ID if source.has_ids else ROW


def _identity(
    encoder: Encoder, source: Source, keep: Sequence[str], dtype: str, batch_size: int
) -> str:
    """Return all that decides the file, as text."""
    weights, files = hashlib.sha256(), hashlib.sha256()
    for name, tensor in encoder.network.state_dict().items():
        weights.update(name.encode())
        weights.update(tensor.contiguous().numpy().tobytes())
    for state in _files_of(source):
        files.update(state.encode(errors="surrogateescape"))
    return json.dumps(
        {
            "encoder": [encoder.config, weights.hexdigest(), encoder.size],
            "decoder": list(encoder.decoder),
            "images": [source.fingerprint, source.num_rows, files.hexdigest()],
            "keep": list(keep),
            "dtype": dtype,
            "batch_size": batch_size,
        }
    )


def _files_of(source: Source) -> Iterator[str]:
    """Yield place and state of each image that is a file of its own: a list says only its name."""
    fs, _ = filesystem(source.uri)
    name = source.columns.image
    if not is_text(schema_of(source, source.files[0]).field(name).type):
        return
    for column, group in zip(source.read_columns(name), source.row_groups, strict=True):
        yield from states_of_files(column, fs, source.files[group.file], source.image_root)
