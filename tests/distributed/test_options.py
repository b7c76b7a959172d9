"""Options that save memory or traffic, over ranks: what is exact stays exact."""

from __future__ import annotations

import pytest
import torch

from simclr_ray.distributed.spawn import spawn
from tests.distributed.options_ranks import gradients

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def test_blocks_that_run_again_give_the_gradient_and_statistics_of_one_process() -> None:
    alone, statistics = map(torch.tensor, gradients(0, recompute=False, compressed=False))
    for found in spawn(gradients, 2, recompute=True, compressed=False):
        ours, moved = map(torch.tensor, found)
        assert (ours - alone).norm() < 1e-9 * alone.norm()
        assert (moved - statistics).norm() < 1e-9 * statistics.norm()


def test_compressed_gradients_are_those_sent_whole_to_bf16s_eight_bits() -> None:
    alone, _ = map(torch.tensor, gradients(0, recompute=False, compressed=False))
    first, second = (
        torch.tensor(g) for g, _ in spawn(gradients, 2, recompute=False, compressed=True)
    )
    assert torch.equal(first, second)  # ranks must not part
    assert 1e-6 < (first - alone).norm() / alone.norm() < 2**-7
