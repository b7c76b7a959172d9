"""The two splits of an experiment as features: each read and decoded once for all networks.

By this process, which holds the views of both splits; or by Ray Data's actors where these are many
(`evaluation.actors`): from them only features come back.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

import torch
from torch import nn

from simclr_ray.augment.decode import ImageDecoder
from simclr_ray.config.experiment import Experiment
from simclr_ray.config.logging import warn_once
from simclr_ray.config.schema import AUTO
from simclr_ray.data.aligned import align_labels
from simclr_ray.data.decoding import evaluation_decoder
from simclr_ray.data.row_reader import UnusableRow
from simclr_ray.data.source import Source
from simclr_ray.evaluation.features import (
    Features,
    Split,
    extract_features,
    load_split,
    split_halves,
)
from simclr_ray.evaluation.scores import LABEL_FREE_ROWS, scorable
from simclr_ray.nn.precision import best_device

if TYPE_CHECKING:
    from simclr_ray.evaluation.ray_features import SplitFeatures

VIEWS_BYTES: Final = 2**30  # of decoded views in this process, where nobody says how many

log = logging.getLogger(__name__)


class EncodedSplits(NamedTuple):
    """What one network makes of the splits.

    Attributes:
        bank: What is learned from; without `test`, what label-free metrics see.
        test: What is scored; None without labels.
    """

    bank: Features
    test: Features | None


def encode_splits(
    experiment: Experiment,
    networks: Sequence[nn.Module],
    size: int = 0,
    decoder: ImageDecoder | None = None,
) -> Iterator[EncodedSplits]:
    """Yield what each network makes of the splits of an experiment, one after the other.

    Args:
        experiment: Its splits, precision, batch size and actors.
        networks: `[m, C, S, S]` in [0, 1] -> `[m, F]`; with actors, they pickle.
        size: Side S of the views in pixels; 0: the experiment's.
        decoder: Of the images; None: the experiment's.

    Raises:
        ClusterError: `evaluation.actors` ask for more than the cluster has.
        DataError: A split cannot be read.
    """
    size = size or experiment.evaluation_size
    decoder = decoder or evaluation_decoder(experiment.data)
    sources = _sources(experiment)
    if _takes_actors(experiment, sources, size):
        yield from _encoded_by_actors(experiment, sources, networks, size, decoder)
        return
    bank, test = _loaded(sources, size, decoder)
    device = best_device()
    for network in networks:
        yield encode(network.to(device), bank, test, experiment)


def decode_splits(experiment: Experiment) -> None:
    """Decode the splits of an experiment, for a process that keeps them (`DECODED`).

    Raises:
        DataError: A split cannot be read.
    """
    _loaded(_sources(experiment), experiment.evaluation_size, evaluation_decoder(experiment.data))


def encode(
    network: nn.Module, bank: Split, test: Split | None, experiment: Experiment
) -> EncodedSplits:
    """Return what a network makes of decoded splits, on the device where its weights are.

    Where there is a test split, of labelled rows alone.

    Raises:
        DataError: There is a test split, and one of the two has no labelled rows.
    """
    device = next((p.device for p in network.parameters()), torch.device("cpu"))

    def features(split: Split) -> Features:
        h = extract_features(
            network, split.images, experiment.evaluation.batch_size, device, experiment.precision
        )
        return Features(h, split.labels, split.ids)

    bank, test = scorable(bank, test)
    return EncodedSplits(features(bank), None if test is None else features(test))


def first_splits(experiment: Experiment, num: int) -> tuple[Split, Split | None]:
    """Return some labelled views of what an experiment learns from and is asked about, decoded.

    At most `num` of each, the second None without labels.

    Raises:
        DataError: A split cannot be read, or has none.
    """
    size, decoder = experiment.evaluation_size, evaluation_decoder(experiment.data)
    return scorable(*_loaded(_sources(experiment), size, decoder, num))


class EvaluatedRows(NamedTuple):
    """How many rows of the splits are encoded, and by whom.

    Attributes:
        num: Rows of both.
        by_actors: Whether by actors, and not by this process.
        actors: Their number; 0: one a device of the cluster.
    """

    num: int
    by_actors: bool
    actors: int


def evaluated_rows(experiment: Experiment, train: Source | None = None) -> EvaluatedRows:
    """Return how many rows of the splits of an experiment are encoded after training.

    Args:
        experiment: Its splits and actors.
        train: Its training images, where they are open already.

    Raises:
        DataError: A split cannot be read.
    """
    sources = _chosen(experiment, train)  # reads footers alone, where `_sources` reads labels
    by_actors = _takes_actors(experiment, sources, experiment.evaluation_size)
    return EvaluatedRows(sources.num_rows, by_actors, experiment.evaluation.num_actors)


def encode_split(
    source: Source, network: nn.Module, experiment: Experiment
) -> tuple[Features, list[UnusableRow]]:
    """Return what a network makes of the labelled rows of a split, and the rows that are no images.

    Args:
        source: The opened split.
        network: `[m, C, S, S]` in [0, 1] -> `[m, F]`; with actors, it pickles.
        experiment: Precision, views, batch size and actors.

    Raises:
        ClusterError: `evaluation.actors` ask for more than the cluster has.
        DataError: The split cannot be read, or none of its rows is an image.
    """
    size, decoder = experiment.evaluation_size, evaluation_decoder(experiment.data)
    if _takes_actors(experiment, _Sources(source, None, is_halved=True), size):
        of = _extracted(experiment, source, [network], size, decoder, labelled=True)
        return Features(of.features[0], of.labels, of.ids), of.bad
    split = load_split(source, size, decoder=decoder)
    own, device = split.labelled(), best_device()
    h = extract_features(
        network.to(device), own.images, experiment.evaluation.batch_size, device,
        experiment.precision,
    )  # fmt: skip
    return Features(h, own.labels, own.ids), split.bad


def _takes_actors(experiment: Experiment, sources: _Sources, size: int) -> bool:
    if experiment.evaluation.actors == AUTO:
        return experiment.data.channels * size**2 * sources.num_rows > VIEWS_BYTES
    return experiment.evaluation.num_actors > 0


def _extracted(
    experiment: Experiment,
    source: Source,
    networks: Sequence[nn.Module],
    size: int,
    decoder: ImageDecoder,
    *,
    limit: int = 0,
    labelled: bool = False,
) -> SplitFeatures:
    """Return what Ray Data's actors make of a split; the cluster is started where there is none."""
    from simclr_ray.distributed.ray_cluster import connect  # Ray is loaded where it is used
    from simclr_ray.evaluation.ray_features import extract

    connect(experiment)
    return extract(
        source,
        networks,
        size,
        experiment.evaluation,
        limit=limit,
        labelled=labelled,
        decoder=decoder,
        precision=experiment.precision,
        label_selector=experiment.scaling.worker_selector,
    )


