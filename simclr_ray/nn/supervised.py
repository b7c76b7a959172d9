"""Losses of classifiers, by the contract of `losses`: R/N times the sum over this rank's images."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from simclr_ray.distributed import collectives
from simclr_ray.nn.losses import BatchMetrics, ChanceLevel, Loss


class CrossEntropyLoss(Loss):
    """Softmax cross entropy of the global batch, for the supervised side of each comparison.

    Args:
        label_smoothing: Share of the target that all classes get alike.
        views: 1: z1 alone is classified; 2: the mean over both views.
        global_batch_size: N, when ranks hold the batch plan's shares of it; 0: counts are
            exchanged at each call.
    """

    takes_labels = True
    top1_name = "classifier_top1"

    def __init__(
        self, label_smoothing: float = 0.0, *, views: int = 1, global_batch_size: int = 0
    ) -> None:
        super().__init__()
        self.label_smoothing = label_smoothing
        self.one_view = views == 1
        self.global_batch_size = global_batch_size

    def forward(self, z1: Tensor, z2: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the loss, a float32 scalar (float64 for float64 input).

        Args:
            z1: [n, K], class scores of view 1, any float dtype.
            z2: [n, K], of view 2; with `views=1` not looked at.
            labels: int64 [n] in [0, K).

        Raises:
            ValueError: Labels are missing.
        """
        if labels is None or len(labels) != len(z1):
            raise ValueError("CrossEntropyLoss needs one label for each image")
        with torch.autocast(z1.device.type, enabled=False):
            sums = [self._sum(z, labels) for z in ((z1,) if self.one_view else (z1, z2))]
            global_images = self.global_batch_size or sum(
                collectives.row_counts(len(z1), z1.device)
            )
            return torch.stack(sums).mean() * (collectives.world_size() / global_images)

    @torch.no_grad()
    def metrics(
        self,
        z1: Tensor,
        z2: Tensor,  # noqa: ARG002 - of other losses
        labels: Tensor | None = None,
    ) -> BatchMetrics:
        """Return top-1 accuracy and the entropy of the predictions for view 1. Collective."""
        assert labels is not None
        log_p = F.log_softmax(z1.double(), dim=1)
        hits = (z1.argmax(1) == labels).sum()
        entropy = -(log_p.exp() * log_p).sum()
        sums = torch.stack([hits.double(), entropy, torch.full_like(entropy, len(z1))])
        total = collectives.all_reduce_sum(sums)
        return BatchMetrics(total[0] / total[2], total[1] / total[2])

    def chance_level(self, num_images: int, dim: int) -> ChanceLevel | None:  # noqa: ARG002 - any N
        """Return ln(K); None while K is not known."""
        return ChanceLevel(math.log(dim), "ln(K)") if dim else None

    def _sum(self, z: Tensor, labels: Tensor) -> Tensor:
        wide = z if z.dtype == torch.float64 else z.float()
        return F.cross_entropy(wide, labels, reduction="sum", label_smoothing=self.label_smoothing)


class DistillationLoss(Loss):
    """Cross entropy against a teacher's probabilities, −Σ_y P_T(y; τ) log P_S(y; τ), both views.

    SimCLRv2 (Chen et al. 2020, arXiv:2006.10029) eq. 2.

    Args:
        temperature: τ of teacher and student.
        global_batch_size: As of `CrossEntropyLoss`.
    """

    takes_labels = True
    top1_name = "classifier_top1"

    def __init__(self, temperature: float = 1.0, *, global_batch_size: int = 0) -> None:
        super().__init__()
        self.temperature, self.global_batch_size = temperature, global_batch_size

    def forward(self, z1: Tensor, z2: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the loss, a float32 scalar (float64 for float64 input).

        Args:
            z1: [n, K], the student's class scores of view 1, any float dtype.
            z2: [n, K], of view 2.
            labels: [n, 2, K], the teacher's class scores of both views.

        Raises:
            ValueError: The teacher's scores are missing, or of another shape.
        """
        if labels is None or labels.shape != (len(z1), 2, z1.shape[1]):
            raise ValueError("DistillationLoss needs the teacher's scores [n, 2, K]")
        with torch.autocast(z1.device.type, enabled=False):
            z = torch.stack([z1, z2], 1)  # [n, 2, K]
            wide = z if z.dtype == torch.float64 else z.float()
            target = F.softmax(labels.to(wide.dtype) / self.temperature, dim=2)
            each = -(target * F.log_softmax(wide / self.temperature, dim=2)).sum(2)
            global_images = self.global_batch_size or sum(
                collectives.row_counts(len(z1), z1.device)
            )
            return each.sum() * (collectives.world_size() / (2 * global_images))

    @torch.no_grad()
    def metrics(self, z1: Tensor, z2: Tensor, labels: Tensor | None = None) -> BatchMetrics:
        """Return how often student and teacher name the same class, and the student's entropy."""
        assert labels is not None
        return CrossEntropyLoss().metrics(z1, z2, labels[:, 0].argmax(1))

    def chance_level(self, num_images: int, dim: int) -> ChanceLevel | None:  # noqa: ARG002 - any N
        """Return ln(K), whatever the teacher says; None while K is not known."""
        return ChanceLevel(math.log(dim), "ln(K)") if dim else None
