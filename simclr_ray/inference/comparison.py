"""Two encoders on the same images: their scores, and how sure the difference is."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from simclr_ray.augment.decode import ImageDecoder
from simclr_ray.config.experiment import Experiment
from simclr_ray.config.protocols import DEFAULT_PROTOCOLS
from simclr_ray.config.wording import counted
from simclr_ray.data.aligned import labels_for_classifier
from simclr_ray.data.classes import SHOWN
from simclr_ray.data.source import Source
from simclr_ray.evaluation.encoded_splits import EncodedSplits, encode_splits
from simclr_ray.evaluation.feature_file import FeatureRows, blocks
from simclr_ray.evaluation.features import Features
from simclr_ray.evaluation.scores import CLASSIFIER_TOP1, protocol_results, score_features
from simclr_ray.inference.encoder import Classifier, Encoder
from simclr_ray.inference.requirement import NOTHING
from simclr_ray.nn.precision import evaluating

log = logging.getLogger(__name__)

RESAMPLES: Final = 2_000
Hits = npt.NDArray[np.bool_]


class EncoderScores(NamedTuple):
    """What an encoder reaches.

    Attributes:
        metrics: Name -> value.
        hits: Of metrics that count images: id -> whether it was named rightly, as two arrays.
        absent: Metric that it cannot have -> why.
    """

    metrics: dict[str, float]
    hits: dict[str, tuple[npt.NDArray[np.int64], Hits]]
    absent: Mapping[str, str] = NOTHING


class Contender(NamedTuple):
    """A network that is scored on the views that its encoder sees.

    Attributes:
        name: What messages call it.
        network: `[m, C, S, S]` in [0, 1] -> `[m, F]`.
        size: Side S of its views in pixels.
        decoder: Of its images.
        classifier: That was fine-tuned on it; None: there is none.
    """

    name: str
    network: nn.Module
    size: int
    decoder: ImageDecoder
    classifier: Classifier | None = None

    @classmethod
    def of(cls, name: str, encoder: Encoder) -> Contender:
        """Return what is scored of an encoder."""
        classifier = encoder if isinstance(encoder, Classifier) else None
        return cls(name, encoder.network, encoder.size, encoder.decoder, classifier)


def score_all(
    contenders: Sequence[Contender],
    experiment: Experiment,
    protocols: Sequence[str] = DEFAULT_PROTOCOLS,
) -> list[EncoderScores]:
    """Return the scores of networks by the splits of an experiment, in their order.

    A split is read once for all that share size and decoder of the views; with `evaluation.actors`
    by these, so that it need not fit this process.

    Raises:
        ClusterError: `evaluation.actors` ask for more than the cluster has.
        DataError: A split cannot be read.
        DivergedError: A network gives values that are no numbers.
    """
    groups: dict[tuple[int, ImageDecoder], list[int]] = {}
    for place, contender in enumerate(contenders):
        groups.setdefault((contender.size, contender.decoder), []).append(place)
    scored = {}
    for (size, decoder), places in groups.items():
        networks = [contenders[place].network for place in places]
        encoded = encode_splits(experiment, networks, size, decoder)
        for place, splits in zip(places, encoded, strict=True):
            scored[place] = _scored(contenders[place], splits, experiment, protocols)
    return [scored[place] for place in range(len(contenders))]


def _scored(
    contender: Contender, splits: EncodedSplits, experiment: Experiment, protocols: Sequence[str]
) -> EncoderScores:
    metrics = score_features(contender.name, *splits, experiment, ()).numbers()
    absent = NOTHING if contender.classifier else {CLASSIFIER_TOP1: "has no classifier"}
    if splits.test is None:
        return EncoderScores(metrics, {}, absent)
    bank, test = splits.bank.labelled(), splits.test.labelled()
    assert test.ids is not None
    ids, hits = test.ids.numpy(), {}
    results = protocol_results(bank, test, experiment, protocols)
    if contender.classifier:
        results[CLASSIFIER_TOP1] = _classifier_hits(contender, test, experiment)
    for metric, result in results.items():
        if isinstance(result, Tensor):
            hits[metric] = ids, result.cpu().numpy()
            metrics[metric] = float(result.double().mean())
        else:
            metrics[metric] = result
    return EncoderScores(metrics, hits, absent)


def _classifier_hits(contender: Contender, test: Features, experiment: Experiment) -> Tensor:
    """Return which labelled rows of `data.test` a contender's classifier names rightly, bool [Q].

    What is of a class that it does not have is none of them, and that is said.
    """
    classifier, data = contender.classifier, experiment.data
    assert classifier is not None
    assert test.ids is not None
    source = Source.open(data.test, data.columns)  # with the labels of the images' own numbering
    labels, missing = labels_for_classifier(source, classifier.class_names)
    ids = source.ids()
    rows = np.argsort(ids)
    truth = torch.from_numpy(labels[rows[np.searchsorted(ids[rows], test.ids.numpy())]])
    if missing:
        log.warning(
            "%s: %d of %s are of classes that its classifier does not have and count as wrong: %s",
            contender.name, int((truth < 0).sum()), counted(len(truth), "test image"),
            ", ".join(missing[:SHOWN]) + (", …" if len(missing) > SHOWN else ""),
        )  # fmt: skip
    return _predicted(classifier.head, test.rows, experiment.evaluation.batch_size) == truth


@torch.inference_mode()
def _predicted(head: nn.Module, h: FeatureRows, batch_size: int) -> Tensor:
    """Return the class with the highest score for each of `h` [Q, F], int64 [Q], on the CPU."""
    like = next(head.parameters(), torch.empty(0))
    with evaluating(head):
        return torch.cat(
            [
                head(part.to(like.device, like.dtype)).argmax(1).cpu()  # of [m, K]
                for block in blocks(h)
                for part in torch.split(block, batch_size)
            ]
        )


def standard_errors(one: EncoderScores, other: EncoderScores) -> dict[str, float]:
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


def table(names: Sequence[str], scored: Sequence[EncoderScores]) -> list[list[str]]:
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
