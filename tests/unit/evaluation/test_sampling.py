"""Of a large split few row groups are read, each by one rank; of a small one rows from all over."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from simclr_ray.data.footer import RowGroup
from simclr_ray.data.source import Source
from simclr_ray.evaluation.sampling import SMALL_GROUPS, rows_of_ranks, sample_rows
from tests.ray.images import noise_png

GROUP_ROWS = 10


def split(folder: Path, num_groups: int, *, last_rows: int = GROUP_ROWS) -> Source:
    """Return a split whose ids run against its rows."""
    num = (num_groups - 1) * GROUP_ROWS + last_rows
    table = pa.table({"image": [b"x"] * num, "id": np.arange(num)[::-1]})
    pq.write_table(table, folder / "split.parquet", row_group_size=GROUP_ROWS)
    return Source.open(str(folder))


def groups_of(source: Source, rows: np.ndarray) -> set[int]:
    """Return the row groups that hold some rows."""
    return set(source.groups_of(rows).tolist())


@pytest.mark.parametrize("limit", [1, 9, 10, 25, 200, 899])
def test_a_sample_of_many_row_groups_reads_no_more_of_them_than_it_needs(
    tmp_path: Path, limit: int
) -> None:
    source = split(tmp_path, 90)
    rows = sample_rows(source, limit)
    assert len(set(rows.tolist())) == len(rows) == limit
    assert len(groups_of(source, rows)) == -(-limit // GROUP_ROWS)
    assert np.all(np.diff(source.ids()[rows]) > 0)
    assert np.array_equal(rows, sample_rows(source, limit))


def test_of_ids_only_those_of_the_row_groups_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, read = split(tmp_path, 90), []
    read_column = Source.read_column

    def noted(self: Source, group: RowGroup, name: str) -> pa.ChunkedArray:
        read.append(group.group)
        return read_column(self, group, name)

    monkeypatch.setattr(Source, "read_column", noted)
    rows = sample_rows(source, 40)
    assert sorted(read) == sorted(groups_of(source, rows))


def test_a_larger_sample_holds_the_smaller_one(tmp_path: Path) -> None:
    source = split(tmp_path, 90)
    assert set(sample_rows(source, 40).tolist()) < set(sample_rows(source, 200).tolist())


def test_groups_are_drawn_from_all_over_and_short_ones_make_others_follow(tmp_path: Path) -> None:
    source = split(tmp_path, 90, last_rows=1)
    rows = sample_rows(source, 200)
    assert len(rows) == 200
    groups = groups_of(source, rows)
    assert len(groups) <= 21
    assert min(groups) < 20
    assert max(groups) > 70


def test_a_sample_of_few_row_groups_comes_from_all_of_them(tmp_path: Path) -> None:
    source = split(tmp_path, SMALL_GROUPS)
    assert len(groups_of(source, sample_rows(source, 64))) > SMALL_GROUPS // 2
    assert len(sample_rows(source)) == len(sample_rows(source, 10**6)) == source.num_rows


def test_a_sample_of_few_but_large_row_groups_reads_what_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = split(tmp_path, 8)
    monkeypatch.setattr("simclr_ray.evaluation.sampling.SMALL_BYTES", 1)
    assert len(groups_of(source, sample_rows(source, 20))) == 2


def test_a_sample_of_image_files_comes_from_all_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # a list of them is sorted by folder, which is often the class, and costs few bytes
    for label in range(10):
        (tmp_path / f"class{label}").mkdir()
        for index in range(4):
            file = tmp_path / f"class{label}" / f"{index}.png"
            file.write_bytes(noise_png(10 * label + index, 8))
    monkeypatch.setattr("simclr_ray.evaluation.sampling.SMALL_GROUPS", 0)
    source = Source.open(str(tmp_path))
    assert sorted(source.labels()[sample_rows(source, 10)]) == list(range(10))


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 7, 16, 64])
def test_each_row_group_is_read_by_one_rank(tmp_path: Path, num_ranks: int) -> None:
    source = split(tmp_path, 90)
    rows = sample_rows(source, 200)
    parts = rows_of_ranks(source, rows, num_ranks)
    assert len(parts) == num_ranks
    assert np.array_equal(np.concatenate(parts), np.sort(rows))
    held = [groups_of(source, part) for part in parts]
    assert sum(map(len, held)) == len(set.union(*held)) == 20
    assert max(map(len, parts)) <= -(-200 // num_ranks) + GROUP_ROWS


@pytest.mark.parametrize("num_ranks", [2, 3, 8, 40])
def test_ranks_share_the_rows_evenly_where_row_groups_are_few_and_large(
    tmp_path: Path, num_ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("simclr_ray.evaluation.sampling.QUICK_ROWS", 2)
    source = split(tmp_path, 3)
    parts = rows_of_ranks(source, sample_rows(source), num_ranks)
    assert np.array_equal(np.concatenate(parts), np.arange(30))
    lengths = [len(part) for part in parts]
    if num_ranks == 2:  # twice a fair share is none too much
        assert lengths in ([10, 20], [20, 10])
    else:
        assert max(lengths) - min(lengths) <= 1
