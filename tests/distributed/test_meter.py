"""What ranks have summed between two reports goes on after a resume to the last bit."""

from __future__ import annotations

import pytest

from simclr_ray.distributed.spawn import spawn
from tests.distributed.ranks import mean_loss_of_halves


@pytest.mark.distributed
@pytest.mark.slow
def test_an_interval_that_is_resumed_has_the_mean_of_one_that_was_not_broken() -> None:
    halves = spawn(mean_loss_of_halves, 3)
    assert halves[0] == halves[1] == halves[2]
    assert [resumed == whole for resumed, whole in halves] == [True] * 3
