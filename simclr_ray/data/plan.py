"""The batch plan: global step k is these rows, a pure function of (seed, k).

The row groups of an epoch are put in a random order; the rows in that order are cut into lanes,
equal runs whose number comes from the manifest alone; within a lane, rows are shuffled again in
windows. A global batch takes its share of each lane, lane by lane, and rank r of R takes rows
[r·B//R, (r+1)·B//R) of that list: so ranks (and the decode actors of a rank) read different lanes,
each row group is read once an epoch and in one piece, and the batch is the same for every R.

Where images are in groups (`image_groups`), what is planned are the groups: read "group of images"
for "row", numbered over the row groups that they lie in.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from simclr_ray.augment.philox import integers, permutation
from simclr_ray.distributed.collectives import partition
from simclr_ray.errors import DataError

ROW_GROUPS_PER_LANE = 20
# Parts whose number divides that of the lanes share none: L lanes in R parts are cut at
# ⌊r·B/R⌋ = ⌊(r·L/R)·B/L⌋, whatever B. So the usual numbers of parts divide the larger of these. The
# largest bounds the memory of a single part, which holds a window and its row groups of each lane.
LANES = (1, 2, 3, 4, 6, 12, 24, 48, 96, 192)
RowNumbers = NDArray[np.int64]


class LaneSlice(NamedTuple):
    """What a part takes of a lane at each step: places [low, high) of the lane's `width`."""

    lane: int
    low: int
    high: int
    width: int


class Visits(NamedTuple):
    """The row groups that a part reads in an epoch, in the order in which it needs them.

    All int64 [m]; the steps count from the epoch's first.
    """

    groups: RowNumbers
    first_step: RowNumbers  # before which no window asks for a row of the group
    last_step: RowNumbers  # after which none does


