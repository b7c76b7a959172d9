"""Neighbours and pairs of 50,000 embeddings are those of all comparisons, within seconds."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
import torch

from simclr_ray.inference.embedding_index import ROUNDING, EmbeddingIndex
from tests.unit.inference.test_embedding_index import write_index

pytestmark = pytest.mark.long

NUM, WIDTH, COPIES, QUERIES = 50_000, 512, 2_000, 100
LEAST, MOST_S = 0.9, 10.0


def test_pairs_and_neighbours_of_50000_embeddings_are_exact(tmp_path: Path) -> None:
    drawn = np.random.default_rng(0)
    rows = np.maximum(drawn.normal(size=(NUM, WIDTH)), 0).astype(np.float32)  # as after a ReLU
    first = drawn.permutation(NUM)[: 2 * COPIES]
    noise = drawn.normal(scale=0.3, size=(COPIES, WIDTH))
    rows[first[COPIES:]] = np.maximum(rows[first[:COPIES]] + noise, 0)
    index = EmbeddingIndex(write_index(tmp_path / "a.parquet", rows))
    began = time.monotonic()
    pairs = index.pairs(LEAST)
    took = time.monotonic() - began
    began = time.monotonic()
    nearest = index.nearest(rows[:QUERIES], 10)
    asked = time.monotonic() - began

    unit = torch.nn.functional.normalize(torch.from_numpy(rows), dim=1)
    expected = set()
    for start in range(0, NUM, 2_000):
        near = (unit[start : start + 2_000] @ unit.T > LEAST - ROUNDING).nonzero().tolist()
        expected |= {(row + start, other) for row, other in near if row + start < other}
    found = {tuple(pair) for pair in pairs.positions.tolist()}
    cosines = unit[:QUERIES] @ unit.T
    best = cosines.topk(10, dim=1)
    assert len(expected) >= COPIES
    assert len(found ^ expected) <= 2  # at the bound itself
    assert all(
        set(a) == set(b)
        for a, b in zip(nearest.positions.tolist(), best.indices.tolist(), strict=True)
    )
    assert took < MOST_S, f"{took:.1f} s for all pairs"
    assert asked < 1.0, f"{asked:.2f} s for {QUERIES} queries"
