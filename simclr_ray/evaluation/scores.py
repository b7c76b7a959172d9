"""The score table: every row by the same code, so that the baselines are honest.

An encoder's features and raw pixels go through one function: kNN and the linear probe where both
splits have labels, and what needs no labels always. Shares lie in [0, 1].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from simclr_ray.config.experiment import Experiment
from simclr_ray.errors import DataError, DivergedError
from simclr_ray.evaluation.features import Split, extract_features
from simclr_ray.evaluation.knn import knn_scores, top_k_accuracy
from simclr_ray.evaluation.label_free import label_free
from simclr_ray.evaluation.linear import fit_linear
from simclr_ray.evaluation.logistic_regression import sweep_logistic_regression

DEFAULT_PROTOCOLS: Final = ("knn", "linear")
# Peers' kNN: solo-learn's is k=20, τ=0.07; `knn_k1` is the nearest neighbour, unweighted. `knn` is
# by default that of InstDisc and lightly, k=200 and τ=0.1.
PROTOCOLS: Final = (*DEFAULT_PROTOCOLS, "logistic_regression", "knn_k20", "knn_k1")
SOLO_K, SOLO_TEMPERATURE = 20, 0.07
COLUMNS: Final = (
    "features", "kNN top-1", "linear top-1", "L-BFGS top-1", "kNN (k=20) top-1", "1-NN top-1",
    "uniformity", "effective rank", "feature std",
)  # fmt: skip
NUM_ACCURACIES: Final = len(PROTOCOLS)  # columns after the first
LABEL_FREE_ROWS: Final = 5_000  # uniformity costs their square
PIXELS: Final = "raw pixels"
PIXEL_SIDE_PX: Final = 32  # raw pixels of larger views are averaged down: 3,072 features at most
PIXEL_BLOCK_ROWS: Final = 4_096


class Features(NamedTuple):
    """A split as features."""

    rows: Tensor  # float32 [M, F]
    labels: Tensor  # int64 [M], -1 where there is none

    def labelled(self) -> Features:
        """Return the rows that have a label."""
        kept = self.labels >= 0
        return self if kept.all() else Features(self.rows[kept], self.labels[kept])


SplitT = TypeVar("SplitT", Split, Features)


class Score(NamedTuple):
    """One row of the table; `None` where a protocol was not asked for or has no labels."""

    name: str
    knn_top1: float | None
    linear_top1: float | None
    uniformity: float
    effective_rank: float
    feature_std: float
    logistic_regression_top1: float | None = None
    knn_k20_top1: float | None = None
    knn_k1_top1: float | None = None


def score_encoder(
    name: str,
    encoder: nn.Module,
    bank: Split,
    test: Split | None,
    experiment: Experiment,
    protocols: Sequence[str] = DEFAULT_PROTOCOLS,
) -> Score:
    """Return the scores of a frozen encoder, on the device where its weights are.

    Args:
        name: what the row is called.
        encoder: `[m, 3, S, S]` in [0, 1] -> `[m, F]`.
        bank: what kNN and the probe learn from; without `test`, what label-free metrics see.
        test: what is scored, label-free metrics included.
        experiment: settings of the protocols, the precision, and the probe's seed.
        protocols: of `PROTOCOLS`.

    Raises:
        DataError: a protocol was asked for and a split has no labels.
        DivergedError: the encoder gives values that are no numbers.
    """
    device = next((p.device for p in encoder.parameters()), torch.device("cpu"))

    def features(split: Split | None) -> Features | None:
        if split is None:
            return None
        h = extract_features(
            encoder, split.images, experiment.evaluation.batch_size, device, experiment.precision
        )
        return Features(h, split.labels)

    bank, test = _scorable(bank, test)
    known = features(bank)
    assert known is not None
    return score_features(name, known, features(test), experiment, protocols)


def score_pixels(
    bank: Split,
    test: Split | None,
    experiment: Experiment,
    protocols: Sequence[str] = DEFAULT_PROTOCOLS,
) -> Score:
    """Return the scores of the pixels themselves; arguments and `DataError` as above."""
    bank, test = _scorable(bank, test)
    known = Features(pixels_of(bank.images), bank.labels)
    asked = None if test is None else Features(pixels_of(test.images), test.labels)
    return score_features(PIXELS, known, asked, experiment, protocols)


def score_features(
    name: str,
    bank: Features,
    test: Features | None,
    experiment: Experiment,
    protocols: Sequence[str] = DEFAULT_PROTOCOLS,
) -> Score:
    """Return the scores of features. Same as `score_encoder`, from features on."""
    for part in (bank, test):
        if part is not None and not torch.isfinite(part.rows).all():
            raise DivergedError(
                f"{name} gives values that are no numbers: the training has diverged"
            )
    if test is None:
        return _score(name, bank.rows)
    bank, test = _scorable(bank, test)
    assert test is not None
    return _evaluate(name, bank, test, experiment, protocols)


def _scorable(bank: SplitT, test: SplitT | None) -> tuple[SplitT, SplitT | None]:
    """Return the labelled rows of both splits, or the bank whole when there is nothing to score."""
    if test is None:
        return bank, None
    bank, test = bank.labelled(), test.labelled()
    for kind, part in (("eval_train", bank), ("test", test)):
        if not len(part.labels):
            raise DataError(f"the {kind} split has no labelled rows; nothing can be scored on it")
    return bank, test


class Pixels(nn.Module):
    """The pixels themselves, as an encoder: `[m, 3, S, S]` in [0, 1] -> `[m, 3·min(S, 32)²]`."""

    def forward(self, images: Tensor) -> Tensor:
        """Return the pixels, larger images averaged down."""
        side = min(images.shape[-1], PIXEL_SIDE_PX)
        return F.adaptive_avg_pool2d(images, side).flatten(1)


def pixels_of(images: Tensor) -> Tensor:
    """Return uint8 `[M, 3, S, S]` as features in [0, 1], float32 `[M, 3·min(S, 32)²]`."""
    side = min(images.shape[-1], PIXEL_SIDE_PX)
    pixels = torch.empty(len(images), 3 * side**2)
    for start in range(0, len(images), PIXEL_BLOCK_ROWS):
        part = images[start : start + PIXEL_BLOCK_ROWS].float() / 255
        pixels[start : start + len(part)] = Pixels()(part)
    return pixels


def cells(score: Score) -> list[str]:
    """Return a row of the table as text, one cell for each of `COLUMNS`."""
    accuracies = (
        score.knn_top1,
        score.linear_top1,
        score.logistic_regression_top1,
        score.knn_k20_top1,
        score.knn_k1_top1,
    )
    shares = ["-" if a is None else f"{100 * a:.1f} %" for a in accuracies]
    return [
        score.name,
        *shares,
        f"{score.uniformity:.2f}",
        f"{score.effective_rank:.1f}",
        f"{score.feature_std:.4f}",
    ]


def format_table(scores: Sequence[Score]) -> str:
    """Return the table as aligned Markdown, which reads well in a terminal too."""
    shown = shown_columns(scores)
    rows = [[row[i] for i in shown] for row in (list(COLUMNS), *map(cells, scores))]
    widths = [max(len(row[i]) for row in rows) for i in range(len(shown))]
    lines = [_line(row, widths) for row in rows]
    rule = [":" + "-" * (w - 1) if i == 0 else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    lines.insert(1, _line(rule, widths))
    return "\n".join(lines) + "\n"


def shown_columns(scores: Sequence[Score]) -> list[int]:
    """Return the places in `COLUMNS` that hold anything, those of the usual protocols always."""
    rows = [cells(score) for score in scores]
    return [
        i
        for i in range(len(COLUMNS))
        if not len(DEFAULT_PROTOCOLS) < i <= NUM_ACCURACIES or any(row[i] != "-" for row in rows)
    ]


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    first = row[0].ljust(widths[0])
    rest = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
    return "| " + " | ".join([first, *rest]) + " |"


def _evaluate(
    name: str,
    bank: Features,
    test: Features,
    experiment: Experiment,
    protocols: Sequence[str],
) -> Score:
    (known, labels), (asked, truth) = bank, test
    num_classes = int(max(labels.max(), truth.max())) + 1
    settings = experiment.evaluation

    def nearest(k: int, temperature: float) -> float:
        votes = knn_scores(known, labels, asked, k, temperature, num_classes)
        return top_k_accuracy(votes, truth)

    def linear() -> float:
        probe = fit_linear(known, labels, num_classes, settings.linear, experiment.seed)
        return top_k_accuracy(probe.logits(asked), truth)

    def logistic_regression() -> float:
        try:
            chosen = sweep_logistic_regression(known, labels, num_classes, experiment.seed)
        except ValueError as error:
            raise DataError(f"logistic_regression: {error}") from error
        return top_k_accuracy(chosen.probe.logits(asked), truth)

    scorers: dict[str, Callable[[], float]] = {
        "knn": lambda: nearest(settings.knn.k, settings.knn.temperature),
        "linear": linear,
        "logistic_regression": logistic_regression,
        "knn_k20": lambda: nearest(SOLO_K, SOLO_TEMPERATURE),
        "knn_k1": lambda: nearest(1, 1.0),
    }
    found: dict[str, Any] = {f"{protocol}_top1": scorers[protocol]() for protocol in protocols}
    return _score(name, asked)._replace(**found)


def _score(name: str, features: Tensor) -> Score:
    if len(features) > LABEL_FREE_ROWS:
        places = torch.linspace(0, len(features) - 1, LABEL_FREE_ROWS).round().long()
        features = features[places]
    return Score(name, None, None, *label_free(features))
