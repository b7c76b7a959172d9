"""Cached gradients over R processes are those of the same groups in one graph of one process."""

from __future__ import annotations

import pytest
import torch

from simclr_ray import dist
from tests.distributed.caching_ranks import cached_gradients, plain_gradients, trained

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


def test_the_loop_in_groups_trains_the_same_weights_and_statistics_on_three_ranks() -> None:
    num, num_groups = 20, 5
    alone = trained(0, num, num_groups)
    for flat in dist.spawn(trained, 3, num, num_groups):
        for ours, expected in zip(flat, alone, strict=True):
            a, b = (
                torch.tensor(ours, dtype=torch.float64),
                torch.tensor(expected, dtype=torch.float64),
            )
            assert (a - b).norm() <= 1e-9 * b.norm()
