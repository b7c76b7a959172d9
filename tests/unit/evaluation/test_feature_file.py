"""Features in a file: what is read is what was written, and scores are those of memory."""

from __future__ import annotations

import errno
import os
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from simclr_ray import config as cfg
from simclr_ray.config.experiment import Experiment, LinearConfig
from simclr_ray.errors import StorageError
from simclr_ray.evaluation import feature_file
from simclr_ray.evaluation.feature_file import FeatureFile, are_finite, blocks
from simclr_ray.evaluation.features import Features
from simclr_ray.evaluation.knn import knn_scores
from simclr_ray.evaluation.linear import _standardised, fit_linear
from simclr_ray.evaluation.scores import score_features

ROWS, WIDTH, CLASSES = 300, 7, 3


@pytest.fixture
def rows() -> Tensor:
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def labels(rows: Tensor) -> Tensor:
    return rows[:, :CLASSES].argmax(1)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let 300 rows be many: blocks of 32."""
    monkeypatch.setattr(feature_file, "BLOCK_BYTES", 4 * WIDTH * 32)


def stored(rows: Tensor) -> FeatureFile:
    """Return a file of the rows, written in parts and not in order."""
    file = FeatureFile(*rows.shape)
    order = np.random.default_rng(0).permutation(len(rows))
    for part in np.array_split(order, 7):
        file.write(part, rows[torch.from_numpy(part)].numpy())
    return file


def test_rows_of_another_device_are_taken_by_places_of_theirs(rows: Tensor) -> None:
    class OfGpu:
        """Stands in for places on a GPU, by which torch takes no rows of the CPU."""

        def to(self, device: torch.device) -> Tensor:
            assert device == rows.device
            return torch.tensor([5, 0, 299])

    places: Any = OfGpu()
    taken = _standardised(rows, torch.device("cpu"))[places]
    want = (rows - rows.mean(0)) / rows.std(0, correction=0)
    torch.testing.assert_close(taken, want[[5, 0, 299]])


def test_rows_are_read_as_a_tensor_would_give_them(rows: Tensor) -> None:
    file = stored(rows)
    assert (len(file), file.shape) == (ROWS, (ROWS, WIDTH))
    mask = torch.arange(ROWS) % 7 == 3
    places = torch.tensor([5, 4, 4, 299, 0])
    for index in (slice(None), slice(10, 50), slice(290, 999), slice(5, 5), mask, places):
        assert torch.equal(file[index], rows[index])
    read = file[:]
    read.zero_()  # a copy
    assert torch.equal(file[:], rows)


def test_a_row_past_the_end_is_refused_and_not_waited_for(rows: Tensor) -> None:
    file = stored(rows)
    for places in ([ROWS], [0, ROWS + 7], [-1]):
        with pytest.raises(IndexError, match="of 300"):
            file[torch.tensor(places)]


def test_blocks_are_all_rows_in_order(rows: Tensor) -> None:
    parts = list(blocks(stored(rows)))
    assert [len(part) for part in parts] == [32] * 9 + [12]
    assert torch.equal(torch.cat(parts), rows)


def test_rows_that_are_kept_move_to_the_front(rows: Tensor) -> None:
    file, kept = stored(rows), torch.arange(ROWS) % 3 != 1
    file.keep(kept.numpy())
    assert torch.equal(file[:], rows[kept])
    file.keep(np.zeros(len(file), bool))
    assert file[:].shape == (0, WIDTH)


def test_a_number_that_is_none_is_found_in_any_block(rows: Tensor) -> None:
    assert are_finite(stored(rows))
    for place in (0, 150, 299):
        poisoned = rows.clone()
        poisoned[place, 2] = torch.nan
        assert not are_finite(stored(poisoned))


def test_a_disk_without_room_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(StorageError, match=r"1,000 images need 7\.8 MiB in .*TMPDIR"):
        FeatureFile(1000, 2048)


@pytest.mark.parametrize("k", [1, 20, 500])
def test_knn_is_that_of_memory(
    rows: Tensor, labels: Tensor, k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    queries = rows + 0.1
    whole = knn_scores(rows, labels, queries, k, 0.1, CLASSES)
    monkeypatch.setattr("simclr_ray.evaluation.knn.BANK_ROWS", 64)
    monkeypatch.setattr("simclr_ray.evaluation.knn.QUERY_ROWS", 50)
    apart = knn_scores(stored(rows), labels, stored(queries), k, 0.1, CLASSES)
    torch.testing.assert_close(apart, whole)


def test_the_linear_probe_is_that_of_memory(
    rows: Tensor, labels: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = LinearConfig(epochs=5, batch_size=16)
    scaled = 40 * rows + 3  # the rate has to be lowered for it
    apart = fit_linear(stored(scaled), labels, CLASSES, settings, seed=1)
    monkeypatch.setattr(feature_file, "BLOCK_BYTES", 2**20)
    whole = fit_linear(scaled, labels, CLASSES, settings, seed=1)
    torch.testing.assert_close(apart.weight, whole.weight, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(
        apart.logits(stored(scaled)), whole.logits(scaled), rtol=1e-4, atol=1e-4
    )


def test_a_row_of_scores_is_that_of_memory(rows: Tensor, labels: Tensor) -> None:
    experiment = cfg.validate(Experiment, {"name": "t", "data": {"train": "x"}})
    in_memory, in_file = (
        score_features(
            "x", Features(of(rows), labels), Features(of(rows[:90]), labels[:90]), experiment
        ).numbers()
        for of in (torch.clone, stored)
    )
    assert set(in_file) >= {"knn_top1", "linear_top1", "effective_rank"}
    assert in_file == pytest.approx(in_memory, rel=1e-5)
