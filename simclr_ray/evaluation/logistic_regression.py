"""The transfer protocol's linear classifier: L-BFGS, l2 chosen on a held-out split (SimCLR §B.8).

Multinomial logistic regression without augmentation, l2 from 45 values spaced evenly in logarithm
from 1e-6 to 1e5, then refitted on all samples. The objective is scikit-learn's with C = 1/l2: the
*sum* of the cross entropies plus l2/2·‖W‖², the bias free. The paper does not say whether sum or
mean; with a mean the largest values would leave nothing but the bias.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from simclr_ray.evaluation.knn import top_k_accuracy
from simclr_ray.evaluation.linear import LinearProbe

L2_VALUES: Final = tuple(10.0 ** (-6 + 11 * i / 44) for i in range(45))
HELD_OUT: Final = 0.2  # of each class
# The gradient's largest entry, over the number of samples: scikit-learn stops at 1e-4.
TOLERANCE: Final = 1e-5
MAX_ITERATIONS: Final = 2000


class BestProbe(NamedTuple):
    """The classifier, the l2 that it has, and the held-out accuracy of each l2 that was tried."""

    probe: LinearProbe
    l2: float
    held_out: dict[float, float]


def fit_logistic_regression(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    l2: float,
    start: LinearProbe | None = None,
) -> LinearProbe:
    """Return the minimum of the objective at one l2; a pure function of the arguments.

    Args:
        features: `[M, F]`, any float dtype; float64 inside.
        labels: int64 `[M]` in [0, num_classes).
        num_classes: K.
        l2: Not below 0.
        start: Where to begin; zeros if not given.

    Raises:
        ValueError: The shapes do not fit, or a feature is not finite.
    """
    if features.ndim != 2 or labels.shape != features.shape[:1] or not len(labels):
        raise ValueError(f"features {list(features.shape)} and labels {list(labels.shape)} differ")
    if not torch.isfinite(features).all():
        raise ValueError("a feature is not finite: the encoder has diverged")
    x = features.double()
    mean = x.mean(0)  # the bias is free: shifting features changes the path, not the minimum
    x = x - mean
    labels = labels.to(x.device)
    weight = x.new_zeros(num_classes, x.shape[1])
    bias = x.new_zeros(num_classes)
    if start is not None:
        weight.copy_(start.weight)
        bias.copy_(start.bias + start.weight.double() @ mean)
    variables = [weight.requires_grad_(), bias.requires_grad_()]
    solver = torch.optim.LBFGS(
        variables,
        max_iter=MAX_ITERATIONS,
        tolerance_grad=TOLERANCE,
        tolerance_change=1e-12,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def objective() -> Tensor:
        solver.zero_grad()
        error = F.cross_entropy(torch.addmm(bias, x, weight.T), labels)
        value = error + l2 / (2 * len(x)) * weight.square().sum()
        value.backward()  # type: ignore[no-untyped-call] # torch's
        return value

    solver.step(objective)  # type: ignore[no-untyped-call] # torch's
    w, b = weight.detach(), bias.detach()
    return LinearProbe(w.float(), (b - w @ mean).float())


def sweep_logistic_regression(
    features: Tensor, labels: Tensor, num_classes: int, seed: int = 0
) -> BestProbe:
    """Return the classifier whose l2 is best on held-out samples, fitted on all.

    A fifth of each class is held out, drawn by `seed`. From the strongest l2 to the weakest each
    fit begins where the last one ended. Of equal accuracies the strongest l2 is taken.

    Args:
        features: `[M, F]`.
        labels: int64 `[M]` in [0, num_classes).
        num_classes: K.
        seed: Of the split.

    Raises:
        ValueError: Same as `fit_logistic_regression`; or no class has two samples to hold one out.
    """
    held_out = _held_out(labels, seed)
    if not held_out.any():
        raise ValueError("no class has two samples: none can be held out to choose l2")
    fit_features, held_out_features = features[~held_out], features[held_out]
    accuracy_of: dict[float, float] = {}
    start: LinearProbe | None = None
    fits: dict[float, LinearProbe] = {}
    for l2 in reversed(L2_VALUES):
        start = fits[l2] = fit_logistic_regression(
            fit_features, labels[~held_out], num_classes, l2, start
        )
        accuracy_of[l2] = top_k_accuracy(start.logits(held_out_features), labels[held_out])
    best = max(accuracy_of, key=lambda l2: (accuracy_of[l2], l2))
    return BestProbe(
        fit_logistic_regression(features, labels, num_classes, best, fits[best]), best, accuracy_of
    )


def _held_out(labels: Tensor, seed: int) -> Tensor:
    """Return which samples are held out: bool `[M]`, a fifth of each class, never all of it."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    held = torch.zeros(len(labels), dtype=torch.bool)
    for label in torch.unique(labels):
        own = order[labels.cpu()[order] == label.cpu()]
        held[own[: min(len(own) - 1, max(1, round(HELD_OUT * len(own))))]] = True
    return held.to(labels.device)
