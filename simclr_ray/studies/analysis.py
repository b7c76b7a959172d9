"""What a study found, from its stored outcomes alone: means, spreads, claims, and the paper.

Claims are tested on pairs: two trials that differ in what the claim names and in nothing else, seed
included. The sign of each difference may as well have been the other one, if the claim is wrong;
that gives an exact permutation test. With few seeds it cannot come out significant, which is said.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from simclr_ray.config import Scalar
from simclr_ray.config.metrics import EPOCH_METRICS
from simclr_ray.studies.comparisons import Comparison
from simclr_ray.studies.definition import Study
from simclr_ray.studies.folder import TrialOutcome
from simclr_ray.studies.plan import Point
from simclr_ray.studies.space import is_same, label_of

SAMPLES = 100_000  # of sign flips where there are more than all of them; as many as the paper's


class Reading(NamedTuple):
    """One value: of a point with a seed."""

    trial: str
    point: Point
    seed: int
    value: float
    extra_metrics: dict[str, float]
    cost: dict[str, float]


class Row(NamedTuple):
    """A point over its seeds."""

    point: Point
    mean: float
    deviation: float  # standard, of the sample; 0 for one seed
    num_seeds: int
    extra_metrics: dict[str, float]  # means of the other metrics
    images: float  # mean of one trial
    seconds: float
    device_hours: float
    paper: float | None  # of the setting that it stands for


class Verdict(NamedTuple):
    """A claim, tested."""

    claim: str
    difference: float  # mean of better - worse, or worse - better where less is better
    deviation: float
    wins: int
    num_pairs: int
    p: float  # two-sided
    smallest_p: float  # that so many pairs could give


class Agreement(NamedTuple):
    """How alike the order of our points is to the paper's."""

    tau: float  # Kendall's, in [-1, 1]
    p: float
    num_points: int


class Results(NamedTuple):
    """All that the report shows."""

    study: Study
    rows: list[Row]
    verdicts: list[Verdict]
    agreement: Agreement | None
    others: list[TrialOutcome]  # trials that did not finish, or that finished with a warning
    num_trials: int
    epochs: int
    images: float
    device_hours: float

    @property
    def unfinished(self) -> list[TrialOutcome]:
        """The trials that did not finish."""
        return [outcome for outcome in self.others if outcome.status != "finished"]

    @property
    def best(self) -> Row | None:
        """The best point, of those that finished with all seeds if there are any such."""
        whole = [r for r in self.rows if r.num_seeds == len(self.study.seeds)] or self.rows
        if not whole:
            return None
        choose = max if self.study.mode == "max" else min
        return choose(whole, key=lambda row: row.mean)


def results_of(study: Study, outcomes: Sequence[TrialOutcome]) -> Results:
    """Return the results of the outcomes that there are."""
    readings = [r for outcome in outcomes for r in readings_of(study, outcome)]
    rows = _rows(study, readings)
    return Results(
        study,
        rows,
        [_verdict(study, comparison, readings) for comparison in study.comparisons],
        _agreement(study, rows),
        [o for o in outcomes if o.reason or not readings_of(study, o)],
        len(outcomes),
        sum(max(o.curve, default=0) for o in outcomes),
        sum(o.cost["images"] for o in outcomes),
        sum(o.cost["device_seconds"] for o in outcomes) / 3600,
    )


def best_outcome(results: Results, outcomes: Sequence[TrialOutcome]) -> TrialOutcome:
    """Return the best trial of the best point. There must be one that finished."""
    assert results.best is not None
    study, point = results.study, results.best.point
    candidates = [(r.value, o) for o in outcomes for r in readings_of(study, o) if r.point == point]
    choose = max if study.mode == "max" else min
    return choose(candidates, key=lambda pair: pair[0])[1]


def readings_of(study: Study, outcome: TrialOutcome) -> list[Reading]:
    """Return what a finished trial says: a value for each of its points."""
    readings = []
    trained = max(outcome.curve, default=0)
    for cell in outcome.cells:
        epoch = int(cell["epoch"])
        # of a trunk that collapsed later, the lengths before are what runs of their own would give
        if outcome.status != "finished" and not (
            outcome.status == "collapsed" and 0 < epoch < trained
        ):
            continue
        values = values_at(outcome, epoch)
        if study.metric not in values:
            continue
        extra_metrics = {name: values[name] for name in study.extra_metrics if name in values}
        share = epoch / trained if epoch else 1.0
        cost = {key: share * value for key, value in outcome.cost.items()}
        value = values[study.metric]
        readings.append(
            Reading(outcome.trial, cell["point"], outcome.seed, value, extra_metrics, cost)
        )
    return readings


def values_at(outcome: TrialOutcome, epoch: int = 0) -> dict[str, float]:
    """Return all metrics of a trial after an epoch; 0: at the end, with what is known then."""
    if epoch:
        return outcome.curve.get(epoch, {})
    last = outcome.curve[max(outcome.curve)] if outcome.curve else {}
    return {**last, **outcome.metrics}


