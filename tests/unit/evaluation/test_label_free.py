"""Label-free metrics against plain NumPy, and their values where theory gives them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from simclr_ray.evaluation import label_free
from simclr_ray.evaluation.label_free import alignment, effective_rank, feature_std, uniformity


def unit(x: np.ndarray) -> np.ndarray:
    return np.asarray(x / np.linalg.norm(x, axis=1, keepdims=True))


@pytest.mark.parametrize("shape", [(40, 6), (9, 30)])
def test_each_metric_equals_its_formula_in_numpy(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(label_free, "BLOCK_ROWS", 7)
    a, b = np.random.default_rng(1).normal(size=(2, *shape)) + 0.5
    u = unit(a)
    pairs = [np.sum((u[i] - u[j]) ** 2) for i in range(len(u)) for j in range(i)]
    singular = np.linalg.svd(a, compute_uv=False)
    p = singular / singular.sum() + 1e-7
    ta, tb = torch.from_numpy(a), torch.from_numpy(b)
    assert alignment(ta, tb) == pytest.approx(np.mean(np.sum((u - unit(b)) ** 2, 1)), rel=1e-12)
    assert uniformity(ta) == pytest.approx(np.log(np.mean(np.exp(-2 * np.array(pairs)))), rel=1e-9)
    assert effective_rank(ta) == pytest.approx(np.exp(-np.sum(p * np.log(p))), rel=1e-9)
    assert feature_std(ta) == pytest.approx(u.std(0).mean(), rel=1e-12)
    assert label_free.label_free(ta) == (uniformity(ta), effective_rank(ta), feature_std(ta))


def test_collapse_to_one_direction_shows_in_every_metric() -> None:
    lengths = torch.from_numpy(np.random.default_rng(2).uniform(1, 5, (50, 1)))
    h = lengths * torch.ones(50, 8)
    assert alignment(h, h.flip(0)) == pytest.approx(0, abs=1e-12)
    assert uniformity(h) == pytest.approx(0, abs=1e-9)
    assert effective_rank(h) == pytest.approx(1, abs=1e-4)
    assert feature_std(h) == pytest.approx(0, abs=1e-9)
    assert effective_rank(torch.zeros(5, 3)) == 1.0


def test_isotropic_features_have_full_rank_and_spread_of_one_over_root_f() -> None:
    h = torch.from_numpy(np.random.default_rng(3).normal(size=(4000, 16)))
    assert effective_rank(h) == pytest.approx(16, abs=0.05)
    assert feature_std(h) == pytest.approx(1 / math.sqrt(16), rel=0.01)


def test_opposite_pairs_have_alignment_four_and_wrong_shapes_are_refused() -> None:
    h = torch.from_numpy(np.random.default_rng(4).normal(size=(10, 3)))
    assert alignment(h, -h) == pytest.approx(4, rel=1e-12)
    with pytest.raises(ValueError, match="differ"):
        alignment(h, h[:5])
    with pytest.raises(ValueError, match="two rows"):
        uniformity(h[:1])
