"""What h and g(h) know of a transformation, and of the class: the probes of SimCLR Table 3.

Each image is transformed or not, by chance, and an MLP learns from frozen features which it was:
gray or in color, turned by which quarter, with noise or without, its edges or itself. The paper
trains "an additional MLP" and says no more of it; here it has one hidden layer as wide as its
input, standardised features, and AdamW. Of images with labels the class is a question as well, put
to linear evaluation of h and of g(h), as in Section 4.2 ("h is a better representation than g(h)").
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from simclr_ray.augment import ops
from simclr_ray.config.experiment import LinearConfig
from simclr_ray.evaluation.features import Split, extract_features
from simclr_ray.evaluation.knn import top_k_accuracy
from simclr_ray.evaluation.linear import fit_linear
from simclr_ray.nn.build import SimCLRModel
from simclr_ray.nn.precision import Precision

EPOCHS: Final = 30
BATCH: Final = 256
RATE: Final = 1e-3
WEIGHT_DECAY: Final = 1e-4


CLASS: Final = "class"  # the question that is not about a transformation


class Probe(NamedTuple):
    """How often the MLP, or linear evaluation of the class, is right, in [0, 1]."""

    target: str
    chance: float  # of the most frequent answer
    h: float
    z: float


class Target(NamedTuple):
    """A question: the transformation, and the chances of each answer."""

    name: str
    chances: tuple[float, ...]
    apply: Callable[[Tensor, NDArray[np.int64], NDArray[np.float64]], Tensor]


def _where(op: ops.Op) -> Callable[[Tensor, NDArray[np.int64], NDArray[np.float64]], Tensor]:
    """Return what applies `op` where the answer is 1."""

    def apply(images: Tensor, answers: NDArray[np.int64], u: NDArray[np.float64]) -> Tensor:
        chosen = torch.from_numpy(np.flatnonzero(answers))
        out = images.clone()
        out[chosen] = op(images[chosen], u[answers == 1])
        return out

    return apply


def _turned(images: Tensor, answers: NDArray[np.int64], u: NDArray[np.float64]) -> Tensor:  # noqa: ARG001 - as the others
    out = images.clone()
    for k in (1, 2, 3):
        rows = torch.from_numpy(np.flatnonzero(answers == k))
        out[rows] = images[rows].rot90(k, (2, 3))
    return out


TARGETS: Final = (
    Target("color vs grayscale", (0.8, 0.2), _where(ops.Grayscale())),
    Target("rotation", (0.25, 0.25, 0.25, 0.25), _turned),
    Target("orig. vs corrupted", (0.5, 0.5), _where(ops.Noise())),
    Target("orig. vs Sobel filtered", (0.5, 0.5), _where(ops.Sobel())),
)
DRAWS: Final = {"orig. vs corrupted": ops.Noise()}  # those that draw


def probe(
    model: SimCLRModel,
    train: Tensor,
    test: Tensor,
    *,
    seed: int = 0,
    batch_size: int = 512,
    precision: Precision = "float32",
) -> list[Probe]:
    """Return the accuracy on each of `TARGETS`, from h and from g(h).

    Args:
        model: Encoder and head, on the device where they are to run.
        train: uint8 [M, 3, S, S], what the MLP learns from.
        test: uint8 [Q, 3, S, S], what it is asked about.
        seed: Of the answers, the draws and the MLP.
        batch_size: Images per forward pass.
        precision: Same as `extract_features`.
    """
    h_and_z = _HAndZ(model)
    device = next(p.device for p in model.parameters())
    probes = []
    for number, target in enumerate(TARGETS):
        splits = []
        for part, images in enumerate((train, test)):
            rng = np.random.Generator(np.random.Philox(key=[seed, 2 * number + part]))
            moved, answers = transformed(target, images, rng)
            splits.append(
                (extract_features(h_and_z, moved, batch_size, device, precision), answers)
            )
        (train_features, labels), (test_features, truth) = splits
        width = train_features.shape[1] - h_and_z.z_dim
        accuracies = [
            _accuracy(
                (train_features[:, part], labels),
                (test_features[:, part], truth),
                len(target.chances),
                seed,
            )
            for part in (slice(0, width), slice(width, None))
        ]
        probes.append(Probe(target.name, max(target.chances), *accuracies))
    return probes


def transformed(target: Target, images: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Return uint8 images transformed by chance, and what was done to each: int64 [M]."""
    answers = rng.choice(len(target.chances), len(images), p=target.chances).astype(np.int64)
    op = DRAWS.get(target.name)
    out = []
    for start in range(0, len(images), 1024):
        part = images[start : start + 1024].float() / 255
        u = rng.random((len(part), op.num_draws(part.shape[-1]) if op else 0))
        done = target.apply(part, answers[start : start + 1024], u)
        out.append((done * 255).round_().to(torch.uint8))
    return torch.cat(out), torch.from_numpy(answers)


