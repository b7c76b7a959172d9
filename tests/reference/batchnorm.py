"""Joint batch normalisation over all ranks in float64 NumPy (Ioffe & Szegedy 2015, alg. 1)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


class Normalised(NamedTuple):
    """Output `[M, C, ...]` and the statistics `[C]` over all rows and pixels; `var` is biased."""

    y: Array
    mean: Array
    var: Array


def forward(x: Array, gamma: Array, beta: Array, eps: float) -> Normalised:
    """Return the whole batch `x [M, C, ...]`, all ranks' rows together, normalised."""
    axes = (0, *range(2, x.ndim))
    shape = (1, -1, *[1] * (x.ndim - 2))
    mean, var = x.mean(axes), x.var(axes)
    x_hat = (x - mean.reshape(shape)) / np.sqrt(var.reshape(shape) + eps)
    return Normalised(gamma.reshape(shape) * x_hat + beta.reshape(shape), mean, var)


def backward(x: Array, dy: Array, gamma: Array, eps: float) -> tuple[Array, Array, Array]:
    """Return the gradients to `x`, gamma and beta, by the chain rule of the paper, step by step."""
    axes = (0, *range(2, x.ndim))
    shape = (1, -1, *[1] * (x.ndim - 2))
    m = x.size // x.shape[1]
    mean, std = x.mean(axes).reshape(shape), np.sqrt(x.var(axes).reshape(shape) + eps)
    centred = x - mean
    dx_hat = dy * gamma.reshape(shape)
    dvar = (dx_hat * centred * -0.5 / std**3).sum(axes).reshape(shape)
    dmean = (-dx_hat / std).sum(axes).reshape(shape) + dvar * (-2 * centred).sum(axes).reshape(
        shape
    ) / m
    dx = dx_hat / std + dvar * 2 * centred / m + dmean / m
    return dx, (dy * centred / std).sum(axes), dy.sum(axes)
