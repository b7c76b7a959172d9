"""Two encoders on the same images: their scores, and how sure the difference is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from simclr_ray.augment.decode import ImageDecoder
from simclr_ray.config.experiment import Experiment
from simclr_ray.config.protocols import DEFAULT_PROTOCOLS
from simclr_ray.evaluation.evaluate import load_splits
from simclr_ray.evaluation.features import Features, Split, extract_features
from simclr_ray.evaluation.scores import protocol_results, score_features
from simclr_ray.inference.encoder import Encoder
from simclr_ray.nn.precision import best_device

RESAMPLES: Final = 2_000
Hits = npt.NDArray[np.bool_]


class Scored(NamedTuple):
    """What an encoder reaches.

    Attributes:
        metrics: Name -> value.
        hits: Of metrics that count images: id -> whether it was named rightly, as two arrays.
    """

    metrics: dict[str, float]
    hits: dict[str, tuple[npt.NDArray[np.int64], Hits]]


def score(
    encoder: Encoder, experiment: Experiment, protocols: Sequence[str] = DEFAULT_PROTOCOLS
) -> Scored:
    """Return the scores of an encoder by the splits of an experiment, seen as it sees images.

    Raises:
        DataError: A split cannot be read.
    """
    return _scored(encoder.network, encoder.size, encoder.decoder, experiment, protocols)


def score_network(
    network: nn.Module, like: Encoder, experiment: Experiment, protocols: Sequence[str]
) -> Scored:
    """Return the scores of a network on the views that an encoder sees."""
    return _scored(network, like.size, like.decoder, experiment, protocols)


def _scored(
    network: nn.Module,
    size: int,
    decoder: ImageDecoder,
    experiment: Experiment,
    protocols: Sequence[str],
) -> Scored:
    bank, test = load_splits(experiment, size, decoder)
    device = best_device()
    network = network.to(device)

    def features(split: Split) -> Features:
        h = extract_features(
            network, split.images, experiment.evaluation.batch_size, device, experiment.precision
        )
        return Features(h, split.labels)

    if test is None:
        row = score_features("", features(bank), None, experiment, ())
        return Scored(row.numbers(), {})
    bank, test = bank.labelled(), test.labelled()
    bank_features, test_features = features(bank), features(test)
    row = score_features("", bank_features, test_features, experiment, ())
    metrics, hits = row.numbers(), {}
    for metric, result in protocol_results(
        bank_features, test_features, experiment, protocols
    ).items():
        if isinstance(result, torch.Tensor):
            hits[metric] = test.ids.numpy(), result.cpu().numpy()
            metrics[metric] = float(result.double().mean())
        else:
            metrics[metric] = result
    return Scored(metrics, hits)


def standard_errors(one: Scored, other: Scored) -> dict[str, float]:
    """Return the standard error of the difference of each metric that counts images of both."""
    errors = {}
    for metric in one.hits.keys() & other.hits.keys():
        (ids, hits), (other_ids, other_hits) = one.hits[metric], other.hits[metric]
        _, own, theirs = np.intersect1d(ids, other_ids, return_indices=True)
        if len(own):
            errors[metric] = paired_bootstrap(hits[own], other_hits[theirs])
    return errors


def paired_bootstrap(one: Hits, other: Hits, resamples: int = RESAMPLES, seed: int = 0) -> float:
    """Return the standard error of mean(one) - mean(other) over the same N images.

    Images are drawn with replacement, each with what both said of it (Efron 1979). An image
    counts -1, 0 or 1, so that a draw of N of them is one of three numbers.

    Args:
        one: Whether each image was named rightly, [N].
        other: Likewise, of the same images.
        resamples: How often N images are drawn.
        seed: Of the draws.

    Example:
        >>> round(paired_bootstrap(np.array([1, 1, 0, 0], bool), np.array([0, 1, 0, 0], bool)), 2)
        0.22
    """
    difference = one.astype(np.int64) - other.astype(np.int64)
    shares = np.array([(difference == value).mean() for value in (-1, 0, 1)])
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(len(difference), shares, size=resamples)
    return float(((drawn[:, 2] - drawn[:, 0]) / len(difference)).std())


def table(names: Sequence[str], scored: Sequence[Scored]) -> list[list[str]]:
    """Return headings and rows of two encoders side by side, a metric a row."""
    one, other = scored
    errors: Mapping[str, float] = standard_errors(one, other)
    rows: list[list[Any]] = []
    for metric in one.metrics:
        if metric not in other.metrics:
            continue
        a, b = one.metrics[metric], other.metrics[metric]
        error = f"{errors[metric]:.4f}" if metric in errors else "-"
        rows.append([metric, f"{a:.4f}", f"{b:.4f}", f"{a - b:+.4f}", error])
    return [["metric", *names, "difference", "standard error"], *rows]