def probe_class(
    model: SimCLRModel,
    train: Split,
    test: Split,
    config: LinearConfig,
    *,
    seed: int = 0,
    batch_size: int = 512,
    precision: Precision = "float32",
) -> Probe:
    """Return the accuracy of linear evaluation of the class, of h and of g(h).

    Args:
        model: Encoder and head, on the device where they are to run.
        train: What is learned from, all with labels.
        test: What is asked about, likewise.
        config: Settings of the linear evaluation.
        seed: Of its order.
        batch_size: Images per forward pass.
        precision: Same as `extract_features`.

    Raises:
        ValueError: A feature is not finite.
    """
    h_and_z = _HAndZ(model)
    device = next(p.device for p in model.parameters())
    seen, unseen = (
        extract_features(h_and_z, split.images, batch_size, device, precision)
        for split in (train, test)
    )
    num_classes = int(max(train.labels.max(), test.labels.max())) + 1
    width = seen.shape[1] - h_and_z.z_dim
    accuracies = []
    for part in (slice(0, width), slice(width, None)):
        learned = fit_linear(seen[:, part].contiguous(), train.labels, num_classes, config, seed)
        logits = learned.logits(unseen[:, part].contiguous())
        accuracies.append(top_k_accuracy(logits, test.labels))
    chance = float(test.labels.bincount().max()) / len(test.labels)
    return Probe(CLASS, chance, *accuracies)


class _HAndZ(nn.Module):
    """h and z side by side."""

    def __init__(self, model: SimCLRModel) -> None:
        super().__init__()
        self.model = model
        self.z_dim = 0

    def forward(self, images: Tensor) -> Tensor:
        """Return [m, F + D]."""
        h, z = self.model(images)
        self.z_dim = z.shape[1]
        return torch.cat([h.float(), z.float()], 1)


def _accuracy(
    train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], num_classes: int, seed: int
) -> float:
    """Return the test accuracy of an MLP trained on standardised features."""
    x, labels = train
    mean, deviation = x.mean(0), x.std(0).clamp(min=1e-6)
    x, test_x = (x - mean) / deviation, (test[0] - mean) / deviation
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        width = x.shape[1]
        mlp = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, num_classes))
        steps = EPOCHS * -(-len(x) // BATCH)
        solver = torch.optim.AdamW(mlp.parameters(), RATE, weight_decay=WEIGHT_DECAY)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(solver, steps)
        for _ in range(EPOCHS):
            for rows in torch.tensor_split(torch.randperm(len(x)), -(-len(x) // BATCH)):
                solver.zero_grad()
                loss = F.cross_entropy(mlp(x[rows]), labels[rows])
                loss.backward()  # type: ignore[no-untyped-call] # torch's
                solver.step()
                schedule.step()
    with torch.no_grad():
        return top_k_accuracy(mlp(test_x), test[1])
