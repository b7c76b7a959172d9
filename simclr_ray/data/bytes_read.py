"""How many bytes of datasets this process has read, counted where it reads them."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import pyarrow.parquet as pq


class ByteCount:
    """A count that several threads add to."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._count = 0

    def add(self, num: int) -> None:
        """Count `num` bytes more."""
        with self._lock:
            self._count += num

    def take(self) -> int:
        """Return what was counted since the last call."""
        with self._lock:
            num, self._count = self._count, 0
        return num


BYTES_READ = ByteCount()  # of this process; what exports it takes it


def stored_bytes(footer: pq.FileMetaData, group: int, columns: Sequence[str]) -> int:
    """Return the bytes that columns of a row group take in the file, those below them included.

    Of columns that were read: of one that is damaged Arrow 25 ends the process when it is asked.
    """
    row_group = footer.row_group(group)
    paths = (footer.schema.column(index).path for index in range(row_group.num_columns))
    return sum(
        row_group.column(index).total_compressed_size
        for index, path in enumerate(paths)
        # a column's own name may have dots
        if any(f"{path}.".startswith(f"{name}.") for name in columns)
    )
