"""One component of each family, from outside the package, as a user would write it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from simclr_ray.config.experiment import Experiment
from simclr_ray.distributed import collectives
from simclr_ray.evaluation.features import Features
from simclr_ray.inference.encoder import Encoder
from simclr_ray.inference.export_formats import ExportFormat, Network
from simclr_ray.nn.losses import Loss, NTXentLoss

NOT_CALLABLE = 3


class PullLoss(Loss):
    """Mean squared distance between views, less how far the batch is spread: a global batch's."""

    def __init__(self, weight: float = 1.0, *, global_batch_size: int = 0) -> None:
        super().__init__()
        self.weight, self.global_batch_size = weight, global_batch_size

    def forward(self, z1: Tensor, z2: Tensor, labels: Tensor | None = None) -> Tensor:
        ranks = collectives.world_size()
        return (z1 - z2).square().sum() * self.weight * ranks / self.global_batch_size


class LocalNTXent(NTXentLoss):
    """The fault that `doctor --loss` is for: negatives of the own rank alone."""

    def forward(self, z1: Tensor, z2: Tensor, labels: Tensor | None = None) -> Tensor:
        z = nn.functional.normalize(torch.cat([z1, z2]))
        logits = (z @ z.T / self.temperature).fill_diagonal_(float("-inf"))
        return nn.functional.cross_entropy(logits, torch.arange(len(z)).roll(len(z1)))


class LabelLoss(Loss):
    """It pulls z1 towards the number of its label."""

    takes_labels = True
    one_view = True

    def __init__(self, *, global_batch_size: int = 0) -> None:
        super().__init__()
        self.global_batch_size = global_batch_size

    def forward(self, z1: Tensor, z2: Tensor, labels: Tensor | None = None) -> Tensor:
        assert labels is not None
        ranks = collectives.world_size()
        return (z1 - labels[:, None]).square().sum() * ranks / self.global_batch_size


class DetachedLoss(PullLoss):
    """It forgets where it comes from."""

    def forward(self, z1: Tensor, z2: Tensor, labels: Tensor | None = None) -> Tensor:
        return super().forward(z1, z2, labels).detach()


class RowsLoss(PullLoss):
    """It gives a number an image."""

    def forward(self, z1: Tensor, z2: Tensor, labels: Tensor | None = None) -> Tensor:
        return (z1 - z2).square().sum(1)


def label_loss(*, global_batch_size: int = 0) -> LabelLoss:
    """Hides that the loss takes labels."""
    return LabelLoss(global_batch_size=global_batch_size)


def small_net(width: int = 8) -> nn.Module:
    """Return an encoder with a batch norm of torch's, which is to become global."""
    layers = [nn.Conv2d(3, width, 3, 2, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def pretrained_net() -> nn.Module:
    """Return an encoder whose batch norms have learned something, one of them without weights."""
    norms = [nn.BatchNorm2d(4), nn.BatchNorm2d(4, affine=False)]
    for norm in norms:
        assert norm.running_mean is not None
        norm.running_mean.fill_(1)
    nn.init.constant_(norms[0].weight, 2)
    return nn.Sequential(nn.Conv2d(3, 4, 3), *norms, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def no_features() -> nn.Module:
    """Return a network that keeps its maps."""
    return nn.Conv2d(3, 8, 3)


class Branching(nn.Module):
    """A network that torch.export refuses: its path depends on the values that it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.net = small_net()

    def forward(self, images: Tensor) -> Tensor:
        h: Tensor = self.net(images)
        return h if h.sum() > 0 else h * 2


class Invert:
    """A part of the image inverted."""

    def __init__(self, strength: float = 1.0) -> None:
        self.strength = strength

    def num_draws(self, size: int) -> int:
        return 1

    def __call__(self, images: Tensor, u: NDArray[np.float64]) -> Tensor:
        part = torch.from_numpy(u[:, :1, None, None]).float() * self.strength
        return images * (1 - part) + (1 - images) * part


class Brighten(Invert):
    """It leaves [0, 1]."""

    def __call__(self, images: Tensor, u: NDArray[np.float64]) -> Tensor:
        return images + 1


class Halve(Invert):
    """It changes the shape."""

    def __call__(self, images: Tensor, u: NDArray[np.float64]) -> Tensor:
        return images[..., ::2]


class SignSGD(torch.optim.Optimizer):
    """w − lr·sign(g + wd·w), without a state."""

    def __init__(self, params: Iterable[dict[str, Any]], lr: float, scale: float = 1.0) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": 0.0, "scale": scale})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override] # as torch's
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    decayed = p.grad + group["weight_decay"] * p
                    p.sub_(decayed.sign(), alpha=group["lr"] * group["scale"])


def nearest_mean(bank: Features, test: Features, num_classes: int, experiment: Experiment) -> float:
    """Return the top-1 accuracy of naming the class whose mean is nearest."""
    means = torch.stack([bank.rows[bank.labels == k].mean(0) for k in range(num_classes)])
    found = torch.cdist(test.rows[:], means).argmin(1)
    return (found == test.labels).double().mean().item()


def percent(bank: Features, test: Features, num_classes: int, experiment: Experiment) -> float:
    """Return no share."""
    return 93.0


def _write(path: Path, encoder: Encoder, example: Tensor) -> None:
    with path.open("wb") as file:
        np.savez(file, **{name: t.numpy() for name, t in encoder.network.state_dict().items()})


def _check(path: Path, encoder: Encoder) -> Network:
    with np.load(path) as stored:
        weights = {name: torch.from_numpy(stored[name]) for name in stored.files}
    return lambda images: torch.func.functional_call(encoder.network, weights, images)


def _check_doubled(path: Path, encoder: Encoder) -> Network:
    return lambda images: 2 * _check(path, encoder)(images)


NUMPY = ExportFormat("NumPy archive", "encoder.npz", _write, _check)


def numpy_archive() -> ExportFormat:
    """Return the format that `export --to` names by its import path."""
    return NUMPY


def hidden_weights() -> ExportFormat:
    """Return a format that would write over another's file."""
    return NUMPY._replace(file="model.safetensors")


WRONG = ExportFormat("doubled", "encoder.npz", _write, _check_doubled)
