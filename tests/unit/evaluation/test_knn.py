"""kNN against scikit-learn and plain loops, at sizes around the block borders."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from simclr_ray.evaluation import knn
from simclr_ray.evaluation.knn import knn_scores, top_k_accuracy


def clouds(seed: int, rows: int, classes: int = 5, dim: int = 12) -> tuple[torch.Tensor, ...]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, rows)
    centres = np.random.default_rng(0).normal(size=(classes, dim))
    features = centres[labels] + rng.normal(size=(rows, dim))
    return torch.from_numpy(features), torch.from_numpy(labels)


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.1), (7, 0.1), (40, 0.5), (400, 0.07)])
def test_votes_rank_classes_as_scikit_learn_with_the_same_weights(
    k: int, temperature: float
) -> None:
    bank, bank_labels = clouds(1, 300)
    queries, _ = clouds(2, 70)
    scores = knn_scores(bank, bank_labels, queries, k=k, temperature=temperature, num_classes=5)
    oracle = KNeighborsClassifier(
        min(k, 300), metric="cosine", weights=lambda d: np.exp((1 - d) / temperature)
    ).fit(bank.numpy(), bank_labels.numpy())
    expected = oracle.predict_proba(queries.numpy())
    shares = (scores / scores.sum(1, keepdim=True)).numpy()
    np.testing.assert_allclose(shares, expected, atol=2e-5)  # float32 cosines over τ


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    bank, bank_labels = clouds(3, 101)
    queries, _ = clouds(4, 23)
    whole = knn_scores(bank, bank_labels, queries, k=9, temperature=0.1, num_classes=5)
    monkeypatch.setattr(knn, "QUERY_ROWS", 7)
    monkeypatch.setattr(knn, "BANK_ROWS", 4)  # fewer than k
    blocks = knn_scores(bank, bank_labels, queries, k=9, temperature=0.1, num_classes=5)
    torch.testing.assert_close(blocks, whole, rtol=1e-5, atol=1e-6)


def test_the_length_of_a_feature_vector_does_not_matter() -> None:
    bank, bank_labels = clouds(5, 64)
    queries, _ = clouds(6, 16)
    lengths = torch.from_numpy(np.random.default_rng(7).uniform(0.01, 100, (64, 1)))
    plain = knn_scores(bank, bank_labels, queries, k=5, temperature=0.1, num_classes=5)
    scaled = knn_scores(
        bank * lengths, bank_labels, queries * 3, k=5, temperature=0.1, num_classes=5
    )
    torch.testing.assert_close(scaled, plain, rtol=1e-4, atol=1e-5)


def test_a_tiny_temperature_stays_finite_and_equals_the_nearest_neighbour() -> None:
    bank, bank_labels = clouds(8, 200)
    queries, _ = clouds(9, 50)
    sharp = knn_scores(bank, bank_labels, queries, k=50, temperature=1e-4, num_classes=5)
    nearest = knn_scores(bank, bank_labels, queries, k=1, temperature=0.1, num_classes=5)
    assert torch.isfinite(sharp).all()
    assert torch.equal(sharp.argmax(1), nearest.argmax(1))


def test_wrong_labels_and_shapes_are_refused() -> None:
    bank, labels = clouds(10, 8)
    with pytest.raises(ValueError, match="outside"):
        knn_scores(bank, labels - 9, bank, k=1, temperature=0.1, num_classes=5)
    with pytest.raises(ValueError, match="do not fit"):
        knn_scores(bank, labels, bank[:, :3], k=1, temperature=0.1, num_classes=5)
    with pytest.raises(ValueError, match="rows and"):
        knn_scores(bank, labels[:3], bank, k=1, temperature=0.1, num_classes=5)
    with pytest.raises(ValueError, match="at least 1"):
        knn_scores(bank, labels, bank, k=0, temperature=0.1, num_classes=5)


def test_top_k_accuracy_counts_ties_once_and_misses_what_is_no_number() -> None:
    scores = torch.tensor([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    labels = torch.tensor([0, 0, 0, 2])
    assert top_k_accuracy(scores, labels) == 0.5  # rows 0 and 2
    assert top_k_accuracy(scores, labels, k=2) == 0.5
    assert top_k_accuracy(scores, labels, k=3) == 1.0
    assert top_k_accuracy(torch.full((4, 3), torch.nan), labels) == 0.0
    with pytest.raises(ValueError, match="do not fit"):
        top_k_accuracy(scores, labels[:2])
