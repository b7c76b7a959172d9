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
    """Return the bytes that columns of a row group take in the file, those below them included."""
    row_group = footer.row_group(group)
    chunks = (row_group.column(index) for index in range(row_group.num_columns))
    return sum(
        chunk.total_compressed_size
        for chunk in chunks
        # a column's own name may have dots
        if any(f"{chunk.path_in_schema}.".startswith(f"{name}.") for name in columns)
    )
