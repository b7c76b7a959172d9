"""What is likely behind a run that does not learn, by its config, its views and its records."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from simclr_ray.config.experiment import Experiment

MOST_EQUAL, MOST_BLANK, MOST_COPIED = 0.9, 0.5, 0.5  # shares of the images; see `ViewFacts`
SHORT, LONG = 0.5, 2.0  # of the weights, against those at the start
SOFT, SHARP = 2.0, 0.02  # temperatures outside of which a loss is hardly one (Table 5: 0.05 to 1)
GROWN_LOSS, GROWN_GRADIENT = 1.2, 10.0  # times the least, and the median, before a divergence
FEW_REPORTS: Final = 3  # of fewer nothing is known before a divergence: it came at once
LEAK_TOP1, LEAK_FRACTION = 0.8, 0.5  # of the batch in training mode; of that in evaluation mode
DEAD_STD: Final = 1e-3  # of z; 0.06 and more 50 steps after warm-up
NO_PAIRS: Final = 0.01  # of the margin


@dataclass(frozen=True)
class Evidence:
    """What is known of a run.

    Attributes:
        experiment: What is run.
        start: Of the model before the first step, and `ViewFacts`; empty without evaluation.
        now: Of the last evaluation, by the same names.
        losses: Means since the report before, of all reports.
        grad_norms: Of the same.
        top1: Contrastive, of the last reports; NaN without.
        is_by_chance: That is no more than random picks would have.
        warmup_steps: As planned.
        step: Of the last record.
    """

    experiment: Experiment
    start: Mapping[str, float]
    now: Mapping[str, float]
    losses: Sequence[float]
    grad_norms: Sequence[float]
    top1: float
    is_by_chance: bool
    warmup_steps: int
    step: int

    @property
    def weight_ratio(self) -> float:
        """Length of the encoder's weights against that at the start; 1 where it is not known."""
        before = self.start.get("weight_norm", 0.0)
        return self.now.get("weight_norm", before) / before if before else 1.0

    @property
    def temperature(self) -> float:
        """τ of the loss; 1 where it has none."""
        return float(getattr(self.experiment.loss, "temperature", 1.0))


def wrong_views(seen: Evidence) -> str:
    """Return what is wrong with the views that a sample of the images gives; else nothing."""
    start = seen.start
    if start.get("blank_views", 0.0) > MOST_BLANK:
        return (
            f"{start['blank_views']:.0%} of the images have two views of one color: the images are "
            "constant (columns.image, data.white), or augment blanks them"
        )
    if start.get("equal_views", 0.0) > MOST_EQUAL:
        return (
            f"the two views of {start['equal_views']:.0%} of the images are identical: augment "
            "changes nothing"
        )
    if start.get("copied_images", 0.0) > MOST_COPIED:
        return (
            f"{start['copied_images']:.0%} of the images have exact duplicates in a batch of "
            f"{seen.experiment.batch_size}, which count as negatives: remove them"
        )
    return ""


def cause_of_collapse(seen: Evidence) -> str:
    """Return the likely cause of a run that learns nothing, and what to change."""
    now, config = seen.now, seen.experiment
    wrong = wrong_views(seen)
    if wrong:
        return wrong
    norm = now.get("weight_norm", 0.0)
    if norm and norm == seen.start.get("weight_norm"):
        return (
            "probably a frozen encoder (requires_grad, or parameters that the optimizer lacks), or "
            f"a learning rate of {config.peak_learning_rate():g} that moves nothing"
        )
    if seen.weight_ratio < SHORT:
        decay = getattr(config.optimizer, "weight_decay", 0.0)
        return (
            f"probably weight decay: optimizer.weight_decay={decay:g} at a rate of "
            f"{config.peak_learning_rate():g} has made the weights {1 / seen.weight_ratio:.3g} "
            "times shorter"
        )
    if seen.temperature < SHARP:
        return _temperature(seen)
    if seen.weight_ratio > LONG:
        return _rate(seen)
    if seen.top1 > LEAK_TOP1 and now.get("pair_top1", 1.0) < LEAK_FRACTION * seen.top1:
        return (
            "probably a leak through batch norm: statistics of few images, in training mode, tell "
            "which views belong together (batch_norm.group_size, or own layers that see the batch)"
        )
    if seen.temperature > SOFT:
        return _temperature(seen)
    if now.get("feature_std_z", 1.0) < DEAD_STD <= now.get("feature_std", 0.0):
        return (
            f"probably the head: z hardly varies ({now['feature_std_z']:.2g}) while h does "
            f"({now['feature_std']:.2g}), so that h gets no gradient (head.*, or own weights)"
        )
    shrinks = now.get("feature_std", 0.0) < seen.start.get("feature_std", 0.0)
    if (seen.is_by_chance or now.get("margin", 1.0) < NO_PAIRS) and not shrinks:
        return (
            "probably pairs that share nothing: augment leaves nothing in common of an image "
            "(min_area, strength), or view b is of other images (data.columns.group)"
        )
    return _rate(seen)


def cause_of_divergence(seen: Evidence) -> str:
    """Return the likely cause of a value that is not finite, and what to change."""
    if seen.temperature < SHARP:
        return _temperature(seen)
    if seen.step and not _has_grown(seen):
        return (
            f"probably a single bad value, of own code or of the hardware, and not the rate: until "
            f"step {seen.step:,} loss ({seen.losses[-1]:.4g}) and gradient "
            f"({seen.grad_norms[-1]:.3g}) were as before"
        )
    return _rate(seen)


def _has_grown(seen: Evidence) -> bool:
    losses = [x for x in seen.losses if math.isfinite(x)]
    lengths = [x for x in seen.grad_norms if math.isfinite(x)]
    if min(len(losses), len(lengths)) < FEW_REPORTS:
        return True
    grew = losses[-1] > GROWN_LOSS * min(losses)
    return (
        grew
        or lengths[-1] > GROWN_GRADIENT * statistics.median(lengths)
        or (seen.weight_ratio > LONG)
    )


def _temperature(seen: Evidence) -> str:
    low = seen.temperature < SHARP
    effect = (
        f"lengthens gradients {1 / seen.temperature:,.0f} times"
        if low
        else "makes all pairs count alike, and gradients short"
    )
    return (
        f"probably the temperature: loss.temperature={seen.temperature:g} {effect} "
        "(the paper tried 0.05 to 1)"
    )


def _rate(seen: Evidence) -> str:
    config = seen.experiment
    longer = f", the weights are {seen.weight_ratio:.3g} times as long as at the start"
    return (
        f"probably the rate: {config.peak_learning_rate():g} after a warm-up of "
        f"{seen.warmup_steps:,} steps{longer if seen.weight_ratio > LONG else ''} (lower "
        "schedule.learning_rate, or lengthen the warm-up)"
    )
