"""All-gather of small vectors between processes of one machine, through shared memory.

Global batch norm exchanges some hundred numbers, twice a layer. gloo hands each such message
through four threads, 0.6 to 3 ms where cores are busy; a slot in shared memory takes
microseconds. Nothing here knows torch.distributed: `dist.py` decides when it is used.
"""

from __future__ import annotations

import mmap
import os
import platform
import tempfile
import time
from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch import Tensor

SLOT_BYTES: Final = 64 * 1024  # of one message
LINE: Final = 64  # counters of two ranks never share a cache line
SPINS = 100  # some 20 µs; then sleep: the core may be what the peer or a decoder waits for
NAP_S: Final = 0.00005
FOLDER: Final = "/dev/shm"


def is_supported() -> bool:
    """Return whether this machine keeps the order of stores that the protocol relies on."""
    return platform.machine() in {"x86_64", "AMD64"} and Path(FOLDER).is_dir()


class SharedVectors:
    """One mapped file: of each rank a counter and two slots.

    Call number c writes slot c mod 2, then the counter. Two slots suffice: a rank writes call
    c + 2 only when all counters have reached c + 1, so when all ranks have read call c.

    Args:
        path: A file of `num_bytes(num_ranks)`, opened by every rank.
        rank: This rank.
        num_ranks: R.
        timeout_s: How long a call waits for the others.
    """

    def __init__(self, path: Path, rank: int, num_ranks: int, timeout_s: float) -> None:
        with path.open("r+b") as file:
            self.memory = mmap.mmap(file.fileno(), num_bytes(num_ranks))
        self.rank, self.num_ranks, self.timeout_s = rank, num_ranks, timeout_s
        counters = memoryview(self.memory)[: num_ranks * LINE].cast("q")
        self.counters = counters[:: LINE // 8]
        bodies = np.frombuffer(self.memory, np.uint8, offset=num_ranks * LINE)
        self.slots = torch.from_numpy(bodies).view(2, num_ranks, SLOT_BYTES)
        self.calls = 0

    def all_gather(self, vector: Tensor) -> Tensor:
        """Return [R, n] of each rank's contiguous CPU vector [n] of at most SLOT_BYTES bytes.

        Raises:
            TimeoutError: A rank did not come.
        """
        raw = vector.view(torch.uint8)
        slots = self.slots[self.calls % 2]
        slots[self.rank, : len(raw)] = raw
        self.calls += 1
        self.counters[self.rank] = self.calls
        self._wait()
        return slots[:, : len(raw)].clone().view(vector.dtype)

    def _wait(self) -> None:
        counters, calls = self.counters, self.calls
        for other in range(self.num_ranks):
            tries, began = 0, 0.0
            while counters[other] < calls:
                tries += 1
                if tries <= SPINS:
                    continue
                began = began or time.monotonic()
                if time.monotonic() - began > self.timeout_s:
                    raise TimeoutError(
                        f"rank {other} did not exchange within {self.timeout_s:.0f} s; "
                        "it has died or hangs"
                    )
                time.sleep(NAP_S)


def num_bytes(num_ranks: int) -> int:
    """Return the size of the file that `num_ranks` ranks share."""
    return num_ranks * (LINE + 2 * SLOT_BYTES)


def create(num_ranks: int) -> Path:
    """Return a new file of zeros for `num_ranks` ranks; the caller unlinks it once all have it."""
    handle, name = tempfile.mkstemp(prefix="simclr_ray-", dir=FOLDER)
    with os.fdopen(handle, "wb") as file:
        file.truncate(num_bytes(num_ranks))
    return Path(name)
