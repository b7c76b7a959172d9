"""The interface between a loss and the training loop, and what is logged beside it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simclr_ray.distributed import collectives
from simclr_ray.nn import ntxent
from simclr_ray.nn.ntxent import interleave


class BatchMetrics(NamedTuple):
    """Two figures logged beside the loss, each a mean over the global batch."""

    top1: Tensor  # scalar in [0, 1]
    entropy: Tensor  # scalar in nats, 0 to log of the number of choices


class ChanceLevel(NamedTuple):
    """The loss of a model that has learned nothing, or has collapsed: all embeddings are equal."""

    value: float
    formula: str
    only_collapsed: bool = False  # no healthy model has a loss so high for long


class Loss(nn.Module, ABC):
    """Interface between a loss and the training loop.

    A loss of your own (`loss: {name: import, path: ...}`) is a subclass; its constructor takes the
    options and `global_batch_size`.

    Attributes:
        takes_labels: `forward` needs the images' labels.
        one_view: `forward` reads z1 alone; the loop then computes no z2.
        top1_name: Key of `metrics`' top-1 accuracy in the log: `train/<top1_name>`.
    """

    takes_labels = False
    one_view = False
    top1_name = "contrastive_top1"

    @abstractmethod
    def forward(self, z1: Tensor, z2: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the loss, a float32 or float64 scalar, by the module's contract. Collective."""

    def metrics(
        self,
        z1: Tensor,
        z2: Tensor,
        labels: Tensor | None = None,  # noqa: ARG002 - of classifiers
    ) -> BatchMetrics:
        """Return top-1 accuracy and entropy of the choice that the loss trains. Collective.

        By default `contrastive_metrics` at temperature 1.
        """
        return contrastive_metrics(z1, z2, 1.0)

    def chance_level(
        self,
        num_images: int,  # noqa: ARG002 - of those that know it
        dim: int,  # noqa: ARG002
    ) -> ChanceLevel | None:
        """Return the loss of embeddings that are all equal; None where there is no such number.

        Args:
            num_images: N of the global batch.
            dim: D of z; of a classifier K, 0 while it is not known.
        """
        return None

    def num_negatives(self, num_images: int) -> int:  # noqa: ARG002 - of contrastive losses
        """Return the negatives of an anchor among N images; 0: the loss has none."""
        return 0


@torch.no_grad()
def contrastive_metrics(
    z1: Tensor, z2: Tensor, temperature: float, *, normalize: bool = True
) -> BatchMetrics:
    """Return top-1 accuracy and entropy of picking a view's partner among the N of the other view.

    As the authors log them, from view 1 against all of view 2: N-way, without the 2N − 2 negatives
    of the own view; means over the global batch. Collective.

    Args:
        z1: Projections of view 1, this rank's. Shape [n, D], any float dtype.
        z2: Projections of view 2, row by row of the same images. Shape [n, D].
        temperature: τ, which the entropy depends on.
        normalize: Divide each z by its l2 norm first.

    Raises:
        ValueError: z1 and z2 differ in shape or are not [n, D].
    """
    with torch.autocast(z1.device.type, enabled=False):
        check_pair(z1, z2)
        z, _ = interleave(z1, z2, normalize=normalize)
        mine, partners = z[0::2], z[1::2]
        counts = collectives.row_counts(len(z1), z.device)
        others = collectives.all_gather_rows(partners, counts)  # [N, D]
        first = sum(counts[: collectives.rank()])
        sums = z.new_zeros(2)
        strip = max(1, ntxent.TILE**2 // len(others))  # of logits, as many as in one tile
        for rows in (slice(i, i + strip) for i in range(0, len(z1), strip)):
            logits = mine[rows] @ others.T / temperature  # [t, N]
            labels = first + torch.arange(len(z1), device=z.device)[rows]
            log_p = F.log_softmax(logits, dim=1)
            sums[0] += (logits.argmax(1) == labels).sum()
            sums[1] -= (log_p.exp() * log_p).sum()
        top1, entropy = collectives.all_reduce_sum(sums) / sum(counts)
    return BatchMetrics(top1, entropy)


def check_pair(z1: Tensor, z2: Tensor) -> None:
    """Raise `ValueError` unless both are [n, D]."""
    if z1.ndim != 2 or z1.shape != z2.shape:
        raise ValueError(f"z1 and z2 must both be [n, D], got {[*z1.shape]} and {[*z2.shape]}")
