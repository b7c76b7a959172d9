"""Stored numbers hold: ids, learning rates and views exactly, training curves within rounding.

`numbers.json` changes only in a commit of its own that says why; `python -m tests.golden.compare
OLD_COMMIT` compares losses and tensors of two commits to the last bit on one machine.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.golden import compare, probe

STORED = Path(__file__).with_name("numbers.json")


@pytest.fixture(scope="module")
def stored() -> dict[str, Any]:
    numbers: dict[str, Any] = json.loads(STORED.read_text(encoding="utf-8"))
    return numbers


@pytest.fixture(scope="module")
def computed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    data = tmp_path_factory.mktemp("golden") / "images.parquet"
    probe.write_images(data)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return probe.quick_numbers(data)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("kind", ["rows", "views", "batches"])
def test_rows_views_and_batches_are_the_stored_ones(
    stored: dict[str, Any], computed: dict[str, Any], kind: str
) -> None:
    assert computed[kind] == stored[kind]


def test_two_ranks_have_the_ids_and_pixels_of_one(computed: dict[str, Any]) -> None:
    assert computed["batches"]["1 ranks"] == computed["batches"]["2 ranks"]


def test_learning_rates_are_the_stored_ones(
    stored: dict[str, Any], computed: dict[str, Any]
) -> None:
    ours, theirs = (compare.flat(n["learning_rates"]) for n in (computed, stored))
    assert ours == pytest.approx(theirs, rel=1e-12)  # a libm may round a cosine otherwise


@pytest.mark.parametrize(
    ("name", "steps", "tolerance"), [("ntxent", 20, 1e-6), ("ntxent_float32", 5, 1e-3)]
)
def test_a_training_follows_the_stored_curve(
    stored: dict[str, Any], computed: dict[str, Any], name: str, steps: int, tolerance: float
) -> None:
    curve = computed["curves"][name]
    assert len(curve) == 20
    assert curve[:steps] == pytest.approx(stored["curves"][name][:steps], rel=tolerance)
    assert len(set(curve)) == 20  # it moved
