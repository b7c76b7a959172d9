"""Shards of groups that lie anywhere get their rows, and nothing is read more than once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from simclr_ray.config.experiment import ColumnsConfig
from simclr_ray.data import regroup, tables
from simclr_ray.data.grouping import one_array
from simclr_ray.data.inputs import ParquetInput, ParquetTask
from simclr_ray.data.regroup import RegroupedTask, bring_together
from simclr_ray.data.source import Source
from simclr_ray.data.tables import RowTable
from simclr_ray.errors import DataError

NUM_ROWS = 200


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run tasks here, each over a few row groups."""
    monkeypatch.setattr(regroup, "run_tasks", lambda work: [each() for each in work])
    monkeypatch.setattr(regroup, "MAX_SHARD_BYTES", 3000)


def write(target: Path, groups: list[int | None], **columns: object) -> Path:
    images = [b"%060d" % i if i % 17 else None for i in range(len(groups))]
    table = pa.table({"image": pa.array(images, pa.binary()), "visit": groups} | columns)
    pq.write_table(table, target, row_group_size=10)
    return target


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("rows_per_shard", [7, 40, 500])
def test_regrouped_shards_hold_what_they_would_read_themselves(
    tmp_path: Path, seed: int, rows_per_shard: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(seed)
    groups = [None if rng.random() < 0.1 else int(g) for g in rng.integers(0, 30, NUM_ROWS)]
    columns = {"id": 5000 + rng.permutation(NUM_ROWS), "path": [f"{i}.png" for i in groups]}
    labels = {"label": rng.integers(0, 3, NUM_ROWS)} if seed % 2 else {}
    path = write(tmp_path / "set.parquet", groups, **columns, **labels)
    given = ParquetInput.open(str(path), ColumnsConfig(group="visit"), 0)
    parts = given.parts(rows_per_shard, seed)
    expected = [list(part.read()) for part in parts]
    reads: Counter[int] = Counter()

    def counting(source: Source, rows: np.ndarray) -> RowTable:
        reads.update(np.unique(rows // 10).tolist())
        return original(source, rows)

    original = Source.read_rows
    monkeypatch.setattr(Source, "read_rows", counting)
    together = bring_together(parts, str(tmp_path / "pieces"))
    assert [list(part.read()) for part in together] == expected
    assert sum(reads.values()) <= 2 * 20
    if rows_per_shard < 500:
        assert all(isinstance(part, RegroupedTask) for part in together)
        assert set(reads.values()) == {1}
        assert len(list((tmp_path / "pieces").iterdir())) > 3
        reads.clear()
        bring_together(parts, str(tmp_path / "pieces"))  # after an interruption
        assert not reads


def test_shards_of_one_large_row_group_read_it_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = pa.table({"image": [b"%060d" % i for i in range(NUM_ROWS)], "label": [1, 2] * 100})
    pq.write_table(table, tmp_path / "set.parquet", compression="none")  # one of 12,000 bytes
    parts = ParquetInput.open(str(tmp_path / "set.parquet"), ColumnsConfig(), 0).parts(40, 0)
    expected = [list(part.read()) for part in parts]
    reads: list[int] = []
    original = Source.read_slices

    def counting(source: Source, index: int, num_rows: int) -> Iterator[RowTable]:
        for rows in original(source, index, num_rows):
            reads.append(len(rows.ids))
            yield rows

    monkeypatch.setattr(Source, "read_slices", counting)
    together = bring_together(parts, str(tmp_path / "pieces"))
    assert [list(part.read()) for part in together] == expected
    assert sum(reads) == NUM_ROWS
    assert len(reads) > 4
    reads.clear()
    min((tmp_path / "pieces").iterdir()).unlink()  # an interruption
    bring_together(parts, str(tmp_path / "pieces"))
    assert sum(reads) == NUM_ROWS
    assert [list(part.read()) for part in together] == expected
    reads.clear()
    bring_together(parts, str(tmp_path / "pieces"))
    assert not reads


@pytest.fixture
def pool_of_arrow() -> Iterator[None]:
    """Arrow's pool of memory, set again after a test."""
    before = pa.default_memory_pool()
    yield
    pa.set_memory_pool(before)


@pytest.mark.usefixtures("pool_of_arrow")
@pytest.mark.parametrize("options", [{}, {"compression": "snappy", "use_dictionary": True}])
def test_a_row_group_that_is_too_large_is_never_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    noise = np.random.default_rng(0)
    table = pa.table({"image": [noise.bytes(20_000) for _ in range(NUM_ROWS)]})
    size = table.nbytes
    pages: dict[str, Any] = {"write_batch_size": 1, "data_page_size": 20_000}
    plain = {"compression": "none", "use_dictionary": False}
    pq.write_table(table, tmp_path / "set.parquet", **pages, **plain | options)
    del table
    monkeypatch.setattr(regroup, "MAX_SHARD_BYTES", size / 10)
    monkeypatch.setattr(tables, "PAGES_BYTES", 40_000)
    parts = ParquetInput.open(str(tmp_path / "set.parquet"), ColumnsConfig(), 0).parts(20, 0)
    pool = pa.proxy_memory_pool(pa.default_memory_pool())  # which counts from here on
    pa.set_memory_pool(pool)
    together = bring_together(parts, str(tmp_path / "pieces"))
    shown = [list(part.read()) for part in together]
    assert pool.max_memory() < 0.5 * size
    assert shown == [list(part.read()) for part in parts]


@pytest.mark.parametrize("limit", [0, 55])
def test_slices_of_a_row_group_are_its_rows(tmp_path: Path, limit: int) -> None:
    table = pa.table({"id": range(500, 600), "image": [b"%d" % i for i in range(100)]})
    (tmp_path / "label=7").mkdir()
    pq.write_table(table, tmp_path / "label=7" / "set.parquet", row_group_size=50)
    source = Source.open(str(tmp_path), limit=limit)
    for index, group in enumerate(source.row_groups):
        parts, whole = list(source.read_slices(index, 20)), source.read_group(index)
        assert len(parts) == -(-group.num_rows // 20)
        assert [i for part in parts for i in part.images] == whole.images
        for name in ("ids", "labels"):
            every = np.concatenate([getattr(part, name) for part in parts])
            np.testing.assert_array_equal(every, getattr(whole, name))
    (tmp_path / "label=7" / "set.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"row group 0 cannot be read|changed while"):
        list(source.read_slices(0, 20))


@pytest.mark.parametrize("names", [["a", None, "b"], [3, None, 2**62]])
def test_rows_are_taken_of_a_column_that_is_in_one_piece(names: list[object]) -> None:
    column = pa.chunked_array([names[:2], names[2:], []], pa.array(names).type)
    whole = one_array(column)
    assert isinstance(whole, pa.Array)  # each of many takes would join the chunks of a column
    assert whole.take(pa.array([2, 1])).to_pylist() == names[:0:-1]


def test_shards_of_groups_that_lie_together_read_them_where_they_are(tmp_path: Path) -> None:
    path = write(tmp_path / "set.parquet", [i // 5 for i in range(NUM_ROWS)])
    given = ParquetInput.open(str(path), ColumnsConfig(group="visit"), 0)
    parts = given.parts(1000, 0)
    assert bring_together(parts, str(tmp_path / "pieces")) == parts
    no_groups = replace(given, groups="").parts(7, 0)
    assert all(isinstance(part, ParquetTask) for part in no_groups)
    assert bring_together(no_groups, str(tmp_path / "pieces")) == no_groups
    assert not (tmp_path / "pieces").exists()
