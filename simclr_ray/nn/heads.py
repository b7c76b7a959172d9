"""Projection heads g: h [N, F] -> z [N, D] (SimCLR §4.2; rules of the authors' code).

A dense layer has no bias since batch norm follows; the last batch norm has no shift. Dense
weights start from N(0, 0.01).
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from simclr_ray.nn.batchnorm import GlobalBatchNorm

Norm = Callable[..., GlobalBatchNorm]


def linear_head(features: int, dim: int, norm: Norm = GlobalBatchNorm) -> nn.Sequential:
    """Return dense, then batch norm without shift: [N, features] -> [N, dim]."""
    return nn.Sequential(_dense(features, dim), norm(dim, shift=False))


def mlp_head(
    features: int, dim: int, layers: int = 2, hidden: int = 0, norm: Norm = GlobalBatchNorm
) -> nn.Sequential:
    """Return `layers` dense layers, batch norm after each, ReLU between: [N, features] -> [N, dim].

    Hidden layers are as wide as h, or `hidden` where above 0.
    """
    parts: list[nn.Module] = []
    width = features
    for _ in range(layers - 1):
        wide = hidden or features
        parts += [_dense(width, wide), norm(wide), nn.ReLU(inplace=True)]
        width = wide
    return nn.Sequential(*parts, *linear_head(width, dim, norm))


def _dense(inputs: int, outputs: int) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, bias=False)
    nn.init.normal_(layer.weight, std=0.01)
    return layer
