"""Shards of groups that lie anywhere get their rows, and nothing is read more than once."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from simclr_ray.config.experiment import ColumnsConfig
from simclr_ray.data import regroup
from simclr_ray.data.grouping import one_array
from simclr_ray.data.inputs import ParquetInput, ParquetTask
from simclr_ray.data.regroup import RegroupedTask, bring_together
from simclr_ray.data.source import RowTable, Source

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
    original = Source.read_rows

    def counting(source: Source, rows: np.ndarray) -> RowTable:
        reads.append(len(rows))
        return original(source, rows)

    monkeypatch.setattr(Source, "read_rows", counting)
    together = bring_together(parts, str(tmp_path / "pieces"))
    assert [list(part.read()) for part in together] == expected
    assert reads == [NUM_ROWS]


def test_of_one_large_row_group_arrow_holds_no_second_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = pa.table({"image": [bytes([i]) * 20_000 for i in range(NUM_ROWS)]})
    size = table.nbytes
    pq.write_table(table, tmp_path / "set.parquet", compression="none", use_dictionary=False)
    del table
    parts = ParquetInput.open(str(tmp_path / "set.parquet"), ColumnsConfig(), 0).parts(20, 0)
    allocated: list[int] = []
    rows_of, write_table = Source._rows, pq.ParquetWriter.write_table

    def rows_counted(*given: Any) -> RowTable:
        allocated.append(pa.total_allocated_bytes())
        return rows_of(*given)

    def write_counted(*given: Any) -> None:
        allocated.append(pa.total_allocated_bytes())
        write_table(*given)

    monkeypatch.setattr(Source, "_rows", rows_counted)
    monkeypatch.setattr(pq.ParquetWriter, "write_table", write_counted)
    before = pa.total_allocated_bytes()
    bring_together(parts, str(tmp_path / "pieces"))
    assert len(allocated) == 1 + len(parts)
    assert allocated[0] - before < 1.2 * size  # the rows in order; what was read is gone
    assert max(allocated[1:]) - before < 0.3 * size  # a shard


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
