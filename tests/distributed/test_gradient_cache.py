"""Cached gradients over R processes are those of the same groups in one graph of one process."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from simclr_ray.data.batch import Batch
from simclr_ray.distributed import collectives
from simclr_ray.distributed.spawn import spawn
from simclr_ray.nn.batchnorm import GlobalBatchNorm
from simclr_ray.nn.resnet import ResNet
from simclr_ray.train import loop
from tests.distributed.gradient_cache_ranks import LOSS, cached_gradients, plain_gradients, trained

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

BATCH, GROUP = 1024, 256  # images in the global batch, and in what passes the model at once
Norm = Callable[[int], nn.Module]


@pytest.mark.parametrize(("num_ranks", "recompute"), [(2, True), (3, False)])
def test_groups_over_ranks_give_the_gradient_of_the_groups_in_one_process(
    num_ranks: int, recompute: bool
) -> None:
    num, num_groups = 20, 4  # 7, 7 and 6 images over three ranks
    reference = plain_gradients(num, num_groups)
    for flat in spawn(cached_gradients, num_ranks, num, num_groups, recompute=recompute):
        assert len(flat) == len(reference)
        for ours, expected in zip(flat, reference, strict=True):
            difference = torch.tensor(ours, dtype=torch.float64) - expected.flatten()
            assert difference.norm() < 1e-9 * expected.norm()
            assert expected.norm() > 0


def test_the_loop_in_groups_trains_the_same_weights_and_statistics_on_three_ranks() -> None:
    num, num_groups = 20, 5
    alone = trained(0, num, num_groups)
    for flat in spawn(trained, 3, num, num_groups):
        for ours, expected in zip(flat, alone, strict=True):
            a, b = (
                torch.tensor(ours, dtype=torch.float64),
                torch.tensor(expected, dtype=torch.float64),
            )
            assert (a - b).norm() <= 1e-9 * b.norm()


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_batch_of_1024_in_groups_of_256_has_the_gradient_of_one_pass(num_ranks: int) -> None:
    """Where nothing joins images, the plain form is the whole batch at once."""
    expected = plain_step(group_norm, [slice(None)])
    for found in on_ranks(num_ranks, "group"):
        assert_same(found.gradients, expected.gradients)
        assert found.loss == pytest.approx(expected.loss, rel=1e-9)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_batch_norm_over_256_of_1024_has_the_gradient_of_torchs_own_on_the_same_four_groups(
    num_ranks: int,
) -> None:
    groups = [slice(g, BATCH, BATCH // GROUP) for g in range(BATCH // GROUP)]
    expected = plain_step(nn.BatchNorm2d, groups)
    for found in on_ranks(num_ranks, "batch"):
        assert_same(found.gradients, expected.gradients)
        assert_same(found.statistics, expected.statistics)
        assert found.loss == pytest.approx(expected.loss, rel=1e-9)


class Step(NamedTuple):
    """One step; arrays, since tensors do not outlive their process."""

    loss: float
    gradients: list[NDArray[np.float64]]
    statistics: list[NDArray[np.float64]]


class Projected(nn.Module):
    """An encoder of some norm and a linear head, in float64, with no gamma at zero."""

    def __init__(self, norm: Norm) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = ResNet(10, 0.125, "cifar", norm)
        self.head = nn.Linear(self.encoder.feature_dim, 16)
        for name, parameter in sorted(self.named_parameters()):
            if parameter.ndim == 1:
                low, high = (0.5, 1.5) if name.endswith("weight") else (-0.2, 0.2)
                nn.init.uniform_(parameter, low, high)
        self.double()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        h = self.encoder(images)
        return h, self.head(h)


class Recorder(torch.optim.SGD):
    """Keeps the gradients that it is given."""

    def step(self, closure: object = None) -> None:  # type: ignore[override] # needs no closure
        self.seen = [p.grad.numpy().copy() for p in self.param_groups[0]["params"]]


def group_norm(channels: int) -> nn.Module:
    return nn.GroupNorm(4, channels)


def global_views() -> Tensor:
    """Return uint8 views [2, N, 3, 8, 8]: both of an image alike, contrast rising along N."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(BATCH, 3, 8, 8, generator=generator)
    noise = torch.randn(2, BATCH, 3, 8, 8, generator=generator)
    contrast = torch.linspace(10, 60, BATCH)[:, None, None, None]
    return ((images + noise) * contrast + 128).clamp_(0, 255).to(torch.uint8)


def plain_step(norm: Norm, groups: list[slice]) -> Step:
    """Return the reference: torch's layers, all groups in one graph, the loss by its matrix."""
    model = Projected(norm).train()
    images = global_views().double() / 255
    parts = [model(images[:, rows].flatten(0, 1))[1].chunk(2) for rows in groups]
    z = F.normalize(torch.cat([part[view] for view in range(2) for part in parts]), dim=1)
    s = (z @ z.T / LOSS.temperature).fill_diagonal_(float("-inf"))  # [2N, 2N]
    loss = F.cross_entropy(s, (torch.arange(2 * BATCH) + BATCH) % (2 * BATCH))
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    return Step(loss.item(), [g.numpy() for g in gradients], statistics(model))


def on_ranks(num_ranks: int, norm: str) -> list[Step]:
    return [loop_step(0, norm)] if num_ranks == 1 else spawn(loop_step, num_ranks, norm)


def loop_step(rank: int, norm: str) -> Step:
    """Return what one step of the loop leaves on this rank, its images in groups."""
    model = Projected(GlobalBatchNorm if norm == "batch" else group_norm)
    first, last = collectives.partition(BATCH, rank, collectives.world_size())
    a, b = global_views()[:, first:last]
    optimizer = Recorder(model.parameters(), 0.1)
    losses: list[float] = []
    loop.train(
        collectives.data_parallel(model),
        LOSS,
        optimizer,
        [Batch(0, a, b, torch.arange(first, last), torch.empty(0, dtype=torch.int64))],
        loop.StepSchedule(1, 1, 0, 0.1, BATCH),
        loop.Callbacks(lambda m: losses.append(m.loss), lambda e, s: None, lambda s: None),
        precision="float64",
        num_groups=BATCH // GROUP,
    )
    return Step(losses[0], optimizer.seen, statistics(model))


def statistics(model: nn.Module) -> list[NDArray[np.float64]]:
    return [b.numpy().copy() for b in model.buffers() if b.is_floating_point()]


def assert_same(ours: list[NDArray[np.float64]], expected: list[NDArray[np.float64]]) -> None:
    """Float64 rounding over the depth of the network stays far below 1e-9."""
    for a, b in zip(ours, expected, strict=True):
        assert np.linalg.norm(b) > 0
        assert np.linalg.norm(a - b) <= 1e-9 * np.linalg.norm(b)
