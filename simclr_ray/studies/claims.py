"""The claims of a study, held against what its trials read.

Readings are paired that differ in what the claim names and in nothing else, seed included; a
difference of differences pairs four. Two things are said of the pairs. The sign of each difference
may as well have been the other one, if the claim is wrong: an exact permutation test, which few
pairs cannot make significant. And the differences of each seed are the effect over seeds
(`studies.effects`), with the paper's beside it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from simclr_ray.studies.comparisons import ROWS, Comparison, Side, paper_effect_of, reads_of
from simclr_ray.studies.definition import Study
from simclr_ray.studies.effects import Effect, effect_of
from simclr_ray.studies.readings import Reading, key_of
from simclr_ray.studies.space import is_same

SAMPLES = 100_000  # of sign flips where there are more than all of them; as many as the paper's

DIGITS = 12  # of a difference: (0.3 - 0.2) - (0.2 - 0.1) is none, and not 3e-17 in favor

Group = tuple[Reading, ...]  # two readings of a pair, or four of a difference of differences


class Verdict(NamedTuple):
    """A claim, tested."""

    claim: str
    difference: float  # mean of better - worse, or worse - better where less is better
    deviation: float
    wins: int
    num_pairs: int
    p: float  # two-sided
    smallest_p: float  # that so many pairs could give
    metric: str  # that `better` is read from: of the same unit as the other
    smallest_effect: float  # 0: none is given
    paper_effect: float | None  # in the unit of the paper's rows
    effect: Effect | None  # over the seeds that have all pairs; None where none has

    @property
    def words(self) -> str:
        """What may be said of the claim, no stronger than the seeds allow."""
        if self.effect is not None:
            return self.effect.words
        return "no seed has all of its pairs" if self.num_pairs else "not run yet"


def verdict_of(study: Study, comparison: Comparison, readings: Sequence[Reading]) -> Verdict:
    """Return what pairs of readings say of a claim."""
    reads = reads_of(comparison, study.metric)
    sides = [_readings_at(readings, side, metric) for side, metric, _ in reads]
    groups = [
        tuple(side[key] for side in sides) for key in sides[0] if all(key in side for side in sides)
    ]
    sign = 1 if study.mode == "max" else -1

    def difference(group: Group) -> float:
        parts = zip(reads, group, strict=True)
        total = sum(read.sign * reading.values[read.metric] for read, reading in parts)
        return sign * round(total, DIGITS)

    joined = _apart(groups)
    differences = [statistics.fmean(map(difference, some)) for some in joined]
    num = len(differences)
    paper = paper_effect_of(comparison, study.paper, study.space, study.metric)
    if paper is not None and comparison.paper_effect == ROWS:
        paper *= sign
    return Verdict(
        comparison.claim,
        statistics.fmean(differences) if num else math.nan,
        statistics.stdev(differences) if num > 1 else 0.0,
        sum(d > 0 for d in differences),
        num,
        sign_flip_p(differences) if num else 1.0,
        min(1.0, 2 / 2**num),
        reads[0].metric,
        comparison.smallest_effect,
        paper,
        _effect(joined, differences, comparison),
    )


def _readings_at(readings: Sequence[Reading], side: Side, metric: str) -> dict[str, Reading]:
    """Return the readings of a side that have a metric, by what the side leaves open and seed."""
    return {
        key_of({**{k: v for k, v in r.point.items() if k not in side}, "seed": r.seed}): r
        for r in readings
        if metric in r.values and all(is_same(r.point[k], v) for k, v in side.items())
    }


def _effect(
    joined: Sequence[Sequence[Group]], differences: Sequence[float], comparison: Comparison
) -> Effect | None:
    """Return the effect over seeds: a seed's difference is the mean of its pairs.

    Seeds that lack a pair which others have are left out, as their mean would be of other points.
    """
    seeds: dict[int, list[float]] = {}
    points: dict[int, set[str]] = {}
    for some, value in zip(joined, differences, strict=True):
        seed = some[0][0].seed
        seeds.setdefault(seed, []).append(value)
        points.setdefault(seed, set()).update(key_of(group[0].point) for group in some)
    every = set().union(*points.values())
    whole = [statistics.fmean(values) for seed, values in seeds.items() if points[seed] == every]
    return effect_of(whole, comparison.smallest_effect) if whole else None


def _apart(pairs: Sequence[Group]) -> list[list[Group]]:
    """Return the groups of readings joined where they share a run: each run is one observation."""
    groups: list[tuple[set[str], list[Group]]] = []
    for pair in pairs:
        names = {reading.trial for reading in pair}
        joined = [group for group in groups if group[0] & names]
        groups = [group for group in groups if not group[0] & names]
        groups.append(
            (names.union(*(g[0] for g in joined)), [p for g in joined for p in g[1]] + [pair])
        )
    return [group for _, group in groups]


def sign_flip_p(differences: Sequence[float]) -> float:
    """Return the two-sided p of paired differences by flipping signs: all ways, or 100,000.

    Exact up to 16 pairs, which have 65,536 ways; of more pairs drawn with a fixed seed.
    """
    from scipy.stats import permutation_test  # takes a second that the light verbs do without

    if len(differences) == 1:  # both ways are as far from zero, and scipy wants two pairs
        return 1.0
    result = permutation_test(
        (differences,), np.sum, permutation_type="samples", n_resamples=SAMPLES, rng=0
    )
    return float(result.pvalue)


def verdict_tree(verdict: Verdict) -> dict[str, Any]:
    """Return a verdict as JSON holds it: what is not finite is null, and the words are there."""
    effect = verdict.effect
    tree = verdict._asdict() | {"effect": finite_tree(effect._asdict()) if effect else None}
    return finite_tree(tree) | {"verdict": verdict.words}


def read_verdict(tree: dict[str, Any]) -> Verdict:
    """Return a verdict that `verdict_tree` or an earlier release, without effects, has written."""
    effect = tree.get("effect")
    if effect:
        absent: dict[str, Any] = {
            "low": -math.inf,
            "high": math.inf,
            "deviation": math.nan,
            "power": math.nan,
        }
        effect = Effect(**{k: absent[k] if v is None else v for k, v in effect.items()})
    difference = math.nan if tree["difference"] is None else tree["difference"]
    later: dict[str, Any] = {"metric": "", "smallest_effect": 0.0, "paper_effect": None}
    fields = {k: v for k, v in tree.items() if k in Verdict._fields}
    return Verdict(**later | fields | {"effect": effect or None, "difference": difference})


def finite_tree(tree: dict[str, Any]) -> dict[str, Any]:
    """Return a tree with null for numbers that JSON does not have."""
    endless = {k for k, v in tree.items() if isinstance(v, float) and not math.isfinite(v)}
    return {k: None if k in endless else v for k, v in tree.items()}
