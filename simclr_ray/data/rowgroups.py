"""The encoded row groups of a part: each is read once an epoch, before its first use.

The plan says between which steps a window of the part asks for rows of a group. A group is read
before the first of them and dropped after the last, and each row's bytes are dropped when the row
is taken. As the rows of the windows in use are taken, groups of the next ones are read in the
background: what is held stays near the windows' size, and reading overlaps decoding.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import numpy as np

from simclr_ray.data.image_groups import ImageGroups
from simclr_ray.data.plan import BatchPlan
from simclr_ray.data.source import Source
from simclr_ray.storage.filesystem import filesystem, is_local

# A request to a bucket waits for the network; local files are read faster than they are decoded.
LOCAL_THREADS, REMOTE_THREADS = 1, 4
# Groups looked at in a step before they are due: in a set that is all decoded, twenty thousand
# would be passed over in one step otherwise.
MOST_AHEAD = 64
RECENT_BYTES = 64 * 2**20


class EncodedRow(NamedTuple):
    """A row as the file has it: its id, the encoded image, and the file that it was.

    `image` is None where there is none, `path` empty where the dataset does not name it.
    """

    id: int
    image: bytes | None
    path: str = ""


EncodedRows = dict[int, EncodedRow]


class RowGroups:
    """The encoded rows that the windows of a part can still ask for.

    Held are, of rows that were not taken yet, at most the windows of the part's lanes and two row
    groups a lane, those that are being read included.

    Args:
        source: The dataset.
        plan: Over its row groups.
        places: [first, last) of the global batch's list: the part.
        stop: The step before which the run ends; nothing is read for later ones.
        missing: Called, in other threads too, with [first, last): those of these rows that are
            still to be decoded.
        read_beyond_epoch: Whether to read ahead for the next epoch now. While decoded rows are
            still being added to a cache, they may all be there by then.
        images: The groups of images that the plan is of; of each, two rows are held.
    """

    def __init__(
        self,
        source: Source,
        plan: BatchPlan,
        places: tuple[int, int],
        stop: int,
        *,
        missing: Callable[[int, int], list[int]],
        read_beyond_epoch: Callable[[], bool],
        images: ImageGroups | None = None,
    ) -> None:
        self.images = images
        self.source, self.plan, self.places, self.stop = source, plan, places, stop
        self.missing, self.read_beyond_epoch = missing, read_beyond_epoch
        self.room = plan.window_rows * sum(1 for _ in plan.lane_slices(*places))  # rows
        self.room *= 2 if images else 1
        self._starts = [g.first_row for g in source.row_groups]
        fs, _ = filesystem(source.uri)
        threads = LOCAL_THREADS if is_local(fs) else REMOTE_THREADS
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="row-groups")
        self._held: dict[tuple[int, int], _Held] = {}
        self._step = stop  # the first call begins anew
        self._visits: Iterator[_Visit] = iter(())
        self._next: _Visit | None = None

    @property
    def num_held(self) -> int:
        """Rows that are held or being read."""
        return sum(held.num_rows for held in self._held.values())

    def advance(self, step: int) -> None:
        """Make ready for `step`: drop what is past, start to read what can be asked for."""
        if not self.room:
            return
        if step < self._step:
            self._begin(step)
        self._step = step
        for key in [key for key, held in self._held.items() if held.last_step < step]:
            self._held.pop(key).drop()
        held, ahead = self.num_held, 0
        while self._next is not None:
            visit = self._next
            due = visit.first_step <= step
            if not due and (ahead == MOST_AHEAD or not self._may_read(visit, held)):
                return
            if visit.last_step >= step:
                held += self._start(visit)
            self._next = next(self._visits, None)
            ahead += not due

    def take(self, row: int) -> EncodedRow | None:
        """Return a row that the step asks for, and hold it no longer; None where it is not held.

        Raises:
            DataError: A file is gone, changed, or broken.
        """
        group = bisect_right(self._starts, row) - 1
        held = self._held.get((self.plan.epoch_of(self._step), group))
        return held.rows().pop(row, None) if held is not None else None

    def _begin(self, step: int) -> None:
        for held in self._held.values():
            held.drop()
        self._held.clear()
        self._step = step
        self._visits = self._visits_from(step)
        self._next = next(self._visits, None)

    def _visits_from(self, step: int) -> Iterator[_Visit]:
        epoch = self.plan.epoch_of(step)
        while (base := epoch * self.plan.steps_per_epoch) < self.stop:
            visits = self.plan.visits(epoch, *self.places)
            for group, first, last in zip(*(column.tolist() for column in visits), strict=True):
                yield _Visit(epoch, group, base + first, base + last)
            epoch += 1

    def _may_read(self, visit: _Visit, held: int) -> bool:
        """Return whether a group that is not due yet may be read now."""
        if visit.first_step >= self.stop:
            return False
        if visit.epoch > self.plan.epoch_of(self._step) and not self.read_beyond_epoch():
            return False
        return held + self._num_drawn(visit.group) <= self.room

    def _start(self, visit: _Visit) -> int:
        """Start to read a group, unless all its rows are decoded; return the rows it holds."""
        if not self._undecoded(visit.group, visit.epoch):
            return 0
        read, num_rows = partial(self._read, visit.group, visit.epoch), self._num_drawn(visit.group)
        self._held[visit.epoch, visit.group] = _Held(
            visit.last_step, num_rows, self._pool.submit(read), read
        )
        return num_rows

    def _read(self, index: int, epoch: int) -> EncodedRows:
        rows = read_encoded(self.source, index)
        return {r: rows[r] for r in self._undecoded(index, epoch)}

    def _undecoded(self, index: int, epoch: int) -> list[int]:
        """Return the rows of a row group that the epoch shows and that are still to be decoded."""
        group = self.source.row_groups[index]
        missing = self.missing(group.first_row, group.first_row + group.num_rows)
        if self.images is None or not missing:
            return missing
        pairs = self.images.pairs(self.images.within(index), seed=self.plan.seed, epoch=epoch)
        drawn: list[int] = np.intersect1d(np.concatenate(pairs), missing).tolist()
        return drawn

    def _num_drawn(self, index: int) -> int:
        """Return the most rows of a row group that an epoch shows."""
        num_rows = self.source.row_groups[index].num_rows
        return num_rows if self.images is None else min(num_rows, 2 * self.plan.group_sizes[index])


class RecentGroups:
    """Any row of the dataset, through the row groups that were asked for last: for stand-ins.

    Each stand-in that is not decoded yet costs the reading of a row group.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self._starts = [g.first_row for g in source.row_groups]
        self._groups: OrderedDict[int, EncodedRows] = OrderedDict()

    def take(self, row: int) -> EncodedRow:
        """Return a row.

        Raises:
            DataError: A file is gone, changed, or broken.
        """
        group = bisect_right(self._starts, row) - 1
        if group not in self._groups:
            self._groups[group] = read_encoded(self.source, group)
            while len(self._groups) > 1 and self._num_bytes() > RECENT_BYTES:
                self._groups.popitem(last=False)
        self._groups.move_to_end(group)
        return self._groups[group][row]

    def _num_bytes(self) -> int:
        images = (row.image for rows in self._groups.values() for row in rows.values())
        return sum(len(image) for image in images if image is not None)


