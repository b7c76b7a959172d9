"""L-BFGS against scikit-learn at the same l2, on features of real images and drawn ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from simclr_ray.data.source import Source
from simclr_ray.evaluation.features import extract_features, load_split
from simclr_ray.evaluation.knn import top_k_accuracy
from simclr_ray.evaluation.logistic_regression import (
    L2_VALUES,
    fit_logistic_regression,
    sweep_logistic_regression,
)
from simclr_ray.nn.resnet import ResNet

Split = tuple[torch.Tensor, torch.Tensor]


def sklearn_accuracy(train: Split, test: Split, l2: float) -> float:
    oracle = LogisticRegression(C=1 / l2, max_iter=5000, tol=1e-5)
    oracle.fit(train[0].double().numpy(), train[1].numpy())
    return float(oracle.score(test[0].double().numpy(), test[1].numpy()))


def ours(train: Split, test: Split, l2: float) -> float:
    probe = fit_logistic_regression(*train, int(train[1].max()) + 1, l2)
    return top_k_accuracy(probe.logits(test[0]), test[1])


@pytest.mark.slow
@pytest.mark.parametrize("dataset", ["cifar10", "caltech101"])
def test_accuracy_is_scikit_learns_to_a_fifth_of_a_point(dataset: str, image_root: Path) -> None:
    torch.manual_seed(0)
    encoder = ResNet(10, 0.5, "strided")
    splits = []
    for part, limit in (("train", 2000), ("test", 1500)):
        split = load_split(Source.open(str(image_root / dataset / part)), 32, limit)
        splits.append((extract_features(encoder, split.images), split.labels))
    train, test = splits
    scale = train[0].std()
    train, test = (train[0] / scale, train[1]), (test[0] / scale, test[1])
    for l2 in (10.0, 1000.0):
        assert ours(train, test, l2) == pytest.approx(sklearn_accuracy(train, test, l2), abs=0.002)


def clouds(seed: int, rows: int) -> Split:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 4, rows)
    centres = np.random.default_rng(0).normal(size=(4, 10)) * 0.6
    features = centres[labels] + rng.normal(size=(rows, 10)) + 5
    return torch.from_numpy(features).float(), torch.from_numpy(labels)


@pytest.mark.parametrize("l2", [1e-2, 1.0, 1e3])
def test_the_weights_are_scikit_learns(l2: float) -> None:
    features, labels = clouds(1, 400)
    probe = fit_logistic_regression(features, labels, 4, l2)
    oracle = LogisticRegression(C=1 / l2, max_iter=5000, tol=1e-8)
    oracle.fit(features.double().numpy(), labels.numpy())
    np.testing.assert_allclose(probe.weight.numpy(), oracle.coef_, atol=5e-3 / max(1, l2))
    gap = probe.bias.numpy() - oracle.intercept_
    np.testing.assert_allclose(gap - gap.mean(), 0, atol=3e-2)


def test_the_sweep_holds_out_a_fifth_and_takes_the_strongest_of_the_best() -> None:
    features, labels = clouds(2, 300)
    chosen = sweep_logistic_regression(features, labels, 4)
    assert list(chosen.held_out) == sorted(L2_VALUES, reverse=True)
    assert len(L2_VALUES) == 45
    assert (min(L2_VALUES), max(L2_VALUES)) == (1e-6, pytest.approx(1e5))
    best = max(chosen.held_out.values())
    assert chosen.l2 == max(l2 for l2, value in chosen.held_out.items() if value == best)
    again = fit_logistic_regression(features, labels, 4, chosen.l2)
    torch.testing.assert_close(chosen.probe.weight, again.weight, rtol=0, atol=2e-2)
    assert sweep_logistic_regression(features, labels, 4).held_out == chosen.held_out


def test_what_cannot_be_fitted_is_refused() -> None:
    with pytest.raises(ValueError, match="differ"):
        fit_logistic_regression(torch.rand(3, 2), torch.zeros(2, dtype=torch.int64), 2, 1.0)
    with pytest.raises(ValueError, match="not finite"):
        fit_logistic_regression(torch.full((2, 2), torch.nan), torch.tensor([0, 1]), 2, 1.0)
    with pytest.raises(ValueError, match="two samples"):
        sweep_logistic_regression(torch.rand(3, 2), torch.tensor([0, 1, 2]), 3)
