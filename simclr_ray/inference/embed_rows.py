"""Embeddings of a whole dataset, as parquet: by all devices of the cluster, resumed where it stood.

While it is made there is a folder OUT.parts-DIGEST with a file a piece of the rows, each whole or
not there; DIGEST is of the encoder, the images and the settings. At the end the pieces become OUT,
one after the other, and the folder goes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from simclr_ray.config.experiment import ColumnsConfig
from simclr_ray.data.classes import Int64s
from simclr_ray.data.columns import PATH_COLUMN
from simclr_ray.data.folder_input import index_folder
from simclr_ray.data.footer import IMAGE_BYTES, IMAGE_LISTING, IMAGE_ROOT
from simclr_ray.data.listing import list_parquet
from simclr_ray.data.source import Source
from simclr_ray.distributed.ray_cluster import connect
from simclr_ray.errors import ConfigError, ConfigIssue, DataError
from simclr_ray.evaluation.ray_features import (
    ERROR,
    ID,
    PATH,
    Encoding,
    devices_of_cluster,
    features_of,
    kept_column,
    stream,
)
from simclr_ray.inference.embed import load_encoder
from simclr_ray.inference.encoder import Encoder
from simclr_ray.storage.filesystem import (
    entries_in,
    filesystem,
    info_of,
    open_whole,
)

EMBEDDING: Final = "embedding"
IDENTITY: Final = b"simclr_ray.embeddings"
FIRST_ROWS, MOST_ROWS = 64, 512  # of a piece: the first are small, so that some come early
GROUP_BYTES: Final = 64 * 2**20  # row groups of more are not read in several pieces
DType = Literal["float32", "float16"]
OnProgress = Callable[[int, int], None]


class Embedded(NamedTuple):
    """What was written.

    Attributes:
        num_rows: Rows of the file, bad ones included.
        num_bad: Of them without an embedding.
        first_bad: Path or id, and reason, of some of those.
    """

    num_rows: int
    num_bad: int
    first_bad: list[tuple[str, str]]


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

    Its columns are `path`, or `id` where no row says its file; those of `keep`; `embedding`, a list
    of F numbers, NaN where there is no image; and `error`, why. A run that was ended goes on where
    it stood; what is finished is not made again.

    Args:
        model: As in `load_encoder`.
        where: Parquet, or a folder of parquet or of images, by path or URI; or image files.
        out: The file, by path or URI.
        columns: Which columns of parquet hold what.
        keep: Columns of parquet that are handed on.
        dtype: Of the numbers.
        batch_size: Images per forward pass.
        tracking_uri: As in `load_encoder`.
        overwrite: Also where `out` holds other embeddings.
        on_progress: Is told the rows that are done, and of how many.

    Raises:
        ConfigError: As in `load_encoder`, or a column of `keep` is not there.
        CheckpointError: As in `load_encoder`.
        TrackingError: As in `load_encoder`.
        DataError: The images cannot be read, or `out` holds something else.
        ClusterError: No cluster answers or starts.
    """
    encoder = load_encoder(model, tracking_uri=tracking_uri)
    source = open_rows(where, out, columns)
    _check_columns(source, keep)
    identity = _identity(encoder, source, keep, dtype, batch_size)
    digest = hashlib.sha256(identity.encode()).hexdigest()[:12]
    fs, path = filesystem(out)
    if _is_done(fs, path, out, digest, overwrite=overwrite):
        _remove_lists(out)
        return _counted(fs, path)
    pieces = cut_pieces(source)
    parts = f"{path}.parts-{digest}"
    done = {info.base_name for info in entries_in(fs, parts)}
    missing = [i for i in range(len(pieces)) if _part(i) not in done]
    num_done = source.num_rows - sum(len(pieces[i]) for i in missing)
    tell = on_progress or (lambda _done, _total: None)
    tell(num_done, source.num_rows)
    if missing:
        connect()
        actors = devices_of_cluster()
        fs.create_dir(parts, recursive=True)  # after all that can be refused
        encoding = Encoding(
            [encoder.network], encoder.size, encoder.decoder, batch_size, keep=tuple(keep)
        )
        chosen = [pieces[i] for i in missing]
        tables = stream(source, chosen, encoding, actors)
        for index, table in zip(missing, tables, strict=True):
            with open_whole(fs, f"{parts}/{_part(index)}") as file:
                pq.write_table(_columns_of(table, encoder.feature_dim, keep, dtype), file)
            num_done += table.num_rows
            tell(num_done, source.num_rows)
    with open_whole(fs, path) as file:
        _join(fs, [f"{parts}/{_part(i)}" for i in range(len(pieces))], file, digest)
    fs.delete_dir(parts)
    _remove_lists(out)
    return _counted(fs, path)


def open_rows(where: str | Sequence[str], out: str, columns: ColumnsConfig | None = None) -> Source:
    """Return the images of a dataset, of a folder, or of files, as rows.

    Of what is no parquet a list is written beside `out`, where all nodes see it.

    Raises:
        DataError: There are none, or they cannot be read.
    """
    if not isinstance(where, str):
        return Source.open(_list_files(where, lists_of(out)), columns)
    fs, root = filesystem(where)
    if not list_parquet(fs, root, where):
        where = index_folder(where, lists_of(out))
    return Source.open(where, columns)


def lists_of(out: str) -> str:
    """Return the hidden folder beside `out` for the list of images that are no parquet."""
    folder, slash, name = out.rpartition("/")
    return f"{folder}{slash}.{name}.list"


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


def _remove_lists(out: str) -> None:
    fs, folder = filesystem(lists_of(out))
    if info_of(fs, folder).type == pafs.FileType.Directory:
        fs.delete_dir(folder)


