"""The batch plan is a pure function that covers each row once an epoch, for any ranks."""

from __future__ import annotations

import numpy as np
import pytest

from simclr_ray.data.plan import BatchPlan, replacement
from simclr_ray.errors import DataError

MANY = BatchPlan(tuple([50, 70, 13] * 35), batch_size=64, seed=3, shuffle_rows=600)
FEW = BatchPlan((100, 40), batch_size=30, seed=3, shuffle_rows=65_536)


@pytest.mark.parametrize("plan", [MANY, FEW], ids=["five lanes", "one lane"])
@pytest.mark.parametrize("epoch", [0, 2])
def test_an_epoch_visits_rows_at_most_once_and_drops_less_than_a_batch(
    plan: BatchPlan, epoch: int
) -> None:
    steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
    rows = np.concatenate([plan.rows(step) for step in steps])
    assert len(np.unique(rows)) == len(rows) == plan.steps_per_epoch * plan.batch_size
    assert rows.min() >= 0
    assert rows.max() < plan.num_rows


def test_the_number_of_lanes_comes_from_the_row_groups() -> None:
    assert MANY.num_lanes == 5
    assert FEW.num_lanes == 1


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 7, 64])
def test_ranks_hold_the_global_batch_in_order(num_ranks: int) -> None:
    n = MANY.batch_size
    shares = [(r * n // num_ranks, (r + 1) * n // num_ranks) for r in range(num_ranks)]
    for step in (0, 17, MANY.steps_per_epoch + 1):
        joined = np.concatenate([MANY.rows_of(step, a, b) for a, b in shares])
        assert joined.tolist() == MANY.rows(step).tolist()


def test_a_lane_reads_its_own_run_of_row_groups_only() -> None:
    starts = np.cumsum([0, *MANY.group_sizes])
    seen = []
    for lane in range(MANY.num_lanes):
        share = (lane * 64 // 5, (lane + 1) * 64 // 5)
        rows = np.concatenate([MANY.rows_of(s, *share) for s in range(MANY.steps_per_epoch)])
        seen.append(set(np.searchsorted(starts, rows, side="right").tolist()))
    shared = [a & b for i, a in enumerate(seen) for b in seen[:i]]
    assert all(len(both) <= 1 for both in shared)  # the group that a border falls into


def test_epochs_and_seeds_order_rows_differently_and_repeat_exactly() -> None:
    again = BatchPlan(FEW.group_sizes, 30, 3, 65_536)
    other = BatchPlan(FEW.group_sizes, 30, 4, 65_536)
    assert FEW.rows(1).tolist() == again.rows(1).tolist()
    assert FEW.rows(1).tolist() != other.rows(1).tolist()
    assert FEW.rows(1).tolist() != FEW.rows(1 + FEW.steps_per_epoch).tolist()


def test_a_global_batch_mixes_the_whole_window() -> None:
    # 30 of 140 rows: the chance that all come from one half of the file is below 1e-8
    rows = FEW.rows(0)
    assert rows.min() < 70 <= rows.max()


def test_too_few_rows_for_a_batch_are_refused() -> None:
    with pytest.raises(DataError, match="20 rows do not fill one global batch of 30"):
        BatchPlan((20,), 30, 0, 100)


def test_replacements_are_new_to_the_batch_and_differ_between_places() -> None:
    batch = MANY.rows(5).tolist()
    named = {
        place: {
            replacement(row, place, batch, attempt, plan=MANY, epoch=0) for attempt in range(20)
        }
        - {-1}
        for place, row in enumerate(batch)
    }
    assert all(named.values())
    assert not set().union(*named.values()) & set(batch)
    for place, rows in named.items():
        assert {row % MANY.batch_size for row in rows} == {place}
