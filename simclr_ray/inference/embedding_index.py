"""A file of embeddings in memory, to ask which images are near another: exact, by FAISS.

Near is the cosine of two embeddings. Nothing is approximate: of 1 million rows of 512 numbers, a
query reads all 2 GB, which takes a tenth of a second; what IVF or HNSW would save is less than the
encoder takes for the query's image, and they would have to be built first. All pairs are another
matter: M²/2 products of F numbers, seconds for 50,000 rows and hours for a million.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from simclr_ray.config.wording import counted
from simclr_ray.data.arrays import Float32s, Int64s
from simclr_ray.data.duplicates import linked
from simclr_ray.errors import ConfigError, DataError, one_line
from simclr_ray.inference.embedding_file import EMBEDDING, ERROR, Origin
from simclr_ray.storage.filesystem import filesystem

EXTRA: Final = "simclr-ray[search]"
PAIRS_AT_ONCE: Final = 10**8  # compared; 1.2 GB where all of them are near
MOST_ROWS: Final = 4096  # of a product
MOST_PAIRS: Final = 5_000_000  # 120 MB; more are no list that anybody reads
ROUNDING: Final = 1e-6  # of a cosine in float32: copies have 0.9999999 as often as 1


class Nearest(NamedTuple):
    """Of each query its nearest rows, the nearest first.

    Attributes:
        positions: int64 [Q, k], in the index.
        cosines: float32 [Q, k].
    """

    positions: Int64s
    cosines: Float32s


class NearPairs(NamedTuple):
    """Rows that are near each other, the nearest first.

    Attributes:
        positions: int64 [p, 2], in the index, the earlier row first.
        cosines: float32 [p].
    """

    positions: Int64s
    cosines: Float32s

    def groups(self, num: int) -> list[Int64s]:
        """Return the positions that belong together, the largest group first.

        A chain of pairs is one group, so its ends may be less alike than any pair.

        Args:
            num: Rows of the index.
        """
        return sorted(linked(num, self.positions), key=lambda group: -len(group))


class EmbeddingIndex:
    """The rows of a file that have an embedding.

    Args:
        uri: Of the file that `embed --out` has written.

    Attributes:
        key: What names a row: `path`, `id` or `row`, its number.
        names: That of each, as text.
        num_rows: Rows of the file, those without an embedding included.
        rows: int64 [M], the numbers of the others in the file.
        vectors: float32 [M, F] of length 1; 0 where an embedding is 0.
        origin: Which encoder made them.

    Raises:
        DataError: It is no such file, or none of its rows has an embedding.

    Example:
        >>> index = EmbeddingIndex("photos.parquet")
        >>> nearest = index.nearest(encoder.embed(["cat.jpg"]), 3)
        >>> [index.names[position] for position in nearest.positions[0]]
        ['cats/17.jpg', 'cats/3.jpg', 'dogs/44.jpg']
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri
        try:
            with _opened(uri) as file:
                self.key, self.num_rows = file.schema_arrow.names[0], file.metadata.num_rows
                self.origin = Origin.read(file.schema_arrow.metadata)
                self.names, self.rows, self.vectors = _read(file, self.key, uri)
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{uri} cannot be read: {one_line(error)}") from error
        if not len(self.rows):
            raise DataError(f"{uri}: none of its rows has an embedding")
        for first in range(0, len(self.vectors), MOST_ROWS):  # in place: they may be gigabytes
            part = self.vectors[first : first + MOST_ROWS]
            part[:] = unit_length(part)

    @property
    def feature_dim(self) -> int:
        """Return F."""
        return int(self.vectors.shape[1])

    def nearest(self, queries: Float32s, num: int) -> Nearest:
        """Return the nearest `num` rows of each query; fewer where the index has no more.

        Args:
            queries: float [Q, F], of any length.
            num: How many.

        Raises:
            ConfigError: FAISS is not installed.
            DataError: They are of another encoder: they have another F.
        """
        faiss = import_faiss()
        if queries.shape[1] != self.feature_dim:
            raise DataError(
                f"{self.uri} holds embeddings of {self.feature_dim} numbers, and the encoder makes "
                f"{queries.shape[1]}: it is an index of another one"
            )
        cosines, positions = faiss.knn(
            unit_length(queries), self.vectors, min(num, len(self.rows)),
            metric=faiss.METRIC_INNER_PRODUCT,
        )  # fmt: skip
        return Nearest(positions.astype(np.int64), cosines)

    def pairs(
        self, least: float, on_progress: Callable[[int, int], None] | None = None
    ) -> NearPairs:
        """Return all pairs of rows whose cosine is at least `least`, but for rounding (1e-6).

        Args:
            least: The cosine.
            on_progress: Gets the rows that are compared, and of how many.

        Raises:
            ConfigError: FAISS is not installed.
            DataError: There are more than `MOST_PAIRS`.
        """
        index = import_faiss().IndexFlatIP(self.feature_dim)
        parts: list[tuple[Int64s, Float32s]] = []
        count, total = 0, len(self.vectors)
        step = max(1, min(MOST_ROWS, PAIRS_AT_ONCE // total))
        for first in range(0, total, step):
            block = self.vectors[first : first + step]
            index.add(block)  # each pair is met once: with rows before it, and its own block's
            positions, cosines = _within(index, block, first, least - ROUNDING)
            parts.append((positions, cosines))
            count += len(cosines)
            if count > MOST_PAIRS:
                raise DataError(
                    f"{self.uri}: more than {MOST_PAIRS:,} pairs of {counted(total, 'image')} have "
                    f"a cosine of {least:g} or more; ask for a higher one (--min-cosine)"
                )
            if on_progress is not None:
                on_progress(min(first + step, total), total)
        positions = np.concatenate([positions for positions, _ in parts])
        cosines = np.concatenate([cosines for _, cosines in parts])
        order = np.lexsort((positions[:, 1], positions[:, 0], -cosines))
        return NearPairs(positions[order], cosines[order])


def _within(index: Any, block: Float32s, first: int, bound: float) -> tuple[Int64s, Float32s]:
    """Return the pairs of a block's rows with earlier rows, int64 [p, 2], and their cosines."""
    limits, cosines, positions = index.range_search(block, bound)
    rows = np.repeat(np.arange(first, first + len(block)), np.diff(limits.astype(np.int64)))
    is_earlier = positions < rows
    pairs = np.stack([positions[is_earlier], rows[is_earlier]], axis=1).astype(np.int64)
    return pairs, cosines[is_earlier]


def unit_length(vectors: Float32s) -> Float32s:
    """Return rows of length 1, float32 [M, F]; those that are 0 stay so."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.ascontiguousarray(vectors / np.maximum(lengths, np.finfo(np.float32).tiny), "f")


def _opened(uri: str) -> pq.ParquetFile:
    """Return a file of embeddings; raise `DataError` where it holds something else."""
    fs, path = filesystem(uri)
    file = pq.ParquetFile(fs.open_input_file(path))
    schema = file.schema_arrow
    if not {EMBEDDING, ERROR} <= set(schema.names) or not _is_numbers(schema.field(EMBEDDING).type):
        file.close(force=True)
        raise DataError(f"{uri} holds no embeddings; `simclr-ray embed --out` writes them")
    return file


def _is_numbers(kind: pa.DataType) -> bool:
    """Return whether a column's values are lists of numbers."""
    is_list = (
        pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    )
    numbers = kind.value_type if is_list else pa.null()
    return bool(pa.types.is_floating(numbers) or pa.types.is_integer(numbers))


def _read(file: pq.ParquetFile, key: str, uri: str) -> tuple[list[str], Int64s, Float32s]:
    """Return names, row numbers and embeddings of the rows that have one, read part by part."""
    names: list[str] = []
    rows: list[Int64s] = []
    vectors: Float32s = np.empty((0, 0), np.float32)
    taken = done = 0
    for batch in file.iter_batches(MOST_ROWS, columns=[key, EMBEDDING, ERROR]):
        part = _vectors_of(batch.column(1), uri)
        if not vectors.size:
            vectors = np.empty((file.metadata.num_rows, part.shape[1]), np.float32)
        if part.shape[1] != vectors.shape[1]:
            raise DataError(f"{uri}: its embeddings are not all as long")
        good = np.flatnonzero(np.isfinite(part).all(axis=1))
        vectors[taken : taken + len(good)] = part[good]
        rows.append(good + done)
        names += [str(name) for name in batch.column(0).take(pa.array(good)).to_pylist()]
        taken, done = taken + len(good), done + len(part)
    return names, np.concatenate([np.empty(0, np.int64), *rows]), vectors[:taken]


def _vectors_of(lists: pa.Array, uri: str) -> Float32s:
    """Return embeddings, float32 [m, F], NaN where there is none."""
    flat = np.asarray(lists.flatten().to_numpy(zero_copy_only=False), np.float32)
    width = len(flat) // max(1, len(lists))
    if not width or len(flat) != width * len(lists):
        raise DataError(f"{uri}: its embeddings are not all as long")
    return flat.reshape(-1, width)


def kept_columns(uri: str) -> Iterator[str]:
    """Yield the columns of a file of embeddings that were handed on from its images."""
    with _opened(uri) as file:
        names = file.schema_arrow.names[1:]
    yield from (name for name in names if name not in (EMBEDDING, ERROR))


def read_column(uri: str, name: str) -> list[Any]:
    """Return a column of a file of embeddings, a value a row."""
    with _opened(uri) as file:
        values: list[Any] = file.read([name]).column(0).to_pylist()
    return values


def import_faiss() -> Any:
    """Return FAISS; raise `ConfigError`, which names the extra, where it is not installed."""
    try:
        import faiss
    except ImportError as error:
        problem = f"needs FAISS: pip install '{EXTRA}' ({error})"
        raise ConfigError.of("search", problem) from error
    return faiss
