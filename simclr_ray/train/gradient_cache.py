"""Gradient caching: a batch whose activations do not fit, with the gradient of the whole batch.

Gao et al. 2021 (arXiv:2101.06983): embed group by group without a graph, take the loss once over
all embeddings, then embed each group again with a graph and feed it its part of the gradient.
The loss sees the whole global batch, so this is not gradient accumulation.

Group g of K holds the images at places p of the *global* batch with p mod K = g. So every group is
spread over all ranks, and batch norm's statistics are those of the same images on any number of
ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

from simclr_ray.nn.batchnorm import frozen_statistics

Project = Callable[[int, slice], tuple[Tensor, Tensor]]


class GradCacheResult(NamedTuple):
    """What one step leaves besides the parameters' gradients."""

    loss: Tensor  # scalar
    z1: Tensor  # [n, D], in the order of the groups
    z2: Tensor  # [n, D]


def grad_cache_step(
    model: nn.Module,
    project: Project,
    loss: Callable[[Tensor, Tensor], Tensor],
    groups: list[slice],
) -> GradCacheResult:
    """Return the loss, and add to the parameters' gradients what one pass would. Collective.

    Running statistics of batch norm move in the first pass only.

    Args:
        model: Whose parameters `project` uses; may be wrapped in `dist.data_parallel`.
        project: (group number, rows) -> z1, z2 [m, D]; must draw the same numbers when repeated.
        loss: Of z1, z2.
        groups: Rows of this rank's batch, group by group.
    """
    with torch.no_grad():
        parts = [project(g, rows) for g, rows in enumerate(groups)]
    z1, z2 = (torch.cat(z).requires_grad_() for z in zip(*parts, strict=True))
    value = loss(z1, z2)
    value.backward()  # type: ignore[no-untyped-call]
    sizes = [len(z) for z, _ in parts]
    # a loss of one view leaves the other without a gradient
    gradients = (torch.zeros_like(z) if z.grad is None else z.grad for z in (z1, z2))
    upstream = list(zip(*(torch.split(g, sizes) for g in gradients), strict=True))
    del parts
    with frozen_statistics(model):
        for g, rows in enumerate(groups):
            with _reduced_later(model) if g + 1 < len(groups) else nullcontext():
                torch.autograd.backward(project(g, rows), upstream[g])
    return GradCacheResult(value.detach(), z1.detach(), z2.detach())


def group_rows(num_rows: int, first: int, num_groups: int) -> list[slice]:
    """Return the rows of each group on a rank that holds places [first, first + num_rows)."""
    return [slice((g - first) % num_groups, num_rows, num_groups) for g in range(num_groups)]


def _reduced_later(model: nn.Module) -> AbstractContextManager[None]:
    """Return the context in which a data-parallel model only adds up its own gradients."""
    no_sync: Callable[[], AbstractContextManager[None]] = getattr(model, "no_sync", nullcontext)
    return no_sync()
