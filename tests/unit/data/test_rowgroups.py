"""Each row group of a part is read once an epoch, and what is held stays within the windows."""

from __future__ import annotations

import io
import shutil
from collections import Counter
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from simclr_ray import config as cfg
from simclr_ray.config.experiment import ColumnsConfig, Experiment
from simclr_ray.data.batches import BatchBuilder, build_plan, build_views
from simclr_ray.data.bytes_read import BYTES_READ
from simclr_ray.data.footer import RowGroup
from simclr_ray.data.image_groups import groups_of, open_grouped
from simclr_ray.data.rowgroups import RecentGroups, read_encoded
from simclr_ray.data.source import Source
from simclr_ray.data.tables import RowTable
from simclr_ray.distributed.collectives import partition
from simclr_ray.errors import DataError

NUM_ROWS, GROUP_ROWS, BATCH = 2410, 10, 24  # 241 groups, 12 lanes of 200 rows


class Counted(Source):
    """A source that counts how often it reads each row group; a class of its own for each test."""

    reads: ClassVar[Counter[int]]

    def read_group(self, index: int, *, labels: bool = True) -> RowTable:
        self.reads[index] += 1
        return super().read_group(index, labels=labels)


def png(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(0)
    images = [png(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)) for _ in range(NUM_ROWS)]
    target = tmp_path_factory.mktemp("rowgroups") / "set.parquet"
    table = pa.table({"image": pa.array(images, pa.binary())})
    pq.write_table(table, target, row_group_size=GROUP_ROWS)
    return target


@pytest.fixture
def counted(path: Path) -> Counted:
    source = Source.open(str(path))
    # what a builder of an earlier test still reads ahead must not be counted here
    own = type("Counted", (Counted,), {"reads": Counter()})
    counted: Counted = own(**{name: getattr(source, name) for name in source.__dataclass_fields__})
    return counted


def experiment(path: Path, cache_gib: float, shuffle_rows: int) -> Experiment:
    return cfg.validate(
        Experiment,
        {
            "name": "t",
            "data": {"train": str(path), "cache_gib": cache_gib, "shuffle_rows": shuffle_rows},
            "augment": {"size": 8},
            "batch_size": BATCH,
        },
    )


def builder_of(
    source: Source, e: Experiment, part: int = 0, parts: int = 1, stop: int = 10**6
) -> BatchBuilder:
    places = partition(BATCH, part, parts)
    views = build_views(e.augment, e.seed)
    return BatchBuilder(source, build_plan(e, source), views, e.data, places, stop=stop)


@pytest.mark.parametrize("parts", [1, 2, 3, 4])
@pytest.mark.parametrize("cache_gib", [0, 300 * (192 + 16) / 2**30], ids=["no cache", "an eighth"])
def test_a_part_reads_each_row_group_once_an_epoch_though_windows_exceed_the_cache(
    path: Path, counted: Counted, parts: int, cache_gib: float
) -> None:
    e = experiment(path, cache_gib, shuffle_rows=600)
    spe = NUM_ROWS // BATCH
    builders = [builder_of(counted, e, part, parts, stop=2 * spe) for part in range(parts)]
    assert builders[0].plan.num_lanes == 12
    assert builders[0].plan.window_rows == 50
    for step in range(2 * spe):
        for builder in builders:
            builder.make(step)
    # two epochs; a group on the border of two parts is read by both
    assert max(counted.reads.values()) <= 4
    assert sum(counted.reads.values()) <= 2 * (241 + parts - 1)


def test_what_is_held_stays_within_the_windows_and_two_row_groups_a_lane(
    path: Path, counted: Counted
) -> None:
    e = experiment(path, 0, shuffle_rows=600)
    builder = builder_of(counted, e)
    held = []
    for step in range(110):
        builder.make(step)
        held.append(builder.groups.num_held)
    assert max(held) <= 600 + 12 * 2 * GROUP_ROWS
    assert np.median(held) >= 400  # reading ahead keeps it near that bound


def test_windows_are_bounded_by_their_bytes_too(path: Path) -> None:
    source = Source.open(str(path))
    assert source.row_bytes == pytest.approx(path.stat().st_size / NUM_ROWS)
    tree = {"train": str(path), "shuffle_rows": 600}
    small = 240.5 * source.row_bytes / 2**30
    for gib, rows in [(1.0, 600), (small, 240)]:
        data = tree | {"shuffle_gib": gib}
        e = cfg.validate(Experiment, {"name": "t", "data": data, "batch_size": BATCH})
        assert build_plan(e, source).shuffle_rows == rows


def test_a_cached_set_is_read_once_in_the_whole_run(path: Path, counted: Counted) -> None:
    e = experiment(path, 1, shuffle_rows=600)
    builder = builder_of(counted, e)
    for step in range(3 * builder.plan.steps_per_epoch):
        builder.make(step)
    # the first epoch drops a tail of 10 rows, whose groups the second may read again
    assert sum(counted.reads.values()) <= 243