def read_encoded(source: Source, index: int) -> EncodedRows:
    """Return the rows of a row group by their number in the dataset.

    Raises:
        DataError: A file is gone, changed, or broken.
    """
    rows = source.read_group(index, labels=False)
    paths = rows.paths or [None] * len(rows.images)
    columns = zip(rows.ids.tolist(), rows.images, paths, strict=True)
    encoded = (EncodedRow(row_id, image, path or "") for row_id, image, path in columns)
    return dict(enumerate(encoded, start=source.row_groups[index].first_row))


class _Visit(NamedTuple):
    """A row group, and the first and last global step of an epoch that ask for rows of it."""

    epoch: int
    group: int
    first_step: int
    last_step: int


class _Held:
    """A row group that is read, being read, or waiting for it: its rows that were not taken."""

    def __init__(
        self,
        last_step: int,
        num_rows: int,
        future: Future[EncodedRows],
        read: Callable[[], EncodedRows],
    ) -> None:
        self.last_step, self._expected = last_step, num_rows
        self._future, self._read = future, read
        self._rows: EncodedRows | None = None

    @property
    def num_rows(self) -> int:
        return self._expected if self._rows is None else len(self._rows)

    def rows(self) -> EncodedRows:
        """Return the rows, read here if the thread has not come to it, or has failed.

        A bucket that did not answer some minutes ago is no reason to end a run.
        """
        if self._rows is None:
            failed = self._future.cancel() or self._future.exception() is not None
            self._rows = self._read() if failed else self._future.result()
        return self._rows

    def drop(self) -> None:
        self._future.cancel()
