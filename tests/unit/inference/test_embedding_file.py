"""What is stored of a piece, and what of others lies beside a file of embeddings and stays."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from simclr_ray.data.folder_input import index_files
from simclr_ray.errors import DataError
from simclr_ray.evaluation.feature_columns import ERROR, ROW, feature_column
from simclr_ray.inference.embed_pieces import DType, Layout
from simclr_ray.inference.embedding_file import EmbeddingFile, Origin

OWN, OTHER = "0123456789ab", "ba9876543210"
FIRST = np.arange(3)  # rows of a piece


def image(folder: Path, name: str) -> str:
    (folder / name).write_bytes(name.encode())
    return str(folder / name)


def piece(num: int = 3) -> pa.Table:
    rows = pa.FixedSizeListArray.from_arrays(pa.array(np.ones(2 * num, np.float32)), 2)
    return pa.table({ROW: range(num), feature_column(0): rows, ERROR: pa.nulls(num, pa.string())})


def beside(file: EmbeddingFile) -> set[str]:
    return {path.rpartition("/")[2] for path in [*file.pieces(), *file.listed()]}


def refused(file: EmbeddingFile, *images: str) -> None:
    with file.place():
        for path in images:
            index_files([path], file.lists)
        raise DataError("no such encoder")


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_another_command_has_left_stays_unless_it_is_overwritten(
    tmp_path: Path, overwrite: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    file = EmbeddingFile(str(tmp_path / "out.parquet"))
    theirs = index_files([image(tmp_path, "a.png")], file.lists)
    other = file.parts(OTHER, theirs)
    other.make()
    other.put(FIRST, Layout(ROW, 2, (), "float32").of(piece()))
    caplog.clear()
    mine = index_files([image(tmp_path, "b.png")], file.lists)
    own = file.parts(OWN, mine, overwrite=overwrite)
    own.make()
    own.put(FIRST, Layout(ROW, 2, (), "float32").of(piece()))
    file.write(own, [FIRST], OWN, Origin())
    # a list is not removed while pieces of others may be of the same images
    left = {Path(theirs).name, Path(mine).name, f"out.parquet.parts-{OTHER}"}
    assert beside(file) == (set() if overwrite else left)
    assert Path(file.lists).exists() != overwrite
    assert [OTHER in line for line in caplog.messages] == ([] if overwrite else [True])
    if not overwrite:
        assert other.read(FIRST).num_rows == 3
        other.clear()  # its own command ends
        file.parts(OWN, theirs, overwrite=True).clear()
        assert not Path(file.lists).exists()


def test_nothing_of_others_goes_where_no_row_has_an_embedding(tmp_path: Path) -> None:
    file = EmbeddingFile(str(tmp_path / "out.parquet"))
    theirs = index_files([image(tmp_path, "a.png")], file.lists)
    other = file.parts(OTHER, theirs)
    other.make()
    mine = index_files([image(tmp_path, "b.png")], file.lists)
    own = file.parts(OWN, mine, overwrite=True)
    own.make()
    own.clear(is_whole=False)
    assert beside(file) == {Path(theirs).name, Path(mine).name, f"out.parquet.parts-{OTHER}"}
    other.clear()
    own.clear(is_whole=False)
    assert not Path(file.lists).exists()


def test_a_piece_of_other_rows_is_none_of_a_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Another release cuts a list otherwise, and calls its images and settings the same."""
    parts = EmbeddingFile(str(tmp_path / "out.parquet")).parts(OWN)
    parts.make()
    before, now = [np.arange(3), np.arange(3, 7)], [np.arange(3), np.arange(3, 5), np.arange(5, 9)]
    for rows in before:
        parts.put(rows, piece(len(rows)))
    assert parts.missing(before) == []
    assert parts.missing([*before, np.arange(7, 9)]) == [2]  # interrupted, and of this release
    assert caplog.messages == []
    assert parts.missing(now) == [1, 2]
    (line,) = caplog.messages
    assert line == f"{parts.path}: 1 finished piece of another release cannot be used; made again"
    assert parts.read(before[1]).num_rows == 4
    Path(parts.path, "part-000000.parquet").touch()  # as the release before named them
    parts.missing(now)
    assert "2 finished pieces of another release" in caplog.messages[-1]


@pytest.mark.parametrize(
    ("uri", "lists"),
    [
        ("out.parquet", ".out.parquet.list"),
        ("/a?b/out?1.parquet", "/a?b/.out?1.parquet.list"),
        ("/out.parquet", "/.out.parquet.list"),
        ("s3://b/c/out.parquet?region=x/y", "s3://b/c/.out.parquet.list?region=x/y"),
        ("s3://b/out.parquet", "s3://b/.out.parquet.list"),
    ],
)
def test_lists_lie_beside_the_file_whatever_its_address_has(uri: str, lists: str) -> None:
    file = EmbeddingFile("out.parquet")
    file.uri = uri
    assert file.lists == lists


def test_a_command_that_is_refused_takes_only_its_own_list_away(tmp_path: Path) -> None:
    file = EmbeddingFile(str(tmp_path / "new" / "out.parquet"))
    first, second = image(tmp_path, "a.png"), image(tmp_path, "b.png")
    with pytest.raises(DataError):
        refused(file, first)
    assert not (tmp_path / "new").exists()
    theirs = index_files([first], file.lists)
    with pytest.raises(DataError):
        refused(file, first, second)
    assert beside(file) == {Path(theirs).name}


@pytest.mark.parametrize(
    ("dtype", "reasons"),
    [
        ("float32", [None, None, "not finite", "not finite", "no image"]),
        ("float16", [None, "not finite in float16", "not finite", "not finite", "no image"]),
    ],
)
def test_a_row_that_is_not_finite_has_an_error(dtype: DType, reasons: list[str | None]) -> None:
    values = [[1.0, 65504.0], [1.0, 7e4], [np.inf, 0.0], [0.0, np.nan], None]
    table = pa.table(
        {
            ROW: range(5),
            feature_column(0): pa.array(values, pa.list_(pa.float32(), 2)),
            ERROR: pa.array([None] * 4 + ["no image"], pa.string()),
        }
    )
    stored = Layout(ROW, 2, (), dtype).of(table)
    assert stored[ERROR].to_pylist() == reasons
    rows = np.array(stored["embedding"].to_pylist(), np.float32)
    bad = [reason is not None for reason in reasons]
    assert np.isnan(rows[bad]).all()
    np.testing.assert_array_equal(rows[0], [1, 65504])