def test_nothing_is_read_for_steps_after_the_last(path: Path, counted: Counted) -> None:
    e = experiment(path, 0, shuffle_rows=120)
    builder = builder_of(counted, e, stop=3)
    for step in range(3):
        builder.make(step)
    steps = [builder.plan.rows(step) // GROUP_ROWS for step in range(5)]  # a window of 10: 5 steps
    assert set(counted.reads) == set(np.concatenate(steps).tolist())


@pytest.mark.parametrize("order", [[5, 6, 5, 2, 3], [0, 60, 150, 90, 91]])
def test_steps_may_be_made_again_and_in_any_order(path: Path, order: list[int]) -> None:
    e = experiment(path, 0, shuffle_rows=300)
    source = Source.open(str(path))
    builder = builder_of(source, e)
    for step in order:
        made, alone = builder.make(step), builder_of(source, e).make(step)
        assert made.ids.tolist() == alone.ids.tolist()
        assert made.a.equal(alone.a)


def test_a_file_that_is_gone_is_an_error_of_the_data(path: Path, tmp_path: Path) -> None:
    copy = tmp_path / "set.parquet"
    shutil.copy(path, copy)
    builder = builder_of(Source.open(str(copy)), experiment(copy, 0, shuffle_rows=120))
    builder.make(0)
    copy.unlink()
    with pytest.raises(DataError, match="cannot be read"):
        builder.make(50)


def test_stand_ins_are_found_in_any_group_and_few_groups_are_kept(path: Path) -> None:
    source = Source.open(str(path))
    recent = RecentGroups(source)
    for row in (0, 2409, 1200, 9, 11):
        assert recent.take(row) == read_encoded(source, row // GROUP_ROWS)[row]


@pytest.fixture
def listed(tmp_path: Path) -> Path:
    """A list of 600 files, each of its own length, in one row group as pandas writes it."""
    (tmp_path / "photos").mkdir()
    for row in range(600):
        (tmp_path / "photos" / str(row)).write_bytes(b"x" * (1000 + row))
    columns = {
        "image": [f"photos/{row}" for row in range(600)],
        "label": [row % 7 for row in range(600)],
        "visit": [row // 100 for row in range(600)],
    }
    pq.write_table(pa.table(columns), tmp_path / "list.parquet")
    pq.write_table(pa.table(columns), tmp_path / "small.parquet", row_group_size=100)
    return tmp_path / "list.parquet"


def test_a_list_is_read_in_slices_of_its_row_group_and_no_more_files_at_once(listed: Path) -> None:
    source = Source.open(str(listed))
    sizes = [1000 + row for row in range(600)]
    assert source.row_groups == (
        RowGroup(0, 0, 0, 256, 0),
        RowGroup(0, 0, 256, 256, 256),
        RowGroup(0, 0, 512, 88, 512),
    )
    BYTES_READ.take()
    read = [source.read_group(index) for index in range(3)]
    of_files = sum(sizes)
    assert of_files < BYTES_READ.take() < of_files + 2 * listed.stat().st_size
    assert [len(i or b"") for rows in read for i in rows.images] == sizes
    assert np.concatenate([rows.ids for rows in read]).tolist() == [*range(600)]
    labels = [row % 7 for row in range(600)]
    assert source.labels().tolist() == labels
    assert np.concatenate([rows.labels for rows in read if rows.labels is not None]).tolist() == (
        labels
    )
    assert [len(i or b"") for i in source.read_first_images(1, 3)] == sizes[256:259]
    some = np.array([599, 0, 300])
    assert [len(i or b"") for i in source.read_rows(some).images] == [1599, 1000, 1300]
    limited = Source.open(str(listed), limit=300)
    assert [g.num_rows for g in limited.row_groups] == [256, 44]
    small = Source.open(str(listed.with_name("small.parquet")))  # as it lies
    assert [(g.num_rows, g.offset) for g in small.row_groups] == [(100, 0)] * 6


def test_a_row_of_a_list_has_the_bytes_of_its_file(listed: Path) -> None:
    source = Source.open(str(listed))
    mean = sum(1000 + row for row in range(600)) / 600
    assert mean < source.row_bytes < mean + 50
    rows = int(100.5 * source.row_bytes) / 2**30
    data = {"train": str(listed), "shuffle_gib": rows}
    e = cfg.validate(Experiment, {"name": "t", "data": data, "batch_size": BATCH})
    assert build_plan(e, source).shuffle_rows == 100


def test_slices_of_a_list_hold_its_groups_whole(listed: Path) -> None:
    columns = ColumnsConfig(group="visit")
    source = open_grouped(str(listed), columns)
    assert [(g.first_row, g.num_rows, g.offset) for g in source.row_groups] == [
        (0, 200, 0),
        (200, 200, 200),
        (400, 200, 400),
    ]
    groups = groups_of(source)
    assert groups.firsts.tolist() == [0, 2, 4, 6]
    assert groups.rows(4).tolist() == [*range(400, 500)]
    cut = open_grouped(str(listed), columns, limit=450)
    assert [g.num_rows for g in cut.row_groups] == [200, 200]
