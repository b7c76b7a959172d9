"""Small vectors between ranks of one machine: exact, in order, and nothing is left behind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from simclr_ray.distributed import shared_memory as sharedmem
from simclr_ray.distributed.spawn import spawn
from tests.distributed.ranks import ends_while_awaited, lengths_differ, small_exchanges

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

needs_shared_memory = pytest.mark.skipif(
    not sharedmem.is_supported(), reason="no x86-64 Linux with /dev/shm"
)


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_small_vectors_of_many_sizes_arrive_whole_and_in_order(num_ranks: int) -> None:
    before = set(Path(sharedmem.FOLDER).glob("simclr_ray-*"))
    assert spawn(small_exchanges, num_ranks) == [[]] * num_ranks
    assert set(Path(sharedmem.FOLDER).glob("simclr_ray-*")) <= before


@needs_shared_memory
def test_a_rank_that_does_not_come_is_an_error_after_the_time_limit() -> None:
    path = sharedmem.create(2)
    try:
        mailbox = sharedmem.SharedVectors(path, rank=0, num_ranks=2, timeout_s=0.2)
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
