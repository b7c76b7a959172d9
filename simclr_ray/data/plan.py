"""The batch plan: global step k is these rows, a pure function of (seed, k).

The row groups of an epoch are put in a random order; the rows in that order are cut into lanes,
equal runs whose number comes from the manifest alone; within a lane, rows are shuffled again in
windows. A global batch takes its share of each lane, lane by lane, and rank r of R takes rows
[r·B//R, (r+1)·B//R) of that list: so ranks (and the decode actors of a rank) read different lanes,
each row group is read once an epoch and in one piece, and the batch is the same for every R.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from simclr_ray.augment.keyed import integers, permutation
from simclr_ray.dist import share
from simclr_ray.errors import DataError

ROW_GROUPS_PER_LANE = 20
Rows = NDArray[np.int64]


@dataclass(frozen=True)
class BatchPlan:
    """Which rows each global batch holds.

    Args:
        group_sizes: Rows of each row group, in file order.
        batch_size: B, images in a global batch.
        seed: 32 bits.
        shuffle_rows: Rows that the windows of all lanes hold together.

    Raises:
        DataError: There are fewer rows than a batch takes.
    """

    group_sizes: tuple[int, ...]
    batch_size: int
    seed: int
    shuffle_rows: int

    def __post_init__(self) -> None:
        if self.num_rows < self.batch_size:
            raise DataError(
                f"{self.num_rows} rows do not fill one global batch of {self.batch_size}; "
                "lower batch_size or bring more pictures"
            )

    @property
    def num_rows(self) -> int:
        """Rows of the dataset."""
        return sum(self.group_sizes)

    @property
    def steps_per_epoch(self) -> int:
        """Whole global batches in an epoch; the tail is dropped."""
        return self.num_rows // self.batch_size

    @property
    def num_lanes(self) -> int:
        """At most one lane per 20 row groups, at least one, never more than B."""
        return min(max(1, len(self.group_sizes) // ROW_GROUPS_PER_LANE), self.batch_size)

    def rows(self, step: int) -> Rows:
        """Return the rows of global step `step`, lane by lane: int64 [B]."""
        return self.rows_of(step, 0, self.batch_size)

    def rows_of(self, step: int, first: int, last: int) -> Rows:
        """Return places [first, last) of the list of `step`, touching only their lanes."""
        epoch, k = divmod(step, self.steps_per_epoch)
        parts = []
        for lane in range(self.num_lanes):
            lane_first, lane_last = share(self.batch_size, lane, self.num_lanes)
            low, high = max(first, lane_first), min(last, lane_last)
            if low < high:
                taken = k * (lane_last - lane_first)
                inside = np.arange(taken + low - lane_first, taken + high - lane_first)
                parts.append(self._lane_rows(epoch, lane, inside))
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def epoch_of(self, step: int) -> int:
        """Return the epoch that `step` belongs to, from 0."""
        return step // self.steps_per_epoch

    def _lane_rows(self, epoch: int, lane: int, places: Rows) -> Rows:
        """Return the rows at `places` of a lane."""
        first, last = (
            self.steps_per_epoch * b for b in share(self.batch_size, lane, self.num_lanes)
        )
        window = max(self.shuffle_rows // self.num_lanes, max(self.group_sizes))
        rows = np.empty(len(places), np.int64)
        for index in np.unique(places // window):
            start = first + int(index) * window
            order = _window(self, epoch, start, min(start + window, last))
            chosen = places // window == index
            rows[chosen] = order[places[chosen] - int(index) * window]
        return rows


@lru_cache(maxsize=4)
def _group_order(plan: BatchPlan, epoch: int) -> tuple[Rows, Rows]:
    """Return the first row of each row group in the epoch's order, and its place in the epoch."""
    order = permutation(len(plan.group_sizes), seed=plan.seed, epoch=epoch, sub=0, purpose="order")
    sizes = np.array(plan.group_sizes, np.int64)
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    places = np.concatenate([[0], np.cumsum(sizes[order])])
    return starts[order], places


@lru_cache(maxsize=256)
def _window(plan: BatchPlan, epoch: int, start: int, stop: int) -> Rows:
    """Return the shuffled rows of places [start, stop) of the epoch."""
    places = np.arange(start, stop)
    keys = integers(places, seed=plan.seed, epoch=epoch, sub=0, purpose="window")
    shuffled = places[np.argsort(keys, kind="stable")]
    starts, ends = _group_order(plan, epoch)
    group = np.searchsorted(ends, shuffled, side="right") - 1
    rows: Rows = starts[group] + shuffled - ends[group]
    return rows


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
