"""Loss and batch norm over three uneven ranks against the NumPy oracles of the whole batch."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray

from simclr_ray.distributed.spawn import spawn
from tests.distributed.ranks import Shares, loss_and_norm
from tests.reference import batchnorm, ntxent

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

RANKS, TEMPERATURE = 3, 0.2


class Case(NamedTuple):
    z1: NDArray[np.float64]
    z2: NDArray[np.float64]
    rows: NDArray[np.float64]
    upstream: NDArray[np.float64]
    gamma: NDArray[np.float64]
    ranks: list[Shares]


@pytest.fixture(scope="module")
def case() -> Case:
    rng = np.random.default_rng(5)
    place = np.linspace(0, 1, 7)  # rows differ in mean and scale along the batch, so ranks do
    z1, z2 = place[:, None] + (0.3 + place[:, None]) * rng.normal(size=(2, 7, 6))
    rows = place[:, None, None, None] * 4 + (0.3 + place[:, None, None, None]) * rng.normal(
        size=(7, 5, 2, 3)
    )
    upstream, gamma = rng.normal(size=rows.shape), rng.normal(size=5)
    ranks = spawn(loss_and_norm, RANKS, (z1, z2), (rows, upstream, gamma), TEMPERATURE)
    return Case(z1, z2, rows, upstream, gamma, ranks)


def test_the_mean_of_the_ranks_losses_is_the_papers_loss(case: Case) -> None:
    loss, *_ = ntxent.ntxent(case.z1, case.z2, TEMPERATURE)
    assert np.mean([r.loss for r in case.ranks]) == pytest.approx(loss, rel=1e-12)


def test_a_ranks_gradient_is_r_times_its_rows_of_the_global_means(case: Case) -> None:
    _, d1, d2 = ntxent.ntxent(case.z1, case.z2, TEMPERATURE)
    ours1 = np.concatenate([r.z1_gradient for r in case.ranks])
    ours2 = np.concatenate([r.z2_gradient for r in case.ranks])
    np.testing.assert_allclose(ours1, RANKS * d1, rtol=1e-10, atol=1e-13)
    np.testing.assert_allclose(ours2, RANKS * d2, rtol=1e-10, atol=1e-13)


def test_contrastive_accuracy_and_entropy_are_those_of_the_global_batch(case: Case) -> None:
    expected = ntxent.contrastive_accuracy_entropy(case.z1, case.z2, TEMPERATURE)
    for rank in case.ranks:
        assert (rank.accuracy, rank.entropy) == pytest.approx(expected, rel=1e-12)


def test_batch_norm_over_ranks_is_joint_batch_norm_forward_and_backward(case: Case) -> None:
    expected = batchnorm.forward(case.rows, case.gamma, np.zeros(5), 1e-5)
    dx, dgamma, _ = batchnorm.backward(case.rows, case.upstream, case.gamma, 1e-5)
    y = np.concatenate([r.bn_output for r in case.ranks])
    gradient = np.concatenate([r.bn_input_gradient for r in case.ranks])
    np.testing.assert_allclose(y, expected.y, rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(gradient, dx, rtol=1e-10, atol=1e-11)
    count = case.rows.size // 5
    for rank in case.ranks:
        np.testing.assert_allclose(rank.bn_weight_gradient, dgamma, rtol=1e-11)
        np.testing.assert_allclose(rank.bn_running[0], 0.1 * expected.mean, rtol=1e-11)
        unbiased = expected.var * count / (count - 1)
        np.testing.assert_allclose(rank.bn_running[1], 0.9 + 0.1 * unbiased, rtol=1e-11)
