"""Projection heads g: h [N, F] -> z [N, D] (SimCLR §4.2; rules of the authors' code).

A dense layer has no bias where batch norm follows, and the last batch norm has no shift; without
batch norm dense layers have a bias. Dense weights start from N(0, 0.01).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simclr_ray.nn.batchnorm import GlobalBatchNorm
from simclr_ray.nn.parameter_groups import SCALE, SCORES

Norm = Callable[..., GlobalBatchNorm]


def no_head(features: int, norm: Norm = GlobalBatchNorm) -> nn.Identity:  # noqa: ARG001 - as of all
    """Return nothing that changes h: [N, features] -> [N, features]."""
    return nn.Identity()


def linear_head(
    features: int, dim: int, norm: Norm = GlobalBatchNorm, *, batch_norm: bool = True
) -> nn.Sequential:
    """Return dense, then batch norm without shift: [N, features] -> [N, dim]."""
    dense = _dense(features, dim, bias=not batch_norm)
    return nn.Sequential(dense, norm(dim, shift=False)) if batch_norm else nn.Sequential(dense)


def mlp_head(
    features: int,
    dim: int,
    layers: int = 2,
    hidden: int = 0,
    norm: Norm = GlobalBatchNorm,
    *,
    batch_norm: bool = True,
) -> nn.Sequential:
    """Return `layers` dense layers, batch norm after each, ReLU between: [N, features] -> [N, dim].

    Hidden layers are as wide as h, or `hidden` where above 0.
    """
    parts = _hidden_layers(features, layers - 1, hidden, norm, batch_norm=batch_norm)
    width = (hidden or features) if parts else features
    return nn.Sequential(*parts, *linear_head(width, dim, norm, batch_norm=batch_norm))


def classifier_head(
    features: int,
    num_classes: int,
    layers: int = 0,
    hidden: int = 0,
    norm: Norm = GlobalBatchNorm,
    *,
    batch_norm: bool = True,
) -> nn.Sequential:
    """Return `layers` hidden layers as of an `mlp_head`, and scores from zero: [N, F] -> [N, K]."""
    parts = _hidden_layers(features, layers, hidden, norm, batch_norm=batch_norm)
    scores = ClassifierLayer((hidden or features) if parts else features, num_classes)
    nn.init.zeros_(scores.weight)
    nn.init.zeros_(scores.bias)
    return nn.Sequential(*parts, scores)


class ClassifierLayer(nn.Linear):
    """A classifier's last layer, which LARS does not adapt (the authors' `head_supervised`).

    From zero, the norm that it would be adapted by is that of its own last steps.
    """

    update_rule = SCORES


class LearnableTemperature(nn.Module):
    """z / (‖z‖·√τ) with τ learned: [N, D] -> [N, D], whose products are cosines over τ.

    The loss then takes τ = 1 and does not normalise. τ is a parameter of the model, so that it is
    averaged, optimised and kept as all others are. It stays within BOUNDS.
    """

    BOUNDS = (1e-3, 100.0)  # the config's
    # adapted: the raw rate, made for adapted layers, would throw it out of its bounds
    update_rule = SCALE

    def __init__(self, temperature: float) -> None:
        super().__init__()
        self.log_temperature = nn.Parameter(torch.tensor(temperature).log())

    def forward(self, z: Tensor) -> Tensor:
        """Return z scaled, in float32 or float64."""
        with torch.autocast(z.device.type, enabled=False):
            wide = z if z.dtype == torch.float64 else z.float()
            low, high = (math.log(bound) for bound in self.BOUNDS)
            return F.normalize(wide) * (-0.5 * self.log_temperature.clamp(low, high)).exp()


def _hidden_layers(
    features: int, layers: int, hidden: int, norm: Norm, *, batch_norm: bool
) -> list[nn.Module]:
    parts: list[nn.Module] = []
    width, wide = features, hidden or features
    for _ in range(layers):
        parts.append(_dense(width, wide, bias=not batch_norm))
        parts += [norm(wide)] if batch_norm else []
        parts.append(nn.ReLU(inplace=True))
        width = wide
    return parts


def _dense(inputs: int, outputs: int, *, bias: bool) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, bias=bias)
    nn.init.normal_(layer.weight, std=0.01)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer
