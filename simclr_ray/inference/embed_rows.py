"""Embeddings of a whole dataset, as parquet: by all devices of the cluster, resumed midway."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from simclr_ray.config import to_tree
from simclr_ray.config.experiment import ColumnsConfig
from simclr_ray.config.uris import hide_passwords
from simclr_ray.data.source import Source
from simclr_ray.distributed.ray_cluster import connect
from simclr_ray.inference.embed_input import (
    check_columns,
    key_of,
    open_rows,
    states_of_images,
)
from simclr_ray.inference.embedding_file import EmbeddingFile, EmbedSummary, Origin
from simclr_ray.storage import checkpoint
from simclr_ray.storage.run_folder import RunFolder
from simclr_ray.tracking.store import store_uri

if TYPE_CHECKING:  # torch is imported while Ray starts
    from simclr_ray.inference.embed_pieces import DType, OnRows
    from simclr_ray.inference.encoder import Encoder


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
    on_progress: OnRows | None = None,
) -> EmbedSummary:
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
    file = EmbeddingFile(out)
    stored = file.digest(overwrite=overwrite)
    # another model may be none, and where a file is, it may be this very one: then without Ray
    with_ray = not stored and _holds_checkpoint(Path(model))
    encoder = None if with_ray else _load(model, tracking_uri)
    with file.place():
        source = open_rows(where, file, columns)
        check_columns(source, keep)
        if encoder is None:
            encoder = _load_beside_ray(model, tracking_uri)
        identity = _identity(encoder, source, keep, dtype, batch_size)
        digest = hashlib.sha256(identity.encode()).hexdigest()[:12]
        if stored not in ("", digest) and not overwrite:
            raise file.taken("embeddings by another model or settings, or of other images")
    parts = file.parts(digest, source.uri, overwrite=overwrite)
    if stored == digest:
        parts.clear()  # of a run that was ended at the very end
        return file.summary()
    from simclr_ray.evaluation.ray_features import Encoding
    from simclr_ray.inference.embed_pieces import Layout, embed_pieces

    address = lasting_address(str(model), tracking_uri)
    encoding = Encoding(
        [encoder.network], encoder.size, encoder.decoder, batch_size, keep=tuple(keep)
    )
    layout = Layout(key_of(source), encoder.feature_dim, encoding.keep, dtype)
    pieces = embed_pieces(source, parts, encoding, layout, on_progress or (lambda *_: None))
    file.write(parts, pieces, digest, _origin(address, encoder, where, source, keep))
    return file.summary()


def _origin(
    address: str, encoder: Encoder, where: str | Sequence[str], source: Source, keep: Sequence[str]
) -> Origin:
    label, classes = source.label, {}
    if label and label.name in keep and label.names and not label.label_of_file:
        classes = {label.name: list(label.names)}  # files that number alike; the numbers are kept
    return Origin(
        encoder=address,
        weights=encoder.digest,
        images=absolute_uri(where) if isinstance(where, str) else "",
        folder="" if isinstance(where, str) else str(Path.cwd()),
        fingerprint=source.fingerprint if isinstance(where, str) else "",
        columns=to_tree(source.columns),
        decoder=tuple(encoder.decoder),
        classes=classes,
    )


def absolute_uri(name: str) -> str:
    """Return a path or URI that holds in other folders too, without its passwords."""
    return hide_passwords(name) if "://" in name else str(Path(name).expanduser().absolute())


def lasting_address(model: str, tracking_uri: str) -> str:
    """Return an encoder's address that will name the same one later: a version for an alias."""
    if not model.startswith("models:/"):
        return absolute_uri(model)
    from simclr_ray.inference.registry import find_version  # 2 s, of MLflow

    version = find_version(model, uri=store_uri(tracking_uri))
    return f"models:/{version.name}/{version.version}"


def _holds_checkpoint(model: Path) -> bool:
    """Return whether a folder here is a checkpoint or a run that has one; without torch."""
    is_one = (model / checkpoint.RECORD).is_file()
    return is_one or (model.is_dir() and bool(RunFolder.at(str(model)).checkpoints()))


def _load(model: str | Path, tracking_uri: str) -> Encoder:
    from simclr_ray.inference.embed import load_encoder

    return load_encoder(model, tracking_uri=tracking_uri)


def _load_beside_ray(model: str | Path, tracking_uri: str) -> Encoder:
    """Load an encoder while Ray starts, which waits more than it works.

    Torch is what takes long to load. Ray is started by this thread: what it starts ends with the
    thread that did.
    """
    with ThreadPoolExecutor(1) as pool:
        loading = pool.submit(_load, model, tracking_uri)
        connect()
        return loading.result()


def _identity(
    encoder: Encoder, source: Source, keep: Sequence[str], dtype: str, batch_size: int
) -> str:
    """Return all that decides the file, as text."""
    files = hashlib.sha256()
    for state in states_of_images(source):
        files.update(state.encode(errors="surrogateescape"))
    return json.dumps(
        {
            "encoder": [encoder.config, encoder.digest, encoder.size],
            "decoder": list(encoder.decoder),
            "images": [source.fingerprint, source.num_rows, files.hexdigest()],
            "keep": list(keep),
            "dtype": dtype,
            "batch_size": batch_size,
        }
    )
