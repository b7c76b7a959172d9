"""Small vectors between ranks of one machine: exact, in order, and nothing is left behind."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from simclr_ray.distributed import shared_memory
from simclr_ray.distributed.spawn import spawn
from tests.distributed.ranks import (
    ends_while_awaited,
    lengths_differ,
    loss_and_norm,
    loss_and_norm_without_shared_memory,
    rank_zero_says,
    small_exchanges,
)

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

needs_shared_memory = pytest.mark.skipif(
    not shared_memory.is_supported(), reason="no x86-64 Linux with /dev/shm"
)


@pytest.mark.parametrize(("num_ranks", "shared"), [(2, True), (3, True), (2, False)])
def test_small_vectors_of_many_sizes_arrive_whole_and_in_order(
    num_ranks: int, *, shared: bool
) -> None:
    assert spawn(small_exchanges, num_ranks, shared=shared) == [[]] * num_ranks


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_what_rank_0_says_all_ranks_know_one_step_later(num_ranks: int) -> None:
    heard = spawn(rank_zero_says, num_ranks, [1, 0, 3, 0, 0])
    assert heard == [[1, 0, 3, 0, 0] if num_ranks == 1 else [0, 1, 0, 3, 0]] * num_ranks


def test_the_process_group_alone_gives_the_loss_and_batch_norm_of_shared_memory() -> None:
    rng = np.random.default_rng(0)
    views = (rng.normal(size=(7, 5)), rng.normal(size=(7, 5)))
    norm = (rng.normal(size=(7, 4, 3, 3)), rng.normal(size=(7, 4, 3, 3)), rng.normal(size=4))
    shared = spawn(loss_and_norm, 2, views, norm, 0.5)
    group = spawn(loss_and_norm_without_shared_memory, 2, views, norm, 0.5)
    for one, other in zip(shared, group, strict=True):
        for a, b in zip(one, other, strict=True):
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@needs_shared_memory
def test_a_rank_that_does_not_come_is_an_error_after_the_time_limit() -> None:
    path = shared_memory.create(2)
    try:
        mailbox = shared_memory.SharedVectors(path, rank=0, num_ranks=2, timeout_s=0.2)
    finally:
        path.unlink()
    with pytest.raises(TimeoutError, match="rank 1"):
        mailbox.all_gather(torch.zeros(3))


@needs_shared_memory
def test_a_rank_that_ends_is_noticed_and_not_waited_for() -> None:
    assert spawn(ends_while_awaited, 2) == ["rank 1 has ended", ""]


@needs_shared_memory
def test_ranks_at_different_calls_hear_of_it() -> None:
    for heard in spawn(lengths_differ, 2):
        assert heard == "ranks exchange vectors of different lengths, in bytes: [4, 8]"
