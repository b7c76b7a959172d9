"""An index gives the neighbours and pairs that a comparison of all with all gives."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from simclr_ray.augment.decode import ImageDecoder
from simclr_ray.errors import ConfigError, DataError
from simclr_ray.inference import embedding_index
from simclr_ray.inference.embedding_file import Origin
from simclr_ray.inference.embedding_index import EmbeddingIndex, unit_length

NUM, WIDTH = 700, 24


def write_index(
    path: Path, rows: Any, *, names: list[str] | None = None, origin: Origin | None = None,
    **more: list[Any],
) -> str:  # fmt: skip
    """Write embeddings as `embed --out` does; rows that are NaN have no image."""
    rows = np.asarray(rows)
    flat = pa.array(rows.reshape(-1))
    errors = [None if np.isfinite(row).all() else "not an image" for row in rows]
    table = pa.table(
        {
            "path": names or [f"{i}.png" for i in range(len(rows))],
            **more,
            "embedding": pa.FixedSizeListArray.from_arrays(flat, rows.shape[1]),
            "error": pa.array(errors, pa.string()),
        }
    )
    if origin is not None:
        table = table.replace_schema_metadata(origin.as_metadata())
    pq.write_table(table, path)
    return str(path)


@pytest.fixture(scope="module")
def rows() -> Any:
    """Return embeddings of which some are copies of others, with a little noise; one is missing."""
    drawn = np.random.default_rng(0)
    made = drawn.normal(size=(NUM, WIDTH)).astype(np.float32)
    made[500:560] = made[:60] * drawn.uniform(0.5, 2, (60, 1)) + drawn.normal(0, 0.02, (60, WIDTH))
    made[5] = np.nan
    return made


def cosines_of(rows: Any) -> Any:
    unit = rows.astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    return unit @ unit.T


def test_neighbours_are_those_of_all_comparisons(
    tmp_path: Path, rows: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = EmbeddingIndex(write_index(tmp_path / "a.parquet", rows))
    good = np.delete(np.arange(NUM), 5)
    assert index.rows.tolist() == good.tolist()
    assert index.names[:6] == ["0.png", "1.png", "2.png", "3.png", "4.png", "6.png"]
    found = index.nearest(3 * rows[good[:50]], 7)
    expected = cosines_of(rows[good])[:50]
    order = np.argsort(-expected, axis=1)[:, :7]
    assert np.array_equal(found.positions, order)
    np.testing.assert_allclose(found.cosines, np.take_along_axis(expected, order, 1), atol=1e-6)
    few = EmbeddingIndex(write_index(tmp_path / "b.parquet", rows[:3]))
    assert few.nearest(rows[:1], 7).positions.shape == (1, 3)
    with pytest.raises(DataError, match="24 numbers, and the encoder makes 5"):
        index.nearest(np.ones((1, 5), np.float32), 1)


@pytest.mark.parametrize("least", [0.97, 0.3, -1.0])
@pytest.mark.parametrize("at_once", [64, 4096])
def test_pairs_are_those_of_all_comparisons(
    tmp_path: Path, rows: Any, least: float, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedding_index, "MOST_ROWS", at_once)
    index = EmbeddingIndex(write_index(tmp_path / "a.parquet", rows))
    found = index.pairs(least)
    expected = cosines_of(rows[index.rows])
    pairs = {tuple(pair) for pair in found.positions.tolist()}
    sure, at_most = (
        set(zip(*np.nonzero(np.triu(expected >= bound, 1)), strict=True))
        for bound in (least, least - 3 * embedding_index.ROUNDING)
    )
    assert sure <= pairs <= at_most
    assert len(found.positions) == len(pairs)
    assert (np.diff(found.cosines) <= 0).all()
    of_pair = expected[found.positions[:, 0], found.positions[:, 1]]
    np.testing.assert_allclose(found.cosines, of_pair, atol=1e-6)


def test_rows_of_the_same_numbers_have_a_cosine_of_one_and_are_a_group(tmp_path: Path) -> None:
    rows = np.eye(6, dtype=np.float32)[[0, 1, 0, 2, 1, 0]]
    rows[3] = 0  # all that an encoder of rectified numbers may make of an image
    index = EmbeddingIndex(write_index(tmp_path / "a.parquet", rows))
    found = index.pairs(1.0)
    assert found.positions.tolist() == [[0, 2], [0, 5], [1, 4], [2, 5]]
    assert [group.tolist() for group in found.groups(6)] == [[0, 2, 5], [1, 4]]
    assert np.array_equal(unit_length(rows)[3], np.zeros(6))
    assert index.pairs(1.0).groups(6)[0].dtype == np.int64


def test_too_many_pairs_are_no_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding_index, "MOST_PAIRS", 10)
    index = EmbeddingIndex(write_index(tmp_path / "a.parquet", np.ones((6, 2), np.float32)))
    with pytest.raises(DataError, match=r"more than 10 pairs of 6 images .*\(--min-cosine\)"):
        index.pairs(0.5)


def test_what_is_no_file_of_embeddings_is_named(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [b""]}), tmp_path / "images.parquet")
    (tmp_path / "text.parquet").write_text("x")
    for name, values in (("one", [0.5]), ("words", [["a"]]), ("nothing", [None])):
        table = pa.table({"path": ["a"], "embedding": values, "error": [None]})
        pq.write_table(table, tmp_path / f"{name}.parquet")
    for name, problem in (
        ("images.parquet", "holds no embeddings"),
        ("one.parquet", "holds no embeddings"),
        ("words.parquet", "holds no embeddings"),
        ("nothing.parquet", "holds no embeddings"),
        ("text.parquet", "cannot be read"),
        ("none.parquet", "cannot be read"),
    ):
        with pytest.raises(DataError, match=problem):
            EmbeddingIndex(str(tmp_path / name))
    empty = write_index(tmp_path / "bad.parquet", np.full((2, 3), np.nan, np.float32))
    with pytest.raises(DataError, match="none of its rows has an embedding"):
        EmbeddingIndex(empty)


def test_half_precision_and_the_origin_are_read(tmp_path: Path, rows: Any) -> None:
    origin = Origin(
        "models:/photos/3", "ab12", "s3://photos", columns={"image": "x"},
        decoder=(1, 2, (100, 200), "pillow", 2),
    )  # fmt: skip
    index = EmbeddingIndex(write_index(tmp_path / "a.parquet", rows.astype("f2"), origin=origin))
    assert index.origin == origin
    assert isinstance(ImageDecoder(*index.origin.decoder).white, tuple)
    assert index.vectors.dtype == np.float32
    assert EmbeddingIndex(write_index(tmp_path / "b.parquet", rows)).origin == Origin()


def test_without_faiss_the_extra_is_named(
    tmp_path: Path, rows: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    index = EmbeddingIndex(write_index(tmp_path / "a.parquet", rows))
    for ask in (lambda: index.pairs(0.9), lambda: index.nearest(rows[:1], 1)):
        with pytest.raises(ConfigError, match=r"pip install 'simclr-ray\[search\]'"):
            ask()


def test_copies_of_any_numbers_have_a_cosine_of_one(tmp_path: Path) -> None:
    """Products of float32 rows with themselves are as often below 1 as not."""
    drawn = np.random.default_rng(1).normal(size=(200, 512)).astype(np.float32)
    index = EmbeddingIndex(write_index(tmp_path / "a.parquet", np.concatenate([drawn, drawn])))
    found = index.pairs(1.0)
    assert sorted(found.positions.tolist()) == [[i, i + 200] for i in range(200)]


def test_a_file_is_read_in_parts_and_progress_is_told(
    tmp_path: Path, rows: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = EmbeddingIndex(write_index(tmp_path / "a.parquet", rows))
    monkeypatch.setattr(embedding_index, "MOST_ROWS", 64)
    parts = EmbeddingIndex(str(tmp_path / "a.parquet"))
    assert parts.names == whole.names
    assert np.array_equal(parts.rows, whole.rows)
    assert np.array_equal(parts.vectors, whole.vectors)
    told: list[tuple[int, int]] = []
    parts.pairs(0.99, lambda done, of: told.append((done, of)))
    assert told[0] == (64, NUM - 1)
    assert told[-1] == (NUM - 1, NUM - 1)
