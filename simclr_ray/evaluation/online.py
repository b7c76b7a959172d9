"""Evaluation while training: kNN where there are labels, and metrics without labels always.

Every rank encodes its share of a fixed sample and the features are gathered, so the cost is
shared and the scores are those of one process.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from simclr_ray.config.experiment import Experiment
from simclr_ray.data.batches import build_views
from simclr_ray.data.source import Source
from simclr_ray.distributed import collectives as dist
from simclr_ray.evaluation.features import extract_features, load_split
from simclr_ray.evaluation.knn import knn_scores, top_k_accuracy
from simclr_ray.evaluation.label_free import alignment, effective_rank, uniformity
from simclr_ray.nn.build import SimCLRModel

PROBE_IMAGES = 1024  # RankMe needs more rows than the rank it is to find
PROBE_EPOCH = 2**32 - 1  # views of the probe never coincide with views of training


class _Part(NamedTuple):
    """This rank's share of a split, and the labels of all of it."""

    images: Tensor  # uint8 [m, 3, S, S]
    labels: Tensor  # int64 [M]
    counts: list[int]  # m of each rank


class OnlineEvaluation:
    """Scores of a model in training.

    Args:
        experiment: Splits, limits and kNN settings.
        source: The training data.
        rank: This rank.
        num_ranks: R.
    """

    def __init__(self, experiment: Experiment, source: Source, rank: int, num_ranks: int) -> None:
        self.experiment, self.rank, self.num_ranks = experiment, rank, num_ranks
        data, limits = experiment.data, experiment.evaluation
        self.bank: _Part | None = None
        if not limits.every_epochs:
            return
        probe = load_split(source, experiment.evaluation_size, PROBE_IMAGES, data.max_pixels)
        self.probe = self._part(probe.images, probe.ids)
        first, last = dist.partition(len(probe.images), rank, num_ranks)
        views = build_views(experiment.augment, experiment.seed)
        self.views = views(self.probe.images, probe.ids[first:last].numpy(), PROBE_EPOCH)
        if data.test:
            test = Source.open(data.test, data.columns)
            bank = Source.open(data.eval_train, data.columns) if data.eval_train else source
            if test.has_labels and bank.has_labels:
                self.bank = self._split(bank, limits.eval_train_limit)
                self.test = self._split(test, limits.test_limit)

    def __call__(self, model: SimCLRModel, device: torch.device) -> dict[str, float]:
        """Return the scores by name, the same on every rank. Collective."""
        encoder = model.encoder
        h = self._features(encoder, self.probe, self.probe.images, device)
        pair = [self._features(encoder, self.probe, view, device) for view in self.views]
        scores = {
            "eval/alignment": alignment(*pair),
            "eval/uniformity": uniformity(h),
            "eval/effective_rank": effective_rank(h),
        }
        if self.bank is not None:
            bank, test = (
                self._features(encoder, part, part.images, device)
                for part in (self.bank, self.test)
            )
            knn = self.experiment.evaluation.knn
            classes = int(torch.cat([self.bank.labels, self.test.labels]).max()) + 1
            votes = knn_scores(bank, self.bank.labels, test, knn.k, knn.temperature, classes)
            scores["eval/knn_top1"] = top_k_accuracy(votes, self.test.labels)
        return scores

    def _features(
        self, encoder: nn.Module, part: _Part, images: Tensor, device: torch.device
    ) -> Tensor:
        mine = extract_features(
            encoder,
            images,
            batch_size=self.experiment.evaluation.batch_size,
            device=device,
            precision=self.experiment.precision,
        )
        return dist.all_gather_rows(mine.to(device), part.counts).cpu()  # [M, F]

    def _split(self, source: Source, limit: int) -> _Part:
        split = load_split(
            source, self.experiment.evaluation_size, limit, self.experiment.data.max_pixels
        )
        labelled = split.labels >= 0
        return self._part(split.images[labelled], split.labels[labelled])

    def _part(self, images: Tensor, labels: Tensor) -> _Part:
        shares = [dist.partition(len(images), r, self.num_ranks) for r in range(self.num_ranks)]
        first, last = shares[self.rank]
        return _Part(images[first:last], labels, [b - a for a, b in shares])
