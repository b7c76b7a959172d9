"""The evaluation protocols of `config.protocols`, one function each, all of one form.

A protocol is called with features of two labelled splits, what it learns from and what it is asked
about; K, the classes of both; and the experiment, for its settings and seed. It returns which test
rows it names rightly, bool [Q], or their share alone.
"""

from __future__ import annotations

from typing import Final

from torch import Tensor

from simclr_ray.config.experiment import Experiment
from simclr_ray.errors import DataError
from simclr_ray.evaluation.features import Features
from simclr_ray.evaluation.knn import knn_scores, top_k_hits
from simclr_ray.evaluation.linear import fit_linear
from simclr_ray.evaluation.logistic_regression import sweep_logistic_regression
from simclr_ray.nn.precision import best_device

SOLO_K: Final = 20
SOLO_TEMPERATURE: Final = 0.07


def knn(bank: Features, test: Features, num_classes: int, experiment: Experiment) -> Tensor:
    """Return the hits of weighted cosine kNN by `evaluation.knn`, bool [Q]."""
    settings = experiment.evaluation.knn
    return _nearest(bank, test, num_classes, settings.k, settings.temperature)


def knn_k20(bank: Features, test: Features, num_classes: int, experiment: Experiment) -> Tensor:  # noqa: ARG001 - has no settings
    """Return the hits of kNN with solo-learn's k and temperature, bool [Q]."""
    return _nearest(bank, test, num_classes, SOLO_K, SOLO_TEMPERATURE)


def knn_k1(bank: Features, test: Features, num_classes: int, experiment: Experiment) -> Tensor:  # noqa: ARG001 - has no settings
    """Return the hits of the one nearest neighbour, bool [Q]."""
    return _nearest(bank, test, num_classes, 1, 1.0)


def linear(bank: Features, test: Features, num_classes: int, experiment: Experiment) -> Tensor:
    """Return the hits of the linear probe by `evaluation.linear`, bool [Q]."""
    settings, seed = experiment.evaluation.linear, experiment.seed
    device = best_device()
    probe = fit_linear(bank.rows, bank.labels, num_classes, settings, seed, device)
    return top_k_hits(probe.logits(test.rows), test.labels).cpu()


def logistic_regression(
    bank: Features, test: Features, num_classes: int, experiment: Experiment
) -> Tensor:
    """Return the hits of logistic regression by L-BFGS, bool [Q].

    Its penalty is chosen on rows held out of the bank.

    Raises:
        DataError: There are too few rows to hold some out.
    """
    if not isinstance(bank.rows, Tensor):
        raise DataError(
            f"logistic_regression takes all features into memory, and {len(bank.rows):,} of "
            f"{bank.rows.shape[1]:,} numbers are too many; `linear` takes any number"
        )
    try:
        chosen = sweep_logistic_regression(bank.rows, bank.labels, num_classes, experiment.seed)
    except ValueError as error:
        raise DataError(f"logistic_regression: {error}") from error
    return top_k_hits(chosen.probe.logits(test.rows), test.labels)


def _nearest(
    bank: Features, test: Features, num_classes: int, k: int, temperature: float
) -> Tensor:
    votes = knn_scores(
        bank.rows, bank.labels, test.rows, k, temperature, num_classes, device=best_device()
    )
    return top_k_hits(votes, test.labels).cpu()
