"""Decoded images, kept once on a node and shared by the processes there.

A set that fits is decoded once by all decode actors of a node together, and lies in memory once.
The images are in an anonymous file (memfd) that each process maps. The kernel frees it when the
last process that has it ends, however it ends, so nothing is left behind; what finds it is a small
text file that names processes and their descriptors. Where there is no such file (another system,
no /proc), a process keeps its images for itself.

No library does it. `multiprocessing.shared_memory` leaves its segment behind when a process is
killed, or its resource tracker unlinks it while others use it. Ray's object store keeps what a
`put` wrote for good as it is, so that a cache that grows would be an object an image, each with an
owner that it is lost with; and it spills to disk what is cheaper decoded again.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import mmap
import os
import re
import stat
import struct
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]
log = logging.getLogger(__name__)
KEY: Final = re.compile(r"[0-9a-f]{24}")  # what the register of a file is called
LAYOUT: Final = 1  # of the file; processes of different layouts share none
HEAD_BYTES: Final = 64  # of the file: one int64, the bytes in use
ENTRY: Final = struct.Struct("=qii")  # id, height, width; the pixels follow
ALIGNMENT: Final = 16


_kept: list[ImageCache] | None = None


def keep_newest() -> None:
    """Keep the images of the cache that is opened last, beyond its use: for the next run here.

    For a process that makes run after run, usually of the same images.
    """
    global _kept
    _kept = [] if _kept is None else _kept


class DecodedImage(NamedTuple):
    """A decoded row: its id, and uint8 [H, W, C], not to be written to."""

    id: int
    pixels: Pixels


class ImageCache:
    """Decoded images by row number, up to a budget; what is kept is never dropped.

    An epoch visits each row once, so whatever is kept is found once an epoch, and dropping one
    image for another could only lose. The file holds the bytes in use, for each row the place of
    its entry (0: none), and the entries. Places are written, and read by `find`, under a lock on
    the file, entries are written before their place: what is found is whole.

    Args:
        name: What the images depend on. Processes of a node that give the same name, number of
            rows and budget share; an empty name shares with none.
        num_rows: Of the dataset.
        budget: Bytes for images.
        channels: C of the images, which `name` has to tell.
    """

    def __init__(self, name: str, num_rows: int, budget: int, channels: int = 3) -> None:
        self.full, self.channels = budget <= 0, channels
        index_bytes = -(-8 * num_rows // ALIGNMENT) * ALIGNMENT
        size = HEAD_BYTES + index_bytes + max(budget, 0)
        self._file = _shared_file(name, num_rows, size) if name and not self.full else -1
        if self._file >= 0:
            weakref.finalize(self, os.close, self._file)
        # pages take memory when they are written to, not before
        self._memory = mmap.mmap(self._file, size)
        head = np.frombuffer(self._memory, np.int64, (HEAD_BYTES + index_bytes) // 8)
        self._used, self._places = head[:1], head[HEAD_BYTES // 8 :][:num_rows]
        with self._locked():
            self._used[0] = max(int(self._used[0]), HEAD_BYTES + index_bytes)
        if _kept is not None and self._file >= 0:
            _kept[:] = [self]

    def find(self, rows: Sequence[int]) -> list[DecodedImage | None]:
        """Return the image of each row, None where it is not kept."""
        with self._locked():
            places = self._places[np.asarray(rows, np.int64)].tolist()
        return [self._entry(place) if place else None for place in places]

    def holds(self, first: int, last: int) -> NDArray[np.bool_]:
        """Return which of the rows [first, last) are kept: bool [last - first]."""
        kept: NDArray[np.bool_] = self._places[first:last] != 0
        return kept

    def would_hold_all(self) -> bool:
        """Return whether all rows would have room, by those that are kept; where none is: no."""
        num = int(np.count_nonzero(self._places))
        index_bytes = -(-self._places.nbytes // ALIGNMENT) * ALIGNMENT
        room = len(self._memory) - HEAD_BYTES - index_bytes
        used = int(self._used[0]) - HEAD_BYTES - index_bytes
        return num > 0 and not self.full and used / num * len(self._places) <= room

    def keep(self, images: dict[int, DecodedImage]) -> None:
        """Keep these images of rows, as many as there is room for."""
        if self.full or not images:
            return
        places = self._reserve(images)
        for row, place in places.items():
            number, pixels = images[row]
            ENTRY.pack_into(self._memory, place, number, *pixels.shape[:2])
            begin = place + ENTRY.size
            self._memory[begin : begin + pixels.nbytes] = np.ascontiguousarray(pixels).data.cast(
                "B"
            )
        with self._locked():
            for row, place in places.items():
                self._places[row] = place

    def _reserve(self, images: dict[int, DecodedImage]) -> dict[int, int]:
        """Return a place for each image that is new and has room."""
        places = {}
        with self._locked():
            end = int(self._used[0])
            for row, image in images.items():
                if self._places[row]:
                    continue
                size = ENTRY.size + image.pixels.nbytes
                if end + size > len(self._memory):
                    self.full = True
                    break
                places[row] = end
                end += -(-size // ALIGNMENT) * ALIGNMENT
            self._used[0] = min(end, len(self._memory))
        return places

    def _entry(self, place: int) -> DecodedImage:
        number, height, width = ENTRY.unpack_from(self._memory, place)
        begin = place + ENTRY.size
        shape = (height, width, self.channels)
        return DecodedImage(number, np.ndarray(shape, np.uint8, self._memory, begin))

    @contextmanager
    def _locked(self) -> Iterator[None]:
        if self._file < 0:
            yield
            return
        fcntl.flock(self._file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(self._file, fcntl.LOCK_UN)


def _shared_file(name: str, num_rows: int, size: int) -> int:
    """Return a descriptor of the file that processes of this name share, -1 where none can be."""
    key = hashlib.sha256(repr((LAYOUT, name, num_rows, size)).encode()).hexdigest()[:24]
    if not hasattr(os, "memfd_create"):
        return -1
    try:
        folder = Path(tempfile.gettempdir()) / f"simclr_ray-images-{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        entry = folder.lstat()  # not what a link of somebody else leads to
        if not stat.S_ISDIR(entry.st_mode) or entry.st_uid != os.getuid():
            return -1
        _remove_registers_of_the_dead(folder, key)
        with (folder / key).open("a+") as register:
            fcntl.flock(register, fcntl.LOCK_EX)
            register.seek(0)
            entries = [line.strip() for line in register]
            alive = [entry for entry in entries if _leads_to(entry, key)]
            opened = (_opened(entry) for entry in alive)
            file = next((file for file in opened if file >= 0), -1)
            file = file if file >= 0 else _new(key, size)
            register.truncate(0)
            register.write("\n".join([*alive, f"{os.getpid()}/fd/{file}"]) + "\n")
    except OSError as error:
        log.warning("decoded images are kept by each process for itself: %s", error)
        return -1
    return file


def _remove_registers_of_the_dead(folder: Path, own: str) -> None:
    """Remove the registers of files that no process has any more, but for that of `own`.

    Whoever opens one at that moment writes into a file without a name, and decodes for itself.
    """
    for path in filter(lambda path: KEY.fullmatch(path.name), folder.iterdir()):
        with suppress(OSError, ValueError), path.open("r+") as register:
            fcntl.flock(register, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.name != own and not any(_leads_to(e.strip(), path.name) for e in register):
                path.unlink()


def _opened(entry: str) -> int:
    """Return a descriptor of the file at `PID/fd/N`, -1 where its process has just ended."""
    try:
        return os.open(f"/proc/{entry}", os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return -1


def _new(key: str, size: int) -> int:
    file = os.memfd_create(key)
    os.ftruncate(file, size)
    return file


def _leads_to(entry: str, key: str) -> bool:
    """Return whether `PID/fd/N` is the file of that key: a number may have gone to another."""
    try:
        return str(Path("/proc", entry).readlink()).startswith(f"/memfd:{key} ")
    except OSError:
        return False
