"""The linear protocol: multinomial logistic regression on frozen features (SimCLR §B.6).

As in the paper: Nesterov SGD with momentum 0.9, rate 0.1·B/256, cosine to zero without warm-up, no
regularisation, weights from zero. Unlike the paper, features are first standardised by the bank's
mean and deviation, and scaled down when their largest principal direction would make that rate
unstable: the same settings then fit an encoder's features and raw pixels, and no row of the table
looks bad only because its scale did not suit the rate. Both are affine maps, folded into the
result, which is a plain linear classifier of the features as they come. Unlike the paper too, the
features are read once, without augmentation.
"""

from __future__ import annotations

import math
from typing import Final, NamedTuple

import torch
from torch import Tensor
from torch.optim.sgd import sgd

from simclr_ray.config import experiment
from simclr_ray.evaluation.feature_file import FeatureRows, are_finite, blocks, is_small

MOMENTUM: Final = 0.9
# Gradient descent with momentum m is stable below 2(1+m)/L; the softmax loss has L <= λ/2 for
# features of largest second moment λ. At the rate 0.1 that is λ < 76; half of it leaves a margin.
CURVATURE_AT_RATE_1: Final = 3.8
# A feature with less deviation than this share of the largest one is taken as constant.
SMALLEST_DEVIATION: Final = 1e-6
POWER_STEPS: Final = 20


class LinearProbe(NamedTuple):
    """A linear classifier of features as they come: `weight [K, F]`, `bias [K]`, float32."""

    weight: Tensor
    bias: Tensor

    def logits(self, features: FeatureRows) -> Tensor:
        """Return the class scores `[M, K]` of `features [M, F]`, where the classifier is."""
        device = self.bias.device
        return torch.cat(
            [
                torch.addmm(self.bias, part.to(device).float(), self.weight.T)
                for part in blocks(features)
            ]
        )


def fit_linear(
    features: FeatureRows,
    labels: Tensor,
    num_classes: int,
    config: experiment.LinearConfig,
    seed: int,
    device: torch.device | str | None = None,
) -> LinearProbe:
    """Return the classifier that SGD finds on `features [M, F]`; a pure function of the arguments.

    Args:
        features: frozen features, any float dtype; they are trained on in float32. Of more than
            `BLOCK_BYTES` a batch at a time is in memory.
        labels: int64 `[M]` in [0, num_classes).
        num_classes: K.
        config: epochs, batch size, and rate per 256 samples.
        seed: fixes the order of the samples, the only random thing here.
        device: where it is computed; that of the features, or the CPU for those in a file.

    Raises:
        ValueError: the shapes do not fit, a label lies outside, or a feature is not finite.
    """
    _check(features, labels, num_classes)
    if device is None:
        device = features.device if isinstance(features, Tensor) else "cpu"
    rows = _standardised(features, torch.device(device))
    allowed = CURVATURE_AT_RATE_1 / peak_rate(len(rows), config)
    rows.shrink(min(1.0, math.sqrt(allowed / max(_largest_moment(rows), 1e-12))))
    weight, bias = descend(rows, labels.to(device), num_classes, config, seed)
    weight = weight * rows.scale  # [K, F]
    return LinearProbe(weight, bias - weight @ rows.mean)


class _Standardised:
    """Features less their mean, times a scale: made as they are used where they are many.

    Args:
        features: `[M, F]`.
        mean: `[F]`.
        scale: `[F]`, zero for features that are constant.
    """

    def __init__(self, features: FeatureRows, mean: Tensor, scale: Tensor) -> None:
        self.features, self.mean, self.scale = features, mean, scale
        self.shape, self.device, self.dtype = features.shape, mean.device, mean.dtype
        self._all = self._of(features[:]) if is_small(features) else None

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, index: slice | Tensor) -> Tensor:
        if self._all is not None:
            return self._all[index]
        if isinstance(self.features, Tensor) and not isinstance(index, slice):
            index = index.to(self.features.device)  # torch takes no other
        return self._of(self.features[index])

    def shrink(self, factor: float) -> None:
        """Multiply all by a factor, which `scale` holds from then on."""
        self.scale = self.scale * factor
        if self._all is not None:
            self._all = self._all * factor

    def _of(self, features: Tensor) -> Tensor:
        return (features.to(self.device).float() - self.mean) * self.scale


