"""NT-Xent in float64 NumPy, written from SimCLR eq. 1 and from what the authors log."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


class Golden(NamedTuple):
    """One line of the golden table: the inputs are `golden_views()`."""

    normalize: bool
    temperature: float
    loss: float
    accuracy: float
    entropy: float


# Computed once in float64 from the formula alone; the authors' code returns twice the loss.
GOLDEN = (
    Golden(normalize=True, temperature=0.05, loss=16.649745, accuracy=0.25, entropy=0.254354),
    Golden(normalize=True, temperature=0.1, loss=8.586253, accuracy=0.25, entropy=0.586938),
    Golden(normalize=True, temperature=0.5, loss=2.670982, accuracy=0.25, entropy=1.276312),
    Golden(normalize=True, temperature=1.0, loss=2.209423, accuracy=0.25, entropy=1.355443),
    Golden(normalize=False, temperature=10.0, loss=2.022817, accuracy=0.25, entropy=1.381266),
)


def golden_views() -> tuple[Array, Array]:
    """Return the views `[4, 8]` that the golden table speaks of."""
    i, k = np.mgrid[0:4, 0:8].astype(np.float64)
    return np.sin(0.7 * i + 1.3 * k + 0.1), np.cos(0.5 * i - 0.9 * k + 0.2)


def ntxent_literal(z1: Array, z2: Array, temperature: float, *, normalize: bool = True) -> float:
    """Return L as eq. 1 spells it: a loop over the anchors, a sum over every other row."""
    z = _rows(z1, z2, normalize=normalize)
    num, total = len(z), 0.0
    for i in range(num):
        positive = (i + num // 2) % num
        s = z @ z[i] / temperature
        others = np.delete(s, i)
        total += np.log(np.sum(np.exp(others - others.max()))) + others.max() - s[positive]
    return float(total / num)


def ntxent(
    z1: Array, z2: Array, temperature: float, *, normalize: bool = True
) -> tuple[float, Array, Array]:
    """Return L and its gradients to `z1` and `z2`, all `[N, D]`, from the dense 2N x 2N matrix."""
    z = _rows(z1, z2, normalize=normalize)
    num = len(z)
    s = z @ z.T / temperature
    np.fill_diagonal(s, -np.inf)
    top = s.max(1, keepdims=True)
    lse = top + np.log(np.exp(s - top).sum(1, keepdims=True))
    positive = np.roll(np.arange(num), num // 2)
    loss = float(np.mean(lse[:, 0] - s[np.arange(num), positive]))
    ds = np.exp(s - lse)
    ds[np.arange(num), positive] -= 1
    dz = (ds + ds.T) @ z / (num * temperature)
    if normalize:
        raw = np.concatenate([z1, z2])
        dz = (dz - z * (z * dz).sum(1, keepdims=True)) / np.linalg.norm(raw, axis=1, keepdims=True)
    return loss, dz[: num // 2], dz[num // 2 :]


def contrastive_accuracy_entropy(
    z1: Array, z2: Array, temperature: float, *, normalize: bool = True
) -> tuple[float, float]:
    """Return what the authors log: N-way, view 1 against all of view 2, entropy in nats."""
    z = _rows(z1, z2, normalize=normalize)
    num = len(z1)
    logits = z[:num] @ z[num:].T / temperature
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    accuracy = np.mean(logits.argmax(1) == np.arange(num))
    entropy = -np.mean(np.sum(p * np.log(np.maximum(p, 1e-300)), axis=1))
    return float(accuracy), float(entropy)


def _rows(z1: Array, z2: Array, *, normalize: bool) -> Array:
    z = np.concatenate([z1, z2])
    return z / np.linalg.norm(z, axis=1, keepdims=True) if normalize else z