def _encoded_by_actors(
    experiment: Experiment,
    sources: _Sources,
    networks: Sequence[nn.Module],
    size: int,
    decoder: ImageDecoder,
) -> Iterator[EncodedSplits]:
    """Yield the same, features made by Ray Data's actors."""
    bank, test, is_halved = sources
    labelled = test is not None or is_halved
    of_bank = _extracted(
        experiment, bank, networks, size, decoder, limit=sources.limit, labelled=labelled
    )
    of_test = _extracted(experiment, test, networks, size, decoder, labelled=True) if test else None
    for i in range(len(networks)):
        own = Features(of_bank.features[i], of_bank.labels, of_bank.ids)
        if is_halved:
            yield EncodedSplits(*split_halves(own))
        elif of_test is None:
            yield EncodedSplits(own, None)
        else:
            yield EncodedSplits(own, Features(of_test.features[i], of_test.labels, of_test.ids))


def _loaded(
    sources: _Sources, size: int, decoder: ImageDecoder, most: int = 0
) -> tuple[Split, Split | None]:
    """Return what is learned from and what is scored; the second is None without labels.

    At most `most` rows of each; 0: all.
    """
    bank = load_split(
        sources.bank, size, min(filter(None, (most, sources.limit)), default=0), decoder
    )
    if sources.is_halved:
        return split_halves(bank)
    return bank, load_split(sources.test, size, most, decoder) if sources.test else None


class _Sources(NamedTuple):
    """What is learned from and what is scored.

    Attributes:
        bank: Without labels, the training images.
        test: None without labels, or where the bank is halved.
        is_halved: The test images alone have labels: the bank is all of them.
    """

    bank: Source
    test: Source | None
    is_halved: bool = False

    @property
    def limit(self) -> int:
        """Return how many rows of the bank are taken at most; 0: all."""
        return LABEL_FREE_ROWS if self.test is None and not self.is_halved else 0

    @property
    def num_rows(self) -> int:
        """Return the rows of both that are taken."""
        bank = min(self.bank.num_rows, self.limit or self.bank.num_rows)
        return bank + (self.test.num_rows if self.test else 0)


def _sources(experiment: Experiment) -> _Sources:
    """Return the splits of an experiment, their labels in one numbering."""
    sources = _chosen(experiment)
    if sources.test is None:
        return sources
    bank, test = align_labels(sources.bank, sources.test)
    return _Sources(bank, test)


def _chosen(experiment: Experiment, train: Source | None = None) -> _Sources:
    """Return the splits of an experiment, each with the labels that it has."""
    data = experiment.data
    train = train or Source.open(data.train, data.columns, data.limit)
    bank = Source.open(data.eval_train, data.columns) if data.eval_train else train
    test = Source.open(data.test, data.columns) if data.test else None
    if test is None or not test.has_labels:
        if test is not None and bank.has_labels:
            warn_once(log, f"{test.shown_uri} {test.unlabelled}: scores are those without labels")
        return _Sources(train, None)
    if not bank.has_labels:
        warn_once(
            log,
            f"{bank.shown_uri} {bank.unlabelled}: scores are of one half of {test.shown_uri} by "
            "the other (data.eval_train names labelled images to learn from)",
        )
        return _Sources(test, None, is_halved=True)
    return _Sources(bank, test)
