"""Evaluation while training: kNN where there are labels, and metrics without labels always.

Every rank encodes its share of a fixed sample and the features are gathered, so the cost is
shared and the scores are those of one process.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from simclr_ray.config.experiment import Experiment
from simclr_ray.data.aligned import align_labels
from simclr_ray.data.arrays import Int64s
from simclr_ray.data.batches import build_views
from simclr_ray.data.decoding import evaluation_decoder
from simclr_ray.data.source import Source
from simclr_ray.distributed import collectives
from simclr_ray.errors import DataError
from simclr_ray.evaluation.features import (
    Features,
    Split,
    decoded_rows,
    extract_features,
)
from simclr_ray.evaluation.label_free import (
    alignment,
    effective_rank,
    feature_std,
    pair_scores,
    uniformity,
)
from simclr_ray.evaluation.protocols import knn
from simclr_ray.evaluation.sampling import rows_of_ranks, sample_rows
from simclr_ray.evaluation.view_facts import view_facts, view_marks
from simclr_ray.nn.build import SimCLRModel

PROBE_IMAGES = 1024  # RankMe needs more rows than the rank it is to find
FAILED = -1  # in place of a rank's count of rows
PROBE_EPOCH = 2**32 - 1  # views of the probe never coincide with views of training


class _Part(NamedTuple):
    """This rank's share of a split, and the labels of all of it."""

    images: Tensor  # uint8 [m, C, S, S]
    labels: Tensor  # int64 [M]
    counts: list[int]  # m of each rank


class KnnFacts(NamedTuple):
    """What kNN scores by: a sample of a large set holds its classes as they fall."""

    knn_bank_rows: int
    knn_bank_classes: int
    knn_test_rows: int
    knn_missing_classes: int  # of the test images, without a row in the bank: never named

    @classmethod
    def of(cls, bank: Tensor, test: Tensor) -> KnnFacts:
        """Return them by the labels of both, int64 [M]."""
        there = set(bank.tolist())
        return cls(len(bank), len(there), len(test), len(set(test.tolist()) - there))


class OnlineRows(NamedTuple):
    """How many images all ranks together encode for an evaluation, each view counted."""

    label_free: int  # a sample, and both views of it
    knn: int  # the bank and the test images; 0 without labels


def encoded_rows(experiment: Experiment, source: Source) -> OnlineRows:
    """Return how many images an evaluation while training encodes.

    Args:
        experiment: Splits and limits.
        source: The training data.

    Raises:
        DataError: A split cannot be read.
    """
    data, limits = experiment.data, experiment.evaluation
    label_free = 3 * min(PROBE_IMAGES, source.num_rows)
    if not data.test:
        return OnlineRows(label_free, 0)
    test = Source.open(data.test, data.columns)
    bank = Source.open(data.eval_train, data.columns) if data.eval_train else source
    if not (test.has_labels and bank.has_labels):
        return OnlineRows(label_free, 0)
    limited = ((bank, limits.eval_train_limit), (test, limits.test_limit))
    return OnlineRows(label_free, sum(min(s.num_rows, most or s.num_rows) for s, most in limited))


