"""The metrics that a run reports while it trains: one table, without torch.

A study may take each as its metric; what a scheduler compares, what a report shows in per cent and
what needs labels follow from here. A metric is a line here, and the code that reports it:
`evaluation.online` for `eval/…`, `train.meter` or the loss for `train/…`. What is known at the end
alone follows from the protocols (`config.protocols`).
"""

from __future__ import annotations

from typing import Final, NamedTuple


class EpochMetric(NamedTuple):
    """A number that is reported at the ends of epochs.

    Attributes:
        name: Its key among the run's metrics.
        is_fraction: A share in [0, 1], shown in per cent.
        needs_labels: Evaluation images have to have labels.
    """

    name: str
    is_fraction: bool = False
    needs_labels: bool = False


EPOCH_METRICS: Final = {
    metric.name: metric
    for metric in (
        EpochMetric("eval/knn_top1", is_fraction=True, needs_labels=True),
        EpochMetric("eval/alignment"),
        EpochMetric("eval/uniformity"),
        EpochMetric("eval/effective_rank"),
        EpochMetric("train/mean_loss"),
        EpochMetric("train/contrastive_top1", is_fraction=True),
        EpochMetric("train/classifier_top1", is_fraction=True),
        EpochMetric("train/entropy"),
    )
}


def is_fraction(metric: str) -> bool:
    """Return whether a metric is a share in [0, 1], to be shown in per cent."""
    return metric not in EPOCH_METRICS or EPOCH_METRICS[metric].is_fraction
