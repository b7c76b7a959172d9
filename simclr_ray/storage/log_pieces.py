"""A log of a run in a bucket: in pieces, since nothing can be appended to an object there.

<run>/metrics.jsonl                       from the first byte on
<run>/metrics.jsonl.pieces/000000262144   from that byte on, and so on

What has come since the last upload becomes a piece of its own, so that an upload is of what is new.
Of the small ones that this leaves at the end of a log, one is made when they are many or large
enough, and when the run ends. So a byte goes up twice; where less than `PIECE_BYTES / MOST_SMALL`
comes at a time, that much goes up again each time at most. A log that ends below `PIECE_BYTES` is
one file then, and one of an older release, a whole file of any size, is a first piece.

A name says where its piece begins. So a log is read right where a kill has left pieces that another
one holds as well, and while a driver puts some together.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Final, NamedTuple

from pyarrow import fs

from simclr_ray.config.logging import warn_once
from simclr_ray.errors import one_line
from simclr_ray.storage.filesystem import (
    entries_in,
    filesystem,
    read_file,
    remove_file,
    write_whole,
)

PIECE_BYTES: Final = 2**18  # from which on a piece stays as it is
MOST_SMALL: Final = 128  # pieces that are smaller
FOLDER: Final = ".pieces"  # ends the name of a log's folder of all pieces but the first
TRIES: Final = 3  # to read a log while its driver puts pieces together
READERS: Final = 16  # threads that read pieces: each is a request
log = logging.getLogger(__name__)


class LogPiece(NamedTuple):
    """An object, and which bytes of the log it holds."""

    path: str
    start: int
    end: int


class BucketLog:
    """A log in a bucket.

    One process at a time brings it up to date; any may read it.

    Args:
        files: The bucket.
        path: On it, of the log as if it were one file.
    """

    def __init__(self, files: fs.FileSystem, path: str) -> None:
        self.files, self.path = files, path
        self._pieces: list[LogPiece] = []  # without gaps, as they were when it was last read
        self._surplus: list[str] = []  # paths of objects that are to go

    @classmethod
    def at(cls, uri: str) -> BucketLog:
        """Return the log at a URI; raise `DataError` where its bucket cannot be opened."""
        return cls(*filesystem(uri))

    def read(self, last: int = 0) -> bytes | None:
        """Return what the log says, its `last` bytes unless 0; None where there is none.

        Where an object is missing, what is left is read and the loss said; the next upload then
        brings the whole log.

        Raises:
            OSError: The bucket does not answer.
        """
        tries = 0
        while True:
            pieces = self._listed()
            if not pieces:
                return None
            start = max(0, pieces[-1].end - last) if last else 0
            data, is_whole = self._joined([p for p in pieces if p.end > start], start)
            if is_whole:
                self._pieces = pieces
                return data
            tries += 1
            if tries == TRIES:
                break
        warn_once(log, f"{self.path} lacks a piece below {self.path}{FOLDER}; the rest is read")
        self._leave(pieces)
        return data

    def bring_up(self, local: Path, *, is_last: bool = False) -> None:
        """Upload what a local log has and this one has not.

        Args:
            local: The whole log: this one as it was read, and what was appended since.
            is_last: Leave no small pieces but one.

        Raises:
            OSError: The bucket takes nothing now. The next call makes good for it.
        """
        size = local.stat().st_size
        if self._pieces and size < self._pieces[-1].end:  # another log: this one makes way for it
            self._leave(self._pieces)
        end = self._pieces[-1].end if self._pieces else 0
        stay = self._staying()
        start = stay[-1].end if stay else 0
        small = len(self._pieces) - len(stay) + (size > end)
        if small < MOST_SMALL and size - start < PIECE_BYTES and not (is_last and small > 1):
            stay, start = self._pieces, end
        if size > start and (size > end or small > 1):
            self._write(local, start, size, stay)
        self._remove_surplus()

    def _leave(self, pieces: Sequence[LogPiece]) -> None:
        """Have the next upload write the whole log, in place of these pieces."""
        self._surplus += [p.path for p in pieces if p.start]
        self._pieces = []

    def _staying(self) -> list[LogPiece]:
        """Return the pieces without the small ones at the end."""
        count = len(self._pieces)
        while count and self._pieces[count - 1].end - self._pieces[count - 1].start < PIECE_BYTES:
            count -= 1
        return self._pieces[:count]

    def _write(self, local: Path, start: int, end: int, stay: Sequence[LogPiece]) -> None:
        """Write the last piece; those that it replaces but the first, which it overwrites, go."""
        with local.open("rb") as file:
            file.seek(start)
            data = file.read(end - start)
        piece = LogPiece(self._path_of(start), start, start + len(data))
        self.files.create_dir(piece.path.rpartition("/")[0], recursive=True)
        write_whole(self.files, piece.path, data)
        self._surplus += [p.path for p in self._pieces[len(stay) :] if p.start > start]
        self._pieces = [*stay, piece]

    def _remove_surplus(self) -> None:
        try:
            while self._surplus:
                remove_file(self.files, self._surplus[-1])
                self._surplus.pop()
        except OSError as error:  # whoever reads passes over it
            why = one_line(error)
            warn_once(log, f"{self.path}{FOLDER}: pieces that are joined cannot be removed ({why})")

    def _path_of(self, start: int) -> str:
        return f"{self.path}{FOLDER}/{start:012d}" if start else self.path

    def _listed(self) -> list[LogPiece]:
        """Return the pieces that are needed, in order; all others are surplus."""
        first = self.files.get_file_info(self.path)
        all_pieces = [LogPiece(self.path, 0, first.size)] if first.is_file else []
        for entry in entries_in(self.files, f"{self.path}{FOLDER}"):
            if entry.is_file and entry.base_name.isdecimal():
                start = int(entry.base_name)
                all_pieces.append(LogPiece(entry.path, start, start + entry.size))
        pieces, self._surplus = list[LogPiece](), []
        for piece in sorted(all_pieces, key=lambda p: p.start):
            if pieces and piece.end <= pieces[-1].end:
                self._surplus.append(piece.path)
            else:
                pieces.append(piece)
        return pieces

    def _joined(self, pieces: Sequence[LogPiece], start: int) -> tuple[bytes, bool]:
        """Return the bytes of pieces from `start` on, and whether there were no gaps."""
        read = partial(self._bytes_of, start=start)
        if len(pieces) == 1:
            contents = [read(pieces[0])]
        else:
            with ThreadPoolExecutor(READERS) as pool:
                contents = list(pool.map(read, pieces))
        parts, end, is_whole = list[bytes](), start, True
        for piece, content in zip(pieces, contents, strict=True):
            begin = max(piece.start, start)
            if content is not None and begin + len(content) > end:
                is_whole = is_whole and begin <= end
                parts.append(content[max(end - begin, 0) :])
                end = begin + len(content)
        return b"".join(parts), is_whole and end >= max((p.end for p in pieces), default=start)

    def _bytes_of(self, piece: LogPiece, start: int) -> bytes | None:
        """Return the bytes of a piece from `start` on; None where it has just gone."""
        skipped = max(start - piece.start, 0)
        return read_file(self.files, piece.path, start=skipped)
