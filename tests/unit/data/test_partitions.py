"""A table in folders `label=cat/` reads as the same table with a column of labels."""

from __future__ import annotations

import pickle
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import pytest

from simclr_ray.config.experiment import ColumnsConfig
from simclr_ray.data.description import describe_columns
from simclr_ray.data.image_groups import groups_line, open_grouped
from simclr_ray.data.inputs import ParquetInput
from simclr_ray.data.source import Source
from simclr_ray.data.subset import write_subset
from simclr_ray.errors import DataError
from simclr_ray.inference.embed_input import check_columns

NAMES = ["cat", "dog", "a b/ü%=x", None, "cat", "train", "007", ""]
NUMBERS = [3, 1, 2**40, None, 3, -1, 0, 2]


def table_of(**columns: Sequence[object]) -> pa.Table:
    num_rows = len(next(iter(columns.values())))
    return pa.table({"image": [b"%d" % i for i in range(num_rows)]} | columns)


def partitioned(table: pa.Table, folder: Path, *names: str) -> str:
    fields = pa.schema([table.schema.field(name) for name in names])
    by = pads.partitioning(fields, flavor="hive")
    pads.write_dataset(table, folder, format="parquet", partitioning=by)
    return str(folder)


def in_one_file(uri: str, path: Path) -> str:
    """Write the rows as pyarrow reads them, in the order of the files' paths."""
    dataset = pads.dataset(uri, partitioning="hive")
    parts = sorted(dataset.get_fragments(), key=lambda part: part.path)
    pq.write_table(pa.concat_tables(p.to_table(schema=dataset.schema) for p in parts), path)
    return str(path)


@pytest.mark.parametrize("values", [NAMES, [3, 1, 2, 3, None, 0, -1, 5]])
@pytest.mark.parametrize("scheme", ["", "file://"])
def test_values_of_folders_are_labels(tmp_path: Path, values: list[object], scheme: str) -> None:
    folder = partitioned(table_of(label=values), tmp_path / "set", "label")
    source = Source.open(scheme + folder)
    oracle = Source.open(in_one_file(folder, tmp_path / "oracle.parquet"))
    assert source.class_names == oracle.class_names
    assert source.labels().tolist() == oracle.labels().tolist()
    rows = np.array([7, 0, 3, 3, 5])
    for each in (source, pickle.loads(pickle.dumps(source))):  # noqa: S301 - our own bytes
        read, expected = each.read_rows(rows), oracle.read_rows(rows)
        assert (read.ids.tolist(), read.images) == (expected.ids.tolist(), expected.images)
        assert read.labels is not None
        assert expected.labels is not None
        assert read.labels.tolist() == expected.labels.tolist()
    assert source.read_group(0, labels=False).labels is None
    assert source.label_of()(rows).tolist() == oracle.label_of()(rows).tolist()
    assert Source.open(folder, limit=5).num_rows == 5


def test_numbers_of_64_bits_stay_numbers_and_larger_ones_are_text(tmp_path: Path) -> None:
    folder = partitioned(table_of(label=NUMBERS), tmp_path / "set", "label")
    labels = Source.open(folder).labels().tolist()
    assert sorted(labels) == sorted(-1 if n is None else n for n in NUMBERS)
    big = partitioned(table_of(label=["1", str(2**63)]), tmp_path / "big", "label")
    assert Source.open(big).class_names == ("1", str(2**63))


def test_folders_within_folders_are_columns_splits_and_groups(tmp_path: Path) -> None:
    table = table_of(
        split=["train"] * 4 + ["test"] * 2,
        label=["test", "train", "cat", "cat", "train", "test"],
        visit=[1, 2, 3, 3, 4, 5],
    )
    for order in (["split", "label", "visit"], ["visit", "label", "split"]):
        folder = partitioned(table, tmp_path / order[0], *order)
        with pytest.raises(DataError, match=r"test \(2 files\), train \(3 files\) side by side"):
            Source.open(folder)
        source = open_grouped(f"{folder}#train", ColumnsConfig(group="visit"))
        assert source.class_names == ("cat", "test", "train")
        assert sorted(source.labels().tolist()) == [0, 0, 1, 2]
        assert groups_line(source) == "3 groups of 1 to 2 images"
        shown = describe_columns(f"{folder}#train", source.columns)
        kinds = {"image": "binary", "split": "string", "label": "string", "visit": "int64"}
        assert shown.columns == kinds
        assert shown.labels == {0: 2, 1: 1, 2: 1}
        check_columns(source, ["visit", "split"])
        assert sorted(source.read_columns("visit")[0].to_pylist()) in ([1], [2], [3, 3])
    species = partitioned(table.drop("split"), tmp_path / "other", "label", "visit")
    assert Source.open(species).num_rows == 6  # classes of such names are no splits


def test_prepared_sets_and_subsets_have_the_labels(tmp_path: Path) -> None:
    folder = partitioned(table_of(species=["b", "a", "b", "a"]), tmp_path / "set", "species")
    with pytest.raises(DataError, match=re.escape("species=...: data.columns.label=species")):
        Source.open(folder).labels()
    columns = ColumnsConfig(label="species")
    items = [
        item for part in ParquetInput.open(folder, columns, 0).parts(9, 0) for item in part.read()
    ]
    assert sorted((item.encoded, item.label) for item in items) == [
        (b"0", 1), (b"1", 0), (b"2", 1), (b"3", 0),
    ]  # fmt: skip
    subset = write_subset(Source.open(folder, columns), 1.0, 0, str(tmp_path / "subsets"))
    assert Source.open(subset, columns).labels().tolist() == [0, 0, 1, 1]
    assert Source.open(subset, columns).class_names == ("a", "b")


def test_the_fingerprint_says_which_folder_a_file_lies_in(tmp_path: Path) -> None:
    first = Source.open(partitioned(table_of(label=["a", "b"]), tmp_path / "one", "label"))
    again = Source.open(partitioned(table_of(label=["a", "b"]), tmp_path / "two", "label"))
    other = Source.open(partitioned(table_of(label=["a", "c"]), tmp_path / "three", "label"))
    assert first.fingerprint == again.fingerprint != other.fingerprint


def test_a_file_among_folders_and_a_folder_alone_are_explained(tmp_path: Path) -> None:
    folder = partitioned(table_of(label=["cat", "dog"]), tmp_path / "set", "label")
    with pytest.raises(DataError, match=r"give the folder that holds the folders label=\.\.\."):
        Source.open(f"{folder}/label=cat").labels()
    pq.write_table(table_of(label=["eel"]), tmp_path / "set" / "own.parquet")
    assert Source.open(folder).class_names == ("cat", "dog", "eel")
    pq.write_table(pa.table({"image": [b"9"]}), tmp_path / "set" / "own.parquet")
    with pytest.raises(DataError, match=r"own\.parquet has no label column 'label'.* label=\.\.\."):
        Source.open(folder)
