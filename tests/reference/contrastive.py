"""Every contrastive loss in float64 NumPy, anchor by anchor, written from the papers.

SimCLR (arXiv:2002.05709) eq. 1 and Table 2; DCL (arXiv:2110.06848) eq. 6 and 7; SupCon
(arXiv:2004.11362) eq. 2. Rows are views 1 of all images, then views 2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from simclr_ray.nn.losses import (
    ContrastiveLoss,
    DCLLoss,
    NTLogisticLoss,
    NTXentLoss,
    SupConLoss,
    TripletLoss,
)

Array = NDArray[np.float64]
Labels = NDArray[np.int64]


class Anchor(NamedTuple):
    """What an anchor sees: products with its positive, its negatives, and its class."""

    positive: float
    negatives: Array
    others: Array  # all rows but itself
    same_class: Array  # of these, its class's
    weight: float  # of its positive, DCLW


Term = Callable[[Anchor], float]


class Case(NamedTuple):
    """A loss and the term of one anchor."""

    name: str
    make: Callable[[], ContrastiveLoss]
    term: Term
    other_view_only: bool = False
    normalize: bool = True


def log_sum_exp(values: Array) -> float:
    """Return log Σ exp."""
    top = values.max()
    return float(top + np.log(np.exp(values - top).sum()))


def softplus(value: float | Array) -> Array:
    """Return log(1 + exp(x))."""
    return np.logaddexp(0.0, value)


def ntxent(tau: float) -> Term:
    """Return eq. 1's."""
    return lambda a: log_sum_exp(np.append(a.negatives, a.positive) / tau) - a.positive / tau


def dcl(tau: float) -> Term:
    """Return DCL's eq. 6, its positive weighted as in eq. 7."""
    return lambda a: log_sum_exp(a.negatives / tau) - a.weight * a.positive / tau


def supcon(tau: float) -> Term:
    """Return SupCon's L_out."""
    return lambda a: log_sum_exp(a.others / tau) - float(a.same_class.mean()) / tau


def logistic(tau: float) -> Term:
    """Return NT-Logistic's, the mean over negatives."""
    return lambda a: float(softplus(-a.positive / tau) + softplus(a.negatives / tau).mean())


def mined_logistic(tau: float) -> Term:
    """Return NT-Logistic's with the semi-hard negative."""

    def term(a: Anchor) -> float:
        below = a.negatives[a.negatives < a.positive]
        chosen = softplus(below.max() / tau) if len(below) else 0.0
        return float(softplus(-a.positive / tau) + chosen)

    return term


def triplet(margin: float) -> Term:
    """Return margin triplet's, the mean over negatives."""
    return lambda a: float(np.maximum(a.negatives - a.positive + margin, 0).mean())


def mined_triplet(margin: float) -> Term:
    """Return margin triplet's with the semi-hard negative."""

    def term(a: Anchor) -> float:
        s, least = a.negatives, a.positive - margin
        within = s[(s < a.positive) & (s > least)]
        return float(within.max() - a.positive + margin) if len(within) else 0.0

    return term


OTHER: Literal["other"] = "other"
CASES = (
    Case("ntxent", lambda: NTXentLoss(0.2), ntxent(0.2)),
    Case("ntxent, no l2", lambda: NTXentLoss(4.0, normalize=False), ntxent(4.0), normalize=False),
    Case("ntxent, other view", lambda: NTXentLoss(0.2, negatives=OTHER), ntxent(0.2), True),
    Case("dcl", lambda: DCLLoss(0.2), dcl(0.2)),
    Case("dclw", lambda: DCLLoss(0.2, sigma=0.5), dcl(0.2)),
    Case("supcon", lambda: SupConLoss(0.2), supcon(0.2)),
    Case("logistic", lambda: NTLogisticLoss(0.2), logistic(0.2)),
    Case("logistic, other", lambda: NTLogisticLoss(0.2, negatives=OTHER), logistic(0.2), True),
    Case("logistic, semi-hard", lambda: NTLogisticLoss(0.2, semi_hard=True), mined_logistic(0.2)),
    Case("triplet", lambda: TripletLoss(0.4), triplet(0.4)),
    Case("triplet, raw", lambda: TripletLoss(0.4, normalize=False), triplet(0.4), normalize=False),
    Case("triplet, semi-hard", lambda: TripletLoss(0.4, semi_hard=True), mined_triplet(0.4)),
    Case(
        "triplet, semi-hard, other view",
        lambda: TripletLoss(0.4, semi_hard=True, negatives=OTHER),
        mined_triplet(0.4),
        True,
    ),
)  # fmt: skip


def value(case: Case, z1: Array, z2: Array, labels: Labels) -> float:
    """Return the loss of the global batch: the mean over its anchors.

    Args:
        case: Which loss.
        z1: [N, D].
        z2: [N, D].
        labels: [N], below 0: none.
    """
    z = np.concatenate([z1, z2])
    if case.normalize:
        z = z / np.linalg.norm(z, axis=1, keepdims=True)
    s, num = z @ z.T, len(z1)
    image, view = np.tile(np.arange(num), 2), np.repeat([0, 1], num)
    classes = np.tile(np.where(labels < 0, -1 - np.arange(num), labels), 2)
    weights = _dclw_weights(s, num) if case.name == "dclw" else np.ones(2 * num)
    total = 0.0
    for i in range(2 * num):
        negative = image != image[i]
        if case.other_view_only:
            negative &= view != view[i]
        other = np.arange(2 * num) != i
        anchor = Anchor(
            positive=s[i, (i + num) % (2 * num)],
            negatives=s[i, negative],
            others=s[i, other],
            same_class=s[i, other & (classes == classes[i])],
            weight=weights[i],
        )
        total += case.term(anchor)
    return total / (2 * num)


def _dclw_weights(s: Array, num: int) -> Array:
    positives = np.exp(np.diag(s, num) / 0.5)
    return np.tile(2 - num * positives / positives.sum(), 2)
