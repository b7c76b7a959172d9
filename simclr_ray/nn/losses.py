"""Contrastive losses: modules of z1, z2 over the global batch, exact on any number of ranks.

    z = normalize([z1; z2])                      # [2N, D], of all ranks
    s_ij = z_i·z_j / τ                           # [2N, 2N], made tile by tile, never held
    L = 1/(2N) · Σ_i [ log Σ_j≠i exp(s_ij) − s_i,partner(i) ]       # NT-Xent

`NTXentLoss` is SimCLR's (Chen et al. 2020, arXiv:2002.05709, eq. 1), `NTLogisticLoss` and
`TripletLoss` are its Tables 2 and 4, `DCLLoss` is of Yeh et al. 2022 (arXiv:2110.06848),
`SupConLoss` of Khosla et al. 2020 (arXiv:2004.11362). `nn/ntxent.py` and `nn/pairwise.py` hold the
arithmetic of tiles. Dense oracles in float64 NumPy, written from the papers, that all are tested
against: `tests/reference/ntxent.py` and `tests/reference/contrastive.py`.

Legend: N images in the global batch, n of them on this rank, R ranks, D the width of a projection.
Contract of all losses: a rank passes the projections of its own n images and gets R/(2N) times the
sum over its own 2n anchors. That is its own mean where ranks hold equally many images, and averages
over ranks to the mean of the global batch. The gradient to z1, z2 is R times that of the global
mean, so gradients must be *averaged* over ranks afterwards, as DDP does. `forward` is a collective:
every rank calls it, or all wait. Without a process group R is 1.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Literal

import torch
from torch import Tensor

from simclr_ray.distributed import collectives
from simclr_ray.nn import ntxent, pairwise
from simclr_ray.nn.loss import BatchMetrics, ChanceLevel, Loss, check_pair, contrastive_metrics

__all__ = [
    "BatchMetrics",
    "ChanceLevel",
    "ContrastiveLoss",
    "DCLLoss",
    "Loss",
    "NTLogisticLoss",
    "NTXentLoss",
    "SupConLoss",
    "TripletLoss",
    "contrastive_metrics",
]

Negatives = Literal["both", "other"]


class ContrastiveLoss(Loss):
    """Base of the losses over pairs of views.

    Args:
        temperature: τ > 0, without unit: divides the products of z. Larger is softer.
        normalize: Divide each z by its l2 norm first, so that products are cosines (the
            paper's Table 5 has both).
        global_batch_size: N, where rank r of R holds rows r·N // R to (r + 1)·N // R, as the batch
            plan partitions them. 0: ranks may hold any number; counts are exchanged at each call,
            which on GPU waits for the device.

    Raises:
        ValueError: `temperature` is not above 0.
    """

    def __init__(
        self, temperature: float = 0.1, *, normalize: bool = True, global_batch_size: int = 0
    ) -> None:
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"temperature must be above 0, got {temperature}")
        self.temperature = temperature
        self.normalize = normalize
        self.has_bounded_products = normalize
        self.global_batch_size = global_batch_size

    def forward(self, z1: Tensor, z2: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the loss of this rank's anchors against the global batch. Collective: two gathers.

        Args:
            z1: Projections of view 1, not normalised. Shape [n, D], any float dtype; arithmetic is
                float32, or float64 for float64 and without `normalize`, under autocast as well.
            z2: Projections of view 2, row by row of the same images. Shape [n, D].
            labels: Classes, for a loss with `takes_labels`; below 0: no label. Shape [n], int64.

        Returns:
            Scalar in nats (`TripletLoss`: in units of the product), float32 or float64. Its
            gradients to z1 and z2 have their dtypes.

        Raises:
            ValueError: z1 and z2 differ in shape or are not [n, D]; the loss takes labels and there
                is not one for each image.
        """
        with torch.autocast(z1.device.type, enabled=False):
            check_pair(z1, z2)
            if self.takes_labels and (labels is None or len(labels) != len(z1)):
                raise ValueError(f"{type(self).__name__} needs one label for each image")
            counts, pair_loss = self._counts(len(z1), z1.device), self._pair_loss()
            wide = not self.has_bounded_products
            if pair_loss is None:
                loss: Tensor = ntxent.NTXentFunction.apply(
                    z1, z2, self.temperature, self.normalize, wide, counts
                )
                return loss
            own = labels if self.takes_labels else None
            return pairwise.loss(
                z1, z2, pair_loss, counts, normalize=self.normalize, wide=wide, labels=own
            )

    def metrics(
        self,
        z1: Tensor,
        z2: Tensor,
        labels: Tensor | None = None,  # noqa: ARG002 - of other losses
    ) -> BatchMetrics:
        """Return `contrastive_metrics` at this loss's temperature. Collective."""
        return contrastive_metrics(z1, z2, self.temperature, normalize=self.normalize)

    def num_negatives(self, num_images: int) -> int:
        """Return the negatives of an anchor: the other images' views, or one view of each."""
        views = 1 if getattr(self, "negatives", "both") == "other" else 2
        return views * (num_images - 1)

    @abstractmethod
    def _pair_loss(self) -> pairwise.PairLoss | None:
        """Return the term of an anchor; None: NT-Xent, which `nn/ntxent.py` computes faster."""

    def _counts(self, local: int, device: torch.device) -> list[int]:
        """Return n of each rank: [R]."""
        if not self.global_batch_size:
            return collectives.row_counts(local, device)
        ranks = range(collectives.world_size())
        shares = [
            collectives.partition(self.global_batch_size, r, collectives.world_size())
            for r in ranks
        ]
        return [last - first for first, last in shares]


class NTXentLoss(ContrastiveLoss):
    """Normalised temperature-scaled cross entropy of the global batch.

    SimCLR (Chen et al. 2020, arXiv:2002.05709) eq. 1. Each of the 2N views is an anchor; its
    partner, the other view of its image, is the positive, the 2N − 2 views of the other images are
    negatives. The value is the paper's L; the authors' `objective.py` returns twice that
    (`docs/paper_ledger.md`). Memory grows with N·D, not with N²: tiles of s are computed forward
    and again backward. In float64 the value equals that of the dense oracle
    (`tests/reference/ntxent.py`) to 1e-11 and the gradients to 1e-9; one process equals 2 to 4 to
    1e-10 and 1e-9 (`tests/distributed/test_losses.py`).

    Args:
        temperature: τ > 0; the paper's best are 0.1 (ImageNet) and 0.5 (CIFAR-10).
        normalize, global_batch_size: Same as `ContrastiveLoss`.
        negatives: `both` views of the other images, or the `other` view of them alone, as in the
            comparison of losses in Table 4 (§B.10).
        learn_temperature: z come from `heads.LearnableTemperature`, which has normalised and
            scaled them; τ is what it started from, and is not applied again.

    Raises:
        ValueError: `temperature` is not above 0.

    Examples:
        Four images whose projections are orthogonal and equal in both views: the positive has
        cosine 1, six negatives have 0, so the loss is log(1 + 6·exp(−1/τ)).

        >>> import torch
        >>> from simclr_ray.nn.losses import NTXentLoss
        >>> z1 = torch.eye(4, 8, requires_grad=True)
        >>> z2 = torch.eye(4, 8)
        >>> loss = NTXentLoss(temperature=0.5)(z1, z2)
        >>> round(loss.item(), 4)
        0.5944
        >>> loss.backward()
        >>> z1.grad.shape
        torch.Size([4, 8])
    """

    def __init__(
        self,
        temperature: float = 0.1,
        *,
        normalize: bool = True,
        global_batch_size: int = 0,
        negatives: Negatives = "both",
        learn_temperature: bool = False,
    ) -> None:
        super().__init__(temperature, normalize=normalize, global_batch_size=global_batch_size)
        self.negatives = negatives
        # above τ = 1, or where lengths are learned, a healthy loss may lie at chance as well
        self._only_collapsed = normalize and temperature <= 1
        if learn_temperature:
            self.temperature, self.normalize = 1.0, False
            self.has_bounded_products = True  # by the head, which has normalised z

    def chance_level(self, num_images: int, dim: int) -> ChanceLevel:  # noqa: ARG002 - any D
        """Return the logarithm of the candidates: ln(2N-1), or ln(N) of the other view alone."""
        formula = "ln(N)" if self.negatives == "other" else "ln(2N-1)"
        candidates = self.num_negatives(num_images) + 1
        return ChanceLevel(math.log(candidates), formula, self._only_collapsed)

    def _pair_loss(self) -> pairwise.PairLoss | None:
        if self.negatives == "both":
            return None
        return pairwise.Softmax(self.temperature, other_view_only=True)


class DCLLoss(ContrastiveLoss):
    """Decoupled contrastive loss: NT-Xent without the positive in its denominator (DCL, DCLW).

    Yeh et al. 2022 (arXiv:2110.06848) eq. 6, weighted by eq. 7. Oracle: `contrastive.dcl`.

    Args:
        temperature, normalize, global_batch_size: Same as `ContrastiveLoss`.
        sigma: 0: DCL. Above 0: DCLW, the positive of image k weighs 2 − N·softmax(s⁺/σ)_k over the
            global batch, not differentiated (von Mises-Fisher weights; the paper has 0.5).

    Raises:
        ValueError: `temperature` is not above 0.

    Examples:
        The views of `NTXentLoss`'s example: log(6) − 1/τ.

        >>> import torch
        >>> from simclr_ray.nn.losses import DCLLoss
        >>> round(DCLLoss(temperature=0.5)(torch.eye(4, 8), torch.eye(4, 8)).item(), 4)
        -0.2082
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

    def chance_level(self, num_images: int, dim: int) -> ChanceLevel:  # noqa: ARG002 - any D
        """Return ln(2N-2); σ weighs the positives 1 on average, so it changes nothing."""
        return ChanceLevel(math.log(self.num_negatives(num_images)), "ln(2N-2)")

    def _pair_loss(self) -> pairwise.PairLoss:
        return pairwise.Softmax(self.temperature, decoupled=True, sigma=self.sigma)


class SupConLoss(ContrastiveLoss):
    """Supervised contrastive loss: all views of an anchor's class are its positives.

    Khosla et al. 2020 (arXiv:2004.11362) eq. 2, L_out, without the factor τ/τ_base of their code.
    An image without a label (below 0) has its own other view as its only positive. Takes the
    arguments of `ContrastiveLoss`. Oracle: `contrastive.supcon`.

    Raises:
        ValueError: `temperature` is not above 0; `forward` is called without labels.

    Examples:
        Without labels it is NT-Xent.

        >>> import torch
        >>> from simclr_ray.nn.losses import SupConLoss
        >>> loss, z = SupConLoss(temperature=0.5), torch.eye(4, 8)
        >>> round(loss(z, z, torch.full((4,), -1)).item(), 4)
        0.5944
        >>> round(loss(z, z, torch.tensor([0, 0, 1, 1])).item(), 4)
        1.9278
    """

    takes_labels = True

    def chance_level(self, num_images: int, dim: int) -> ChanceLevel:  # noqa: ARG002 - any D
        """Return ln(2N-1), whatever the labels."""
        return ChanceLevel(math.log(2 * num_images - 1), "ln(2N-1)")

    def _pair_loss(self) -> pairwise.PairLoss:
        return pairwise.Supervised(self.temperature)


class NTLogisticLoss(ContrastiveLoss):
    """NT-Logistic: −log σ(s⁺/τ) − mean over negatives of log σ(−s⁻/τ).

    SimCLR Table 2 and 4. The paper says neither sum nor mean over negatives; it is a mean here
    (`docs/paper_ledger.md`). Oracles: `contrastive.logistic`, `contrastive.mined_logistic`.

    Args:
        temperature, normalize, global_batch_size: Same as `ContrastiveLoss`.
        semi_hard: Use one negative an anchor: the most similar of those less similar than the
            positive; where there is none, the positive's term alone.
        negatives: Same as `NTXentLoss`.

    Raises:
        ValueError: `temperature` is not above 0.

    Examples:
        >>> import torch
        >>> from simclr_ray.nn.losses import NTLogisticLoss
        >>> round(NTLogisticLoss(temperature=0.5)(torch.eye(4, 8), torch.eye(4, 8)).item(), 4)
        0.8201
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
    """Margin triplet: the mean over negatives of max(s⁻ − s⁺ + m, 0), without a temperature.

    SimCLR Table 2 and 4. Oracles: `contrastive.triplet`, `contrastive.mined_triplet`.

    Args:
        margin: m >= 0, in units of s (a cosine where `normalize`); the paper tried 0, 0.4, 0.8 and
            1.6.
        normalize, global_batch_size: Same as `ContrastiveLoss`.
        semi_hard: Use one negative an anchor: the most similar of those less similar than the
            positive by less than m; where there is none, the anchor counts 0.
        negatives: Same as `NTXentLoss`.

    Raises:
        ValueError: `margin` is below 0, or is 0 with `semi_hard`.

    Examples:
        Every negative is less similar than its positive by 1: only a margin above 1 costs.

        >>> import torch
        >>> from simclr_ray.nn.losses import TripletLoss
        >>> round(TripletLoss(margin=1.6)(torch.eye(4, 8), torch.eye(4, 8)).item(), 4)
        0.6
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
