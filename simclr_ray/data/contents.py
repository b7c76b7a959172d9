"""What files hold that are told apart by name and size: a sample of them is read.

BMP, PPM, NumPy arrays and uncompressed TIFF keep their size when they are made anew in place, and a
run must not go on with other images than it began with. To read all would cost as much as an epoch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from simclr_ray.data.files import target_of
from simclr_ray.data.listing import REMOTE_THREADS
from simclr_ray.errors import DataError
from simclr_ray.storage.filesystem import is_local, one_line

FILES: Final = 256  # changes of one file in a hundred are seen in nine of ten cases
BYTES: Final = 65_536  # from the middle of each: the beginning is a header
GROUPS: Final = 16  # of a list, that names are read from


def digest_of(targets: Sequence[tuple[pafs.FileSystem, str]]) -> str:
    """Return 16 hex digits of what evenly spaced files hold; one that cannot be read holds nothing.

    Args:
        targets: The files, in an order of their own.
    """
    chosen = [targets[i] for i in _spaced(len(targets), FILES)]
    threads = 1 if all(is_local(fs) for fs, _ in chosen) else REMOTE_THREADS
    with ThreadPoolExecutor(threads) as pool:
        parts = list(pool.map(_middle, chosen))
    digest = hashlib.sha256()
    for part in parts:
        digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()[:16]


def digest_of_named(
    lists: Sequence[tuple[str, int]], fs: pafs.FileSystem, column: str, root: str
) -> str:
    """Return the same of the files that parquet files name.

    Args:
        lists: Path and number of row groups of each parquet file.
        fs: Where they lie.
        column: Of text, as `read_images` takes it.
        root: As in `read_images`.

    Raises:
        DataError: A list cannot be read.
    """
    groups = [(path, group) for path, total in lists for group in range(total)]
    chosen = [groups[i] for i in _spaced(len(groups), GROUPS)]
    targets = []
    for path, group in chosen:
        try:
            with fs.open_input_file(path) as stream:
                table = pq.ParquetFile(stream).read_row_group(group, columns=[column])
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{path} cannot be read: {one_line(error)}") from error
        names = table.column(column)
        rows = _spaced(len(names), FILES // len(chosen))
        targets += [target_of(str(names[row].as_py()), fs, path, root) for row in rows]
    return digest_of(targets)


def _spaced(total: int, most: int) -> list[int]:
    """Return at most so many positions of a sequence, evenly spaced, with its ends."""
    spaced = np.linspace(0, total - 1, min(total, most)).round().astype(int)
    positions: list[int] = np.unique(spaced).tolist()
    return positions


def _middle(target: tuple[pafs.FileSystem, str]) -> bytes:
    fs, path = target
    with suppress(OSError, pa.ArrowException), fs.open_input_file(path) as stream:
        num_bytes = stream.size()
        stream.seek(max(0, (num_bytes - BYTES) // 2))
        part: bytes = stream.read(BYTES)
        return part
    return b""
