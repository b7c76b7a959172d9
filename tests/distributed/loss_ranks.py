"""What each rank of `test_losses` runs."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from simclr_ray.distributed import collectives
from tests.reference.contrastive import CASES

Array = NDArray[np.float64]


class Found(NamedTuple):
    """One loss on one rank's share."""

    value: float
    gradients: Array  # [2, n, D]


def losses(rank: int, views: Array, labels: NDArray[np.int64]) -> list[Found]:
    """Return each case's loss and gradient on this rank's share of [2, N, D]."""
    first, last = collectives.partition(len(labels), rank, collectives.world_size())
    found = []
    for case in CASES:
        z1, z2 = (torch.from_numpy(v[first:last].copy()).requires_grad_() for v in views)
        value = case.make()(z1, z2, torch.from_numpy(labels[first:last].copy()))
        gradients = torch.autograd.grad(value, [z1, z2])
        found.append(Found(value.item(), torch.stack(gradients).numpy().copy()))
    return found
