"""A file of embeddings in memory, to ask which images are near another: exact, by FAISS.

Near is the cosine of two embeddings. Nothing is approximate: of 1 million rows of 512 numbers,
2 GB, a query reads all, which takes a tenth of a second; what IVF or HNSW would save is less than
the encoder takes for the query's image, and they would have to be built first.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from simclr_ray.config.wording import counted
from simclr_ray.data.duplicates import linked
from simclr_ray.errors import ConfigError, ConfigIssue, DataError
from simclr_ray.inference.embedding_file import EMBEDDING, ERROR, Origin
from simclr_ray.storage.filesystem import filesystem, one_line

Floats = npt.NDArray[np.float32]
Int64s = npt.NDArray[np.int64]

EXTRA: Final = "simclr-ray[search]"
PAIRS_AT_ONCE: Final = 10**8  # compared; 1.2 GB where all of them are near
MOST_ROWS: Final = 4096  # of a product
MOST_PAIRS: Final = 5_000_000  # 120 MB; more are no list that anybody reads


class Nearest(NamedTuple):
    """Of each query its nearest rows, the nearest first.

    Attributes:
        places: int64 [Q, k], places in the index.
        cosines: float32 [Q, k].
    """

    places: Int64s
    cosines: Floats


class Pairs(NamedTuple):
    """Rows that are near each other, the nearest first.

    Attributes:
        places: int64 [p, 2], places in the index, the earlier row first.
        cosines: float32 [p].
    """

    places: Int64s
    cosines: Floats

    def groups(self, num: int) -> list[Int64s]:
        """Return the places that belong together, of an index of `num` rows, largest group first.

        A chain of pairs is one group, so its ends may be less alike than any pair.
        """
        return sorted(linked(num, self.places), key=lambda group: -len(group))


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
        ConfigError: The extra is not installed.
        DataError: It is no such file, or none of its rows has an embedding.

    Example:
        >>> index = EmbeddingIndex("photos.parquet")
        >>> nearest = index.nearest(encoder.embed(["cat.jpg"]), 3)
        >>> [index.names[place] for place in nearest.places[0]]
        ['cats/17.jpg', 'cats/3.jpg', 'dogs/44.jpg']
    """

    def __init__(self, uri: str) -> None:
        self._faiss = import_faiss()
        self.uri = uri
        table = read_embeddings(uri)
        self.origin = Origin.read(table.schema.metadata)
        vectors = _vectors_of(table, uri)
        self.num_rows, self.key = len(vectors), table.column_names[0]
        is_good = np.isfinite(vectors).all(axis=1)
        self.rows: Int64s = np.flatnonzero(is_good)
        if not len(self.rows):
            raise DataError(f"{uri}: none of its rows has an embedding")
        self.names = [str(name) for name in table.column(0).take(pa.array(self.rows)).to_pylist()]
        self.vectors = unit_length(vectors[is_good])
        self._index: Any = None

    @property
    def feature_dim(self) -> int:
        """F."""
        return int(self.vectors.shape[1])

    def nearest(self, queries: Floats, num: int) -> Nearest:
        """Return the nearest `num` rows of each query; fewer where the index has no more.

        Args:
            queries: float [Q, F], of any length.
            num: How many.

        Raises:
            DataError: They are of another encoder: they have another F.
        """
        if queries.shape[1] != self.feature_dim:
            raise DataError(
                f"{self.uri} holds embeddings of {self.feature_dim} numbers, and the encoder makes "
                f"{queries.shape[1]}: it is an index of another one"
            )
        if self._index is None:
            self._index = self._faiss.IndexFlatIP(self.feature_dim)
            self._index.add(self.vectors)
        wanted = min(num, len(self.rows))
        cosines, places = self._index.search(unit_length(queries), wanted)
        return Nearest(places.astype(np.int64), cosines)

    def pairs(self, least: float) -> Pairs:
        """Return all pairs of rows whose cosine is at least `least`.

        Raises:
            DataError: There are more than `MOST_PAIRS`.
        """
        index = self._faiss.IndexFlatIP(self.feature_dim)
        parts: list[tuple[Int64s, Floats]] = []
        count = 0
        step = max(1, min(MOST_ROWS, PAIRS_AT_ONCE // len(self.vectors)))
        for first in range(0, len(self.vectors), step):
            block = self.vectors[first : first + step]
            index.add(block)  # each pair is met once: with rows before it, and its own block's
            places, cosines = _within(index, block, first, least)
            parts.append((places, cosines))
            count += len(cosines)
            if count > MOST_PAIRS:
                shown = counted(len(self.vectors), "image")
                raise DataError(
                    f"{self.uri}: more than {MOST_PAIRS:,} pairs of {shown} have a cosine of "
                    f"{least:g} or more; ask for a higher one (--least)"
                )
        places = np.concatenate([places for places, _ in parts])
        cosines = np.concatenate([cosines for _, cosines in parts])
        order = np.lexsort((places[:, 1], places[:, 0], -cosines))
        return Pairs(places[order], cosines[order])


def _within(index: Any, block: Floats, first: int, least: float) -> tuple[Int64s, Floats]:
    """Return the pairs of a block's rows with earlier rows, int64 [p, 2], and their cosines."""
    # FAISS gives what is above a bound, and not what is at it
    limits, cosines, places = index.range_search(block, float(np.nextafter(least, -2.0, dtype="f")))
    rows = np.repeat(np.arange(first, first + len(block)), np.diff(limits.astype(np.int64)))
    is_earlier = places < rows
    pairs = np.stack([places[is_earlier], rows[is_earlier]], axis=1).astype(np.int64)
    return pairs, cosines[is_earlier]


def _vectors_of(table: pa.Table, uri: str) -> Floats:
    """Return the embeddings, float32 [M, F], NaN where there is none."""
    lists = table[EMBEDDING].combine_chunks()
    flat = np.asarray(lists.flatten().to_numpy(zero_copy_only=False), np.float32)
    width = len(flat) // max(1, len(lists))
    if not width or len(flat) != width * len(lists):
        raise DataError(f"{uri}: its embeddings are not all as long")
    return flat.reshape(-1, width)


def unit_length(vectors: Floats) -> Floats:
    """Return rows of length 1, float32 [M, F]; those that are 0 stay so."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.ascontiguousarray(vectors / np.maximum(lengths, np.finfo(np.float32).tiny), "f")


def read_embeddings(uri: str) -> pa.Table:
    """Return the table of a file of embeddings, its first column what names a row.

    Raises:
        DataError: There is no such file, or it holds something else.
    """
    fs, path = filesystem(uri)
    try:
        with fs.open_input_file(path) as file:
            stored = pq.ParquetFile(file)
            names = stored.schema_arrow.names
            if EMBEDDING not in names or ERROR not in names:
                raise DataError(f"{uri} holds no embeddings; `simclr-ray embed --out` writes them")
            return stored.read()
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{uri} cannot be read: {one_line(error)}") from error


def columns_of(table: pa.Table) -> Iterator[str]:
    """Yield the columns that were handed on from the images."""
    yield from (name for name in table.column_names[1:] if name not in (EMBEDDING, ERROR))


def import_faiss() -> Any:
    """Return FAISS; raise `ConfigError`, which names the extra, where it is not installed."""
    try:
        import faiss
    except ImportError as error:
        problem = f"needs FAISS: pip install '{EXTRA}' ({error})"
        raise ConfigError([ConfigIssue("search", problem)]) from error
    return faiss
