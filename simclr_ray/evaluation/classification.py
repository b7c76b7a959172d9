"""What class scores are worth: top-1, top-5, mean per class, and 11-point mAP (SimCLR §B.8)."""

from __future__ import annotations

from typing import Final, NamedTuple

import torch
from torch import Tensor

from simclr_ray.evaluation.knn import top_k_accuracy

# Measure -> heading of its column.
LABELS: Final = {
    "top1": "top-1",
    "top5": "top-5",
    "mean_per_class": "mean per class",
    "voc07_map": "11-point mAP",
}


class Classification(NamedTuple):
    """The field's four measures, in [0, 1], and of how many images; 0: not known."""

    top1: float
    top5: float
    mean_per_class: float  # top-1, of each class that has a sample
    voc07_map: float
    num_images: int = 0

    def measures(self) -> dict[str, float]:
        """Return the measures by name."""
        return {k: v for k, v in self._asdict().items() if k != "num_images"}


def classification(scores: Tensor, labels: Tensor) -> Classification:
    """Return how well `scores [Q, K]` name `labels`, int64 `[Q]`.

    Raises:
        ValueError: there are no rows, or the shapes do not fit.
    """
    top1 = top_k_accuracy(scores, labels)
    classes = torch.unique(labels)
    own = [top_k_accuracy(scores[labels == c], labels[labels == c]) for c in classes]
    truth = labels[:, None] == torch.arange(scores.shape[1], device=labels.device)
    return Classification(
        top1,
        top_k_accuracy(scores, labels, 5),
        sum(own) / len(own),
        mean_average_precision_11(scores, truth),
        len(labels),
    )


def mean_average_precision_11(scores: Tensor, truth: Tensor) -> float:
    """Return VOC 2007's mAP: the mean over classes of precision at recalls 0, 0.1 ... 1.

    The precision at a recall is the best one at that recall or a higher one. Classes without a
    sample are left out.

    Args:
        scores: `[Q, K]`.
        truth: bool `[Q, K]`; a sample may be of several classes.

    Raises:
        ValueError: No sample is of any class.
    """
    average_precisions: list[float] = []
    for own, positive in zip(scores.double().T, truth.T, strict=True):
        if not positive.any():
            continue
        hits = positive[own.argsort(descending=True, stable=True)].double().cumsum(0)
        precision = hits / torch.arange(1, len(hits) + 1, device=hits.device)
        best = precision.flip(0).cummax(0).values.flip(0)
        recall = hits / hits[-1]
        levels = torch.arange(11, device=hits.device, dtype=torch.float64) / 10
        places = torch.searchsorted(recall.contiguous(), levels - 1e-9)
        average_precisions.append(float(best[places].mean()))
    if not average_precisions:
        raise ValueError("no sample is of any class")
    return sum(average_precisions) / len(average_precisions)
