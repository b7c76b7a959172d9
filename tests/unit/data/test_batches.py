"""The rows of a planned batch become views, whoever makes which part, bad rows and all."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from simclr_ray import config as cfg
from simclr_ray.augment.decode import ImageDecoder, decode_image
from simclr_ray.config.experiment import Experiment
from simclr_ray.data.batch import Batch
from simclr_ray.data.batches import (
    BatchBuilder,
    build_plan,
    build_views,
    join,
    local_batches,
)
from simclr_ray.data.row_reader import RowReader
from simclr_ray.data.source import Source
from simclr_ray.errors import DataError, TooManyBadImages
from tests.ray.images import noise_png

NUM_ROWS, BATCH = 60, 12
FIRST_ID = 1000  # ids are no row numbers here


Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write NUM_ROWS images in groups of 7; rows named bad are text, or null."""

    def make(bad: tuple[int, ...] = (), null: tuple[int, ...] = ()) -> Path:
        images = [
            None if i in null else b"no image" if i in bad else noise_png(i, 16)
            for i in range(NUM_ROWS)
        ]
        table = pa.table(
            {
                "id": pa.array(range(FIRST_ID, FIRST_ID + NUM_ROWS), pa.int64()),
                "image": pa.array(images, pa.binary()),
                "path": [f"cats/{i}.png" for i in range(NUM_ROWS)],
            }
        )
        pq.write_table(table, tmp_path / "set.parquet", row_group_size=7)
        return tmp_path / "set.parquet"

    return make


def experiment(path: Path, *overrides: str) -> Experiment:
    tree = {
        "name": "t",
        "seed": 3,
        "data": {"train": str(path), "max_bad_fraction": 0.5},
        "augment": {"size": 16},
        "batch_size": BATCH,
    }
    return cfg.validate(Experiment, cfg.apply_overrides(tree, overrides))


def opened(e: Experiment) -> Source:
    return Source.open(e.data.train, e.data.columns, e.data.limit)


def whole(e: Experiment, steps: range) -> list[Batch]:
    return list(local_batches(e, opened(e), steps))


def in_parts(e: Experiment, steps: range, cuts: list[int]) -> list[Batch]:
    """Return the batches joined from parts cut at `cuts`, each made by a builder of its own."""
    source = opened(e)
    edges = [0, *cuts, e.batch_size]
    builders = [
        BatchBuilder(source, build_plan(e, source), build_views(e.augment, e.seed), e.data, places)
        for places in pairwise(edges)
    ]
    return [join([builder.make(step) for builder in builders]) for step in steps]


def assert_equal(ours: list[Batch], theirs: list[Batch]) -> None:
    assert len(ours) == len(theirs)
    for x, y in zip(ours, theirs, strict=True):
        assert x.step == y.step
        for name in ("a", "b", "ids", "bad"):
            assert torch.equal(getattr(x, name), getattr(y, name)), (x.step, name)


def test_a_batch_holds_the_planned_rows_and_the_views_of_their_ids(write: Write) -> None:
    e = experiment(write())
    source = opened(e)
    plan, views = build_plan(e, source), build_views(e.augment, e.seed)
    for batch in whole(e, range(7)):
        rows = plan.rows(batch.step)
        assert batch.ids.tolist() == (rows + FIRST_ID).tolist()
        assert batch.bad.tolist() == []
        epoch = batch.step // (NUM_ROWS // BATCH)
        pair = views([noise_png(int(row), 16) for row in rows], batch.ids.numpy(), epoch)
        assert torch.equal(batch.a, pair.a)
        assert torch.equal(batch.b, pair.b)
        assert batch.a.shape == (BATCH, 3, 16, 16)


def test_an_epoch_shows_each_image_once(write: Write) -> None:
    batches = whole(experiment(write()), range(10))
    for epoch in (batches[:5], batches[5:]):
        ids = torch.cat([b.ids for b in epoch])
        assert sorted(ids.tolist()) == list(range(FIRST_ID, FIRST_ID + NUM_ROWS))
    assert not torch.equal(batches[0].ids, batches[5].ids)


@pytest.mark.parametrize("cuts", [[6], [5], [4, 8], [1, 2], [3, 3], list(range(1, BATCH))])
@pytest.mark.parametrize("bad", [(), (0, 5, 17, 33, 34, 59)])
def test_the_batch_is_the_same_for_any_split_into_parts(
    write: Write, cuts: list[int], bad: tuple[int, ...]
) -> None:
    e = experiment(write(bad=bad, null=(8,) if bad else ()))
    assert_equal(in_parts(e, range(10), cuts), whole(e, range(10)))


