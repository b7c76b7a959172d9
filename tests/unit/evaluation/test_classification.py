"""Measures of class scores against scikit-learn and by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, top_k_accuracy_score

from simclr_ray.evaluation.classification import LABELS, classification, mean_average_precision_11


def test_the_measures_are_scikit_learns() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 8, 300)
    labels[:100] = 2  # classes are not equally many
    scores = rng.normal(size=(300, 8))
    scores[np.arange(300), labels] += 1.0
    found = classification(torch.from_numpy(scores), torch.from_numpy(labels))
    assert found.top1 == pytest.approx((scores.argmax(1) == labels).mean())
    assert found.top5 == pytest.approx(top_k_accuracy_score(labels, scores, k=5))
    expected = balanced_accuracy_score(labels, scores.argmax(1))
    assert found.mean_per_class == pytest.approx(expected)
    assert found.num_images == 300
    assert found.measures() == dict(zip(LABELS, found, strict=False))


def test_the_11_point_map_is_voc_2007s() -> None:
    scores = torch.tensor([[0.9], [0.8], [0.7], [0.6], [0.5]])
    truth = torch.tensor([[True], [False], [True], [False], [False]])
    # precision 1 up to recall 0.5 (six levels), then 2/3 (five)
    expected = (6 * 1.0 + 5 * 2 / 3) / 11
    assert mean_average_precision_11(scores, truth) == pytest.approx(expected)
    perfect = mean_average_precision_11(
        scores, torch.tensor([[True], [True], [False], [False], [False]])
    )
    assert perfect == pytest.approx(1.0)
    both = mean_average_precision_11(scores.expand(-1, 2), torch.cat([truth, ~truth & False], 1))
    assert both == pytest.approx(expected)  # a class without a sample is left out
    with pytest.raises(ValueError, match="no sample"):
        mean_average_precision_11(scores, truth & False)
