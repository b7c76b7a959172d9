"""Neighbours of some images by their features, and confused classes, on a sample of the splits.

An impression and no score: the sample is small, so that a page is made in seconds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from simclr_ray.augment.decode import Pixels, shown_as_rgb
from simclr_ray.config.experiment import Experiment
from simclr_ray.data.aligned import align_labels
from simclr_ray.data.decoding import evaluation_decoder
from simclr_ray.data.description import class_name
from simclr_ray.data.source import Source
from simclr_ray.errors import DataError
from simclr_ray.evaluation.evaluate import probed_source
from simclr_ray.evaluation.features import Features, Split, extract_features, load_split
from simclr_ray.evaluation.knn import knn_scores, nearest
from simclr_ray.nn.precision import best_device
from simclr_ray.nn.pretrained import load_model

BANK_TIMES: Final = 4  # rows that neighbours come from, for each test image
QUERIES, NEIGHBOURS = 8, 8  # that are shown


class Neighbour(NamedTuple):
    """An image, of a query or near one.

    Attributes:
        pixels: uint8 [S, S, 3], the view that the encoder sees.
        name: Of its class, or its id.
        cosine: With the query; 1 of itself.
    """

    pixels: Pixels
    name: str
    cosine: float


class NeighbourSample(NamedTuple):
    """What features say of a sample.

    Attributes:
        rows: Of each query, itself and its nearest neighbours.
        confusion: int64 [K, K], true class by class of the k nearest neighbours; None: no labels.
        class_names: K of them.
        num_test: Images that queries are some of.
        num_bank: Images that neighbours come from.
        num_unseen: Labelled test images of classes that the bank has no image of; not counted.
    """

    rows: list[list[Neighbour]]
    confusion: npt.NDArray[np.int64] | None
    class_names: list[str]
    num_test: int
    num_bank: int
    num_unseen: int = 0


def sample_neighbours(
    experiment: Experiment, checkpoint: Path, num: int, device: torch.device | None = None
) -> NeighbourSample:
    """Return neighbours and confused classes by the encoder of a checkpoint.

    Args:
        experiment: Its splits and settings.
        checkpoint: The folder.
        num: Test images; four times as many are drawn of `eval_train` (or `train`) for neighbours.
        device: Of the encoder; the best there is where it is None.

    Raises:
        CheckpointError: The checkpoint is not whole.
        DataError: A split cannot be read.
    """
    bank_source, test_source, have_labels = _sources(experiment)
    decoder, size = evaluation_decoder(experiment.data), experiment.evaluation_size
    bank = load_split(bank_source, size, BANK_TIMES * num, decoder)
    test = load_split(test_source, size, num, decoder) if test_source else _first(bank, num)
    device = device or best_device()
    encoder = load_model(checkpoint).encoder.to(device)

    def features(split: Split) -> Features:
        rows = extract_features(
            encoder, split.images, experiment.evaluation.batch_size, device, experiment.precision
        )
        return Features(rows, split.labels, split.ids)

    bank_rows, rows = features(bank), features(test)
    names = [class_name(bank_source, c) for c in range(int(bank.labels.max()) + 1)]
    confusion, num_unseen = None, 0
    if have_labels:
        confusion, num_unseen = _confusion(experiment, bank_rows, rows, len(names))
    shown = torch.linspace(0, len(test.images) - 1, min(QUERIES, len(test.images))).long()
    is_among = test_source is None  # then an image is one of the bank, at the same place
    wanted = min(NEIGHBOURS + is_among, len(bank.images))
    cosines, places = nearest(bank_rows.rows, rows.at(shown).rows, wanted, device)
    lists = []
    for row, near, likeness in zip(shown.tolist(), places.tolist(), cosines.tolist(), strict=True):
        pairs = list(zip(near, likeness, strict=True))
        if is_among:  # a copy may come before the image itself
            pairs = [pair for pair in pairs if pair[0] != row][:NEIGHBOURS]
        first = _neighbour(test, row, 1.0, names if have_labels or not test_source else [])
        lists.append([first, *(_neighbour(bank, place, cosine, names) for place, cosine in pairs)])
    sizes = len(test.images), len(bank.images)
    return NeighbourSample(lists, confusion, names if have_labels else [], *sizes, num_unseen)


def _sources(experiment: Experiment) -> tuple[Source, Source | None, bool]:
    """Return where neighbours come from, what is asked about, and whether both have labels."""
    data, bank = experiment.data, probed_source(experiment.data)
    test = Source.open(data.test, data.columns) if data.test else None
    have_labels = bank.has_labels and test is not None and test.has_labels
    if have_labels and test is not None:
        try:
            bank, test = align_labels(bank, test)
        except DataError:  # of other classes: neighbours need none
            have_labels = False
    return bank, test, have_labels


def _first(split: Split, num: int) -> Split:
    return split.at(torch.arange(min(num, len(split.images))))


def _confusion(
    experiment: Experiment, bank: Features, test: Features, num_classes: int
) -> tuple[npt.NDArray[np.int64] | None, int]:
    """Return how often each class was taken for each, and how many images are of none in the bank.

    By the vote that evaluation takes. An image of a class that the sample of the bank lacks can be
    named wrongly only, so it says nothing.
    """
    bank, test = bank.labelled(), test.labelled()
    is_seen = torch.isin(test.labels, bank.labels)
    test, num_unseen = test.at(is_seen), int((~is_seen).sum())
    if not len(bank.labels) or not len(test.labels):
        return None, num_unseen
    knn = experiment.evaluation.knn
    votes = knn_scores(bank.rows, bank.labels, test.rows, knn.k, knn.temperature, num_classes)
    counts = np.zeros((num_classes, num_classes), np.int64)
    np.add.at(counts, (test.labels.numpy(), votes.argmax(1).cpu().numpy()), 1)
    return counts, num_unseen


def _neighbour(split: Split, row: int, cosine: float, names: list[str]) -> Neighbour:
    label = int(split.labels[row])
    name = names[label] if 0 <= label < len(names) else f"id {int(split.ids[row])}"
    return Neighbour(shown_as_rgb(split.images[row].permute(1, 2, 0).numpy()), name, cosine)
