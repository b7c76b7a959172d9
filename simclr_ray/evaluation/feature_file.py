"""Features that are too many for memory: rows in a file without a name, read as they are used.

They are read and not mapped: of a mapped file all that was ever touched counts as memory of the
process until the system takes it back, and a container may be ended before it does.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from typing import Final, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from simclr_ray.data.arrays import Int64s
from simclr_ray.errors import StorageError
from simclr_ray.storage.space import sized

BLOCK_BYTES: Final = 2**28  # of rows that are in memory at once


class FeatureFile:
    """Rows of F float32 numbers on disk, indexed as a tensor is; what is read is a copy.

    It lies in the folder for temporary files ($TMPDIR), and is gone with this object.

    Args:
        num: Rows, M.
        width: F.

    Raises:
        StorageError: The disk has no room for it.
    """

    def __init__(self, num: int, width: int) -> None:
        self.shape = (num, width)
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - closed with this object
        try:
            os.posix_fallocate(self._file.fileno(), 0, num * self._row_bytes)
        except OSError as error:
            self._file.close()
            raise StorageError(
                f"features of {num:,} images need {sized(num * self._row_bytes)} in "
                f"{tempfile.gettempdir()}, which has no room for them (TMPDIR names another folder)"
            ) from error

    def __len__(self) -> int:
        """Return M."""
        return self.shape[0]

    def write(self, places: Int64s, rows: npt.NDArray[np.float32]) -> None:
        """Store rows, float32 [m, F], at `places`, int64 [m]."""
        for part in _runs(places):
            data = np.ascontiguousarray(rows[part]).data.cast("B")
            first = int(places[part][0]) * self._row_bytes
            done = 0
            while done < len(data):
                done += os.pwrite(self._file.fileno(), data[done:], first + done)

    def __getitem__(self, index: slice | Tensor) -> Tensor:
        """Return rows, float32 [m, F]: a slice of them, or those at places or where a mask is.

        Raises:
            IndexError: A place is no row.
        """
        if isinstance(index, slice):
            places = np.arange(*index.indices(len(self)))
        elif index.dtype == torch.bool:
            places = torch.nonzero(index)[:, 0].numpy()
        else:
            places = index.cpu().numpy()
        wrong = places[(places < 0) | (places >= len(self))]
        if len(wrong):
            raise IndexError(f"there is no row {wrong[0]} of {len(self)}")
        out = np.empty((len(places), self.shape[1]), np.float32)
        for part in _runs(places):
            self._read(int(places[part][0]), out[part])
        return torch.from_numpy(out)

    def keep(self, kept: npt.NDArray[np.bool_]) -> None:
        """Move the rows where `kept`, bool [M], is true to the front, and forget the others."""
        places = np.flatnonzero(kept)
        if len(places) == len(self):
            return
        step = max(1, BLOCK_BYTES // self._row_bytes)
        for first in range(0, len(places), step):
            some = places[first : first + step]
            self.write(np.arange(first, first + len(some)), self[torch.from_numpy(some)].numpy())
        self.shape = (len(places), self.shape[1])

    @property
    def _row_bytes(self) -> int:
        return 4 * self.shape[1]

    def _read(self, place: int, out: npt.NDArray[np.float32]) -> None:
        """Fill `out`, which is contiguous, with the rows from `place` on."""
        data, done = out.data.cast("B"), 0
        while done < len(data):
            done += os.preadv(self._file.fileno(), [data[done:]], place * self._row_bytes + done)


FeatureRows: TypeAlias = Tensor | FeatureFile


class Sliced(Protocol):
    """What gives rows by slices."""

    @property
    def shape(self) -> Sequence[int]:
        """Return [M, F]."""

    def __getitem__(self, index: slice) -> Tensor:
        """Return some rows."""


def is_small(rows: Sliced) -> bool:
    """Return whether the rows, [M, F], are at most `BLOCK_BYTES`: then they are one block."""
    num, width = rows.shape
    return 4 * num * width <= BLOCK_BYTES


def blocks(rows: Sliced) -> Iterator[Tensor]:
    """Yield the rows, [M, F], in parts of at most `BLOCK_BYTES`."""
    num, width = rows.shape
    step = max(1, BLOCK_BYTES // (4 * width))
    for first in range(0, max(1, num), step):
        yield rows[first : first + step]


def are_finite(rows: FeatureRows) -> bool:
    """Return whether all numbers are finite."""
    return all(bool(torch.isfinite(part).all()) for part in blocks(rows))


def _runs(places: npt.NDArray[np.integer]) -> Iterator[slice]:
    """Yield the parts of `places` in which each follows the one before."""
    if not len(places):
        return
    borders = np.flatnonzero(np.diff(places) != 1) + 1
    firsts, lasts = np.concatenate([[0], borders]), np.concatenate([borders, [len(places)]])
    for first, last in zip(firsts.tolist(), lasts.tolist(), strict=True):
        yield slice(first, last)
