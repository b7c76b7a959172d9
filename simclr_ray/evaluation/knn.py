"""Weighted cosine nearest neighbours: how well features tell classes apart, without training.

Instance discrimination (Wu et al. 2018, arXiv:1805.01978, §3.4): features are l2-normalised, the k
nearest rows of the bank vote for their class with weight exp(cos/τ). The usual k=200, τ=0.1.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor
from torch.nn import functional as F

from simclr_ray.evaluation.feature_file import FeatureRows

# Rows of one block of similarities: 1,024 x 16,384 float32 are 64 MiB, whatever the bank's size.
QUERY_ROWS: Final = 1_024
BANK_ROWS: Final = 16_384


def knn_scores(
    bank: FeatureRows,
    bank_labels: Tensor,
    queries: FeatureRows,
    k: int,
    temperature: float,
    num_classes: int,
    *,
    device: torch.device | str | None = None,
) -> Tensor:
    """Return the votes of each query's `k` nearest bank rows for each class, float32 `[Q, K]`.

    Weights are taken relative to the nearest neighbour's, so that a small τ cannot overflow: the
    nearest row has weight 1, and a query's order of classes is that of the plain weights.

    Args:
        bank: features `[M, F]`, M > 0, any float dtype; need not be normalised.
        bank_labels: int64 `[M]` in [0, num_classes).
        queries: features `[Q, F]`.
        k: neighbours that vote; all of the bank when it has fewer.
        temperature: τ > 0.
        num_classes: K.
        device: where it is computed and the result is; the bank's, or the CPU for one in a file.

    Raises:
        ValueError: the shapes do not fit, or a label lies outside [0, num_classes).
    """
    _check(bank, bank_labels, queries, num_classes)
    if k < 1 or temperature <= 0:
        raise ValueError(f"k must be at least 1 and temperature above 0, not {k} and {temperature}")
    k = min(k, len(bank))
    if device is None:
        device = bank.device if isinstance(bank, Tensor) else "cpu"
    cosines, rows = nearest(bank, queries, k, torch.device(device))  # [Q, k]
    weights = torch.exp((cosines - cosines[:, :1]) / temperature)
    votes = torch.zeros(len(queries), num_classes, device=device)
    return votes.scatter_add_(1, bank_labels.to(device)[rows], weights)


def top_k_accuracy(scores: Tensor, labels: Tensor, k: int = 1) -> float:
    """Return the share of rows that `top_k_hits` names, in [0, 1]. Raises as it does."""
    return top_k_hits(scores, labels, k).double().mean().item()


def top_k_hits(scores: Tensor, labels: Tensor, k: int = 1) -> Tensor:
    """Return whether each row's class is among the `k` highest of `scores [Q, K]`, bool `[Q]`.

    Of equal scores the lower class number counts as higher, so constant scores earn no more than
    chance. A row whose own score is not a number is a miss.

    Raises:
        ValueError: there are no rows, or the shapes do not fit.
    """
    if scores.ndim != 2 or labels.shape != scores.shape[:1] or not len(labels):
        raise ValueError(f"scores {list(scores.shape)} and labels {list(labels.shape)} do not fit")
    labels = labels.to(scores.device)
    own = scores.gather(1, labels[:, None])  # [Q, 1]
    classes = torch.arange(scores.shape[1], device=scores.device)
    ahead = (scores > own) | ((scores == own) & (classes < labels[:, None]))
    return (ahead.sum(1) < k) & own[:, 0].isfinite()


def nearest(
    bank: FeatureRows, queries: FeatureRows, k: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return cosine and row of the `k` nearest bank rows, nearest first; both `[Q, k]`.

    The bank is passed over once, however many queries there are: it may lie in a file.
    """
    best = torch.full((len(queries), k), -torch.inf, device=device)
    rows = torch.zeros(len(queries), k, dtype=torch.int64, device=device)
    for start in range(0, len(bank), BANK_ROWS):
        part = F.normalize(bank[start : start + BANK_ROWS].to(device).float(), dim=1)
        for first in range(0, len(queries), QUERY_ROWS):
            of_block = slice(first, first + QUERY_ROWS)
            block = F.normalize(queries[of_block].to(device).float(), dim=1)
            value, index = (block @ part.T).topk(min(k, len(part)), dim=1)
            both = torch.cat([best[of_block], value], 1)
            best[of_block], kept = both.topk(k, dim=1)
            rows[of_block] = torch.cat([rows[of_block], index + start], 1).gather(1, kept)
    return best, rows


def _check(bank: FeatureRows, labels: Tensor, queries: FeatureRows, num_classes: int) -> None:
    if len(bank.shape) != 2 or len(queries.shape) != 2 or bank.shape[1] != queries.shape[1]:
        raise ValueError(f"bank {list(bank.shape)} and queries {list(queries.shape)} do not fit")
    if not len(bank) or labels.shape != bank.shape[:1]:
        raise ValueError(f"bank has {len(bank)} rows and {len(labels)} labels")
    if labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(
            f"labels lie in [{labels.min().item()}, {labels.max().item()}], "
            f"outside [0, {num_classes})"
        )
