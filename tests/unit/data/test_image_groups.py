"""Pairs are of one group, by key alone; groups lie whole in row groups, and each is read once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from scipy.stats import chisquare

from simclr_ray import config as cfg
from simclr_ray.config.experiment import ColumnsConfig, Experiment
from simclr_ray.data.batch import Batch
from simclr_ray.data.batches import BatchBuilder, build_plan, build_views, join, local_batches
from simclr_ray.data.grouping import cut_between_groups, grouped_order, number_groups
from simclr_ray.data.image_groups import group_column, groups_line, groups_of, open_grouped
from simclr_ray.data.source import Source
from simclr_ray.data.tables import RowTable
from simclr_ray.errors import DataError, TooManyBadImages
from simclr_ray.train.worker_batches import apply_color
from tests.ray.images import noise_png

FIRST_ID = 1000  # ids are no row numbers here
BATCH = 12


PNGS = [noise_png(seed, 8) for seed in range(400)]


def write(
    path: Path,
    row_groups: list[list[Any]],
    bad: Collection[int] = frozenset(),
    kind: pa.DataType | None = None,
) -> Path:
    """Write row groups of rows of these groups; rows named bad are text."""
    groups = [group for part in row_groups for group in part]
    images = [b"no image" if i in bad else PNGS[i % len(PNGS)] for i in range(len(groups))]
    table = pa.table(
        {
            "id": pa.array(range(FIRST_ID, FIRST_ID + len(groups)), pa.int64()),
            "image": pa.array(images, pa.binary()),
            "visit": pa.array(groups, kind),
        }
    )
    with pq.ParquetWriter(path, table.schema) as writer:
        first = 0
        for part in row_groups:
            writer.write_table(table.slice(first, len(part)), len(part))
            first += len(part)
    return path


def random_layout(seed: int, num_groups: int, *, text: bool, mixed: bool) -> list[list[Any]]:
    """Return row groups of whole groups of 1 to 7 images, some rows without a group."""
    rng = np.random.default_rng(seed)
    names = rng.choice(10 * num_groups, num_groups, replace=False).tolist()
    row_groups: list[list[Any]] = []
    for part in np.array_split(np.array(names), max(1, num_groups // 6)):
        rows: list[Any] = []
        for name in part.tolist():
            size = int(rng.integers(1, 8))
            rows += [None] if rng.random() < 0.1 else [f"v{name}" if text else name] * size
        row_groups.append([rows[i] for i in rng.permutation(len(rows))] if mixed else rows)
    return row_groups


def experiment(path: Path, *overrides: str) -> Experiment:
    tree = {
        "name": "t",
        "seed": 3,
        "data": {
            "train": str(path),
            "max_bad_fraction": 0.9,
            "cache_gib": 0,
            "columns": {"group": "visit"},
        },
        "augment": {"size": 16},
        "batch_size": BATCH,
    }
    return cfg.validate(Experiment, cfg.apply_overrides(tree, overrides))


def opened(e: Experiment) -> Source:
    return open_grouped(e.data.train, e.data.columns, e.data.limit)


def whole(e: Experiment, steps: range) -> list[Batch]:
    return list(local_batches(e, opened(e), steps))


def assert_equal(ours: list[Batch], theirs: list[Batch]) -> None:
    for x, y in zip(ours, theirs, strict=True):
        assert x.step == y.step
        for name in ("a", "b", "ids", "ids_b", "bad"):
            assert torch.equal(getattr(x, name), getattr(y, name)), (x.step, name)


def group_of_id(row_groups: list[list[Any]]) -> dict[int, object]:
    """Return the group of each id, an own one for a row without."""
    rows = [group for part in row_groups for group in part]
    return {FIRST_ID + i: ("none", i) if g is None else g for i, g in enumerate(rows)}


@pytest.mark.parametrize("seed", range(6))
def test_an_epoch_shows_each_group_once_by_two_of_its_images(tmp_path: Path, seed: int) -> None:
    layout = random_layout(seed, 40, text=seed % 2 == 0, mixed=seed % 3 == 0)
    e = experiment(write(tmp_path / "set.parquet", layout), "batch_size=7")
    source, group_of = opened(e), group_of_id(layout)
    sizes = Counter(group_of.values())
    assert source.num_groups == source.num_pairs == len(sizes)
    per_epoch = len(sizes) // 7
    assert e.steps_per_epoch(source.num_pairs) == per_epoch
    for epoch in range(2):
        batches = whole(e, range(epoch * per_epoch, (epoch + 1) * per_epoch))
        shown = []
        for batch in batches:
            assert batch.ids_b is not None
            for a, b in zip(batch.ids.tolist(), batch.ids_b.tolist(), strict=True):
                assert group_of[a] == group_of[b]
                assert (a == b) == (sizes[group_of[a]] == 1)
                shown.append(group_of[a])
        assert len(shown) == len(set(shown)) == per_epoch * 7  # so none twice in a global batch


def test_views_are_those_of_the_two_images_by_their_own_ids(tmp_path: Path) -> None:
    layout = random_layout(9, 30, text=False, mixed=False)
    e = experiment(write(tmp_path / "set.parquet", layout))
    views = build_views(e.augment, e.seed)
    for batch in whole(e, range(4)):
        assert batch.ids_b is not None
        ids, epoch = (batch.ids.numpy(), batch.ids_b.numpy()), batch.step // 2
        of_each = [views([PNGS[i - FIRST_ID] for i in own.tolist()], own, epoch) for own in ids]
        assert torch.equal(batch.a, of_each[0].a)
        assert torch.equal(batch.b, of_each[1].b)


def test_lists_of_stages_draw_the_shared_ones_for_each_image(tmp_path: Path) -> None:
    layout = random_layout(9, 30, text=False, mixed=False)
    e = experiment(write(tmp_path / "set.parquet", layout))
    tree = cfg.to_tree(e) | {
        "augment": {"name": "pipeline", "size": 16, "shared": [{"name": "crop"}]}
    }
    e = cfg.validate(Experiment, tree)
    views = build_views(e.augment, e.seed)
    (batch,) = whole(e, range(1))
    assert batch.ids_b is not None
    ids = (batch.ids.numpy(), batch.ids_b.numpy())
    of_each = [views([PNGS[i - FIRST_ID] for i in own.tolist()], own, 0) for own in ids]
    assert torch.equal(batch.a, of_each[0].a)
    assert torch.equal(batch.b, of_each[1].b)


def test_color_by_the_worker_is_that_of_the_data_actors(tmp_path: Path) -> None:
    path = write(tmp_path / "set.parquet", random_layout(9, 30, text=False, mixed=False))
    both, split = experiment(path), experiment(path, "scaling.color_augment_on=worker")
    views: Any = build_views(both.augment, both.seed)
    for expected, crops in zip(whole(both, range(3)), whole(split, range(3)), strict=True):
        a, b = apply_color(views, crops, crops.step // 2, torch.device("cpu"))
        assert torch.equal(a, expected.a)
        assert torch.equal(b, expected.b)


def in_parts(e: Experiment, steps: range, cuts: list[int]) -> list[Batch]:
    source = opened(e)
    views = build_views(e.augment, e.seed)
    builders = [
        BatchBuilder(source, build_plan(e, source), views, e.data, places)
        for places in pairwise([0, *cuts, e.batch_size])
    ]
    return [join([builder.make(step) for builder in builders]) for step in steps]


@pytest.mark.parametrize(
    ("cuts", "cache_gib"), [([6], "0"), ([4, 8], "0.1"), ([3, 3], f"{20 * 208 / 2**30}")]
)
@pytest.mark.parametrize("bad", [set(), {0, 1, 2, 9, 17, 18, 33, 60, 61}])
def test_the_batch_is_the_same_for_any_split_cache_and_start(
    tmp_path: Path, cuts: list[int], bad: set[int], cache_gib: str
) -> None:
    layout = random_layout(5, 40, text=True, mixed=True)
    e = experiment(write(tmp_path / "set.parquet", layout, bad), f"data.cache_gib={cache_gib}")
    expected = whole(experiment(tmp_path / "set.parquet"), range(9))
    assert_equal(in_parts(e, range(9), cuts), expected)
    assert_equal(whole(e, range(4, 9)), expected[4:])
    assert any(len(batch.bad) for batch in expected) == bool(bad)


@pytest.mark.parametrize("seed", range(4))
def test_bad_images_are_replaced_within_the_group_while_it_has_others(
    tmp_path: Path, seed: int
) -> None:
    layout = random_layout(seed, 40, text=False, mixed=True)
    group_of = group_of_id(layout)
    rows = np.random.default_rng(seed).permutation(len(group_of))
    bad = set(rows[: len(rows) // 3].tolist())
    e = experiment(write(tmp_path / "set.parquet", layout, bad))
    usable = Counter(g for i, g in group_of.items() if i - FIRST_ID not in bad)
    source = opened(e)
    plan, groups = build_plan(e, source), groups_of(source)
    for batch in whole(e, range(12)):
        assert batch.ids_b is not None
        epoch = plan.epoch_of(batch.step)
        drawn = groups.pairs(plan.rows(batch.step), seed=3, epoch=epoch)
        unusable = {FIRST_ID + row for pair in drawn for row in pair.tolist() if row in bad}
        assert set(batch.bad.tolist()) == unusable
        shown = set()
        for place, (a, b) in enumerate(zip(batch.ids.tolist(), batch.ids_b.tolist(), strict=True)):
            assert {a, b}.isdisjoint({FIRST_ID + row for row in bad})
            assert group_of[a] == group_of[b]
            assert (a == b) == (usable[group_of[a]] == 1)
            shown.add(group_of[a])
            planned = group_of[FIRST_ID + int(drawn[0][place])]
            if usable[planned]:
                assert group_of[a] == planned
                if drawn[0][place] not in bad:
                    assert a == FIRST_ID + int(drawn[0][place])
        assert len(shown) == BATCH


def test_bad_images_are_counted_among_the_images(tmp_path: Path) -> None:
    layout = [[g] * 3 for g in range(24)]
    path = write(tmp_path / "set.parquet", layout, set(range(0, 24)))
    with pytest.raises(TooManyBadImages, match="of 72 rows cannot be used"):
        whole(experiment(path, "data.max_bad_fraction=0.1"), range(10))


@pytest.mark.parametrize("size", [2, 5, 12])
def test_over_epochs_each_pair_of_images_is_as_likely(tmp_path: Path, size: int) -> None:
    source = open_grouped(
        str(write(tmp_path / "set.parquet", [[g] * size for g in range(40)])),
        ColumnsConfig(group="visit"),
    )
    groups = groups_of(source)
    seen = np.zeros((size, size), np.int64)
    for epoch in range(150):
        a, b = groups.pairs(np.arange(40), seed=1, epoch=epoch)
        np.add.at(seen, (a % size, b % size), 1)
    assert seen.trace() == 0
    assert chisquare(seen.sum(1)).pvalue > 0.001
    assert chisquare(seen[~np.eye(size, dtype=bool)]).pvalue > 0.001


def test_a_pair_depends_on_seed_epoch_and_key_alone(tmp_path: Path) -> None:
    layout = [[f"v{g}"] * 6 for g in range(20)]
    here = write(tmp_path / "here.parquet", layout)
    there = write(tmp_path / "there.parquet", [[*layout[9], *layout[3]], layout[7]])
    columns = ColumnsConfig(group="visit")
    ours, theirs = (groups_of(open_grouped(str(path), columns)) for path in (here, there))
    for seed, epoch in ((0, 0), (0, 1), (5, 0)):
        mine = np.stack(ours.pairs(np.array([9, 3, 7]), seed=seed, epoch=epoch)) % 6
        assert (mine == np.stack(theirs.pairs(np.arange(3), seed=seed, epoch=epoch)) % 6).all()
    pairs = [ours.pairs(np.arange(20), seed=s, epoch=e)[0] for s, e in ((0, 0), (0, 1), (5, 0))]
    assert len({tuple(p.tolist()) for p in pairs}) == 3


class Counted(Source):
    """A source that counts how often it reads each row group; a class of its own for each test."""

    reads: ClassVar[Counter[int]]

    def read_group(self, index: int, *, labels: bool = True) -> RowTable:
        self.reads[index] += 1
        return super().read_group(index, labels=labels)


def counted(source: Source) -> Counted:
    own = type("Counted", (Counted,), {"reads": Counter()})
    made: Counted = own(**{name: getattr(source, name) for name in source.__dataclass_fields__})
    return made


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_two_epochs_read_two_sets_and_decode_two_images_a_group(
    tmp_path: Path, parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    layout = [[8 * r + g for g in range(8) for _ in range(rng.integers(1, 6))] for r in range(96)]
    e = experiment(
        write(tmp_path / "set.parquet", layout), "batch_size=24", "data.shuffle_rows=600"
    )
    source = counted(opened(e))
    plan, views = build_plan(e, source), build_views(e.augment, e.seed)
    assert plan.num_lanes == 4
    steps = range(2 * plan.steps_per_epoch)
    assert len(steps) == 2 * 768 // 24
    builders = [
        BatchBuilder(
            source, plan, views, e.data, (24 * p // parts, 24 * (p + 1) // parts), stop=len(steps)
        )
        for p in range(parts)
    ]
    decoded = 0
    for builder in builders:
        decode = builder.reader.decoder.decode

        def count(image: bytes, least: Any, decode: Any = decode) -> Any:
            nonlocal decoded
            decoded += 1
            return decode(image, least)

        monkeypatch.setattr(
            builder.reader, "decoder", type("D", (), {"decode": staticmethod(count)})
        )
    for step in steps:
        for builder in builders:
            builder.make(step)
            assert builder.groups.num_held <= builder.groups.room + 2 * 8 * 2 * 4
    footer = pq.read_metadata(tmp_path / "set.parquet")
    num_bytes = [footer.row_group(i).total_byte_size for i in range(len(layout))]
    read = sum(source.reads[i] * size for i, size in enumerate(num_bytes))
    assert read <= 2 * 1.05 * sum(num_bytes)
    ones = sum(size == 1 for size in Counter(g for part in layout for g in part).values())
    assert decoded == 2 * (2 * 768 - ones)


@pytest.mark.parametrize("kind", [pa.int64(), pa.int32(), pa.string(), pa.large_string()])
def test_groups_are_numbered_as_a_dictionary_would(kind: pa.DataType) -> None:
    rng = np.random.default_rng(1)
    for num in (1, 2, 50):
        values: list[Any] = [
            None if rng.random() < 0.2 else int(rng.integers(-5, 5)) for _ in range(num)
        ]
        if not pa.types.is_integer(kind):
            values = [None if v is None else f"ä{v}" for v in values]
        column = pa.chunked_array([pa.array(values, kind)])
        column = column.cast(pa.int64() if pa.types.is_integer(kind) else pa.string())
        found = number_groups(column)
        seen: dict[object, int] = {}
        codes = [
            seen.setdefault(("none", i) if v is None else v, len(seen))
            for i, v in enumerate(values)
        ]
        assert found.codes.tolist() == codes
        assert found.is_null.tolist() == [isinstance(key, tuple) for key in seen]
        named = [k for k, null in zip(found.keys.tolist(), found.is_null, strict=True) if not null]
        assert len(set(named)) == len(named)


@pytest.mark.parametrize("most", [1, 3, 10, 1000])
def test_runs_of_the_grouped_order_cut_no_group(most: int) -> None:
    rng = np.random.default_rng(most)
    column = pa.chunked_array([pa.array([int(g) for g in rng.integers(0, 30, 100)], pa.int64())])
    order, groups = grouped_order(column, seed=2)
    assert sorted(order.tolist()) == list(range(100))
    values = column.to_numpy()[order]
    assert (np.diff(values) != 0).sum() + 1 == len(set(values.tolist()))
    assert ((np.diff(values) != 0) == (np.diff(groups) != 0)).all()
    runs = cut_between_groups(groups, most)
    assert [first for first, _ in runs] == [0, *(last for _, last in runs[:-1])]
    assert runs[-1][1] == 100
    for first, last in runs:
        assert last - first <= most or len(set(values[first:last].tolist())) == 1
        assert first == 0 or values[first - 1] != values[first]


def test_a_group_in_several_row_groups_is_refused_with_the_line_that_mends_it(
    tmp_path: Path,
) -> None:
    path = write(tmp_path / "set.parquet", [[1, 1, 2], [2, 3, 3], [2, 4, None], [None]])
    with pytest.raises(DataError) as caught:
        opened(experiment(path))
    message = str(caught.value)
    assert "data.columns.group=visit" in message
    assert "6 groups lie in 8 pieces" in message
    line = f"simclr-ray prepare {path} {tmp_path / 'set'}-grouped columns.group=visit"
    assert line in message
    assert "data.columns.group=group" in message


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["data.columns.group=visist"], "has no group column 'visist' (did you mean 'visit'?)"),
        (["data.columns.group=image"], "group column 'image' has type binary, which is neither"),
    ],
)
def test_a_column_that_cannot_be_a_group_is_refused(
    tmp_path: Path, overrides: list[str], problem: str
) -> None:
    path = write(tmp_path / "set.parquet", [[1, 1, 2]])
    with pytest.raises(DataError) as caught:
        opened(experiment(path, *overrides))
    assert problem in str(caught.value)


def test_ids_that_repeat_are_refused_unless_they_are_the_group(tmp_path: Path) -> None:
    path = write(tmp_path / "set.parquet", [[1, 1, 2], [5, 3, 3]])
    with pytest.raises(DataError, match="6 rows, 4 distinct ids"):
        Source.open(str(path), ColumnsConfig(id="visit"))
    source = open_grouped(str(path), ColumnsConfig(id="visit", group="visit"))
    assert (source.has_ids, source.ids().tolist()) == (False, list(range(6)))
    assert source.num_groups == 4
    with pytest.raises(DataError, match="6 rows, 4 distinct ids"):
        Source.open(str(path), ColumnsConfig(id="visit"))


@pytest.mark.parametrize(
    ("limit", "kept"),
    [(1, 0), (2, 0), (3, 3), (4, 4), (5, 4), (6, 4), (7, 7), (8, 8), (9, 8), (11, 11)],
)
def test_a_limit_keeps_whole_groups_only(tmp_path: Path, limit: int, kept: int) -> None:
    path = write(tmp_path / "set.parquet", [["a", "b", "a", "c"], ["d", "e", "d", "f"], ["g"] * 3])
    columns = ColumnsConfig(group="visit")
    if not kept:
        with pytest.raises(DataError, match=f"data.limit={limit} holds no whole group"):
            open_grouped(str(path), columns, limit)
        return
    source = open_grouped(str(path), columns, limit)
    assert source.num_rows == kept == sum(g.num_rows for g in source.row_groups)
    assert groups_of(source).sizes.sum() == kept
    assert len(source.ids()) == kept


def test_too_few_groups_for_a_batch_are_refused(tmp_path: Path) -> None:
    e = experiment(write(tmp_path / "set.parquet", [[g] * 5 for g in range(11)]))
    with pytest.raises(DataError, match="11 groups do not fill one global batch of 12"):
        build_plan(e, opened(e))


def test_groups_are_said_with_their_sizes(tmp_path: Path) -> None:
    columns = ColumnsConfig(group="visit")
    path = write(tmp_path / "set.parquet", [[1, 1, 2], [5, 3, 3]])
    assert groups_line(open_grouped(str(path), columns)) == "4 groups of 1 to 2 images"
    path = write(tmp_path / "one.parquet", [[1], [5]])
    assert groups_line(open_grouped(str(path), columns)) == "2 groups of 1 image"


def test_images_of_blank_text_are_of_no_common_thing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    columns = ColumnsConfig(group="visit")
    path = write(tmp_path / "set.parquet", [["a", "", "a"], ["", " ", None, "b"]])
    source = open_grouped(str(path), columns)
    assert groups_of(source).sizes.tolist() == [2, 1, 1, 1, 1, 1]
    assert "3 of 7 rows have blank text in column 'visit': each is a group" in caplog.text
    assert group_column(source).to_pylist() == ["a", None, "a", None, None, None, "b"]


def test_a_column_of_groups_changes_the_digest_and_not_the_fingerprint(tmp_path: Path) -> None:
    path = write(tmp_path / "set.parquet", [[1, 1, 2]])
    plain = experiment(path, "data.columns.group=")
    assert plain.digest() != experiment(path).digest()
    tree = cfg.to_tree(plain)
    del tree["data"]["columns"]["group"]
    assert cfg.validate(Experiment, tree).digest() == plain.digest()
    assert opened(plain).fingerprint == opened(experiment(path)).fingerprint
    assert opened(plain).num_pairs == 3
