"""Every contrastive loss over 2, 3 and 4 processes, with uneven shares, is that of one."""

from __future__ import annotations

import numpy as np
import pytest

from simclr_ray.distributed.spawn import spawn
from tests.distributed.loss_ranks import losses
from tests.reference.contrastive import CASES

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_values_and_gradients_are_those_of_one_process(ranks: int) -> None:
    rng = np.random.default_rng(3)
    place = np.linspace(0, 1, 10)[:, None]  # rows differ along the batch, so ranks do
    views = place + (0.3 + place) * rng.normal(size=(2, 10, 5))
    labels = rng.integers(-1, 3, size=10)
    alone = losses(0, views, labels)
    shared = spawn(losses, ranks, views, labels)
    for index, case in enumerate(CASES):
        found = [rank[index] for rank in shared]
        value = np.mean([f.value for f in found])
        assert value == pytest.approx(alone[index].value, rel=1e-10), case.name
        gradients = np.concatenate([f.gradients for f in found], axis=1) / ranks
        np.testing.assert_allclose(
            gradients, alone[index].gradients, rtol=1e-9, atol=1e-12, err_msg=case.name
        )
