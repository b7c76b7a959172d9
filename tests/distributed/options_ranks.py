"""What each rank of `test_options` runs."""

from __future__ import annotations

import torch
from torch import nn

from simclr_ray.distributed import collectives
from simclr_ray.nn.batchnorm import GlobalBatchNorm
from simclr_ray.nn.losses import NTXentLoss
from simclr_ray.nn.resnet import ResNet

BATCH = 12


def gradients(rank: int, *, recompute: bool, compressed: bool) -> tuple[list[float], list[float]]:
    """Return averaged gradients and running statistics after one step on this rank's share."""
    torch.manual_seed(0)
    model = ResNet(10, 0.125, "cifar").double()
    for module in model.modules():
        if isinstance(module, GlobalBatchNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
    model.recompute = recompute
    views = torch.randn(2, BATCH, 3, 8, 8, dtype=torch.float64)
    first, last = collectives.partition(BATCH, rank, collectives.world_size())
    parallel = collectives.data_parallel(model.train(), compressed=compressed)
    z1, z2 = parallel(views[:, first:last].flatten(0, 1)).chunk(2)
    NTXentLoss(0.5)(z1, z2).backward()
    found = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return torch.cat(found).tolist(), torch.cat([b.flatten() for b in model.buffers()]).tolist()
