"""Gradient caching leaves the gradient of one pass, with batch norm that of the same groups."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from simclr_ray.nn.batchnorm import GlobalBatchNorm
from simclr_ray.nn.losses import NTXentLoss
from simclr_ray.nn.precision import prepare_model
from simclr_ray.nn.resnet import ResNet
from simclr_ray.train import loop
from simclr_ray.train.gradient_cache import group_rows
from simclr_ray.train.loop import cached_step
from tests.distributed.gradient_cache_ranks import Both
from tests.unit.train.test_loop import batches, schedule

N = 12
LOSS = NTXentLoss(0.2)


def network(norm: Callable[[], nn.Module]) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), norm(), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 6)
    ).double()


def views() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(2, N, 3, 8, 8, generator=generator, dtype=torch.float64)
    return noise * torch.linspace(0.3, 2, N, dtype=torch.float64)[:, None, None, None]


def projector(model: nn.Module, images: Tensor) -> Callable[[int, slice], tuple[Tensor, Tensor]]:
    def project(group: int, rows: slice) -> tuple[Tensor, Tensor]:
        torch.manual_seed(group)
        z1, z2 = model(torch.cat([images[0, rows], images[1, rows]])).chunk(2)
        return z1, z2

    return project


def in_one_graph(model: nn.Module, images: Tensor, groups: list[slice]) -> Tensor:
    """Return the loss after a plain backward pass: all groups in one graph."""
    project = projector(model, images)
    z1, z2 = (
        torch.cat(z) for z in zip(*(project(g, r) for g, r in enumerate(groups)), strict=True)
    )
    value: Tensor = LOSS(z1, z2)
    value.backward()  # type: ignore[no-untyped-call] # torch's
    return value.detach()


def assert_equal_gradients(ours: nn.Module, reference: nn.Module) -> None:
    for (name, p), q in zip(ours.named_parameters(), reference.parameters(), strict=True):
        assert p.grad is not None
        assert q.grad is not None
        assert q.grad.norm() > 0, name
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("num_groups", [1, 3, 4])
def test_without_batch_norm_the_gradient_is_that_of_one_pass(num_groups: int) -> None:
    ours = network(lambda: nn.GroupNorm(2, 8))
    reference = copy.deepcopy(ours)
    groups = group_rows(N, 0, num_groups)
    cached = cached_step(ours, projector(ours, views()), LOSS, groups)
    expected = in_one_graph(reference, views(), [slice(None)])
    assert cached.loss.item() == pytest.approx(expected.item(), rel=1e-12)
    assert_equal_gradients(ours, reference)


def test_with_batch_norm_it_is_that_of_the_same_groups_in_one_graph() -> None:
    ours = network(lambda: GlobalBatchNorm(8))
    reference = copy.deepcopy(ours)
    groups = group_rows(N, 0, 3)
    cached_step(ours, projector(ours, views()), LOSS, groups)
    in_one_graph(reference, views(), groups)
    assert_equal_gradients(ours, reference)
    for a, b in zip(ours.buffers(), reference.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=0)  # moved once a group, not twice


def test_dropout_draws_the_same_in_both_passes() -> None:
    ours = network(lambda: nn.Dropout(0.5))
    reference = copy.deepcopy(ours)
    groups = group_rows(N, 0, 4)
    cached_step(ours, projector(ours, views()), LOSS, groups)
    in_one_graph(reference, views(), groups)
    assert_equal_gradients(ours, reference)


@pytest.mark.parametrize(("batch_size", "num_groups"), [(12, 3), (12, 4), (10, 2), (15, 5)])
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_groups_hold_the_same_images_on_any_number_of_ranks(
    batch_size: int, num_groups: int, num_ranks: int
) -> None:
    places = torch.arange(batch_size)
    held: list[list[int]] = [[] for _ in range(num_groups)]
    for rank in range(num_ranks):
        first, last = rank * batch_size // num_ranks, (rank + 1) * batch_size // num_ranks
        for group, rows in enumerate(group_rows(last - first, first, num_groups)):
            assert len(places[first:last][rows]) > 0
            held[group] += places[first:last][rows].tolist()
    assert held == [places[g::num_groups].tolist() for g in range(num_groups)]


def test_the_loop_trains_the_same_weights_with_groups_where_nothing_joins_images() -> None:
    def trained(num_groups: int) -> nn.Module:
        torch.manual_seed(0)
        model = Both(ResNet(10, 0.125, "cifar", lambda c: nn.GroupNorm(4, c)))
        prepare_model(model, torch.device("cpu"), "float64")
        callbacks = loop.Callbacks(lambda m: None, lambda e, s: None, lambda s: None)
        loop.train(
            model,
            LOSS,
            torch.optim.SGD(model.parameters(), 0.1),
            batches(0, 3),
            schedule(),
            callbacks,
            precision="float64",
            num_groups=num_groups,
        )
        return model

    for a, b in zip(trained(1).parameters(), trained(3).parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-13)