@pytest.mark.parametrize("workers", [1, 2, 3, 5])
def test_ranks_together_hold_the_global_batch(write: Write, workers: int) -> None:
    e = experiment(write(bad=(4, 40)))
    source = opened(e)
    shares = [list(local_batches(e, source, range(6), r, workers)) for r in range(workers)]
    joined = [join(list(parts)) for parts in zip(*shares, strict=True)]
    assert_equal(joined, whole(e, range(6)))
    assert {len(s[0].ids) for s in shares} <= {BATCH // workers, -(-BATCH // workers)}


def test_a_step_does_not_depend_on_those_made_before_it(write: Write) -> None:
    e = experiment(write(bad=(0, 5, 17, 33)))
    assert_equal(whole(e, range(4, 8)), whole(e, range(8))[4:])


def test_steps_made_together_are_those_made_one_by_one(write: Write) -> None:
    e = experiment(write(bad=(9,), null=(2, 17)))
    source = opened(e)
    per_epoch = NUM_ROWS // BATCH

    def builder() -> BatchBuilder:
        views = build_views(e.augment, e.seed)
        return BatchBuilder(source, build_plan(e, source), views, e.data, (3, BATCH - 2))

    one_by_one, together = builder(), builder()
    for epoch in range(2):
        steps = range(epoch * per_epoch, (epoch + 1) * per_epoch)
        assert_equal(together.build(steps), [one_by_one.make(step) for step in steps])
    with pytest.raises(ValueError, match="epochs"):
        together.build([per_epoch - 1, per_epoch])


def test_bad_rows_are_named_and_replaced_by_rows_that_are_not_in_the_batch(write: Write) -> None:
    bad = (0, 5, 17, 33, 34, 59)
    e = experiment(write(bad=bad, null=(8,)))
    plan = build_plan(e, opened(e))
    unusable = {FIRST_ID + row for row in (*bad, 8)}
    for batch in whole(e, range(15)):
        planned = (plan.rows(batch.step) + FIRST_ID).tolist()
        assert batch.bad.tolist() == [i for i in planned if i in unusable]
        ids = batch.ids.tolist()
        assert len(set(ids)) == BATCH
        assert not unusable & set(ids)
        for place, (was, now) in enumerate(zip(planned, ids, strict=True)):
            assert (now == was) == (was not in unusable), place


@pytest.mark.parametrize("cuts", [[], [25], [10, 30]])
def test_in_a_set_of_hardly_more_than_a_batch_no_row_stands_in_twice(
    write: Write, cuts: list[int]
) -> None:
    bad = (0, 11, 23, 37, 49)
    e = experiment(write(bad=bad), "batch_size=50")
    for one, split in zip(whole(e, range(6)), in_parts(e, range(6), cuts), strict=True):
        assert len(one.bad) > 1
        assert len(set(one.ids.tolist())) == 50
        assert not {FIRST_ID + row for row in bad} & set(one.ids.tolist())
        assert_equal([one], [split])


def test_the_replacement_of_a_row_differs_between_epochs(write: Write) -> None:
    e = experiment(write(bad=(17,)))
    plan = build_plan(e, opened(e))
    stand_ins = set()
    for batch in whole(e, range(40)):
        planned = plan.rows(batch.step).tolist()
        if 17 in planned:
            stand_ins.add(int(batch.ids[planned.index(17)]))
    assert len(stand_ins) > 2


@pytest.mark.parametrize(("stopped_at", "workers"), [(1, 1), (3, 2), (7, 3), (9, 5)])
def test_bad_rows_and_those_that_stand_in_are_the_same_after_a_stop(
    write: Write, stopped_at: int, workers: int
) -> None:
    """Three epochs; oracles for the list are the plan and the file, for pixels the images."""
    bad, null = (0, 5, 17, 33, 34, 59), (8,)
    e = experiment(write(bad=bad, null=null))
    source = opened(e)
    plan, views = build_plan(e, source), build_views(e.augment, e.seed)
    steps = range(stopped_at, 15)
    shares = [list(local_batches(e, source, steps, r, workers)) for r in range(workers)]
    resumed = [join(list(parts)) for parts in zip(*shares, strict=True)]
    undisturbed = whole(e, range(15))
    assert_equal(whole(e, range(stopped_at)) + resumed, undisturbed)
    for batch, other in zip(resumed, undisturbed[stopped_at:], strict=True):
        planned = plan.rows(batch.step).tolist()
        unusable = [row for row in planned if row in (*bad, *null)]
        assert batch.bad.tolist() == [row + FIRST_ID for row in unusable]
        reasons = ["null image" if row in null else "not an image" for row in unusable]
        assert list(batch.reasons) == list(other.reasons) == reasons
        assert list(batch.paths) == [f"cats/{row}.png" for row in unusable]
        shown = (batch.ids - FIRST_ID).tolist()
        kept = [(row, at) for row, at in zip(planned, shown, strict=True) if row not in unusable]
        assert all(row == at for row, at in kept)
        images = [decode_image(noise_png(row, 16)) for row in shown]
        pair = views(images, batch.ids.numpy(), batch.step // (NUM_ROWS // BATCH))
        assert torch.equal(batch.a, pair.a)
        assert torch.equal(batch.b, pair.b)


def test_too_many_bad_rows_stop_the_run_with_reasons(write: Write) -> None:
    e = experiment(write(bad=(1, 2, 3, 4), null=(5,)), "data.max_bad_fraction=0.05")
    with pytest.raises(TooManyBadImages) as caught:
        whole(e, range(5))
    message = str(caught.value)
    assert re.match("[45] of 60 rows cannot be used", message)  # 3 are 5 %, and would do
    assert "data.max_bad_fraction=0.05" in message
    assert "not an image" in message
    assert re.search(r"first: cats/\d\.png, cats/", message)
    assert caught.value.exit_code == 2


def test_a_share_of_zero_stops_at_the_first_bad_row(write: Write) -> None:
    e = experiment(write(null=(30,)), "data.max_bad_fraction=0")
    with pytest.raises(TooManyBadImages, match=r"1 of 60 rows .* reasons: null image"):
        whole(e, range(5))


def test_as_many_bad_rows_as_allowed_do_not_stop(write: Write) -> None:
    e = experiment(write(bad=(1, 2, 3)), "data.max_bad_fraction=0.05")
    batches = whole(e, range(5))
    named = {row: path for b in batches for row, path in zip(b.bad.tolist(), b.paths, strict=True)}
    assert named == {FIRST_ID + i: f"cats/{i}.png" for i in (1, 2, 3)}


def test_where_no_row_is_left_to_stand_in_the_run_stops(write: Write) -> None:
    e = experiment(write(bad=(7,)), "data.max_bad_fraction=1", f"batch_size={NUM_ROWS}")
    with pytest.raises(DataError, match="no usable row is left to stand in for row 7"):
        whole(e, range(1))


def test_the_cache_changes_no_pixel(write: Write) -> None:
    path = write(bad=(9, 50))
    budgets = ("2.0", "0", f"{10 * 768 / 2**30}")  # all, none, ten images
    made = [whole(experiment(path, f"data.cache_gib={gib}"), range(12)) for gib in budgets]
    assert_equal(made[0], made[1])
    assert_equal(made[0], made[2])


def test_the_cache_stays_within_its_budget(write: Write) -> None:
    source = Source.open(str(write()))
    reader = RowReader(source, ImageDecoder(10**6), cache_gib=10.5 * 768 / 2**30)
    for _ in range(2):
        for row in range(NUM_ROWS):
            assert reader.image(row) is not None
    assert reader.cache.holds(0, NUM_ROWS).sum() == 10


def test_parts_of_different_steps_are_not_joined(write: Write) -> None:
    first, second = whole(experiment(write()), range(2))
    with pytest.raises(DataError, match=r"parts of different steps met: \[0, 1\]"):
        join([first, second])


def test_fewer_rows_than_a_batch_are_refused(write: Write) -> None:
    e = experiment(write(), "batch_size=61")
    with pytest.raises(DataError, match="60 rows do not fill one global batch of 61"):
        build_plan(e, opened(e))


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("good.parquet", []),
        ("some_bad_images.parquet", [10, 20, 50]),  # truncated, text, 1x1; CMYK and 16-bit convert
        ("null_images.parquet", list(range(3, 100, 10))),
        ("bomb_inside.parquet", [7]),
        ("struct_image_column.parquet", []),
    ],
)
def test_odd_files_train_with_their_bad_rows_replaced(
    image_root: Path, name: str, bad: list[int]
) -> None:
    e = experiment(image_root / "odd" / name, "batch_size=25")
    batches = whole(e, range(4))
    assert sorted(i for b in batches for i in b.bad.tolist()) == bad
    for batch in batches:
        assert len(set(batch.ids.tolist())) == 25
        assert not set(bad) & set(batch.ids.tolist())


def test_a_file_of_bad_rows_alone_stops(image_root: Path) -> None:
    e = experiment(image_root / "odd" / "all_bad_images.parquet", "data.max_bad_fraction=0.01")
    with pytest.raises(TooManyBadImages, match="2 of 100 rows cannot be used, more than"):
        whole(e, range(1))
