"""All-gather of small vectors between processes of one machine, through shared memory.

Global batch norm exchanges some hundred numbers, twice a layer. gloo hands each such message
through four threads, which sleep and are woken; here a rank writes a slot and the others read it.
Measured with two ranks on two cores, 129 floats after 5 ms of arithmetic: 3,444 µs a message by
gloo, 573 µs by this (`benchmarks/results/collectives.json`). No library does it: torch's CPU
backends are gloo and MPI, which its wheels are built without, and its symmetric memory is for
CUDA. Nothing here knows torch.distributed: `collectives` decides when it is used, and
`scaling.shared_memory=false` turns it off.
"""

from __future__ import annotations

import fcntl
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

FOLDER: Final = "/dev/shm"  # nosec B108 # noqa: S108 - names by mkstemp
LINE: Final = 64  # counters of two ranks never share a cache line
HEAD: Final = 8  # bytes of a slot that hold the message's length
SLOT_BYTES: Final = 64 * 1024 - HEAD  # of a message; 8,000 numbers, and batch norm has 4,097
SPINS = 100  # some 20 µs; then sleep: the core may be what the peer or a decoder waits for
NAP_S: Final = 0.00005  # the kernel's own timer slack
LOOK_S: Final = 1.0  # how often a waiting rank looks whether the other is alive


def is_supported() -> bool:
    """Return whether this machine keeps the order of stores that the protocol relies on."""
    return platform.machine() in {"x86_64", "AMD64"} and Path(FOLDER).is_dir()


class SharedVectors:
    """One mapped file: of each rank a counter and two slots.

    Call number c writes slot c mod 2, then the counter. Two slots suffice: a rank writes call
    c + 2 only when all counters have reached c + 1, so when all ranks have read call c. A rank
    holds a lock on the byte of its number, which the kernel drops when the process ends, however
    it ends.

    Args:
        path: A file of `num_bytes(num_ranks)`, opened by every rank.
        rank: This rank.
        num_ranks: R.
        timeout_s: How long a call waits for the others.

    Raises:
        OSError: The file cannot be opened or mapped.
    """

    def __init__(self, path: Path, rank: int, num_ranks: int, timeout_s: float) -> None:
        self.file = path.open("r+b")  # closing it would drop the lock
        fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, rank)
        self.memory = mmap.mmap(self.file.fileno(), num_bytes(num_ranks))
        self.rank, self.num_ranks, self.timeout_s = rank, num_ranks, timeout_s
        self.counters = memoryview(self.memory)[: num_ranks * LINE].cast("q")[:: LINE // 8]
        bodies = np.frombuffer(self.memory, np.uint8, offset=num_ranks * LINE)
        slots = torch.from_numpy(bodies).view(2, num_ranks, HEAD + SLOT_BYTES)
        self.lengths, self.bodies = slots[..., :HEAD].view(torch.int64), slots[..., HEAD:]
        self.calls = 0

    def all_gather(self, vector: Tensor) -> Tensor:
        """Return [R, n] of each rank's contiguous CPU vector [n] of at most SLOT_BYTES bytes.

        Raises:
            TimeoutError: A rank did not come.
            ConnectionError: A rank has ended.
            RuntimeError: Ranks brought vectors of different lengths: they are at different calls.
        """
        raw = vector.view(torch.uint8)
        slot = self.calls % 2
        self.bodies[slot, self.rank, : len(raw)] = raw
        self.lengths[slot, self.rank] = len(raw)
        self.calls += 1
        self.counters[self.rank] = self.calls
        self._wait()
        lengths = self.lengths[slot, :, 0].tolist()
        if lengths != [len(raw)] * self.num_ranks:
            raise RuntimeError(f"ranks exchange vectors of different lengths, in bytes: {lengths}")
        return self.bodies[slot, :, : len(raw)].clone().view(vector.dtype)

    def _wait(self) -> None:
        counters, calls = self.counters, self.calls
        for other in range(self.num_ranks):
            tries = 0
            while counters[other] < calls:
                tries += 1
                if tries > SPINS:
                    self._wait_asleep(other)

    def _wait_asleep(self, other: int) -> None:
        began = looked = time.monotonic()
        while self.counters[other] < self.calls:
            time.sleep(NAP_S)
            now = time.monotonic()
            if now - began > self.timeout_s:
                raise TimeoutError(f"rank {other} did not come within {self.timeout_s:.0f} s")
            if now - looked > LOOK_S:
                looked = now
                self._check_alive(other)

    def _check_alive(self, other: int) -> None:
        try:
            fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, other)
        except OSError:
            return  # it holds its lock
        if self.counters[other] < self.calls:
            raise ConnectionError(f"rank {other} has ended")


def num_bytes(num_ranks: int) -> int:
    """Return the size of the file that `num_ranks` ranks share."""
    return num_ranks * (LINE + 2 * (HEAD + SLOT_BYTES))


def create(num_ranks: int) -> Path:
    """Return a new file of zeros for `num_ranks` ranks; the caller unlinks it once all have it.

    Raises:
        OSError: There is no room, or no right to write.
    """
    handle, name = tempfile.mkstemp(prefix=f"simclr_ray-{os.getpid()}-", dir=FOLDER)
    with os.fdopen(handle, "wb"):
        try:
            # not a sparse file: a full tmpfs would kill the ranks that touch it
            os.posix_fallocate(handle, 0, num_bytes(num_ranks))
        except OSError:
            Path(name).unlink()
            raise
    return Path(name)
