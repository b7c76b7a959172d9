"""The metrics that a run reports while it trains: one table, without torch.

A study may take each as its metric; what a scheduler compares, what a report shows in per cent and
what needs labels follow from here. A metric is a line here, and the code that reports it:
`evaluation.online` for `eval/…`, `train.meter` or the loss for `train/…`. What is known at the end
alone follows from the protocols (`config.protocols`).
"""

from __future__ import annotations

import re
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


_OF_FEATURES: Final = {
    "alignment": "mean squared distance of the two views of an image, 0 to 4; lower is alike",
    "uniformity": "how evenly h lies on the sphere, 0 to about −4; lower is more even",
    "effective_rank": "how many dimensions h uses (RankMe), 1 to F; higher is more",
    "feature_std": "spread of each normalised feature of h, 0 to 1/√F; 0 is collapse",
    "effective_rank_z": "effective rank of z, 1 to D",
    "feature_std_z": "spread of each normalised feature of z, 0 to 1/√D",
    "weight_norm": "length of all weights of the encoder together",
    "margin": "by how much the views of an image are nearer than those of others, cosine of z",
    "pair_top1": "how often the nearest view, of as many as a batch has, is the partner, 0 to 1",
}
# What each number of a run's log and of MLflow is, by its name; `<…>` stands for several.
MEANINGS: Final = {
    "train/loss": "the paper's L over the global batch, of the last step",
    "train/mean_loss": "the same, mean over the steps since the last report",
    "train/learning_rate": "of the last step, after warm-up, decay and rollbacks",
    "train/grad_norm": "length of the gradient of all parameters, of the last step, not clipped",
    "train/contrastive_top1": "how often the partner is the nearest of the other views, 0 to 1",
    "train/classifier_top1": "how often the classifier names the class, 0 to 1",
    "train/entropy": "of that choice, in nats; 0 is certain",
    "train/temperature": "τ, where it is learned",
    "train/images_per_s": "images a second over all workers, between two reports",
    "train/data_wait_fraction": "of that time, the part that a step waited for its batch, 0 to 1",
    "train/bad_rows": "rows that could not be decoded and were replaced, since the last report",
    "eval/knn_top1": "class by the nearest neighbours, on a sample, 0 to 1",
    **{f"eval/{name}": says for name, says in _OF_FEATURES.items()},
    **{f"start/{name}": f"before the first step: {says}" for name, says in _OF_FEATURES.items()},
    "start/first_batch_s": "seconds until the first batch, logged once a start",
    "start/equal_views": "share of a sample whose two views are equal, 0 to 1",
    "start/blank_views": "share of a sample whose views are both of one color, 0 to 1",
    "start/copied_images": "share of a sample that is there twice, 0 to 1",
    "start/knn_bank_rows": "labelled rows that kNN learns from while training",
    "start/knn_bank_classes": "classes among them",
    "start/knn_test_rows": "labelled rows that it is asked about",
    "start/knn_missing_classes": "classes of those that the bank has no row of",
    "final/<row>/<metric>": "of the score table: trained_encoder, untrained_encoder (of random "
    "weights), raw_pixels",
    "final/<metric>": "of a study: of the trained encoder, by a protocol",
    "final/classifier/top1": "how often a supervised run's own classifier names the class, 0 to 1",
    "final/classifier/top5": "how often the class is among its first five",
    "final/classifier/mean_per_class": "mean over classes of how often it names them",
    "final/classifier/voc07_map": "11-point mean average precision, as of VOC 2007",
    "best/<metric>": "of a study: of its best point, mean over seeds",
}


def meaning_of(metric: str) -> str:
    """Return what a metric is, in a sentence; empty: it is none of a run's."""
    if metric in MEANINGS:
        return MEANINGS[metric]
    forms = [name for name in MEANINGS if "<" in name]
    for form in forms:
        if re.fullmatch(re.sub(r"<\w+>", r"[^/]+", form), metric):
            return MEANINGS[form]
    return ""
