"""The contrastive losses: modules of z1, z2 over the global batch, exact on any number of ranks.

NT-Xent is SimCLR's (Chen et al. 2020, arXiv:2002.05709, eq. 1); NT-Logistic and margin triplet are
its Table 2 and 4; decoupled (Yeh et al. 2022, arXiv:2110.06848) and supervised contrastive (Khosla
et al. 2020, arXiv:2004.11362) come after it. `ntxent` and `pairwise` hold the arithmetic.

The contract of all. The value is R/(2N) times the sum over this rank's own anchors: its own mean
when ranks hold equally many images, and the mean of the global batch when averaged over ranks. The
gradient to z1, z2 is R times that of the global mean, so gradients must afterwards be *averaged*
over ranks, as DDP does.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simclr_ray.distributed import collectives as dist
from simclr_ray.nn import ntxent, pairwise
from simclr_ray.nn.ntxent import interleave

Negatives = Literal["both", "other"]


class BatchMetrics(NamedTuple):
    """What is logged beside the loss, a mean over the global batch each."""

    top1: Tensor  # scalar in [0, 1]
    entropy: Tensor  # scalar, nats


class Loss(nn.Module, ABC):
    """What the loop asks of a loss.

    Attributes:
        takes_labels: `forward` needs the images' labels.
        one_view: It looks at z1 alone; the loop then makes no z2.
        top1_name: What its top-1 accuracy is called among the metrics of training.
    """

    takes_labels = False
    one_view = False
    top1_name = "contrastive_top1"

    @abstractmethod
    def forward(self, z1: Tensor, z2: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the loss by the module's contract, a float32 or float64 scalar. Collective."""

    @abstractmethod
    def metrics(self, z1: Tensor, z2: Tensor, labels: Tensor | None = None) -> BatchMetrics:
        """Return top-1 accuracy and entropy of what the loss makes the model do. Collective."""


