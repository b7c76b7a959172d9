"""What each rank of `test_caching` runs, and its reference in one process."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from simclr_ray.data.batch import Batch
from simclr_ray.distributed import collectives
from simclr_ray.nn.batchnorm import GlobalBatchNorm
from simclr_ray.nn.losses import NTXentLoss
from simclr_ray.nn.resnet import ResNet
from simclr_ray.train import loop
from simclr_ray.train.gradient_cache import group_rows
from simclr_ray.train.loop import cached_step

LOSS = NTXentLoss(0.2)


def network() -> ResNet:
    """Return a whole encoder in float64 with no batch norm gamma at zero."""
    torch.manual_seed(0)
    model = ResNet(10, 0.125, "cifar", GlobalBatchNorm).double()
    for module in model.modules():
        if isinstance(module, GlobalBatchNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return model


def images(num: int) -> Tensor:
    """Return the global views [2, N, 3, 8, 8], unequal along N."""
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(2, num, 3, 8, 8, generator=generator, dtype=torch.float64)
    return noise * torch.linspace(0.3, 2, num, dtype=torch.float64)[:, None, None, None]


def plain_gradients(num: int, num_groups: int) -> list[Tensor]:
    """Return the gradients when the groups pass in one graph, in this process."""
    model, views = network(), images(num)
    parts = [model(views[:, g::num_groups].flatten(0, 1)).chunk(2) for g in range(num_groups)]
    z1, z2 = (torch.cat(z) for z in zip(*parts, strict=True))
    LOSS(z1, z2).backward()
    return gradients(model)


def cached_gradients(
    rank: int, num: int, num_groups: int, *, recompute: bool = False
) -> list[list[float]]:
    """Return the averaged gradients of this rank's share by caching, flat."""
    model = network()
    model.recompute = recompute
    parallel = collectives.data_parallel(model)
    first, last = collectives.partition(num, rank, collectives.world_size())
    views = images(num)[:, first:last]

    def project(_: int, rows: slice) -> tuple[Tensor, Tensor]:
        z1, z2 = parallel(views[:, rows].flatten(0, 1)).chunk(2)
        return z1, z2

    cached_step(parallel, project, LOSS, group_rows(last - first, first, num_groups))
    return [g.flatten().tolist() for g in gradients(model)]


def trained(rank: int, num: int, num_groups: int) -> list[list[float]]:
    """Return weights and running statistics after the loop's steps on this rank's share, flat."""
    model = Both(network())
    first, last = collectives.partition(num, rank, collectives.world_size())
    views = images(num).mul(40).add(128).clamp(0, 255).to(torch.uint8)[:, first:last]
    nothing = torch.empty(0, dtype=torch.int64)
    stream = (Batch(k, views[0], views[1].roll(k, -1), nothing, nothing) for k in range(3))
    loop.train(
        collectives.data_parallel(model),
        LOSS,
        torch.optim.SGD(model.parameters(), 0.1),
        stream,
        loop.StepSchedule(3, 3, 0, 0.1, num),
        loop.Callbacks(lambda m: None, lambda e, s: None, lambda s: None),
        precision="float64",
        num_groups=num_groups,
    )
    return [t.flatten().tolist() for t in model.state_dict().values()]


class Both(nn.Module):
    """An encoder as the loop wants it: images -> (h, z)."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return h, and h again for z."""
        h = self.encoder(images)
        return h, h


def gradients(model: nn.Module) -> list[Tensor]:
    """Return all gradients; every parameter must have one."""
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]
