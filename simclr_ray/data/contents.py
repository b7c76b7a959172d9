"""What files hold that are told apart by name and size: a sample of them is read.

BMP, PPM, NumPy arrays and uncompressed TIFF keep their size when they are made anew in place, and a
run must not go on with other images than it began with. To read all would cost as much as an epoch.
"""

from __future__ import annotations

import hashlib
import itertools
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from simclr_ray.data.files import names_of, target_of
from simclr_ray.data.listing import REMOTE_THREADS
from simclr_ray.errors import DataError, one_line
from simclr_ray.storage.filesystem import is_local

T = TypeVar("T")
NUM_PIECES: Final = 256  # changes of one image in a hundred are seen in nine of ten cases
PIECE_BYTES: Final = 65_536  # from the middle of each: the beginning is a header
NUM_GROUPS: Final = 16  # of a list, that names are read from
REMEMBERED_S: Final = 300.0  # a bucket is asked once by a command that opens a list several times


class Sampled(NamedTuple):
    """What a sample of files holds.

    Attributes:
        digest: 16 hex digits of it; empty: there is no sample.
        mean_bytes: Of a whole piece, of those that are there.
    """

    digest: str
    mean_bytes: float


class Piece(NamedTuple):
    """A part of a file that is one image, or stands for several.

    Attributes:
        fs: Where it lies.
        path: Of the file.
        start: Its first byte.
        size: Bytes; -1: up to the end.
    """

    fs: pafs.FileSystem
    path: str
    start: int = 0
    size: int = -1


_remembered: dict[tuple[str, ...], tuple[float, Sampled]] = {}


def sample_digest(pieces: Sequence[Piece]) -> str:
    """Return the digest of `sample`; raises what it does."""
    return sample(pieces).digest


def sample(pieces: Sequence[Piece]) -> Sampled:
    """Return what evenly spaced pieces hold; of a file that is gone, nothing.

    Args:
        pieces: In an order of their own.

    Raises:
        DataError: A bucket does not answer.
    """
    chosen = evenly(pieces)
    if all(is_local(piece.fs) for piece in chosen):
        return _sampled([_middle(piece) for piece in chosen])
    key = tuple(f"{piece.path} {piece.start} {piece.size}" for piece in chosen)
    read_at, sampled = _remembered.get(key, (0.0, Sampled("", 0)))
    if not sampled.digest or time.monotonic() - read_at > REMEMBERED_S:
        with ThreadPoolExecutor(REMOTE_THREADS) as pool:
            sampled = _sampled(list(pool.map(_middle, chosen)))
        _remembered[key] = (time.monotonic(), sampled)
    return sampled


def sample_named_files(
    groups: Sequence[tuple[str, int, int]], fs: pafs.FileSystem, column: str, root: str
) -> Sampled:
    """Return the `sample` of the files that rows of parquet files name.

    Args:
        groups: Path of the parquet file, row group in it, and how many of its rows count.
        fs: Where they lie.
        column: Of text or of structs of paths, as `read_images` takes them.
        root: As in `read_images`.

    Raises:
        DataError: A list cannot be read, or a bucket does not answer.
    """
    chosen = evenly(groups, NUM_GROUPS)

    def pieces_of(group: tuple[str, int, int]) -> list[Piece]:
        path, number, num_rows = group
        try:
            with fs.open_input_file(path) as stream:
                table = pq.ParquetFile(stream).read_row_group(number, columns=[column])
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{path} cannot be read: {one_line(error)}") from error
        names = names_of(table.column(column).slice(0, num_rows))
        some = evenly(names, NUM_PIECES // len(chosen))
        return [Piece(*target_of(str(name), fs, path, root)) for name in some]

    with ThreadPoolExecutor(1 if is_local(fs) else NUM_GROUPS) as pool:
        return sample([piece for part in pool.map(pieces_of, chosen) for piece in part])


def pieces_of_file(fs: pafs.FileSystem, path: str, num: int = NUM_GROUPS) -> list[Piece]:
    """Return a file that holds many images as equal pieces."""
    size = int(fs.get_file_info(path).size or 0)
    ends = [size * at // num for at in range(num + 1)]
    return [Piece(fs, path, first, last - first) for first, last in itertools.pairwise(ends)]


def evenly(items: Sequence[T], most: int = NUM_PIECES) -> list[T]:
    """Return at most so many items, evenly spaced, with the first and the last."""
    spaced = np.linspace(0, len(items) - 1, min(len(items), most)).round().astype(int)
    return [items[at] for at in np.unique(spaced).tolist()]


def _sampled(parts: Sequence[tuple[bytes, int]]) -> Sampled:
    digest = hashlib.sha256()
    for part, _ in parts:
        digest.update(hashlib.sha256(part).digest())
    sizes = [size for _, size in parts if size]
    return Sampled(digest.hexdigest()[:16], sum(sizes) / max(1, len(sizes)))


def _middle(piece: Piece) -> tuple[bytes, int]:
    """Return the middle of a piece, and its bytes; nothing of a file that is gone or unreadable."""
    try:
        with piece.fs.open_input_file(piece.path) as stream:
            size = piece.size if piece.size >= 0 else stream.size()
            stream.seek(piece.start + max(0, (size - PIECE_BYTES) // 2))
            return stream.read(min(size, PIECE_BYTES)), size
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return b"", 0
    except (OSError, pa.ArrowException) as error:
        if is_local(piece.fs):  # a folder, a name too long, a bad sector: of this file alone
            return b"", 0
        raise DataError(f"{piece.path} cannot be read: {one_line(error)}") from error