class OnlineEvaluation:
    """Scores of a model in training; to make one is a collective.

    Args:
        experiment: Splits, limits and kNN settings.
        source: The training data.
        rank: This rank.
        num_ranks: R.
        device: Where models are evaluated, and through which ranks exchange.

    Raises:
        DataError: A split cannot be read, or no row of it can be evaluated.
    """

    def __init__(
        self,
        experiment: Experiment,
        source: Source,
        rank: int,
        num_ranks: int,
        device: torch.device,
    ) -> None:
        self.experiment, self.rank, self.num_ranks = experiment, rank, num_ranks
        self.device = device
        data, limits = experiment.data, experiment.evaluation
        self.bank: _Part | None = None
        if not limits.every_epochs:
            return
        own, self.probe = self._part(source, sample_rows(source, PROBE_IMAGES))
        views = build_views(experiment.augment, experiment.seed, data.channels)
        self.views = views(own.images, own.ids.numpy(), PROBE_EPOCH)
        if data.test:
            test = Source.open(data.test, data.columns)
            bank = Source.open(data.eval_train, data.columns) if data.eval_train else source
            if test.has_labels and bank.has_labels:
                bank, test = align_labels(bank, test)
                self.bank = self._labelled(bank, limits.eval_train_limit)
                self.test = self._labelled(test, limits.test_limit)

    def before_training(self, model: SimCLRModel) -> dict[str, float]:
        """Return what later scores are held against, and the facts of the views. Collective.

        Named `start/…`: the scores of the model as it begins, `ViewFacts`, and `KnnFacts`.
        """
        if not self.experiment.evaluation.every_epochs:
            return {}
        marks = view_marks(self.probe.images, self.views)
        gathered = collectives.all_gather_rows(
            marks.to(self.device), self.probe.counts
        ).cpu()  # [M, 3]
        facts = view_facts(gathered, self.experiment.batch_size)._asdict()
        scores = {key.partition("/")[2]: v for key, v in self._label_free(model).items()}
        if self.bank is not None:
            facts |= KnnFacts.of(self.bank.labels, self.test.labels)._asdict()
        return {f"start/{key}": value for key, value in {**scores, **facts}.items()}

    def __call__(self, model: SimCLRModel) -> dict[str, float]:
        """Return the scores by name, the same on every rank. Collective."""
        encoder, scores = model.encoder, self._label_free(model)
        if self.bank is not None:
            bank, test = (
                Features(self._features(encoder, part, part.images), part.labels)
                for part in (self.bank, self.test)
            )
            classes = int(torch.cat([bank.labels, test.labels]).max()) + 1
            hits = knn(bank, test, classes, self.experiment)
            scores["eval/knn_top1"] = hits.double().mean().item()
        return scores

    def _label_free(self, model: SimCLRModel) -> dict[str, float]:
        """Return the scores without labels. Collective."""
        encoder = model.encoder
        h = self._features(encoder, self.probe, self.probe.images)
        pair = [self._features(encoder, self.probe, view) for view in self.views]
        scores = {
            "eval/alignment": alignment(*pair),
            "eval/uniformity": uniformity(h),
            "eval/effective_rank": effective_rank(h),
            "eval/feature_std": feature_std(h),
            "eval/weight_norm": weight_norm(encoder),
        }
        if self.experiment.classifier is None and len(h) > 1:
            a, b = (project(model.head, part) for part in pair)
            pairs = pair_scores(a, b, self.experiment.batch_size)
            scores |= {
                "eval/effective_rank_z": effective_rank(a),
                "eval/feature_std_z": feature_std(a),
                "eval/margin": pairs.margin,
                "eval/pair_top1": pairs.top1,
            }
        return scores

    def _features(self, encoder: nn.Module, part: _Part, images: Tensor) -> Tensor:
        mine = extract_features(
            encoder,
            images,
            batch_size=self.experiment.evaluation.batch_size,
            device=self.device,
            precision=self.experiment.precision,
        )
        return collectives.all_gather_rows(mine.to(self.device), part.counts).cpu()  # [M, F]

    def _labelled(self, source: Source, limit: int) -> _Part:
        return self._part(source, sample_rows(source, limit), labelled=True)[1]

    def _part(self, source: Source, rows: Int64s, *, labelled: bool = False) -> tuple[Split, _Part]:
        """Return this rank's share of `rows`; no rank decodes another's. A collective."""
        mine = rows_of_ranks(source, rows, self.num_ranks)[self.rank]
        size, decoder = (
            self.experiment.evaluation_size, evaluation_decoder(self.experiment.data)
        )  # fmt: skip
        try:
            own = decoded_rows(source, mine, size, decoder)
            own = own.labelled() if labelled else own
        except DataError:
            collectives.row_counts(FAILED, self.device)  # the other ranks would wait for this one
            raise
        counts = collectives.row_counts(len(own.images), self.device)
        if FAILED in counts:
            raise DataError(f"{source.shown_uri} cannot be read by rank {counts.index(FAILED)}")
        if not any(counts):
            reasons = [row.reason for row in own.bad] or ["no row has a label"]
            raise DataError(f"{source.shown_uri}: no row can be evaluated: {reasons[0]}")
        labels = collectives.all_gather_rows(own.labels.to(self.device), counts).cpu()
        return own, _Part(own.images, labels, counts)


@torch.no_grad()
def project(head: nn.Module, h: Tensor) -> Tensor:
    """Return z `[M, D]` of features `[M, F]`, float32 on the CPU, by a head in eval mode."""
    first = next(head.parameters(), h)
    modes = [(module, module.training) for module in head.modules()]
    head.eval()
    try:
        z: Tensor = head(h.to(first.device, first.dtype))
    finally:
        for module, training in modes:
            module.training = training
    return z.float().cpu()


@torch.no_grad()
def weight_norm(module: nn.Module) -> float:
    """Return the length of a module's matrices and kernels, all as one vector.

    Scales and shifts are left out, as by weight decay.
    """
    squares = [p.double().square().sum() for p in module.parameters() if p.ndim > 1]
    return float(torch.stack(squares).sum().sqrt()) if squares else 0.0