def _list_files(files: Sequence[str], out: str) -> str:
    """Return a parquet that names files, written into the folder `out`."""
    absolute = [str(Path(file).expanduser().absolute()) for file in files]
    sizes = [Path(name).stat().st_size if Path(name).is_file() else -1 for name in absolute]
    listing = hashlib.sha256(json.dumps([list(files), sizes]).encode()).hexdigest()
    about = {
        IMAGE_ROOT: "file:///",
        IMAGE_BYTES: str(sum(max(size, 0) for size in sizes)),
        IMAGE_LISTING: listing,
    }
    table = pa.table({
        "id": pa.array(range(len(files)), pa.int64()),
        "image": pa.array([name.lstrip("/") for name in absolute], pa.string()),
        PATH_COLUMN: pa.array(list(files), pa.string()),
    }).replace_schema_metadata(about)  # fmt: skip
    uri = f"{out}/{listing[:12]}.parquet"
    fs, path = filesystem(uri)
    fs.create_dir(path.rpartition("/")[0], recursive=True)
    with open_whole(fs, path) as file:
        pq.write_table(table, file, row_group_size=MOST_ROWS)
    return uri


def _check_columns(source: Source, keep: Sequence[str]) -> None:
    fs, _ = filesystem(source.uri)
    with fs.open_input_file(source.files[0]) as file:
        names = pq.read_schema(file).names
    taken = {PATH if source.has_paths else ID, EMBEDDING, ERROR}
    issues = [
        ConfigIssue("--keep", f"there is no column {name!r}; the columns: {', '.join(names)}")
        for name in keep
        if name not in names
    ]
    issues += [
        ConfigIssue("--keep", f"{name!r} is written anyway, or would take the place of one that is")
        for name in keep
        if name in taken
    ]
    if issues:
        raise ConfigError(issues)


def _identity(
    encoder: Encoder, source: Source, keep: Sequence[str], dtype: str, batch_size: int
) -> str:
    """Return all that decides the file, as text."""
    weights = hashlib.sha256()
    for name, tensor in encoder.network.state_dict().items():
        weights.update(name.encode())
        weights.update(tensor.contiguous().numpy().tobytes())
    return json.dumps(
        {
            "encoder": [encoder.config, weights.hexdigest(), encoder.size],
            "decoder": list(encoder.decoder),
            "images": [source.fingerprint, source.num_rows],
            "keep": list(keep),
            "dtype": dtype,
            "batch_size": batch_size,
        }
    )


def _is_done(fs: pafs.FileSystem, path: str, out: str, digest: str, *, overwrite: bool) -> bool:
    """Return whether `out` is there already.

    Raises:
        DataError: It is something else, and not to be overwritten.
    """
    kind = info_of(fs, path).type
    if kind == pafs.FileType.NotFound:
        return False
    if kind == pafs.FileType.Directory:
        raise DataError(f"{out} is a folder; embeddings are written to a file")
    try:
        with fs.open_input_file(path) as file:
            stored = (pq.read_schema(file).metadata or {}).get(IDENTITY, b"").decode()
    except (OSError, pa.ArrowException):
        stored = ""
    if stored == digest:
        return True
    if overwrite:
        return False
    what = "embeddings by another model or settings, or of other images" if stored else "other data"
    raise DataError(f"{out} holds {what}; choose another file, or start over (--overwrite)")


def _columns_of(table: pa.Table, width: int, keep: Sequence[str], dtype: DType) -> pa.Table:
    """Return what is stored of a piece; NaN where there is no image.

    Arrow writes fixed-size lists that are null to parquet, and cannot read them again (25.0).
    """
    good = np.array([reason is None for reason in table[ERROR].to_pylist()])
    rows = np.full((len(good), width), np.nan, np.dtype(dtype))
    if good.any():
        rows[good] = features_of(table)
    name = PATH if PATH in table.column_names else ID
    return pa.table(
        {
            name: table[name],
            **{column: table[kept_column(column)] for column in keep},
            EMBEDDING: pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), width),
            ERROR: table[ERROR],
        }
    )


def _part(index: int) -> str:
    return f"part-{index:06d}.parquet"


def _join(fs: pafs.FileSystem, parts: Sequence[str], file: pa.NativeFile, digest: str) -> None:
    """Write one parquet file of several, one in memory at a time."""
    writer = None
    for part in parts:
        with fs.open_input_file(part) as stored:
            table = pq.read_table(stored)
        if writer is None:
            about = (table.schema.metadata or {}) | {IDENTITY: digest.encode()}
            writer = pq.ParquetWriter(file, table.schema.with_metadata(about))
        writer.write_table(table.cast(writer.schema.with_metadata(table.schema.metadata)))
    assert writer is not None  # a dataset has rows
    writer.close()


def _counted(fs: pafs.FileSystem, path: str) -> Embedded:
    """Return what a finished file holds."""
    with fs.open_input_file(path) as file:
        stored = pq.ParquetFile(file)
        name = stored.schema_arrow.names[0]
        bad: list[tuple[str, str]] = []
        num_bad = 0
        for batch in stored.iter_batches(columns=[name, ERROR]):
            reasons = batch.column(1)
            num_bad += len(reasons) - reasons.null_count
            if len(bad) < 5 and len(reasons) > reasons.null_count:
                pairs = zip(batch.column(0).to_pylist(), reasons.to_pylist(), strict=True)
                bad += [(str(key), reason) for key, reason in pairs if reason is not None]
        return Embedded(stored.metadata.num_rows, num_bad, bad[:5])