@dataclass(frozen=True)
class BatchPlan:
    """Which rows each global batch holds.

    Args:
        group_sizes: Rows of each row group, in file order.
        batch_size: B, images in a global batch.
        seed: 32 bits.
        shuffle_rows: Rows that the windows of all lanes hold together.
        unit: What the rows are, for messages.

    Raises:
        DataError: There are fewer rows than a batch takes.
    """

    group_sizes: tuple[int, ...]
    batch_size: int
    seed: int
    shuffle_rows: int
    unit: str = "rows"

    def __post_init__(self) -> None:
        if self.num_rows < self.batch_size:
            raise DataError(
                f"{self.num_rows} {self.unit} do not fill one global batch of {self.batch_size}; "
                "lower batch_size or bring more images"
            )

    @cached_property
    def num_rows(self) -> int:
        """Rows of the dataset."""
        return sum(self.group_sizes)

    @property
    def steps_per_epoch(self) -> int:
        """Whole global batches in an epoch; the tail is dropped."""
        return self.num_rows // self.batch_size

    @cached_property
    def num_lanes(self) -> int:
        """The largest of `LANES` that is at most one per 20 row groups and at most B."""
        most = min(len(self.group_sizes) // ROW_GROUPS_PER_LANE, self.batch_size)
        return max(number for number in LANES if number <= max(1, most))

    @cached_property
    def window_rows(self) -> int:
        """Rows of a lane that are shuffled together: at least the largest row group's."""
        return max(self.shuffle_rows // self.num_lanes, max(self.group_sizes))

    def rows(self, step: int) -> RowNumbers:
        """Return the rows of global step `step`, lane by lane: int64 [B]."""
        return self.rows_of(step, 0, self.batch_size)

    def rows_of(self, step: int, first: int, last: int) -> RowNumbers:
        """Return places [first, last) of the list of `step`, touching only their lanes."""
        epoch, k = divmod(step, self.steps_per_epoch)
        parts = [
            self._lane_rows(
                epoch, piece.lane, k * piece.width + piece.low, k * piece.width + piece.high
            )
            for piece in self.lane_slices(first, last)
        ]
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def epoch_of(self, step: int) -> int:
        """Return the epoch that `step` belongs to, from 0."""
        return step // self.steps_per_epoch

    def lane_slices(self, first: int, last: int) -> Iterator[LaneSlice]:
        """Yield what places [first, last) of a global batch take of each lane they touch."""
        lanes, batch = self.num_lanes, self.batch_size
        for lane in range(first * lanes // batch, lanes):
            lane_first, lane_last = partition(batch, lane, lanes)
            if lane_first >= last:
                return
            low, high = max(first, lane_first), min(last, lane_last)
            if low < high:
                yield LaneSlice(lane, low - lane_first, high - lane_first, lane_last - lane_first)

    def visits(self, epoch: int, first: int, last: int) -> Visits:
        """Return which row groups places [first, last) need in `epoch`, and in which steps.

        A row group on the border of two lanes of a part is needed at the end of the one and at the
        beginning of the other: it is visited once, for the whole of that time.
        """
        window = self.window_rows
        order, ends = self._epoch_order(epoch)
        row_numbers: list[RowNumbers] = []
        for piece in self.lane_slices(first, last):
            start, stop = self._lane_places(piece.lane)
            low = int(np.searchsorted(ends, start, side="right")) - 1
            high = int(np.searchsorted(ends, stop, side="left"))
            begin = np.maximum(ends[low:high], start) - start
            end = np.minimum(ends[low + 1 : high + 1], stop) - start
            opens = begin // window * window
            closes = np.minimum(-(-end // window) * window, stop - start) - 1
            row_numbers.append(
                np.stack([order[low:high], opens // piece.width, closes // piece.width])
            )
        if not row_numbers:
            return Visits(*np.empty((3, 0), np.int64))
        groups, opens, closes = np.concatenate(row_numbers, axis=1)
        unique, where = np.unique(groups, return_inverse=True)
        first_step = np.full(len(unique), self.steps_per_epoch)
        last_step = np.zeros(len(unique), np.int64)
        np.minimum.at(first_step, where, opens)
        np.maximum.at(last_step, where, closes)
        by_need = np.argsort(first_step, kind="stable")
        return Visits(unique[by_need], first_step[by_need], last_step[by_need])

    def _lane_places(self, lane: int) -> tuple[int, int]:
        """Return [start, stop) of a lane among the places of an epoch."""
        first, last = partition(self.batch_size, lane, self.num_lanes)
        return self.steps_per_epoch * first, self.steps_per_epoch * last

    def _lane_rows(self, epoch: int, lane: int, low: int, high: int) -> RowNumbers:
        """Return the rows at places [low, high) of a lane."""
        window = self.window_rows
        start, stop = self._lane_places(lane)
        parts = []
        for index in range(low // window, (high - 1) // window + 1):
            begin = index * window
            order = self._window(epoch, start + begin, min(start + begin + window, stop))
            parts.append(order[max(low - begin, 0) : high - begin])
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _window(self, epoch: int, start: int, stop: int) -> RowNumbers:
        """Return the shuffled rows of places [start, stop) of the epoch."""
        key = (epoch, start)
        if key in self._windows:
            self._windows.move_to_end(key)
            return self._windows[key]
        places = np.arange(start, stop)
        keys = integers(places, seed=self.seed, epoch=epoch, sub=0, purpose="window")
        shuffled = places[np.argsort(keys, kind="stable")]
        order, ends = self._epoch_order(epoch)
        at = np.searchsorted(ends, shuffled, side="right") - 1
        rows: RowNumbers = self._starts[order[at]] + shuffled - ends[at]
        self._windows[key] = rows
        while len(self._windows) > 2 * self.num_lanes + 2:  # this one and the next of each lane
            self._windows.popitem(last=False)
        return rows

    def _epoch_order(self, epoch: int) -> tuple[RowNumbers, RowNumbers]:
        """Return the row groups in the epoch's order, and the places between them [m + 1]."""
        if epoch not in self._orders:
            count = len(self.group_sizes)
            order = permutation(count, seed=self.seed, epoch=epoch, sub=0, purpose="order")
            self._orders[epoch] = order, np.concatenate([[0], np.cumsum(self._sizes[order])])
            while len(self._orders) > 3:
                self._orders.popitem(last=False)
        return self._orders[epoch]

    @cached_property
    def _sizes(self) -> RowNumbers:
        return np.array(self.group_sizes, np.int64)

    @cached_property
    def _starts(self) -> RowNumbers:
        return np.cumsum(self._sizes) - self._sizes

    @cached_property
    def _windows(self) -> OrderedDict[tuple[int, int], RowNumbers]:
        return OrderedDict()

    @cached_property
    def _orders(self) -> OrderedDict[int, tuple[RowNumbers, RowNumbers]]:
        return OrderedDict()


def replacement(
    row: int, place: int, batch: Collection[int], attempt: int, *, plan: BatchPlan, epoch: int
) -> int:
    """Return the row that stands in for an unusable `row`, or -1 if this attempt names none.

    A pure function of (seed, epoch, row, attempt). Candidates for place p of the batch are rows
    p, p + B, p + 2B, …, so two replacements of one batch can never be the same row, whoever makes
    them; rows already planned for the batch are passed over.
    """
    choices = -(-(plan.num_rows - place) // plan.batch_size)
    key = integers(np.array([row]), seed=plan.seed, epoch=epoch, sub=attempt, purpose="replacement")
    candidate = place + plan.batch_size * int(key[0] % np.uint64(choices))
    return -1 if candidate in batch else candidate