def is_fraction(metric: str) -> bool:
    """Return whether a metric is a share, to be shown in per cent."""
    return metric not in EPOCH_METRICS or EPOCH_METRICS[metric].is_fraction


def shown(metric: str, value: float) -> str:
    """Return a value of a metric as text, without its unit."""
    return f"{100 * value:.1f}" if is_fraction(metric) else f"{value:.3f}"


def _rows(study: Study, readings: Sequence[Reading]) -> list[Row]:
    groups: dict[str, list[Reading]] = {}
    for reading in readings:
        groups.setdefault(_key(reading.point), []).append(reading)
    rows = []
    for group in groups.values():
        values = [r.value for r in group]
        names = [n for n in study.extra_metrics if all(n in r.extra_metrics for r in group)]
        rows.append(
            Row(
                group[0].point,
                statistics.fmean(values),
                statistics.stdev(values) if len(values) > 1 else 0.0,
                len(values),
                {n: statistics.fmean(r.extra_metrics[n] for r in group) for n in names},
                statistics.fmean(r.cost["images"] for r in group),
                statistics.fmean(r.cost["seconds"] for r in group),
                statistics.fmean(r.cost["device_seconds"] for r in group) / 3600,
                paper_value(study, group[0].point),
            )
        )
    return sorted(rows, key=lambda row: _place(study, row.point))


def _place(study: Study, point: Point) -> list[tuple[int, float]]:
    """Return where a point stands in the order in which the space lists its values."""
    place = []
    for name, dim in study.space.items():
        listed = [label_of(value) for value in dim.listed]
        value = point.get(name)
        at = listed.index(value) if value in listed else len(listed)
        place.append((at, float(value) if isinstance(value, int | float) else 0.0))
    return place


def paper_value(study: Study, point: Point) -> float | None:
    """Return the paper's value of the setting that a point stands for, or None."""
    paper = study.paper
    wanted = []
    for name in paper.columns:
        if name not in point:
            return None
        like = paper.matches.get(name, {})
        named = (theirs for ours, theirs in like.items() if is_same(ours, point[name]))
        wanted.append(next(named, point[name]))
    for row in paper.rows:
        if all(map(is_same, row[:-1], wanted)):
            return float(row[-1])
    return None


def _agreement(study: Study, rows: Sequence[Row]) -> Agreement | None:
    """Compare orders; what the paper's numbers do not tell apart is averaged."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if row.paper is not None:
            groups.setdefault(_key({k: row.point[k] for k in study.paper.columns}), []).append(row)
    pairs = [(statistics.fmean(r.mean for r in g), g[0].paper) for g in groups.values()]
    if len(pairs) < 3:
        return None
    from scipy.stats import kendalltau  # half a second, of which `study status` needs none

    correlation = kendalltau([a for a, _ in pairs], [b for _, b in pairs])
    if np.isnan(correlation.statistic):
        return None
    return Agreement(float(correlation.statistic), float(correlation.pvalue), len(pairs))


def _verdict(study: Study, comparison: Comparison, readings: Sequence[Reading]) -> Verdict:
    """Return what pairs of trials say of a claim."""
    better, worse = (
        {
            _key({**{k: v for k, v in r.point.items() if k not in side}, "seed": r.seed}): r
            for r in readings
            if all(is_same(r.point[k], v) for k, v in side.items())
        }
        for side in (comparison.better, comparison.worse)
    )
    sign = 1 if study.mode == "max" else -1
    pairs = [(better[key], worse[key]) for key in better if key in worse]
    differences = [
        statistics.fmean(sign * (a.value - b.value) for a, b in group) for group in _apart(pairs)
    ]
    num = len(differences)
    if not num:
        return Verdict(comparison.claim, float("nan"), 0.0, 0, 0, 1.0, 1.0)
    return Verdict(
        comparison.claim,
        statistics.fmean(differences),
        statistics.stdev(differences) if num > 1 else 0.0,
        sum(d > 0 for d in differences),
        num,
        sign_flip_p(differences),
        min(1.0, 2 / 2**num),
    )


def _apart(pairs: Sequence[tuple[Reading, Reading]]) -> list[list[tuple[Reading, Reading]]]:
    """Return the pairs in groups that share no run: each run is one observation."""
    groups: list[tuple[set[str], list[tuple[Reading, Reading]]]] = []
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


def as_json(results: Results) -> str:
    """Return the results as JSON: rows, claims and agreement; what the figure is drawn from."""
    tree = {
        "study": results.study.name,
        "scale": results.study.scale,
        "metric": results.study.metric,
        "rows": [row._asdict() for row in results.rows],
        "claims": [verdict._asdict() for verdict in results.verdicts],
        "agreement": results.agreement._asdict() if results.agreement else None,
        "not_finished": [
            {
                "trial": o.trial,
                "status": o.status,
                "reason": o.reason,
                "epochs": max(o.curve, default=0),
            }
            for o in results.unfinished
        ],
        "epochs": results.epochs,
        "images": results.images,
        "device_hours": results.device_hours,
    }
    return json.dumps(tree, indent=1)


def _key(point: dict[str, Scalar]) -> str:
    return json.dumps(point, sort_keys=True)
