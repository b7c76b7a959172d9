"""What each rank of `test_bf16` runs."""

from __future__ import annotations

import torch
from torch import Tensor

from simclr_ray.distributed import collectives
from simclr_ray.nn.batchnorm import GlobalBatchNorm

Numbers = list[object]


def inputs() -> Tensor:
    """Return the global batch: bf16 [7, 5, 4, 4], unequal over its rows, one channel constant."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(7, 5, 4, 4, generator=generator) * torch.arange(1, 8).view(-1, 1, 1, 1)
    x[:, 3] = 2.5
    return x.bfloat16()


def normalise(rank: int) -> tuple[Numbers, list[Numbers], Numbers]:
    """Return this rank's output, the running statistics, and the gradient to its rows."""
    first, last = collectives.partition(7, rank, 2)
    x = inputs()[first:last].requires_grad_()
    norm = GlobalBatchNorm(5).train()
    out = norm(x)
    (out.float() ** 3).sum().backward()  # not of a square, whose gradient is all but zero
    assert x.grad is not None
    statistics = [norm.running_mean.tolist(), norm.running_var.tolist()]
    return out.float().tolist(), statistics, x.grad.float().tolist()