def _standardised(features: FeatureRows, device: torch.device) -> _Standardised:
    mean, deviation = _mean_and_deviation(features, device)
    varies = deviation > SMALLEST_DEVIATION * deviation.max()
    scale = torch.where(varies, 1 / deviation.clamp(min=torch.finfo().tiny), 0)
    return _Standardised(features, mean, scale)


def _mean_and_deviation(features: FeatureRows, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return both of each feature, [F]; of many rows, by passes over them in parts."""
    if is_small(features):
        rows = features[:].to(device).float()
        return rows.mean(0), rows.std(0, correction=0)
    num, zero = len(features), torch.zeros(features.shape[1], dtype=torch.float64, device=device)
    mean, squares = zero.clone(), zero.clone()
    for part in blocks(features):
        mean += part.to(device).double().sum(0) / num
    for part in blocks(features):
        squares += (part.to(device).double() - mean).square().sum(0) / num
    return mean.float(), squares.sqrt().float()


def _largest_moment(rows: _Standardised) -> float:
    """Return about the largest eigenvalue of `rowsᵀ rows / M`, by power iteration."""
    start = torch.Generator().manual_seed(0)
    v = torch.randn(rows.shape[1], generator=start).to(rows.device)
    value = 0.0
    for _ in range(POWER_STEPS):
        v = v / v.norm().clamp(min=1e-30)
        v = sum((part.T @ (part @ v) for part in blocks(rows)), torch.zeros_like(v)) / len(rows)
        value = v.norm().item()
    return value


def descend(
    rows: Tensor | _Standardised,
    labels: Tensor,
    num_classes: int,
    config: experiment.LinearConfig,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """Return weight `[K, F]` and bias `[K]` after SGD on standardised `rows [M, F]`.

    The gradient is written out: it is two products. The update is torch's, bit for bit what two
    lines of ours gave, at 1.12 to 1.24 of their processor time (`benchmarks/results/linear.json`);
    its function, since the class imports `torch._dynamo` for seconds.
    """
    num_batches = math.ceil(len(rows) / config.batch_size)  # whose sizes differ by at most one
    total, peak = config.epochs * num_batches, peak_rate(len(rows), config)
    order = torch.Generator().manual_seed(seed)
    weight = torch.zeros(num_classes, rows.shape[1], dtype=rows.dtype, device=rows.device)
    bias = torch.zeros_like(weight[:, 0])
    buffers: list[Tensor | None] = [None, None]
    for epoch in range(config.epochs):
        shuffled = torch.randperm(len(rows), generator=order).to(rows.device)
        for index, batch in enumerate(shuffled.tensor_split(num_batches)):
            step = epoch * num_batches + index
            rate = peak * 0.5 * (1 + math.cos(math.pi * step / total))
            x, y = rows[batch], labels[batch]
            error = torch.softmax(torch.addmm(bias, x, weight.T), 1)  # [B, K]
            error[torch.arange(len(y), device=y.device), y] -= 1
            error /= len(y)
            sgd(
                [weight, bias], [error.T @ x, error.sum(0)], buffers, lr=rate, momentum=MOMENTUM,
                nesterov=True, weight_decay=0, dampening=0, maximize=False,
            )  # fmt: skip
    return weight, bias


def peak_rate(num_rows: int, config: experiment.LinearConfig) -> float:
    """Return the rate at the start: 0.1 for 256 samples, in proportion to the batch."""
    return config.learning_rate * min(config.batch_size, num_rows) / 256


def _check(features: FeatureRows, labels: Tensor, num_classes: int) -> None:
    if len(features.shape) != 2 or not len(features) or labels.shape != features.shape[:1]:
        raise ValueError(f"features {list(features.shape)} and labels {list(labels.shape)} differ")
    if labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(f"a label lies outside [0, {num_classes})")
    if not are_finite(features):
        raise ValueError("a feature is not finite: the encoder has diverged")