class ContrastiveLoss(Loss):
    """What the losses over pairs of views share.

    Args:
        temperature: τ > 0, which divides the products of z.
        normalize: Divide each z by its l2 norm first (Table 5 has both).
        global_batch_size: N, when ranks hold the batch plan's shares of it; 0: counts are
            exchanged at each call, which on GPU waits for the device.
    """

    def __init__(
        self, temperature: float = 0.1, *, normalize: bool = True, global_batch_size: int = 0
    ) -> None:
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"temperature must be above 0, got {temperature}")
        self.temperature = temperature
        self.normalize = normalize
        self.global_batch_size = global_batch_size

    def forward(self, z1: Tensor, z2: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the loss, a float32 scalar (float64 for float64 input). Collective: gathers.

        Args:
            z1: [n, D], this rank's projections of view 1, not normalised, any float dtype.
            z2: [n, D], those of view 2, row by row the same images.
            labels: int64 [n], of losses that take them; below 0: none.

        Raises:
            ValueError: The shapes differ or are not [n, D], or labels are missing.
        """
        with torch.autocast(z1.device.type, enabled=False):
            _check(z1, z2)
            if self.takes_labels and (labels is None or len(labels) != len(z1)):
                raise ValueError(f"{type(self).__name__} needs one label for each image")
            counts, pair_loss = self._counts(len(z1), z1.device), self._pair_loss()
            if pair_loss is None:
                loss: Tensor = ntxent.NTXentConfig.apply(
                    z1, z2, self.temperature, self.normalize, counts
                )
                return loss
            own = labels if self.takes_labels else None
            return pairwise.loss(z1, z2, pair_loss, counts, normalize=self.normalize, labels=own)

    def metrics(
        self,
        z1: Tensor,
        z2: Tensor,
        labels: Tensor | None = None,  # noqa: ARG002 - of other losses
    ) -> BatchMetrics:
        """Return top-1 accuracy and entropy of picking a view's partner. Collective."""
        return contrastive_metrics(z1, z2, self.temperature, normalize=self.normalize)

    @abstractmethod
    def _pair_loss(self) -> pairwise.PairLoss | None:
        """Return the term of an anchor; None: NT-Xent by its own faster core."""

    def _counts(self, local: int, device: torch.device) -> list[int]:
        """Return n of each rank."""
        if not self.global_batch_size:
            return dist.row_counts(local, device)
        ranks = range(dist.world_size())
        shares = [dist.share(self.global_batch_size, r, dist.world_size()) for r in ranks]
        return [last - first for first, last in shares]


class NTXentLoss(ContrastiveLoss):
    """The normalised temperature-scaled cross entropy of the global batch (SimCLR eq. 1).

    The paper's L; the authors' code returns twice this value. Arguments as of `ContrastiveLoss`.

    Args:
        negatives: `both` views of the other images, or those of the `other` view alone, as in
            the comparison of Table 4 (§B.10).
    """

    def __init__(
        self,
        temperature: float = 0.1,
        *,
        normalize: bool = True,
        global_batch_size: int = 0,
        negatives: Negatives = "both",
    ) -> None:
        super().__init__(temperature, normalize=normalize, global_batch_size=global_batch_size)
        self.negatives = negatives

    def _pair_loss(self) -> pairwise.PairLoss | None:
        if self.negatives == "both":
            return None
        return pairwise.Softmax(self.temperature, other_view_only=True)


class DCLLoss(ContrastiveLoss):
    """Decoupled contrastive loss: NT-Xent without the positive in its denominator (DCL, DCLW).

    Arguments as of `ContrastiveLoss`.

    Args:
        sigma: Above 0, the positive of image k weighs 2 − N·softmax(s⁺/σ)_k, over the global batch
            and not differentiated (DCLW's von Mises-Fisher weights; the paper has σ = 0.5).
    """

    def __init__(
        self,
        temperature: float = 0.1,
        *,
        normalize: bool = True,
        global_batch_size: int = 0,
        sigma: float = 0.0,
    ) -> None:
        super().__init__(temperature, normalize=normalize, global_batch_size=global_batch_size)
        self.sigma = sigma

    def _pair_loss(self) -> pairwise.PairLoss:
        return pairwise.Softmax(self.temperature, decoupled=True, sigma=self.sigma)


class SupConLoss(ContrastiveLoss):
    """Supervised contrastive loss, L_out of Khosla et al. eq. 2, without their factor τ/τ_base.

    The positives of an anchor are all views of its class, its own image's other view among them; an
    image without a label has that one alone. Arguments as of `ContrastiveLoss`.
    """

    takes_labels = True

    def _pair_loss(self) -> pairwise.PairLoss:
        return pairwise.Supervised(self.temperature)


class NTLogisticLoss(ContrastiveLoss):
    """NT-Logistic of Table 2: −log σ(s⁺/τ) − mean over negatives of log σ(−s⁻/τ).

    The paper leaves the sum over negatives open; it is a mean here (`docs/paper_ledger.md`).
    Arguments as of `ContrastiveLoss`.

    Args:
        semi_hard: One negative an anchor: the most similar of those less similar than the positive;
            where there is none, the positive's term alone.
        negatives: `both` views of the other images, or those of the `other` view alone.
    """

    def __init__(
        self,
        temperature: float = 0.1,
        *,
        normalize: bool = True,
        global_batch_size: int = 0,
        semi_hard: bool = False,
        negatives: Negatives = "both",
    ) -> None:
        super().__init__(temperature, normalize=normalize, global_batch_size=global_batch_size)
        self.semi_hard, self.negatives = semi_hard, negatives

    def _pair_loss(self) -> pairwise.PairLoss:
        kind = pairwise.MinedLogistic if self.semi_hard else pairwise.Logistic
        return kind(self.temperature, other_view_only=self.negatives == "other")


class TripletLoss(ContrastiveLoss):
    """Margin triplet of Table 2: the mean over negatives of max(s⁻ − s⁺ + m, 0), without τ.

    Arguments as of `ContrastiveLoss`.

    Args:
        margin: m >= 0; the paper tried 0, 0.4, 0.8 and 1.6.
        semi_hard: One negative an anchor: the most similar of those less similar than the positive
            by less than m; where there is none, the anchor counts 0.
        negatives: `both` views of the other images, or those of the `other` view alone.
    """

    def __init__(
        self,
        margin: float = 0.8,
        *,
        normalize: bool = True,
        global_batch_size: int = 0,
        semi_hard: bool = False,
        negatives: Negatives = "both",
    ) -> None:
        super().__init__(1.0, normalize=normalize, global_batch_size=global_batch_size)
        if margin < 0:
            raise ValueError(f"margin must not be below 0, got {margin}")
        if semi_hard and not margin:
            raise ValueError("semi_hard needs a margin above 0: no negative lies within 0")
        self.margin, self.semi_hard, self.negatives = margin, semi_hard, negatives

    def _pair_loss(self) -> pairwise.PairLoss:
        kind = pairwise.MinedTriplet if self.semi_hard else pairwise.Triplet
        return kind(self.margin, other_view_only=self.negatives == "other")


@torch.no_grad()
def contrastive_metrics(
    z1: Tensor, z2: Tensor, temperature: float, *, normalize: bool = True
) -> BatchMetrics:
    """Return top-1 accuracy and entropy of picking a view's partner among the N of the other view.

    As the authors log them, from view 1 against all of view 2: N-way, without the 2N − 2 negatives
    of the own view; means over the global batch. Arguments as for `NTXentLoss`. Collective.
    """
    with torch.autocast(z1.device.type, enabled=False):
        _check(z1, z2)
        z, _ = interleave(z1, z2, normalize=normalize)
        mine, partners = z[0::2], z[1::2]
        counts = dist.row_counts(len(z1), z.device)
        others = dist.all_gather_rows(partners, counts)  # [N, D]
        first = sum(counts[: dist.rank()])
        sums = z.new_zeros(2)
        strip = max(1, ntxent.TILE**2 // len(others))  # of logits, as many as in one tile
        for rows in (slice(i, i + strip) for i in range(0, len(z1), strip)):
            logits = mine[rows] @ others.T / temperature  # [t, N]
            labels = first + torch.arange(len(z1), device=z.device)[rows]
            log_p = F.log_softmax(logits, dim=1)
            sums[0] += (logits.argmax(1) == labels).sum()
            sums[1] -= (log_p.exp() * log_p).sum()
        top1, entropy = dist.all_reduce_sum(sums) / sum(counts)
    return BatchMetrics(top1, entropy)


def _check(z1: Tensor, z2: Tensor) -> None:
    if z1.ndim != 2 or z1.shape != z2.shape:
        raise ValueError(f"z1 and z2 must both be [n, D], got {[*z1.shape]} and {[*z2.shape]}")
