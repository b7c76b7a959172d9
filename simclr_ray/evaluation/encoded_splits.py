"""The two splits of an experiment as features: each read and decoded once for all networks.

By this process, which holds the views of both splits; or by Ray Data's actors (`evaluation.actors`)
where these do not fit: from them only features come back.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import nn

from simclr_ray.augment.decode import ImageDecoder
from simclr_ray.config.experiment import Experiment
from simclr_ray.data.aligned import align_labels
from simclr_ray.data.decoding import evaluation_decoder
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
    if experiment.evaluation.actors:
        yield from _encoded_by_actors(experiment, networks, size, decoder)
        return
    bank, test = _loaded(experiment, size, decoder)
    device = best_device()
    for network in networks:
        yield encode(network.to(device), bank, test, experiment)


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


def _encoded_by_actors(
    experiment: Experiment, networks: Sequence[nn.Module], size: int, decoder: ImageDecoder
) -> Iterator[EncodedSplits]:
    """Yield the same, features made by Ray Data's actors; the cluster is up."""
    from simclr_ray.distributed.ray_cluster import connect  # Ray is loaded where it is used
    from simclr_ray.evaluation.ray_features import SplitFeatures, extract

    connect(experiment)
    bank, test, is_halved = _sources(experiment)

    def encoded(source: Source, limit: int) -> SplitFeatures:
        return extract(
            source,
            networks,
            size,
            experiment.evaluation,
            limit=limit,
            decoder=decoder,
            precision=experiment.precision,
        )

    of_bank = encoded(bank, 0 if test or is_halved else LABEL_FREE_ROWS)
    of_test = encoded(test, 0) if test else None
    for i in range(len(networks)):
        own = Features(of_bank.features[i], of_bank.labels, of_bank.ids)
        if is_halved:
            yield EncodedSplits(*split_halves(own))
        elif of_test is None:
            yield EncodedSplits(own, None)
        else:
            yield EncodedSplits(own, Features(of_test.features[i], of_test.labels, of_test.ids))


def _loaded(experiment: Experiment, size: int, decoder: ImageDecoder) -> tuple[Split, Split | None]:
    """Return what is learned from and what is scored; the second is None without labels."""
    bank, test, is_halved = _sources(experiment)
    if is_halved:
        return split_halves(load_split(bank, size, decoder=decoder))
    if test is None:
        return load_split(bank, size, LABEL_FREE_ROWS, decoder), None
    return load_split(bank, size, decoder=decoder), load_split(test, size, decoder=decoder)


def _sources(experiment: Experiment) -> tuple[Source, Source | None, bool]:
    """Return the bank and the test split; without labels, the training images and None.

    Where the test images alone have labels, the bank is all of them, to be halved.
    """
    data = experiment.data
    train = Source.open(data.train, data.columns, data.limit)
    bank = Source.open(data.eval_train, data.columns) if data.eval_train else train
    test = Source.open(data.test, data.columns) if data.test else None
    if test is None or not test.has_labels:
        if test is not None and bank.has_labels:
            log.warning("%s %s: scores are those without labels", test.uri, test.unlabelled)
        return train, None, False
    if not bank.has_labels:
        log.warning(
            "%s %s: scores are of one half of %s by the other (data.eval_train names labelled "
            "images to learn from)", bank.uri, bank.unlabelled, test.uri,
        )  # fmt: skip
        return test, None, True
    bank, test = align_labels(bank, test)
    return bank, test, False
