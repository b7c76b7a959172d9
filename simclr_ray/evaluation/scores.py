"""The score table: every row by the same code, so that the baselines are honest.

An encoder's features and raw pixels go through one function: kNN and the linear probe where both
splits have labels, and what needs no labels always. Shares lie in [0, 1].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from simclr_ray.config.experiment import Experiment
from simclr_ray.config.protocols import DEFAULT_PROTOCOLS, PROTOCOLS, protocols_named
from simclr_ray.errors import ConfigError, DataError, DivergedError
from simclr_ray.evaluation.feature_file import FeatureRows, are_finite
from simclr_ray.evaluation.features import Features, Split
from simclr_ray.evaluation.label_free import label_free

# Key of a metric without labels -> heading of its column: the arrow says which way is better.
LABEL_FREE: Final = {
    "uniformity": "uniformity ↓",
    "effective_rank": "effective rank ↑",
    "feature_std": "feature std ↑",
}
CLASSIFIER_TOP1: Final = "classifier_top1"  # of a classifier that belongs to the encoder
LABEL_FREE_ROWS: Final = 5_000  # uniformity costs their square
TRAINED: Final = "trained encoder"
UNTRAINED: Final = "untrained encoder"
PIXELS: Final = "raw pixels"
PIXEL_SIDE_PX: Final = 32  # raw pixels of larger views are averaged down: 3,072 features at most


SplitT = TypeVar("SplitT", Split, Features)


@dataclass(frozen=True)
class Score:
    """One row of the table.

    Attributes:
        name: What was scored.
        uniformity: Of features, as of `label_free`; None where there are too few; so are these two.
        effective_rank: RankMe's.
        feature_std: Of normalised features.
        accuracies: Metric, such as `knn_top1` -> share in [0, 1], of each protocol that was asked
            for; empty without labels.
        num_images: That the accuracies are of; 0: not known, of rows of an earlier release.
    """

    name: str
    uniformity: float | None
    effective_rank: float | None
    feature_std: float | None
    accuracies: Mapping[str, float] = field(default_factory=dict)
    num_images: int = 0

    @property
    def knn_top1(self) -> float | None:
        """Return the accuracy of protocol `knn`, if there is one."""
        return self.accuracies.get("knn_top1")

    @property
    def linear_top1(self) -> float | None:
        """Return the accuracy of protocol `linear`, if there is one."""
        return self.accuracies.get("linear_top1")

    @classmethod
    def from_tree(cls, tree: Mapping[str, Any]) -> Score:
        """Return the row that `as_tree` gave."""
        own = {name: tree[name] for name in ("name", "uniformity", "effective_rank", "feature_std")}
        own["num_images"] = tree.get("num_images", 0)
        rest = {k: float(v) for k, v in tree.items() if k not in own and v is not None}
        return cls(**own, accuracies=rest)

    def as_tree(self) -> dict[str, str | float | None]:
        """Return name and numbers as `scores.json` has them; null for what was not asked for."""
        columns = dict.fromkeys(protocol.metric for protocol in PROTOCOLS)
        free = (self.uniformity, self.effective_rank, self.feature_std)
        return {
            "name": self.name,
            **columns,
            **self.accuracies,
            **dict(zip(LABEL_FREE, free, strict=True)),
            **({"num_images": self.num_images} if self.num_images else {}),
        }

    def numbers(self) -> dict[str, float]:
        """Return the numbers that there are, by name."""
        return {k: v for k, v in self.as_tree().items() if isinstance(v, float)}


def score_features(
    name: str,
    bank: Features,
    test: Features | None,
    experiment: Experiment,
    protocols: Sequence[str] = DEFAULT_PROTOCOLS,
) -> Score:
    """Return the scores of an encoder by its features.

    Args:
        name: what the row is called.
        bank: what kNN and the probe learn from; without `test`, what label-free metrics see.
        test: what is scored, label-free metrics included.
        experiment: settings of the protocols, the precision, and the probe's seed.
        protocols: names of `config.protocols`, or import paths.

    Raises:
        DataError: a protocol was asked for and a split has no labels.
        DivergedError: the encoder gives values that are no numbers.
    """
    for part in (bank, test):
        if part is not None and not are_finite(part.rows):
            raise DivergedError(
                f"{name} gives values that are no numbers: the training has diverged"
            )
    if test is None:
        return _score(name, bank.rows)
    bank, test = scorable(bank, test)
    assert test is not None
    return _evaluate(name, bank, test, experiment, protocols)


def scorable(bank: SplitT, test: SplitT | None) -> tuple[SplitT, SplitT | None]:
    """Return the labelled rows of both splits, or the bank whole when there is nothing to score.

    Raises:
        DataError: There is a test split, and one of the two has no labelled rows.
    """
    if test is None:
        return bank, None
    bank, test = bank.labelled(), test.labelled()
    for kind, part in (("eval_train", bank), ("test", test)):
        if not len(part.labels):
            raise DataError(f"the {kind} split has no labelled rows; nothing can be scored on it")
    return bank, test


class RawPixelEncoder(nn.Module):
    """The pixels themselves, as an encoder: `[m, C, S, S]` in [0, 1] -> `[m, C·min(S, 32)²]`."""

    def forward(self, images: Tensor) -> Tensor:
        """Return the pixels, larger images averaged down."""
        side = min(images.shape[-1], PIXEL_SIDE_PX)
        return F.adaptive_avg_pool2d(images, side).flatten(1)


def table(scores: Sequence[Score]) -> list[list[str]]:
    """Return headings and rows as text: all columns, of protocols the usual and those asked for."""
    metrics, labels = metrics_shown(scores), {p.metric: p.label for p in PROTOCOLS}
    headings = [labels.get(m, m.replace("_top1", " top-1")) for m in metrics]
    return [
        ["features", *headings, *LABEL_FREE.values()],
        *([score.name, *_percentages(score, metrics), *_label_free(score)] for score in scores),
    ]


def metrics_shown(scores: Sequence[Score]) -> list[str]:
    """Return the metrics of the columns with accuracies, in their order: the first is column 1."""
    reported = _metrics_of(scores)
    usual = [protocol.metric for protocol in protocols_named(DEFAULT_PROTOCOLS)]
    builtin = [p.metric for p in PROTOCOLS]
    shown = [metric for metric in builtin if metric in usual or metric in reported]
    return shown + [metric for metric in reported if metric not in builtin]


def short_table(scores: Sequence[Score]) -> list[list[str]]:
    """Return headings and rows for a terminal: accuracies where there are any, else the rest."""
    rows, free = table(scores), len(LABEL_FREE)
    if _metrics_of(scores):
        return [row[:-free] for row in rows]
    return [[row[0], *row[-free:]] for row in rows]


def format_table(scores: Sequence[Score]) -> str:
    """Return the table as aligned Markdown, which reads well in a terminal too."""
    rows = table(scores)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [_line(row, widths) for row in rows]
    rule = [":" + "-" * (w - 1) if i == 0 else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    lines.insert(1, _line(rule, widths))
    return "\n".join(lines) + "\n"


def _metrics_of(scores: Sequence[Score]) -> list[str]:
    return list(dict.fromkeys(metric for score in scores for metric in score.accuracies))


def _percentages(score: Score, metrics: Sequence[str]) -> list[str]:
    values = [score.accuracies.get(metric) for metric in metrics]
    return ["-" if value is None else f"{100 * value:.1f} %" for value in values]


def _label_free(score: Score) -> list[str]:
    values = (score.uniformity, score.effective_rank, score.feature_std)
    digits = (2, 1, 4)
    return ["-" if v is None else f"{v:.{n}f}" for v, n in zip(values, digits, strict=True)]


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
    results = protocol_results(bank, test, experiment, protocols)
    accuracies = {
        metric: result.double().mean().item() if isinstance(result, Tensor) else result
        for metric, result in results.items()
    }
    return replace(_score(name, test.rows), accuracies=accuracies, num_images=len(test.labels))


def protocol_results(
    bank: Features, test: Features, experiment: Experiment, protocols: Sequence[str]
) -> dict[str, Tensor | float]:
    """Return by metric which rows of `test` each protocol names rightly, bool [Q], or their share.

    Raises:
        ConfigError: A protocol is unknown, two have one metric, or one of your own returns
            something else.
    """
    num_classes = int(max(bank.labels.max(), test.labels.max())) + 1
    results: dict[str, Tensor | float] = {}
    for protocol in protocols_named(protocols):
        result = protocol.load()(bank, test, num_classes, experiment)
        is_hits = isinstance(result, Tensor) and result.dtype == torch.bool
        if not (is_hits and result.shape == test.labels.shape) and not (
            isinstance(result, float) and 0 <= result <= 1
        ):
            expected = "expected a float in [0, 1], the share of test rows named rightly"
            raise ConfigError.of(protocol.run, f"returned {result!r}; {expected}")
        results[protocol.metric] = result
    return results


def _score(name: str, features: FeatureRows) -> Score:
    places = torch.arange(len(features))
    if len(features) > LABEL_FREE_ROWS:
        places = torch.linspace(0, len(features) - 1, LABEL_FREE_ROWS).round().long()
    return Score(name, *label_free(features[places]))
