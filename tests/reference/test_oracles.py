"""The oracles themselves, against golden values and finite differences: no code of ours in here."""

from __future__ import annotations

import numpy as np
import pytest

from tests.reference import batchnorm, ntxent
from tests.reference.lars import Lars, learning_rate


@pytest.mark.parametrize("golden", ntxent.GOLDEN, ids=str)
def test_the_ntxent_oracle_gives_the_golden_values(golden: ntxent.Golden) -> None:
    z1, z2 = ntxent.golden_views()
    loss, *_ = ntxent.ntxent(z1, z2, golden.temperature, normalize=golden.normalize)
    logged = ntxent.contrastive_accuracy_entropy(
        z1, z2, golden.temperature, normalize=golden.normalize
    )
    assert loss == pytest.approx(golden.loss, abs=1e-6)  # the table has six decimals
    assert logged == pytest.approx((golden.accuracy, golden.entropy), abs=1e-6)


@pytest.mark.parametrize("normalize", [True, False])
def test_dense_ntxent_equals_the_literal_sum_and_its_gradient_finite_differences(
    normalize: bool,
) -> None:
    rng = np.random.default_rng(1)
    z1, z2 = rng.normal(size=(2, 5, 3))
    loss, d1, d2 = ntxent.ntxent(z1, z2, 0.3, normalize=normalize)
    assert loss == pytest.approx(ntxent.ntxent_literal(z1, z2, 0.3, normalize=normalize), rel=1e-12)
    for which, gradient in ((0, d1), (1, d2)):
        for index in np.ndindex(5, 3):
            values = []
            for h in (1e-6, -1e-6):
                views = [z1.copy(), z2.copy()]
                views[which][index] += h
                value = ntxent.ntxent_literal(views[0], views[1], 0.3, normalize=normalize)
                values.append(value)
            slope = (values[0] - values[1]) / 2e-6
            assert gradient[index] == pytest.approx(slope, abs=1e-7)  # error of the difference


def test_the_batch_norm_oracle_equals_finite_differences() -> None:
    rng = np.random.default_rng(2)
    x, dy = rng.normal(size=(2, 6, 3, 2, 2))
    gamma, beta = rng.normal(size=(2, 3))
    dx, dgamma, dbeta = batchnorm.backward(x, dy, gamma, 1e-5)

    def loss(x: np.ndarray, gamma: np.ndarray, beta: np.ndarray) -> float:
        return float((batchnorm.forward(x, gamma, beta, 1e-5).y * dy).sum())

    for which, gradient in enumerate((dx, dgamma, dbeta)):
        for index in list(np.ndindex(*gradient.shape))[::7]:
            values = []
            for h in (1e-6, -1e-6):
                inputs = [x.copy(), gamma.copy(), beta.copy()]
                inputs[which][index] += h
                values.append(loss(*inputs))
            assert gradient[index] == pytest.approx((values[0] - values[1]) / 2e-6, abs=1e-6)


def test_the_schedule_starts_at_zero_peaks_after_warm_up_and_ends_at_zero() -> None:
    rates = [learning_rate(t, 4.8, 10, 100) for t in range(101)]
    assert rates[0] == 0.0
    assert rates[5] == pytest.approx(2.4)
    assert rates[10] == max(rates) == pytest.approx(4.8)
    assert rates[55] == pytest.approx(2.4)
    assert rates[100] == pytest.approx(0.0, abs=1e-15)


def test_the_first_lars_step_moves_by_the_trust_coefficient_whatever_the_gradients_scale() -> None:
    rng = np.random.default_rng(3)
    weight, gradient = rng.normal(size=(2, 4, 4))
    for scale in (1e-6, 1.0, 1e6):
        lars = Lars(weight, momentum=0.9, weight_decay=0.0)
        lars.step(scale * gradient, lr=2.0)
        moved = np.linalg.norm(lars.weight - weight)
        assert moved == pytest.approx(0.002 * np.linalg.norm(weight), rel=1e-12)
