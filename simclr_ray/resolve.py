"""What a config leaves to the data and to other runs, checked and filled in before it starts."""

from __future__ import annotations

import numpy as np

from simclr_ray.data.source import NO_LABEL, Source
from simclr_ray.errors import DataError
from simclr_ray.experiment import ClassifierHead, Data, Experiment
from simclr_ray.starting import with_start, with_teacher


def resolved(experiment: Experiment, source: Source) -> Experiment:
    """Return the experiment, complete: classes counted, first weights and teacher named.

    Raises:
        ConfigError: Weights are not there or do not fit.
        DataError: Labels are missing; see `with_classes`.
    """
    return with_classes(with_teacher(with_start(experiment)), source)


def split_like_test(data: Data) -> str:
    """Return which of `data.train` and `data.bank` holds the pictures of `data.test`, or nothing.

    Opens what there is to compare. Raises `DataError` where one cannot be read.
    """
    if not data.test:
        return ""
    others = [path for path in dict.fromkeys((data.train, data.bank)) if path]
    known = {Source.open(path, data.columns).fingerprint: path for path in others}
    return known.get(Source.open(data.test, data.columns).fingerprint, "")


def with_classes(experiment: Experiment, source: Source) -> Experiment:
    """Return the experiment, the number of classes filled in where its head is a classifier.

    Raises:
        DataError: The loss takes labels and the pictures have none; of a classifier, too, where a
            picture has none, there are fewer than two classes, or more than `head.num_classes`.
    """
    if not experiment.takes_labels:
        return experiment
    if not source.has_labels:
        raise DataError(
            f"loss.name={experiment.loss.name} needs labels, and {source.uri} has no integer "
            f"column {source.columns.label!r} (data.columns.label)"
        )
    head = experiment.head
    if not isinstance(head, ClassifierHead):
        return experiment
    labels = source.labels()
    if (labels == NO_LABEL).any() or labels.min() < 0:
        raise DataError(
            f"{int((labels < 0).sum())} of {len(labels)} rows of {source.uri} have no label; "
            "a classifier is trained on labelled rows alone"
        )
    found = int(labels.max()) + 1
    if len(np.unique(labels)) < 2:
        raise DataError(f"all rows of {source.uri} are of one class; there is nothing to learn")
    if head.num_classes and found > head.num_classes:
        raise DataError(
            f"{source.uri} has labels up to {found - 1}, more than "
            f"head.num_classes={head.num_classes} allows"
        )
    filled = head.model_copy(update={"num_classes": head.num_classes or found})
    return experiment.model_copy(update={"head": filled})
