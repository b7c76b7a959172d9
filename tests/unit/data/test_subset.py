"""A share of the labels: balanced over classes, fixed by its seed, bytes and ids as they were."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from simclr_ray.data.source import Source
from simclr_ray.data.subset import balanced_rows, rows_left, write_subset
from simclr_ray.errors import DataError
from tests.ray.images import write_shapes

LABELS = np.repeat([0, 1, 2, -1], [500, 300, 200, 50])


def test_classes_give_equally_many_rows_by_the_seed_alone() -> None:
    rows = balanced_rows(LABELS, 0.1, 0)
    assert np.bincount(LABELS[rows]).tolist() == [33, 33, 33]  # of 100 asked for
    assert (np.diff(rows) > 0).all()
    assert np.array_equal(rows, balanced_rows(LABELS, 0.1, 0))
    assert not np.array_equal(rows, balanced_rows(LABELS, 0.1, 1))
    assert len(balanced_rows(LABELS, 1.0, 0)) == 1000  # all that have a label
    assert np.bincount(LABELS[balanced_rows(LABELS, 0.9, 0)]).tolist() == [300, 300, 200]


@pytest.mark.parametrize(("labels", "label_fraction"), [(LABELS, 0.001), (np.full(9, -1), 0.5)])
def test_fewer_rows_than_classes_are_refused(
    labels: NDArray[np.int64], label_fraction: float
) -> None:
    with pytest.raises(DataError, match="classes"):
        balanced_rows(labels, label_fraction, 0)


def test_the_rows_are_written_once_with_their_ids_and_bytes(tmp_path: Path) -> None:
    write_shapes(tmp_path / "all.parquet", 200, row_group_size=30)
    source = Source.open(str(tmp_path / "all.parquet"))
    where = write_subset(source, 0.25, 3, str(tmp_path / "runs"))
    subset = Source.open(where)
    rows = balanced_rows(source.labels(), 0.25, 3)
    assert np.array_equal(subset.ids(), source.ids()[rows])
    assert np.array_equal(subset.labels(), source.labels()[rows])
    kept = subset.read_rows(np.arange(subset.num_rows)).images
    assert kept == source.read_rows(rows).images
    stamp = Path(where).stat().st_mtime_ns
    assert write_subset(source, 0.25, 3, str(tmp_path / "runs")) == where
    assert Path(where).stat().st_mtime_ns == stamp
    assert write_subset(source, 0.25, 4, str(tmp_path / "runs")) != where


def test_at_most_so_many_of_the_rows_that_were_not_chosen_are_the_test() -> None:
    chosen = balanced_rows(LABELS, 0.1, 0)
    rest = np.setdiff1d(np.flatnonzero(LABELS >= 0), chosen)
    assert len(rest) == 901
    assert np.array_equal(rows_left(LABELS, chosen, 0), rest)
    assert np.array_equal(rows_left(LABELS, chosen, 0, 901), rest)
    rows = rows_left(LABELS, chosen, 0, 200)
    assert len(rows) == 200
    assert (np.diff(rows) > 0).all()
    assert np.isin(rows, rest).all()
    assert np.array_equal(rows, rows_left(LABELS, chosen, 0, 200))
    assert not np.array_equal(rows, rows_left(LABELS, chosen, 1, 200))
    # each row is drawn alike: 200 / 901 of the times, within 5 standard errors of 400 draws
    times = sum(np.isin(rest, rows_left(LABELS, chosen, seed, 200)) for seed in range(400))
    error = np.sqrt(400 * 200 / 901 * (1 - 200 / 901))
    assert np.abs(times - 400 * 200 / 901).max() < 5 * error


def test_no_more_than_a_sample_of_the_other_rows_is_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(rows_left, "__defaults__", (40,))
    caplog.set_level("INFO")
    write_shapes(tmp_path / "all.parquet", 200, row_group_size=30)
    source, runs = Source.open(str(tmp_path / "all.parquet")), str(tmp_path / "runs")
    chosen = Source.open(write_subset(source, 0.25, 3, runs))
    others = Source.open(write_subset(source, 0.25, 3, runs, others=True))
    assert others.num_rows == 40
    assert not np.isin(others.ids(), chosen.ids()).any()
    left = 200 - chosen.num_rows
    assert f"tested on 40 of the {left} labelled images that were not chosen" in caplog.text
    assert write_subset(source, 1.0, 3, runs, others=True) == ""
