"""Metrics that need no labels: alignment, uniformity, effective rank, feature_std, pairs.

Alignment and uniformity: Wang & Isola 2020 (arXiv:2005.10242). Effective rank: RankMe, Garrido et
al. 2023 (arXiv:2210.02885). Feature_std: Chen & He 2021 (SimSiam, arXiv:2011.10566, §4.1).
All take features `[M, F]` of any float dtype, on any device, and return a Python number.
"""

from __future__ import annotations

import math
from typing import Final, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK_ROWS: Final = 2_048  # [2048, M] float64 distances at once
GRAM_COLUMNS: Final = 256
UNIFORMITY_T: Final = 2.0
RANK_EPSILON: Final = 1e-7  # RankMe eq. 1
TIE: Final = 1e-9  # of cosines in float64: nearer is no difference


class LabelFree(NamedTuple):
    """The metrics that one set of features gives by itself; None: it has too few rows."""

    uniformity: float | None
    effective_rank: float | None
    feature_std: float | None


def label_free(features: Tensor) -> LabelFree:
    """Return uniformity, effective rank and feature_std of `features [M, F]`; None if M < 2."""
    if len(features) < 2:
        return LabelFree(None, None, None)
    return LabelFree(uniformity(features), effective_rank(features), feature_std(features))


def alignment(a: Tensor, b: Tensor) -> float:
    """Return the mean squared distance of l2-normalised `a[i]` and `b[i]`, in [0, 4]; 0 is best.

    Args:
        a: features of one view of each image, `[M, F]`.
        b: features of the other view, `[M, F]`.

    Raises:
        ValueError: the shapes differ.
    """
    if a.shape != b.shape:
        raise ValueError(f"views differ in shape: {list(a.shape)} and {list(b.shape)}")
    difference = F.normalize(a.double(), dim=1) - F.normalize(b.double(), dim=1)
    return difference.square().sum(1).mean().item()


def uniformity(features: Tensor) -> float:
    """Return log of the mean of exp(-2·|x-y|²) over all pairs of rows, in [-8, 0]; low is even.

    Raises:
        ValueError: there are fewer than two rows.
    """
    num = len(features)
    if num < 2:
        raise ValueError(f"uniformity needs two rows or more, not {num}")
    x = F.normalize(features.double(), dim=1)
    within = across = 0.0  # blocks of rows, each pair of which is looked at once
    for start in range(0, num, BLOCK_ROWS):
        block, after = x[start : start + BLOCK_ROWS], x[start + BLOCK_ROWS :]
        within += _closeness(block, block) - len(block)  # less the rows with themselves
        across += _closeness(block, after)
    return math.log(max(within + 2 * across, 1e-300) / (num * (num - 1)))


def _closeness(a: Tensor, b: Tensor) -> float:
    """Return the sum of exp(-2·|x-y|²) over the rows x of `a` and y of `b`, all of length 1."""
    squared = (a @ b.T).mul_(-2).add_(2).clamp_(min=0)
    return squared.mul_(-UNIFORMITY_T).exp_().sum().item()


def effective_rank(features: Tensor) -> float:
    """Return exp of the entropy of the normalised singular values, in [1, min(M, F)].

    RankMe eq. 1. Singular values come from the smaller Gram matrix in float64, which costs M·F²
    and is exact to 1e-8 of the largest one, below the paper's ε. All-zero features have rank 1.
    """
    x = features.double()
    gram = _lower_gram(x.T if x.shape[1] <= x.shape[0] else x)
    singular = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()  # reads the lower triangle
    total = singular.sum()
    if total == 0:
        return 1.0
    p = singular / total + RANK_EPSILON
    return math.exp(-(p * p.log()).sum().item())


def _lower_gram(x: Tensor) -> Tensor:
    """Return the lower triangle of `x @ x.T`, by blocks of columns: half of the products."""
    gram = x.new_zeros(len(x), len(x))
    for first in range(0, len(x), GRAM_COLUMNS):
        block = slice(first, first + GRAM_COLUMNS)
        gram[first:, block] = x[first:] @ x[block].T
    return gram


def feature_std(features: Tensor) -> float:
    """Return the standard deviation of l2-normalised features, mean over F.

    About 1/√F for features that point everywhere alike, 0 for collapsed ones.
    """
    return F.normalize(features.double(), dim=1).std(0, correction=0).mean().item()


class PairScores(NamedTuple):
    """How two views of an image lie to each other, against those of other images."""

    margin: float  # mean cosine of the two views of an image, less that of other images' views
    top1: float  # share of views whose nearest among so many of the other kind is their partner


def pair_scores(a: Tensor, b: Tensor, choices: int) -> PairScores:
    """Return margin and top-1 of the pairs `a[i]`, `b[i]`.

    Args:
        a: features of one view of each image, `[M, F]`, M at least 2.
        b: features of the other view, `[M, F]`.
        choices: views among which a partner is picked, as in a batch of so many images; the last
            group has fewer, and one of a single row is left out.
    """
    a, b = F.normalize(a.double(), dim=1), F.normalize(b.double(), dim=1)
    num = len(a)
    positive = (a * b).sum().item()
    every = (a.sum(0) * b.sum(0)).sum().item()  # the sum over all pairs
    margin = positive / num - (every - positive) / (num * (num - 1))
    hits = rows = 0
    size = max(2, choices)
    for of_a, of_b in zip(torch.split(a, size), torch.split(b, size), strict=True):
        if len(of_a) > 1:
            partners = torch.arange(len(of_a), device=a.device)
            # of equal views none is found: argmax would always name the first
            similar = of_a @ of_b.T
            own = similar.diagonal().clone()
            similar[partners, partners] = -math.inf
            hits += int((own > similar.max(1).values + TIE).sum())
            rows += len(of_a)
    return PairScores(margin, hits / rows if rows else 0.0)
