"""Cached gradients over R processes are those of the same groups in one graph of one process."""

from __future__ import annotations

import pytest
import torch

from simclr_ray import dist
from tests.distributed.caching_ranks import cached_gradients, plain_gradients

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_groups_over_ranks_give_the_gradient_of_the_groups_in_one_process(num_ranks: int) -> None:
    num, num_groups = 20, 4  # 7, 7 and 6 images over three ranks
    reference = plain_gradients(num, num_groups)
    for flat in dist.spawn(cached_gradients, num_ranks, num, num_groups):
        assert len(flat) == len(reference)
        for ours, expected in zip(flat, reference, strict=True):
            difference = torch.tensor(ours, dtype=torch.float64) - expected.flatten()
            assert difference.norm() < 1e-9 * expected.norm()
            assert expected.norm() > 0
