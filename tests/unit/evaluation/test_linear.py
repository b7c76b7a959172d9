"""The linear protocol against scikit-learn's optimum, and what it must not depend on."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from benchmarks.linear import written_out
from simclr_ray.config.experiment import LinearConfig
from simclr_ray.evaluation.knn import top_k_accuracy
from simclr_ray.evaluation.linear import descend, fit_linear

CFG = LinearConfig(epochs=40, batch_size=64, learning_rate=0.1)


def clouds(
    seed: int, rows: int, separation: float = 1.3, classes: int = 4, dim: int = 10
) -> tuple[torch.Tensor, ...]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, rows)
    centres = separation * np.random.default_rng(0).normal(size=(classes, dim))
    features = centres[labels] + rng.normal(size=(rows, dim))
    return torch.from_numpy(features).float(), torch.from_numpy(labels)


def test_the_probe_reaches_the_loss_and_accuracy_of_the_convex_optimum() -> None:
    features, labels = clouds(1, 2000, separation=0.6)
    test, test_labels = clouds(2, 2000, separation=0.6)
    probe = fit_linear(features, labels, 4, CFG, seed=0)
    oracle = LogisticRegression(C=1e6, max_iter=2000).fit(features.numpy(), labels.numpy())
    ours = torch.nn.functional.cross_entropy(probe.logits(features), labels).item()
    log_p = oracle.predict_log_proba(features.numpy())
    best = -log_p[np.arange(len(labels)), labels.numpy()].mean()
    assert best <= ours <= best + 0.003  # SGD stops short of the optimum, never below it
    accuracy = top_k_accuracy(probe.logits(test), test_labels)
    assert accuracy == pytest.approx(oracle.score(test.numpy(), test_labels.numpy()), abs=0.01)


def test_shift_and_scale_of_single_features_do_not_matter() -> None:
    features, labels = clouds(3, 500)
    rng = np.random.default_rng(4)
    scale = torch.from_numpy(rng.uniform(1e-3, 1e3, 10)).float()
    shift = scale * torch.from_numpy(rng.uniform(-2, 2, 10)).float()
    plain = fit_linear(features, labels, 4, CFG, seed=0).logits(features)
    moved = fit_linear(features * scale + shift, labels, 4, CFG, seed=0).logits(
        features * scale + shift
    )
    torch.testing.assert_close(moved, plain, rtol=0, atol=2e-3)  # float32 over 40 epochs


def test_correlated_features_of_large_norm_do_not_make_it_diverge() -> None:
    """Raw pixels share one direction, brightness, whose moment is far above the stable one."""
    features, labels = clouds(5, 600)
    rng = np.random.default_rng(6)
    brightness = torch.from_numpy(rng.normal(size=(600, 1))).float()
    pixels = features.repeat(1, 100) + 20 * brightness  # [600, 1000]
    probe = fit_linear(pixels, labels, 4, LinearConfig(learning_rate=1.0), seed=0)
    loss = torch.nn.functional.cross_entropy(probe.logits(pixels), labels).item()
    assert loss < 1.0  # chance is ln 4 = 1.39


def test_the_same_seed_gives_the_same_bits_and_another_seed_another_order() -> None:
    features, labels = clouds(7, 300)
    first, again, other = (fit_linear(features, labels, 4, CFG, seed=s) for s in (1, 1, 2))
    assert torch.equal(first.weight, again.weight)
    assert torch.equal(first.bias, again.bias)
    assert not torch.equal(first.weight, other.weight)


def test_constant_features_and_a_class_without_rows_are_harmless() -> None:
    features, labels = clouds(8, 200)
    features = torch.cat([features, torch.full((200, 2), 7.0)], 1)
    probe = fit_linear(features, labels, 6, CFG, seed=0)
    assert torch.equal(probe.weight[:, 10:], torch.zeros(6, 2))
    assert top_k_accuracy(probe.logits(features), labels) > 0.9
    collapsed = fit_linear(torch.ones(200, 3), labels, 4, CFG, seed=0)
    assert torch.isfinite(collapsed.logits(torch.ones(1, 3))).all()


def test_labels_outside_and_features_that_are_no_numbers_are_refused() -> None:
    features, labels = clouds(9, 20)
    with pytest.raises(ValueError, match="outside"):
        fit_linear(features, labels, 2, CFG, seed=0)
    with pytest.raises(ValueError, match="not finite"):
        fit_linear(features * torch.inf, labels, 4, CFG, seed=0)
    with pytest.raises(ValueError, match="differ"):
        fit_linear(features, labels[:3], 4, CFG, seed=0)


@pytest.mark.parametrize("batch_size", [64, 200])
def test_the_descent_is_nesterovs_update_written_out(batch_size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    rows, labels = torch.randn(200, 16, generator=generator), torch.arange(200) % 4
    config = LinearConfig(epochs=5, batch_size=batch_size)
    expected = written_out(rows, labels, 4, config, 3)
    torch.testing.assert_close(descend(rows, labels, 4, config, 3), expected, rtol=1e-5, atol=1e-7)
